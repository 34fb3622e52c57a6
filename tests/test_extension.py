"""Components from outside: a user's folder and an installed package bring a loss, a judge, a pair rule, a schema."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from builders import ROOT, TINY_RUN, Said, write_tiny_data

from selfalign.cli.environment import conf_folder
from selfalign.cli.errors import explain
from selfalign.config import extensions
from selfalign.config.hydra import compose_experiment
from selfalign.config.overrides import check_recorded
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Judgement, PreferencePair, Response
from selfalign.launch.dry_run import dry_run
from selfalign.launch.evaluate import evaluate_models
from selfalign.losses.logps import PairLogps
from selfalign.losses.preference import DPO
from selfalign.store import source_code as code
from selfalign.store.key import to_key_json

EXAMPLES = ROOT / "docs/examples"
PACKAGE = "selfalign_example"


@pytest.fixture(autouse=True)
def _nothing_stays_imported() -> Iterator[None]:
    """Packages of one test are another's elsewhere."""
    path = list(sys.path)
    forget()
    yield
    sys.path[:] = path
    forget()


def forget() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in (PACKAGE, "mine", "theirs", "made_up"):
            del sys.modules[name]
    for cached in (extensions.installed_folders, code.source_code, code._digest):
        cached.cache_clear()


def outside(cwd: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """The command in another folder and process, where Python itself does not look into the current folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [path])])}
    return warm.run(
        [sys.executable, "-P", "-m", "selfalign", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def installed(site: Path, conf: str = f"{PACKAGE}.conf") -> Path:
    """The example as `pip install` leaves it."""
    shutil.copytree(EXAMPLES / PACKAGE, site / PACKAGE)
    told = site / f"{PACKAGE}-0.1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: selfalign-example\nVersion: 0.1.0\n")
    (told / "RECORD").write_text(f"{PACKAGE}/__init__.py,,\n")
    (told / "entry_points.txt").write_text(f"[selfalign.conf]\nexample = {conf}\n")
    return site


def jobs(output: Path) -> list[Path]:
    """The run folders of the only sweep."""
    [listed] = output.glob("sweeps/*/jobs.json")
    return [(listed.parent / job["folder"]).resolve() for job in read_json(listed)]


def made(folder: Path, label: str, kind: Any, file: str) -> list[Any]:
    return read_records(folder / "artifacts" / label / file, kind)


# --- both ways, to the end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the example, and a sweep that was run there with --config-dir."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(EXAMPLES / PACKAGE, folder / PACKAGE)
    zero = "defaults:\n  - robust_dpo\n  - _self_\n\nepsilon: 0\n"
    (folder / PACKAGE / "conf/loss/robust_dpo_zero.yaml").write_text(zero)
    said = outside(
        folder, "-m", "--config-dir", f"{PACKAGE}/conf", "experiment=example", *TINY_RUN[1:], "iterations=1",
        "loss=robust_dpo_zero,dpo", *write_tiny_data(folder / "data"), "output_dir=outputs",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return folder


def test_own_loss_trains_what_the_built_in_trains_where_the_two_are_equal(swept: Path) -> None:
    own, built_in = jobs(swept / "outputs")
    weights = [read_json(job / "provenance.json")["weights"]["M2"] for job in (own, built_in)]
    assert weights[0] == weights[1]
    stages = [read_json(job / "provenance.json")["artifacts"]["M2"] for job in (own, built_in)]
    assert stages[0] != stages[1], "found under the key of another loss"


def test_own_judge_and_own_pair_rule_do_what_they_say(swept: Path) -> None:
    own, _ = jobs(swept / "outputs")
    responses = {r.id: r for r in made(own, "iteration_1/responses", Response, "responses.jsonl")}
    judgements = made(own, "iteration_1/judgements", Judgement, "judgements.jsonl")
    assert len(judgements) == len(responses) == 9
    scores = {j.response_id: j.score for j in judgements}
    assert scores == {name: max(0, 5 - len(r.text.split()) / 4) for name, r in responses.items()}
    pairs = made(own, "iteration_1/pairs", PreferencePair, "pairs.jsonl")
    assert pairs
    for pair in pairs:
        family = sorted(scores[name] for name, r in responses.items() if r.instruction_id == pair.instruction_id)
        assert (pair.chosen_score, pair.rejected_score) == (family[-1], family[1])


def test_report_card_and_provenance_name_what_came_from_outside(swept: Path) -> None:
    own, built_in = jobs(swept / "outputs")
    report, card = (own / "report.html").read_text(), (own / "model_card.md").read_text()
    assert "<b>robust DPO</b> (β = 0.1; reference: the previous model)" in report
    assert "Brevity judged" in report
    assert "BestMedian made the pairs" in report
    assert "- Loss of a pair: robust DPO, `((1−ε)" in card
    assert "epsilon `0.0`" in card
    assert "--config-dir selfalign_example/conf" in card
    packages = [read_json(job / "provenance.json")["packages"][PACKAGE] for job in (own, built_in)]
    assert packages[0] == packages[1]
    assert packages[0] in report
    [digest] = read_json(own / "artifacts/M2/manifest.json")["inputs"]["loss"]["source code"].values()
    assert packages[0] == f"(source code {digest})"


def test_run_with_own_components_is_measured_with_its_folder_and_makes_nothing_again(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(swept)
    own, _ = jobs(swept / "outputs")
    before = sorted((swept / "outputs/store").glob("*/*/manifest.json"))
    with pytest.raises(Exception, match="Could not find 'experiment/example'"):
        evaluate_models([str(own)], [], conf_folder())
    folder = evaluate_models([str(own)], [], conf_folder(), swept / PACKAGE / "conf")
    summary = read_json(folder / "summary.json")
    assert [row["model"] for row in summary["models"]] == ["M1", "M2"]
    assert sorted((swept / "outputs/store").glob("*/*/manifest.json")) == before


def test_run_with_own_components_has_a_dry_run(
    swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(swept)
    [_, ranked, *_] = write_tiny_data(swept / "data")
    (swept / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in VOTES))
    asked = ["data=votes", "data.path=votes.jsonl", "data.seed_data.demonstrations=''", ranked, "iterations=1"]
    unused = ["pair=best_worst", "evaluate=none"]
    config, _, _ = compose_experiment(conf_folder(), ["experiment=example", *asked, *unused], swept / PACKAGE / "conf")
    dry_run(config)
    stages = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert {"evaluation_M2/ranked_scores", "M2"} <= set(stages)


VOTES = [
    {"task": "Name a tree.", "a": "An oak.", "b": "A fish.", "votes_a": 5, "votes_b": 1},
    {"task": "Name a fish.", "a": "An oak.", "b": "A carp.", "votes_a": 0, "votes_b": 4},
    {"task": "Name a bird.", "a": "A wren.", "b": "An owl.", "votes_a": 3, "votes_b": 2},
    {"prompt": "Name a stone.", "chosen": "Flint.", "rejected": "Butter."},
]


def test_installed_package_is_there_without_any_option(tmp_path: Path) -> None:
    site, cwd = installed(tmp_path / "site"), tmp_path / "empty"
    cwd.mkdir()
    (cwd / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in VOTES))
    said = outside(
        cwd, "experiment=smoke", "name=tiny", "data=votes", "data.path=votes.jsonl", "iterations=1", "evaluate=none",
        "data.seed_data.demonstrations=''", "data.seed_data.ranked=''", "loss=robust_dpo", "loss.epsilon=0.2",
        "train.align.dtype=float32", path=str(site),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    [folder] = cwd.glob("outputs/tiny-*")
    pairs = made(folder, "iteration_1/pairs", PreferencePair, "pairs.jsonl")
    assert [(p.chosen, p.rejected) for p in pairs] == [
        ("An oak.", "A fish."), ("A carp.", "An oak."), ("Flint.", "Butter."),
    ]  # fmt: skip
    assert read_json(folder / "artifacts/iteration_1/pairs/manifest.json")["counts"]["dropped"] == {"schema": 1}
    told = read_json(folder / "artifacts/M2/manifest.json")["inputs"]["loss"]
    assert (told["class"], told["epsilon"]) == ("RobustDPO", 0.2)
    assert read_json(folder / "provenance.json")["packages"][PACKAGE].startswith("0.1.0 (source code ")


# --- what is found, and what is said of what is not ----------------------------------------------------------------


def test_options_of_an_installed_package_are_listed(
    tmp_path: Path, call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = str(installed(tmp_path / "site"))
    monkeypatch.syspath_prepend(site)
    said = call("experiment=smoke", "loss=robust_dop")
    assert said.err.startswith(
        "error: no loss=robust_dop; did you mean loss=robust_dpo? There are: alpha_dpo, dpo, ipo, "
    )
    assert "robust_dpo" in call("--help").out
    assert "selfalign-example" in outside(tmp_path, "experiment=smoke", "--info", "searchpath", path=site).stdout
    assert PACKAGE not in sys.modules, "a package is imported because an option of it is chosen"


def test_option_whose_name_is_taken_is_said(
    tmp_path: Path, call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = installed(tmp_path / "site")
    shutil.copy(conf_folder() / "loss/ipo.yaml", site / PACKAGE / "conf/loss/dpo.yaml")
    monkeypatch.syspath_prepend(str(site))
    (tmp_path / "own/loss").mkdir(parents=True)
    shutil.copy(conf_folder() / "loss/ipo.yaml", tmp_path / "own/loss/robust_dpo.yaml")
    said = call("experiment=smoke", "--config-dir", "own")
    assert said.err == (
        "error: --config-dir own: an option loss/robust_dpo exists already and would be used: rename yours\n"
    )
    assert call("experiment=smoke", "--config-dir", "nowhere").err == "error: --config-dir nowhere: no such folder\n"
    caplog.clear()
    assert call("experiment=smoke", "loss=dpo", "--cfg", "job").code == 0
    assert caplog.messages == [
        "selfalign-example: its options loss/dpo are not used, because options of these names exist already"
    ]


def test_options_of_an_own_folder_are_listed(call: Callable[..., Said]) -> None:
    conf = str(EXAMPLES / PACKAGE / "conf")
    assert "robust_dpo" in call("--help", "--config-dir", conf).out
    assert "robust_dpo" not in call("--help").out


@pytest.mark.parametrize("conf", [f"{PACKAGE}.config", "no_package.conf", "not a name"])
def test_entry_point_without_a_folder_harms_nobody(
    tmp_path: Path,
    call: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    conf: str,
) -> None:
    monkeypatch.syspath_prepend(str(installed(tmp_path / "site", conf)))
    assert call("experiment=smoke", "--cfg", "job").code == 0
    assert caplog.messages == [
        f"selfalign-example: its entry point example = {conf} in selfalign.conf is no folder of an installed "
        "package; its options are left out"
    ]


def test_broken_package_harms_those_alone_who_choose_it(
    tmp_path: Path, call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = installed(tmp_path / "site")
    (site / PACKAGE / "__init__.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(site))
    assert call("experiment=smoke", "--cfg", "job").code == 0
    said = call("experiment=smoke", "loss=robust_dpo", "--cfg", "job")
    assert said.code == 1
    assert said.err == "error: cannot import selfalign_example.losses: ZeroDivisionError: division by zero\n"


LOSS = (
    "from dataclasses import dataclass\nfrom typing import ClassVar\n@dataclass(kw_only=True)\nclass Mine:\n"
    "    title: ClassVar[str] = 'Mine'\n    formula: ClassVar[str] = 'h'\n    pairwise: ClassVar[bool] = True\n"
    "    offset: ClassVar[str] = 'none'\n    beta: float = 0.1\n"
)
CALL = "    def __call__(self, policy, reference, refinement=None):\n        return policy.chosen - reference.chosen\n"
RULE = "from dataclasses import dataclass\nfrom selfalign.data.pair_rules import PairRule\n@dataclass(kw_only=True)\n"
WRONG = {
    "no module": ("", "nowhere.Mine", "no module nowhere; it is looked for among installed packages, on PYTHONPATH"),
    "no module inside": (LOSS, "mine.losses.Mine", "no module mine.losses"),
    "module that lacks another": ("import nowhere_else\n", "mine.Mine", "cannot import mine: No module named 'nowhere"),
    "module that fails": ("raise OSError('no\\ndisk')\n", "mine.Mine", "cannot import mine: OSError: no disk"),
    "module that is none": ("class:\n", "mine.Mine", r"cannot import mine: SyntaxError: .*mine.py, line 1"),
    "no class": (LOSS + CALL, "mine.Mien", r"mine \(.*mine.py\) has no class Mien; did you mean mine.Mine\?"),
    "no class at all": (LOSS + CALL, "mine.dataclass", r"mine \(.*mine.py\) has no class dataclass"),
    "no dataclass": ("class Mine:\n    pass\n", "mine.Mine", "mine.Mine must be a dataclass, because its fields are"),
    "frozen": (LOSS.replace("kw_only", "frozen") + CALL, "mine.Mine", "mine.Mine is a frozen dataclass"),
    "no loss": (LOSS, "mine.Mine", r"loss: mine.Mine lacks __call__, which selfalign.losses.protocol.PreferenceLoss"),
    "no loss at all": (RULE + "class Mine:\n    pass\n", "mine.Mine", "loss: mine.Mine lacks beta, __call__, title, "),
    "type that no setting has": (LOSS + "    at: complex = 0j\n" + CALL, "mine.Mine", "mine.Mine: .*complex"),
    "default of another type": (LOSS + "    at: int = 'x'\n" + CALL, "mine.Mine", "mine.Mine: Value 'x' of type 'str'"),
}  # fmt: skip


@pytest.mark.parametrize(("module", "name", "said"), WRONG.values(), ids=WRONG)
def test_class_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, said: str
) -> None:
    with pytest.raises(SelfalignError, match=f"^{said}") as caught:
        compose_own(tmp_path, monkeypatch, module, {"loss/mine": name}, "loss=mine")
    assert "\n" not in str(caught.value)


def compose_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, options: dict[str, str], *overrides: str
) -> Any:
    """The smoke experiment with options of a folder, and a module `mine` in the current one."""
    monkeypatch.chdir(folder)
    (folder / "mine.py").write_text(module)
    for option, name in options.items():
        place = folder / "conf" / f"{option}.yaml"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"defaults:\n  - /schema/{name}@_here_\n  - _self_\n" if name else "beta: 1\n")
    return compose_experiment(conf_folder(), ["experiment=smoke", *overrides], folder / "conf")[0]


def test_other_groups_are_held_to_what_they_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULE + "class Mine(PairRule):\n    def wanted(self, responses):\n        return 1\n"
    with pytest.raises(SelfalignError, match=r"^mine.Mine does not define what its base requires: pick$"):
        compose_own(tmp_path, monkeypatch, rule, {"pair/mine": "mine.Mine"}, "pair=mine")
    for group, said in {
        "pair": r"must be a selfalign.data.pair_rules.PairRule$",
        "data": r"must be a selfalign.config.data.SelfRewarding$",
        "judge": r"lacks max_failure_rate, degeneracy, .* which selfalign.judges.protocol.Judge requires$",
        "engine": r"lacks dtype, load, load_scorer, which selfalign.engines.protocol.Engine requires$",
    }.items():
        forget()
        with pytest.raises(SelfalignError, match=rf"^{group}: mine.Mine {said}"):
            compose_own(tmp_path, monkeypatch, LOSS + CALL, {f"{group}/mine": "mine.Mine"}, f"{group}=mine")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            "mine",
            r"^tracker\.mine: mine\.Mine lacks check_installed, open, which .*Tracking requires$",
        ),
        ("_here_", r"^tracker: begin its option's defaults with /schema/MODULE\.CLASS@NAME, not @_here_$"),
    ],
)
def test_tracker_is_held_to_what_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOSS + CALL)
    option = tmp_path / "conf" / "tracker" / "mine.yaml"
    option.parent.mkdir(parents=True)
    option.write_text(f"defaults:\n  - /schema/mine.Mine@{place}\n  - _self_\n")
    with pytest.raises(SelfalignError, match=said):
        compose_experiment(conf_folder(), ["experiment=smoke", "tracker=mine"], tmp_path / "conf")


def test_option_that_names_no_class_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SelfalignError, match=r"^loss: its option names no class\. Begin the option's defaults with /schema/MOD"
    ):
        compose_own(tmp_path, monkeypatch, "", {"loss/mine": ""}, "loss=mine")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.bata=1", r"no loss\.bata; did you mean loss\.beta\?"),
        ("loss.beta=high", r"cannot set loss\.beta=high: Value 'high' of type 'str' could not be converted to Float"),
        ("+loss.more=1", r"no loss\.more; loss has beta"),
    ],
)
def test_keys_and_types_are_those_of_the_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    with pytest.raises(Exception) as caught:
        compose_own(tmp_path, monkeypatch, LOSS + CALL, {"loss/mine": "mine.Mine"}, "loss=mine", override)
    assert (explain(caught.value) or "").startswith(said.replace("\\", ""))


def test_judge_without_a_form_of_answers_is_not_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SelfalignError, match=r"^the judge Brevity writes no judgements to fine-tune on: set data"):
        compose_own(tmp_path, monkeypatch, "", {"judge/mine": f"{PACKAGE}.judges.Brevity"}, "judge=mine")
    half = ["judge=mine", "data.seed_data.eft_source=none", "judge.words_per_point=0"]
    with pytest.raises(SelfalignError, match=r"^judge\.words_per_point must be above 0, got 0"):
        compose_own(tmp_path, monkeypatch, "", {"judge/mine": f"{PACKAGE}.judges.Brevity"}, *half)


# --- keys --------------------------------------------------------------------------------------------------------


def key_with(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> Any:
    forget()
    return to_key_json(compose_own(folder, monkeypatch, module, {"loss/mine": "mine.Mine"}, "loss=mine").loss)


def test_changed_code_is_another_key_and_the_same_elsewhere_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = key_with(tmp_path, monkeypatch, LOSS + CALL)
    assert first.keys() == {"class", "source code", "beta"}
    assert key_with(tmp_path, monkeypatch, LOSS + CALL) == first
    assert key_with(tmp_path, monkeypatch, LOSS + CALL.replace("chosen - ", "rejected - ")) != first
    sys.path.remove(str(tmp_path))
    (other := tmp_path / "other").mkdir()
    assert key_with(other, monkeypatch, LOSS + CALL) == first


def test_every_module_of_the_package_counts_and_those_of_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("")
    (tmp_path / "mine/losses.py").write_text("from theirs import Mine as Base\nclass Mine(Base):\n    pass\n")
    (tmp_path / "theirs.py").write_text(LOSS + CALL)
    keys = []
    for file, text in (("mine/help.py", "a = 1\n"), ("mine/help.py", "a = 2\n"), ("theirs.py", LOSS + CALL + "\n")):
        (tmp_path / file).write_text(text)
        forget()
        monkeypatch.chdir(tmp_path)
        keys.append(code.source_code(extensions.import_component("mine.losses.Mine")))
    assert all(key.keys() == {"mine", "theirs"} for key in keys)
    assert keys[0]["mine"] != keys[1]["mine"] == keys[2]["mine"]
    assert keys[0]["theirs"] == keys[1]["theirs"] != keys[2]["theirs"]
    (tmp_path / "mine/notes.txt").write_text("no code")
    forget()
    assert code.source_code(extensions.import_component("mine.losses.Mine")) == keys[2]


def test_code_is_read_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compose_own(tmp_path, monkeypatch, LOSS + CALL, {"loss/mine": "mine.Mine"}, "loss=mine").loss
    key = to_key_json(before)
    (tmp_path / "mine.py").write_text("edited while the run goes on\n")
    assert to_key_json(before) == key


def test_own_classes_of_selfalign_have_no_source_code_in_their_keys() -> None:
    assert to_key_json(DPO()) == {"class": "DPO", "beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.0}


def test_class_without_a_file_is_refused() -> None:
    made = type("Made", (), {"__module__": "made_up"})
    sys.modules["made_up"] = type(sys)("made_up")
    with pytest.raises(SelfalignError, match=r"^made_up: no source files"):
        code.source_code(made)


# --- a run folder runs nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "hydra.searchpath=[file:///tmp]", "+hydra.x=1", "+schema=mine.Mine", "++schema@loss=mine.Mine",
        "loss=../../mine",
        "judge@evaluate.preference_pairs.judge=../mine", "+texts/more=../../mine", "benchmark=[mt_bench,../mine]",
    ],
)  # fmt: skip
def test_recorded_setting_that_could_bring_code_is_refused(override: str) -> None:
    with pytest.raises(SelfalignError, match=r"^outputs/run: its setting .* could bring code of its own"):
        check_recorded(["loss=dpo", override], Path("outputs/run"))


def test_recorded_settings_of_all_other_kinds_are_taken() -> None:
    check_recorded(
        [
            "loss=mine", "output_dir=../out", "data.path=../a.jsonl", "judge.prompt='a .. b'", "benchmark=[mt_bench]",
            "~track",
        ],
        Path("run"),
    )  # fmt: skip


def test_run_folder_cannot_have_code_run(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = jobs(swept / "outputs")
    shutil.copytree(swept / "outputs", tmp_path / "outputs", symlinks=True)
    shutil.move(tmp_path / "outputs" / own.name, tmp_path / "outputs/run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a run folder was run')\n")
    (tmp_path / "outputs/run/mine.yaml").write_text("defaults:\n  - /schema/evil.Mine@_here_\n")
    summary = read_json(tmp_path / "outputs/run/summary.json")
    for override in (
        "loss=../../outputs/run/mine",
        f"hydra.searchpath=[file://{tmp_path}/outputs]",
        "+schema=evil.Mine",
    ):
        summary["config"]["overrides"] = [override]
        write_json(tmp_path / "outputs/run/summary.json", summary)
        with pytest.raises(SelfalignError, match=r"^outputs/run: its setting .* could bring code"):
            evaluate_models(["outputs/run"], [], conf_folder())
    assert "evil" not in sys.modules


# --- the example's formula ---------------------------------------------------------------------------------------


def test_example_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    kind = extensions.import_component(f"{PACKAGE}.losses.RobustDPO")
    policy = PairLogps(**{name: torch.tensor(value) for name, value in {
        "chosen": [-1.0, -4.0], "rejected": [-3.0, -2.0], "chosen_tokens": [2.0, 2.0], "rejected_tokens": [3.0, 1.0],
    }.items()})  # fmt: skip
    reference = PairLogps(**{name: torch.tensor(value) for name, value in {
        "chosen": [-2.0, -2.0], "rejected": [-2.0, -2.0], "chosen_tokens": [2.0, 2.0], "rejected_tokens": [3.0, 1.0],
    }.items()})  # fmt: skip
    h = torch.tensor([2.0, -2.0])
    right, wrong = -torch.log(torch.sigmoid(0.5 * h)), -torch.log(torch.sigmoid(-0.5 * h))
    by_hand = (0.9 * right - 0.1 * wrong) / 0.8
    torch.testing.assert_close(kind(beta=0.5, epsilon=0.1)(policy, reference), by_hand)
    torch.testing.assert_close(kind(beta=0.5, epsilon=0)(policy, reference), DPO(beta=0.5)(policy, reference))
    with pytest.raises(SelfalignError, match=r"loss.epsilon must be at least 0 and below 0.5, got 0.5"):
        kind(epsilon=0.5)
