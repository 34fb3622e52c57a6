import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY_RUN, composed, run, write_tiny_data
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from mutation import Check, assert_caught
from test_pipeline import manifest, write_pairs

from selfalign.config.hydra import choices
from selfalign.core.files import read_json
from selfalign.data.mixtures import data_source
from selfalign.launch.experiment import run_experiment
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import stop_ids
from selfalign.report import model_card as card
from selfalign.report.model_card import model_card, write_card
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished
from selfalign.store.key import to_key_json

SECTIONS = ["Use", "Method", "Data", "Results", "Limits", "Lineage", "Reproduction"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = (
    "`x` ``y`` |\n\n# Injected\n<img src=x onerror=alert(1)> [a](http://evil.example) **b** ```\n</details>\n---\n"
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of the loop with all weights trained; the answers cross a bound."""
    root = tmp_path_factory.mktemp("full")
    return run(root / "outputs", *TINY_RUN, *write_tiny_data(root / "data"), "evaluate.bounds.max_length_growth=0")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_policy: PolicyCheckpoint) -> Iterator[Path]:
    """An adapter, aligned on given pairs, for a model of the hub that states its licence; nothing is evaluated."""
    root = tmp_path_factory.mktemp("adapter")
    with on_hub(tiny_policy, "license: apache-2.0\nlanguage: en"):
        yield run(
            root / "outputs",
            *("model=pretrained", "model.path=maker/tiny", "model.lora.rank=2", "tracker=none", "name=bare"),
            *("data=pairs", f"data.path={write_pairs(root / 'pairs.jsonl')}", "iterations=1", "evaluate=none"),
            *(
                "data.seed_data.demonstrations=''",
                "data.seed_data.ranked=''",
                "loss=sr_ipo",
                "loss.lambda_scale=derived",
            ),
            *("train.align.dtype=float32", "engine.dtype=float32", "train.align.learning_rate=0.1"),
        )


@contextmanager
def on_hub(policy: PolicyCheckpoint, front_matter: str) -> Iterator[None]:
    """The policy in the hub's cache, as maker/tiny."""
    place = Path(constants.HF_HUB_CACHE) / "models--maker--tiny"
    snapshot = place / "snapshots" / COMMIT
    for part in ("weights", "tokenizer"):
        shutil.copytree(policy.path / part, snapshot, dirs_exist_ok=True)
    (snapshot / "README.md").write_text(f"---\n{front_matter}\n---\n# tiny\n")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    yield
    shutil.rmtree(place)


def written(folder: Path) -> ModelCard:
    """A run's card as the hub's library reads it."""
    return ModelCard(model_card(Finished.load(folder)))


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def table(text: str) -> list[list[str]]:
    """The cells of the first table of a text."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    rows: list[list[str]] = []
    for token, inside in pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append("".join(leaf.content for leaf in inside.children or []))
        elif token.type == "table_close":
            break
    return rows


# --- metadata ----------------------------------------------------------------------------------------------------


def test_metadata_hold_the_last_model_s_numbers(full: Path) -> None:
    run = Finished.load(full)
    last = run.models[-1]
    last["instrument/head_to_head/passed"] = 0
    blind = {result.metric_type for result in ModelCard(model_card(run)).data.eval_results}
    assert not {"eval/win_rate", "eval/win_rate_length_controlled"} & blind
    last["instrument/head_to_head/passed"] = 1
    found = {result.metric_type: result for result in ModelCard(model_card(run)).data.eval_results}
    assert {"eval/win_rate", "eval/win_rate_length_controlled", "judge_quality/pairwise_accuracy"} <= found.keys()
    for key, result in found.items():
        assert result.metric_value == last[key]
        ends = {end: last[f"{key}_{end}"] for end in ("low", "high") if f"{key}_{end}" in last}
        assert (result.metric_args or {}) == ({"confidence": 0.95, **ends} if ends else {})
        assert result.dataset_name == ("asked" if key.startswith("eval/") else "ranked") + ".jsonl"
    assert found["eval/win_rate"].metric_args["low"] < found["eval/win_rate"].metric_args["high"]


def test_metadata_say_what_kind_of_model_it_is(full: Path, adapter: Path) -> None:
    data = written(full).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "tiny M3")
    assert data.tags == ["selfalign", "sr-dpo"]
    assert (data.base_model, data.license, data.datasets) == (None, None, None)
    data = written(adapter).data
    assert (data.library_name, data.base_model, data.license) == ("peft", "maker/tiny", "apache-2.0")
    assert data.tags == ["selfalign", "sr-ipo", "lora"]


def test_run_without_evaluation_has_no_results_in_its_metadata(adapter: Path) -> None:
    assert "model-index" not in written(adapter).data.to_dict()
    assert "No answers were compared" in section(written(adapter).text, "Limits")


@pytest.mark.parametrize("front_matter", ["tags: [a]", "license: [a, b]", "- a list", "a: b: c", "license: {x: 1}"])
def test_licence_that_is_not_stated_stays_unset(
    adapter: Path, tiny_policy: PolicyCheckpoint, front_matter: str
) -> None:
    readme = (adapter / "artifacts/M0/weights/README.md").resolve()
    before = readme.read_text()
    readme.write_text(f"---\n{front_matter}\n---\n")
    try:
        assert written(adapter).data.license is None
        assert "stated by M0's files: none" in written(adapter).text
    finally:
        readme.write_text(before)


def test_data_sets_of_the_hub_are_named_and_files_are_not(full: Path) -> None:
    run = Finished.load(full)
    inputs = run.inputs(Label.input("seeds"))
    at, file = f"owner/set@{COMMIT}:train", inputs["contents"][1]
    mixture = data_source(["owner/set:train", "own.jsonl"], "k")
    hub = {**inputs, "contents": [[at, file], file]}
    hub["config"] = {**inputs["config"], "demonstrations": to_key_json(mixture)}

    class OnHub(Finished):
        def inputs(self, label: Label) -> dict[str, Any]:
            return hub if label == Label.input("seeds") else run.inputs(label)

    found = ModelCard(model_card(OnHub.load(full)))
    assert found.data.datasets == ["owner/set"]
    assert f"Demonstrations: `owner/set:train`, hub data set `{at}`" in found.text
    assert f"Demonstrations: `own.jsonl`, SHA-256 `{file}`" in found.text


# --- text --------------------------------------------------------------------------------------------------------


def test_card_is_written_with_the_run_and_again_with_the_same_bytes(full: Path) -> None:
    before = (full / "model_card.md").read_bytes()
    assert ModelCard.load(full / "model_card.md").data.model_name == "tiny M3"
    write_card(full)
    assert (full / "model_card.md").read_bytes() == before


def test_table_of_results_holds_the_summary_s_numbers(full: Path) -> None:
    head, *rows = table(section(written(full).text, "Results"))
    models = read_json(full / "summary.json")["models"]
    assert head == ["model", "M1", "M2", "M3", "meaning"]
    cells = {name: values for name, *values, _ in rows}
    for name, key in (
        ("win rate vs\u00a0M1", "eval/win_rate"),
        ("judge accuracy", "judge_quality/pairwise_accuracy"),
    ):
        for cell, row in zip(cells[name], models, strict=True):
            numbers = [row[f"{key}{end}"] for end in ("", "_low", "_high") if f"{key}{end}" in row]
            assert [int(shown) for shown in re.findall(r"\d+", cell)] == [round(100 * number) for number in numbers]
    assert [float(cell.replace("\u2212", "-").split()[0]) for cell in cells["reward margin"][1:]] == [
        pytest.approx(row["rewards/margins"], abs=5e-4) for row in models[1:]
    ]
    assert cells["trained on"][1:] == [f"{row['pairs']} pair{'s' * (row['pairs'] != 1)}" for row in models[1:]]


def test_lineage_leads_from_m0_to_the_last_model_by_digests(full: Path) -> None:
    head, *rows = table(section(written(full).text, "Lineage"))
    told = read_json(full / "provenance.json")
    lines = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert {name: line["weights, SHA-256"] for name, line in lines.items()} == told["weights"]
    assert {name: line["made by"] for name, line in lines.items()} == {n: told["artifacts"][n] for n in told["weights"]}
    assert [(name, line["from"], line["reference"], line["trained on"]) for name, line in lines.items()] == [
        ("M0", "–", "–", "–"),
        ("M1", "M0", "–", "seeds"),
        ("M2", "M1", "M1", "iteration_1/pairs"),
        ("M3", "M2", "M2", "iteration_2/pairs"),
    ]
    for name in ("M2", "M3"):
        assert lines[name]["its content, SHA-256"] == manifest(full, lines[name]["trained on"])["digest"]


def test_lineage_of_an_adapter_on_given_pairs_starts_at_m0(adapter: Path) -> None:
    _, _, m2 = table(section(written(adapter).text, "Lineage"))
    assert (m2[0], m2[3], m2[4], m2[5]) == ("M2", "M0", "M0", "iteration_1/pairs")
    assert m2[1] == read_json(adapter / "provenance.json")["weights"]["M2"]


def test_method_tells_loss_reference_judge_and_iterations(full: Path, adapter: Path) -> None:
    said = section(written(full).text, "Method")
    assert "the model's own pairs (arXiv 2401.10020), 2 iterations" in said
    assert "Sr-DPO, `−log σ(β h − λ ⊥Δ)`; `SrDPO`, beta `0.1`, lam `0.5`" in said
    assert "π_ref: the previous model" in said
    assert "Judge: `ExpectedScore`, " in said
    assert re.search(r"Judge: .*model `self`", said)
    assert re.search(r"Judge: .*min_score `0`, max_score `5`", said)
    assert "Pair rule: `BestWorst`" in said
    said = section(written(adapter).text, "Method")
    assert "Method: given pairs, 1 iteration" in said
    assert "Sr-IPO, `(h − (λ/β) ⊥Δ − 1/(2β))²`" in said
    assert "Judge: none" in said
    assert "Pair rule" not in said


def test_data_are_identified_and_what_was_dropped_is_counted(full: Path, adapter: Path) -> None:
    said, summary = section(written(full).text, "Data"), read_json(full / "summary.json")
    for name in ("ift", "ranked", "asked"):
        file = full.parents[1] / "data" / f"{name}.jsonl"
        assert f"`{file}`, SHA-256 `{hashlib.sha256(file.read_bytes()).hexdigest()}`" in said
    assert summary["drops"]
    for label, reasons in summary["drops"].items():
        line = next(line for line in said.splitlines() if line.startswith(f"- Dropped in {label}: "))
        assert [int(count) for count in re.findall(r"\d+(?= [a-z])", line.split(": ")[1])] == [
            *filter(None, reasons.values())
        ]
    head, *rows = table(said)
    pairs = [manifest(full, f"iteration_{n}/pairs")["counts"]["pairs"] for n in (1, 2)]
    assert head == ["iteration", "1", "2", "meaning"]
    assert next(row for row in rows if row[0] == "pairs")[1:3] == [str(count) for count in pairs]
    said = section(written(adapter).text, "Data")
    assert f"M0: `maker/tiny`, on the hub `maker/tiny` at commit `{COMMIT}`" in said
    assert "Licence stated by M0's files: `apache-2.0`" in said
    assert "Dropped in iteration_1/pairs: 1 identical" in said


def test_limits_tell_what_the_numbers_do_not_show(full: Path) -> None:
    said = section(written(full).text, "Limits")
    assert "compared head to head by M1 and scored by M1, not by people; this judge is a model of the run" in said
    assert "A share of 3 instructions is uncertain by up to ±57 percentage points" in said
    assert "judged its own training data" in said
    assert "Warning: metrics outside their bounds" in said
    growth = read_json(full / "summary.json")["models"][-1]["bound_violated/max_length_growth"]
    assert f"M3: max length growth {growth:.3g}" in said


def test_uncertainty_is_that_of_the_instructions_with_a_verdict(full: Path) -> None:
    """The judge's text about one of the three could not be read."""
    run = Finished.load(full)
    run.models[-1] |= {"eval/wins": 1, "eval/ties": 1, "eval/losses": 0}
    said = section(ModelCard(model_card(run)).text, "Limits")
    assert "A share of 2 instructions is uncertain by up to ±70 percentage points" in said


def test_server_that_judged_is_named_and_its_name_stays_text(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, inputs = Finished.load(full), Finished.inputs
    server = {"endpoint": {"base_url": "http://there/v1", "model": "*big* <model>"}}

    def of_server(run: Finished, label: Label) -> dict[str, Any]:
        found = inputs(run, label)
        return {**found, "judge": found["judge"] | server} if found.get("judge") else found

    assert "Each model judged its own training data" in ModelCard(model_card(run)).text
    monkeypatch.setattr(Finished, "inputs", of_server)
    run.config["evaluate"]["head_to_head"] = None
    run.config["judge"] |= server
    text = ModelCard(model_card(run)).text
    assert "Answers were scored by `*big* <model>`, not by people. A share" in section(text, "Limits")
    assert ", scored by *big* &lt;model&gt;. The seed" in section(text, "Method")
    assert run.config["judge"]["model"] == "self"
    assert "Each model judged its own training data" not in text


def test_reproduction_tells_version_commit_command_and_configuration(full: Path) -> None:
    said, told = section(written(full).text, "Reproduction"), read_json(full / "provenance.json")
    assert told["commit"] in said
    assert f"selfalign {told['packages']['selfalign']}" in said
    assert " ".join(told["command"]) in said
    assert (full / "config.yaml").read_text().strip() in said


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_said_code_loads_the_model(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = request.getfixturevalue(kind)
    monkeypatch.chdir(folder.parent)
    found = re.search(r"```python\n(.*?)```", section(written(folder).text, "Use"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    policy = PolicyCheckpoint(folder / "artifacts" / ("M3" if kind == "full" else "M2")).load("float32", device="cpu")
    ids = names["tokenizer"]("Tell me about bees.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, logits = policy.model(ids).logits, names["model"].eval()(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    ends = names["model"].generation_config.eos_token_id
    assert (ends if isinstance(ends, list) else [ends]) == stop_ids(policy.tokenizer)


def test_what_a_user_wrote_stays_text(
    full: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("hostile")
    data = write_tiny_data(root)
    (root / "ift.jsonl").rename(root / "a`b``c |\n\n# Injected <img src=x onerror=1> *d* [e](f).jsonl")
    config, text, plain = composed(*TINY_RUN, *data, f"output_dir={full.parent}", "name='λ_x'")
    named = str(next(root.glob("a*")))
    config.data.seed_data.demonstrations = plain["data"]["seed_data"]["demonstrations"] = named
    monkeypatch.setattr("sys.argv", ["selfalign", HOSTILE])
    plain["model"]["path"] = HOSTILE
    folder = run_experiment(config, text + HOSTILE, {**plain, "choices": choices(config)})
    found = ModelCard.load(folder / "model_card.md")
    assert found.data.model_name == "λ_x M3"
    tokens = MarkdownIt("commonmark").enable("table").parse(found.text)
    headings = [inside.content for token, inside in pairwise(tokens) if token.type == "heading_open"]
    assert headings == ["`λ_x M3`", *SECTIONS]
    leaves = [leaf for token in tokens for leaf in (token.children or [token])]
    assert not {leaf.type for leaf in leaves} & {"html_inline", "link_open", "image", "strong_open"}
    tags = {tag for leaf in leaves if leaf.type == "html_block" for tag in re.findall(r"<\W*(\w+)", leaf.content)}
    assert tags == {"p", "b", "details", "summary", "code"}
    code = [leaf.content for leaf in leaves if leaf.type in ("code_inline", "fence")]
    assert " ".join(named.split()) in code
    assert " ".join(HOSTILE.split()) in code
    assert sum("# Injected" in block for block in code) >= 4


# --- mutants -----------------------------------------------------------------------------------------------------

NUMBERS = test_metadata_hold_the_last_model_s_numbers
KIND = test_metadata_say_what_kind_of_model_it_is
RESULTS = test_table_of_results_holds_the_summary_s_numbers
LINEAGE = test_lineage_leads_from_m0_to_the_last_model_by_digests
METHOD = test_method_tells_loss_reference_judge_and_iterations
DATA = test_data_are_identified_and_what_was_dropped_is_counted
LIMITS = test_limits_tell_what_the_numbers_do_not_show
LOADING = test_said_code_loads_the_model
MUTANTS = [
    ("numbers of M1", "row, places = run.models[-1]", "row, places = run.models[0]", NUMBERS),
    ("no intervals", 'ends = {end: row[f"{key}_{end}"]', "ends = {end: row[key]", NUMBERS),
    ("adapter as whole model", '"peft" if lora else', '"transformers" if lora else', KIND),
    ("made-up licence", "(stated or {}).get(key)", '"mit"', KIND),
    (
        "all from one base",
        'label_of(inputs.get("policy")), reference',
        'label_of(inputs.get("base")), reference',
        LINEAGE,
    ),
    ("no pairs", 'inputs.get("pairs") or inputs.get("demonstrations")', 'inputs.get("demonstrations")', LINEAGE),
    (
        "stored reference",
        'if reference and run.stages.get(reference) == "reference_logprobs":',
        "if False:",
        LINEAGE,
    ),
    ("file as hub data", "return name if at else", "return name if name else", DATA),
    ("too sure", "98 / math.sqrt(answers)", "98 / answers", LIMITS),
    ("silent drift", "{html(warnings(run))}", "", LIMITS),
    ("base for adapter", "model = PeftModel.from_pretrained(base, {place('adapter')})", "model = base", LOADING),
    ("one model's row", '**row, "trained_on"', '**run.models[-1], "trained_on"', RESULTS),
]


@pytest.mark.parametrize(("old", "new", "check"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutant_is_caught(
    old: str,
    new: str,
    check: Check,
    full: Path,
    adapter: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"full": full, "adapter": adapter, "kind": "adapter", "request": request, "monkeypatch": monkeypatch}
    assert_caught(card, sys.modules[__name__], old, new, check, given)
