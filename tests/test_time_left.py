"""The time left of a run, from what its earlier stages took."""

import math
from pathlib import Path

import pytest
from builders import composed, write_tiny_data

from selfalign.pipeline.loop import plan
from selfalign.runs.labels import Label
from selfalign.runs.planner import PlannedStage
from selfalign.runs.time_left import TimeLeft, time_left
from selfalign.store.artifacts import Artifact


def stage(label: str, name: str, records: float = 0, *, runs_model: bool = True) -> PlannedStage:
    return PlannedStage(Label.parse(label), name, "", records, runs_model)


def took(**seconds: float) -> dict[Label, Artifact]:
    """The artifacts of stages by their labels, with `__` for the slash."""
    labels = {label.replace("__", "/"): value for label, value in seconds.items()}
    return {Label.parse(k): Artifact("stage", k, Path("/nowhere"), k, {}, v) for k, v in labels.items()}


LOOP = [
    stage("M1", "sft", 100),
    stage("evaluation_M1/answers", "respond", 10),
    stage("iteration_1/responses", "respond", 40),
    stage("iteration_1/pairs", "pair", 20, runs_model=False),
    stage("M2", "align", 20),
    stage("evaluation_M2/answers", "respond", 10),
    stage("evaluation_M2/against_M1", "head_to_head", 10),
    stage("iteration_2/responses", "respond", 80),
    stage("iteration_2/pairs", "pair", 40, runs_model=False),
    stage("M3", "align", 60),
    stage("evaluation_M3/answers", "respond", 10),
    stage("evaluation_M3/against_M1", "head_to_head", 10),
    stage("evaluation_M3/against_M2", "head_to_head", 10),
]


def test_later_iteration_takes_what_the_earlier_took_by_the_ratio_of_their_sizes() -> None:
    made = took(M1=900, evaluation_M1__answers=5, iteration_1__responses=60, iteration_1__pairs=1, M2=100,
                evaluation_M2__answers=7, evaluation_M2__against_M1=30)  # fmt: skip
    left = time_left(LOOP[7:], LOOP, made)
    assert left is not None
    assert left.seconds == pytest.approx(60 * 2 + 1 * 2 + 100 * 3 + 7 + 30 + 30)
    assert left.sources == ("iteration 1", "M2")
    assert left.text() == "about 8 min left, from iteration 1's and M2's times"


def test_nothing_is_said_where_a_stage_with_a_model_is_like_none_before() -> None:
    made = took(M1=900, evaluation_M1__answers=5, iteration_1__responses=60)
    assert time_left(LOOP[3:], LOOP, made) is None  # Nobody knows how long M2 takes.
    assert time_left(LOOP[3:4], LOOP, made) == TimeLeft(0.0, ())  # Pairing asks no model.
    assert TimeLeft(0.0, ()).text() == ""


def test_last_stage_of_a_kind_counts() -> None:
    made = took(evaluation_M1__answers=5, evaluation_M2__answers=50)
    assert time_left(LOOP[10:11], LOOP, made) == TimeLeft(50.0, ("M2",))


def test_size_that_nobody_knows_changes_nothing() -> None:
    loop = [stage("iteration_1/responses", "respond", math.inf), stage("iteration_2/responses", "respond", math.inf)]
    assert time_left(loop[1:], loop, took(iteration_1__responses=60)) == TimeLeft(60.0, ("iteration 1",))


def test_plan_of_a_run_says_how_much_each_stage_makes_or_reads(tmp_path: Path) -> None:
    given = write_tiny_data(tmp_path)
    planned = {
        str(one.label): one for one in plan(composed("experiment=smoke", *given, "data.accumulate_pairs=true")[0])
    }
    assert (planned["M2"].stage, planned["M2"].runs_model) == ("align", True)
    assert not planned["iteration_1/pairs"].runs_model
    assert 0 < planned["iteration_1/instructions"].records < planned["iteration_1/responses"].records < math.inf
    assert planned["M3"].records == 2 * planned["M2"].records
