"""What is right beside what the judge says: rates, gains, the judge's accuracy, the pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    TINY_RUN,
    composed,
    instruction,
    judgement,
    planned,
    records_artifact,
    response,
    run,
    workspace,
    write_tiny_data,
)

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.jsonl import read_scores
from selfalign.core.records import Instruction, PreferencePair
from selfalign.metrics.truth import judged_truth, true_gaps, true_rates
from selfalign.pipeline.loop import run_pipeline
from selfalign.report.instruction_values import instruction_values
from selfalign.runs.labels import Label
from selfalign.runs.planner import Planner
from selfalign.runs.reader import Finished
from selfalign.stages.truth import truth, truth_of_candidates
from selfalign.store.artifacts import Artifact
from selfalign.store.stage import StageFunction

SUMS = {"a": 1, "b": 2, "c": 3, "d": 4}
TRUTH = ["evaluate.truth=true", "evaluate.instructions=shipped:verifiable_test", "data=verifiable"]


def asked(*names: str) -> list[Instruction]:
    """Sums, whose second check is that the answer is short."""
    short = [{"kind": "words", "at_most": 3}]
    number = {name: {"kind": "number", "value": SUMS[name]} for name in names}
    return [replace(instruction(name), answer=number[name], constraints=short) for name in names]


def answers(folder: Path, **texts: Sequence[str]) -> Artifact:
    made = [response(f"{name}-{n}", text) for name, several in texts.items() for n, text in enumerate(several, start=1)]
    return records_artifact(folder, instructions=asked(*texts), responses=made)


def test_true_rate_is_the_share_of_checks_and_its_gain_is_paired(tmp_path: Path) -> None:
    own = answers(tmp_path / "own", a=["1"], b=["2"], c=["It is 3, I think"], d=["5"])
    first = answers(tmp_path / "first", a=["1"], b=["7"], c=["7"], d=["I think it is 6"])
    out = workspace(tmp_path / "out")
    numbers = truth(out, instructions=own, answers=own, baseline=first)
    assert read_scores(out.path) == {"a-1": 1, "b-1": 1, "c-1": 0.5, "d-1": 0.5}
    assert numbers["eval/true_rate"] == 0.75
    assert numbers["eval/true_gain"] == pytest.approx((0 + 0.5 + 0 + 0.5) / 4)
    assert numbers["eval/true_win_rate"] == 3 / 4
    alone = truth(workspace(tmp_path / "alone"), instructions=own, answers=own, baseline=None)
    assert alone == {name: value for name, value in numbers.items() if name.startswith("eval/true_rate")}


def test_interval_of_the_gain_is_over_differences_not_over_rates() -> None:
    """Instructions differ much more than the models do on each, so only a paired interval lies clear of zero."""
    hard = {str(n): float(n % 2) for n in range(40)}
    better = {name: min(1.0, value + 0.25 * (int(name) % 4 == 0)) for name, value in hard.items()}
    found = true_rates(better, hard)
    differences = np.array([better[name] - hard[name] for name in sorted(hard)])
    error = differences.std() / math.sqrt(40)
    assert found["eval/true_gain"] == pytest.approx(differences.mean())
    assert found["eval/true_gain_low"] == pytest.approx(differences.mean() - 1.96 * error, abs=0.01)
    assert 0 < found["eval/true_gain_low"] < found["eval/true_gain_high"]
    assert found["eval/true_rate_high"] - found["eval/true_rate_low"] > 0.2


def test_judge_is_right_where_it_orders_two_candidates_as_the_truth_does() -> None:
    groups = [
        [(1.0, 0.9), (0.0, 0.1), (0.0, 0.9)],  # right, and equal scores; the last two do not differ in truth
        [(0.5, 0.2), (1.0, 0.1)],  # wrong
        [(1.0, None), (0.0, 0.3)],  # no score
        [(1.0, 0.0), (1.0, 1.0)],
    ]
    found = judged_truth(groups)
    assert found["truth/judge_accuracy"] == 1.5 / 3
    assert found["truth/rate"] == pytest.approx((1 / 3 + 3 / 4 + 1 / 2 + 1) / 4)


def test_judge_that_guesses_is_right_half_the_time_however_often_it_ties() -> None:
    draw = np.random.default_rng(0)
    for scores in (1, 3, 1000):
        groups = [
            [(float(t), float(s)) for t, s in zip(draw.integers(3, size=4), draw.integers(scores, size=4), strict=True)]
            for _ in range(400)
        ]
        found = judged_truth(groups)
        assert found["truth/judge_accuracy_low"] <= 0.5 <= found["truth/judge_accuracy_high"]


def test_pairs_are_right_wrong_or_neither() -> None:
    found = true_gaps([1.0, 0.5, 0.0, -0.5])
    assert found["truth/pair_gap"] == 0.25
    assert (found["truth/pairs_right"], found["truth/pairs_wrong"]) == (0.5, 0.25)
    assert true_gaps([]) == {}


def test_swapped_judge_is_never_right_and_makes_pairs_that_are_wrong(tmp_path: Path) -> None:
    given = answers(tmp_path / "given", a=["1", "9"], b=["2", "I do not know that"])
    swapped = {"a-1": 0.0, "a-2": 0.5, "b-1": 0.0, "b-2": 1.0}
    scores = records_artifact(
        tmp_path / "scores", judgements=[judgement(name, score) for name, score in swapped.items()]
    )
    pairs = [
        PreferencePair(
            id=name, prompt=name, chosen="", rejected="", instruction_id=name, chosen_id=f"{name}-2",
            rejected_id=f"{name}-1",
        )
        for name in "ab"
    ]  # fmt: skip
    made = records_artifact(tmp_path / "pairs", pairs=pairs)
    inputs = {"instructions": given, "responses": given, "judgements": scores}
    numbers = truth_of_candidates(workspace(tmp_path / "out"), **inputs, pairs=made)
    assert numbers["truth/judge_accuracy"] == 0
    assert numbers["truth/pairs_wrong"] == 1
    assert numbers["truth/pair_gap"] == pytest.approx(-0.75)
    without = truth_of_candidates(workspace(tmp_path / "none"), **inputs, pairs=None)
    assert without == {name: value for name, value in numbers.items() if "pair" not in name}


def test_truth_is_measured_with_the_verifier_or_where_it_is_asked_for() -> None:
    told = ["experiment=smoke", *TRUTH[1:], "judge=function", "judge.function=mine.py:score"]
    told += ["data.seed_data.eft_source=none"]
    places = ["evaluation_M1/truth", "iteration_1/truth", "evaluation_M2/truth"]

    def measured(*more: str) -> list[str]:
        return [label for label in planned(composed(*told, *more, "iterations=1")[0]) if label.endswith("truth")]

    assert measured() == []
    assert measured("evaluate.truth=true") == places
    assert [one for one in planned(composed("experiment=smoke", *TRUTH[1:], "judge=verifier")[0]) if "truth" in one][
        :3
    ] == places


@dataclass
class Recording(Planner):
    """A plan that keeps the inputs of its stages."""

    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        self.inputs[str(label)] = inputs
        return Planner.make(self, label, stage, **inputs)


def test_pairs_are_checked_in_the_iterations_that_make_some() -> None:
    told = ["experiment=smoke", *TRUTH, "iterations=3", "loss=kto"]
    for rules, expected in (
        (("pair=labels", "+pair@at.2.pair=best_worst"), [False, True, True]),
        (("pair=best_worst", "+pair@at.3.pair=labels"), [True, True, False]),
    ):
        run_pipeline(composed(*told, *rules)[0], recording := Recording())
        checked = [recording.inputs[f"iteration_{n}/truth"]["pairs"] is not None for n in (1, 2, 3)]
        assert checked == expected


def test_later_verifier_needs_given_instructions_that_say_what_is_right() -> None:
    told = ["experiment=smoke", "data=verifiable", "data.seed_data.eft_source=none", "judge=function"]
    told += ["judge.function=mine.py:score", "evaluate.instructions=shipped:evaluation"]
    for judge, checked in (("verifier", True), ("expected_score", False)):
        config = composed(*told, f"+judge@at.2.judge={judge}")[0]
        run_pipeline(config, recording := Recording())
        assert recording.inputs["instructions"].get("verifiable", False) == checked
        assert "verifiable" not in recording.inputs["questions"]


def test_truth_without_instructions_is_refused() -> None:
    with pytest.raises(SelfalignError, match=r"^evaluate\.truth checks answers to evaluate\.instructions.*set "):
        composed("experiment=smoke", "evaluate=none", "evaluate.truth=true")


def test_run_shows_the_truth_beside_a_judge_that_guesses(tmp_path: Path) -> None:
    folder = run(
        tmp_path / "run", *TINY_RUN, write_tiny_data(tmp_path / "data")[0], *TRUTH, "judge=function",
        "judge.function=selfalign.judges.controls:random", "data.seed_data.eft_source=none",
        "data.instruct.source=shipped:verifiable:40", "data.instruct.count=12", "evaluate.count=4", "iterations=2",
        "data.respond.sampling.max_new_tokens=16", "evaluate.head_to_head=null", "pair.minimum_pairs=1",
    )  # fmt: skip
    summary = read_json(folder / "summary.json")
    rates = [row["eval/true_rate"] for row in summary["models"]]
    assert len(rates) == 3
    assert "eval/true_gain" not in summary["models"][0]
    gains = [row["eval/true_gain"] for row in summary["models"][1:]]
    assert gains == pytest.approx([rate - rates[0] for rate in rates[1:]])
    finished = Finished.load(folder)
    for row, metric in product(finished.models, ("eval/true_rate", "eval/true_gain", "eval/true_win_rate")):
        values = [*instruction_values(finished, row["model"], metric).values()]
        assert bool(values) == (metric in row)
        assert not values or sum(values) / len(values) == pytest.approx(row[metric])
    page = (folder / "report.html").read_text("utf-8")
    assert '<section id="truth">' in page
    for title in ("Wins against M1, by truth and by the judge", "Judge against the truth", "Score gap of pairs"):
        assert f"<b>{title}</b>" in page
