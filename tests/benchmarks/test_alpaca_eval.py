import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
from benchmarking import measure
from builders import Killed, Script, completion, killed_after, loaded, small_context_policy
from chat_server import ChatServer, chat, chat_server

from selfalign.benchmarks.alpaca_eval import AlpacaComparator, AlpacaEval
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.data.turns import as_prompt
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import Sampling
from selfalign.engines.transformers import Transformers
from selfalign.metrics.intervals import length_controlled, wilson
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt

PROMPT = (
    "Which?\n<instruction>\n{instruction}\n</instruction>\n<first>\n{first}\n</first>\n<second>\n{second}\n</second>"
)
REFERENCES = [
    {"instruction": f"Say something {how}.", "output": f"The reference says {how}.", "generator": "ref-1", "dataset": d}
    for how, d in (("kind", "koala"), ("short", "koala"), ("{odd}", "oasst"), ("new", "vicuna"))
]
ANSWERS = ["Mine is kind.", "Mine is brief and then it goes on.", "Mine is odd.", "Mine is new."]
WORTH = {"kind": 2, "short": -1, "{odd}": 0, "new": None}
"""By how much the model's answer is better; None for a judge that says nothing."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def alpaca_eval(folder: Path, rows: list[dict[str, str]] = REFERENCES, **judge: Any) -> AlpacaEval:
    path = folder / "reference.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    sampling = Sampling(max_new_tokens=6)
    return AlpacaEval(reference_outputs=str(path), sampling=sampling, judge=AlpacaComparator(prompt=PROMPT, **judge))


def at(server: ChatServer) -> Endpoint:
    return Endpoint(base_url=server.url, model="judge-1", api_key_env="")


def verdict(body: dict[str, Any]) -> bytes:
    """A fair judge of the table: the same answer wins, wherever it stands."""
    text = body["messages"][-1]["content"]
    worth = WORTH[re.search(r"Say something (.*)\.\n", text)[1]]
    first_is_ours = "Mine" in text[text.index("<first>") : text.index("</first>")]
    if worth is None:
        return chat("I cannot tell.")
    return chat("[[C]]" if not worth else "[[A]]" if (worth > 0) == first_is_ours else "[[B]]")


def judged(folder: Path, policy: PolicyCheckpoint, **more: Any) -> dict[str, Any]:
    """The counts of four given answers, judged by the table."""
    script = Script(loaded(policy.path), [completion(answer) for answer in ANSWERS], per_batch=1)
    script.plan = lambda lengths, samples, most: [[index] for index in range(len(lengths))]  # in the records' order
    with chat_server(verdict) as server:
        return measure(folder, alpaca_eval(folder, endpoint=at(server), **more), policy, engine=script)


def test_win_rates_are_of_the_models_answers_in_both_orders(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts = judged(tmp_path, tiny_policy)
    assert (counts["wins"], counts["ties"], counts["losses"], counts["comparisons"]) == (1, 1, 1, 4)
    expected = wilson(1.5, 3)
    assert [counts[f"win_rate{end}"] for end in ("", "_low", "_high")] == [expected.value, expected.low, expected.high]
    longer = [float(len(a) - len(row["output"])) for a, row in zip(ANSWERS, REFERENCES, strict=True)][:3]
    assert counts["win_rate_length_controlled"] == pytest.approx(length_controlled([1, 0, 0.5], longer).value)
    assert counts["mean_characters"] == sum(map(len, ANSWERS)) / 4
    assert counts["mean_characters_opponent"] == sum(len(row["output"]) for row in REFERENCES) / 4
    assert counts["dropped"] == {"unanswered": 0, "no_score": 1}
    assert counts["judge/requests"] == 8


def test_judge_that_names_one_place_gives_half_and_full_bias(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    with chat_server("[[A]]") as server:
        counts = measure(tmp_path, alpaca_eval(tmp_path, endpoint=at(server)), tiny_policy)
    assert (counts["win_rate"], counts["judge/position_bias"], counts["ties"]) == (0.5, 1.0, 4)


def test_files_are_in_alpaca_evals_layout(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts = judged(tmp_path, tiny_policy)
    model = f"M2-{tiny_policy.digest[:8]}"
    outputs = read_json(tmp_path / "out" / model / "model_outputs.json")
    assert [row["output"] for row in outputs] == ANSWERS
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in REFERENCES]
    assert {row["generator"] for row in outputs} == {model}
    assert [row["dataset"] for row in outputs] == ["koala", "koala", "oasst", "vicuna"]
    annotations = read_json(tmp_path / "out" / model / "judge-1" / "annotations.json")
    assert [row["preference"] for row in annotations] == [2.0, 1.0, 1.5, None]
    assert {(row["generator_1"], row["generator_2"], row["annotator"]) for row in annotations} == {
        ("ref-1", model, "judge-1")
    }
    assert [row["output_1"] for row in annotations] == [row["output"] for row in REFERENCES]
    assert [row["output_2"] for row in annotations] == ANSWERS
    # As alpaca_eval's metrics take them: preferences minus 1, without those that are none.
    preferences = pandas.DataFrame(annotations)["preference"].astype(float)
    assert (preferences[preferences.between(1, 2)] - 1).mean() == pytest.approx(counts["win_rate"])


def test_policy_judges_by_its_verdict_tokens(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts = measure(tmp_path, alpaca_eval(tmp_path), tiny_policy, tiny_policy)
    assert counts["wins"] + counts["ties"] + counts["losses"] == 4
    assert "judge/position_bias_nats" in counts
    [annotations] = (tmp_path / "out").glob(f"*/sft-{tiny_policy.digest[:8]}/annotations.json")
    assert len(read_json(annotations)) == 4


def test_instruction_that_does_not_fit_is_counted_and_not_compared(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    rows = [*REFERENCES, {"instruction": "word " * 400, "output": "x", "generator": "ref-1", "dataset": "koala"}]
    longest = max(len(encode_prompt(tiny_policy.load_tokenizer(), as_prompt(r["instruction"]))) for r in REFERENCES)
    small = small_context_policy(tiny_policy, tmp_path / "small", longest + 6)
    with chat_server("[[B]]") as server:
        counts = measure(tmp_path, alpaca_eval(tmp_path, rows, endpoint=at(server)), small)
    assert (counts["dropped"], counts["comparisons"]) == ({"unanswered": 1}, 4)


def test_judge_without_verdicts_stops_and_names_its_setting(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    with chat_server("No.") as server, pytest.raises(SelfalignError, match=r"4 of 4 .*benchmark.alpaca_eval.judge, or"):
        measure(tmp_path, alpaca_eval(tmp_path, endpoint=at(server)), tiny_policy)


def test_killed_benchmark_continues_and_loses_no_finished_batch(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Transformers(dtype="float32", max_batch_tokens=40)
    with killed_after(100, monkeypatch) as all_sizes:
        measure(tmp_path / "whole", made := alpaca_eval(tmp_path), tiny_policy, tiny_policy, engine=backend)
    with killed_after(2, monkeypatch) as sizes, pytest.raises(Killed):
        measure(tmp_path / "killed", made, tiny_policy, tiny_policy, engine=backend)
    with killed_after(100, monkeypatch) as rest:
        measure(tmp_path / "killed", made, tiny_policy, tiny_policy, engine=backend)
    assert sizes + rest == all_sizes
    whole, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "out").rglob("*.json")}
        for name in ("whole", "killed")
    )
    assert whole == killed
    assert len(whole) == 2


def test_count_is_held_against_the_instructions_that_there_are(tmp_path: Path) -> None:
    made = replace(alpaca_eval(tmp_path), count=4)
    assert made.sources("benchmark.alpaca_eval").keys() == {"reference_outputs"}
    with pytest.raises(SelfalignError, match=r"benchmark.alpaca_eval.count=5, but .* has 4"):
        replace(made, count=5).sources("benchmark.alpaca_eval")
    with pytest.raises(SelfalignError, match=r"benchmark.alpaca_eval.count=2, but .* has 1"):
        replace(alpaca_eval(tmp_path, REFERENCES[:1]), count=2).sources("benchmark.alpaca_eval")


def test_bad_reference_outputs_are_named_with_their_row(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"reference.json row 4: same instruction as .*reference.json row 0, but"):
        alpaca_eval(tmp_path, [*REFERENCES, REFERENCES[0] | {"output": "No."}]).sources("benchmark.alpaca_eval")
    with pytest.raises(SelfalignError, match=r"reference.json row 1: .*output"):
        alpaca_eval(tmp_path, [REFERENCES[0], {"instruction": "a"}]).sources("benchmark.alpaca_eval")
    with pytest.raises(SelfalignError, match=r"reference.json row 1: .* one user turn, but .* of system, user"):
        alpaca_eval(tmp_path, [REFERENCES[0], {"system": "Rhyme.", "instruction": "a", "output": "b"}]).sources(
            "benchmark.alpaca_eval"
        )
    missing = AlpacaEval(reference_outputs="/nowhere/a.json", judge=AlpacaComparator(prompt=PROMPT))
    with pytest.raises(SelfalignError, match=r"^benchmark.alpaca_eval.reference_outputs: .*no such file"):
        missing.sources("benchmark.alpaca_eval")
