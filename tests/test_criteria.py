"""The criteria of single instructions: in given rows, in records, and in what a run asks for."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from builders import artifact, composed, records_artifact, workspace
from msgspec import UNSET

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_json
from selfalign.core.jsonl import read_records
from selfalign.core.records import Criterion, Instruction, RankedAnswers
from selfalign.data.sources import read_instructions, read_ranked
from selfalign.judges.criteria import CriteriaConfig
from selfalign.judges.expected import ExpectedScore
from selfalign.judges.rubric import RubricScore
from selfalign.launch.dry_run_stages import StageEstimator
from selfalign.pipeline.loop import run_pipeline
from selfalign.pipeline.requirements import _criteria
from selfalign.runs.labels import Label
from selfalign.runs.planner import Planner
from selfalign.stages.seed_data import write_questions
from selfalign.store.artifacts import Artifact
from selfalign.store.key import to_key_json
from selfalign.store.stage import PlannedArtifact, StageFunction


def rows(folder: Path, *fields: dict) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"Task {n}?", **row}) + "\n" for n, row in enumerate(fields)))
    return str(file)


def criteria_in(folder: Path, **fields: object) -> list[Criterion]:
    [record] = read_instructions(rows(folder, fields), "given")[0]
    return record.criteria


WEIGHED = [Criterion(text="It is warm.", weight=3.0), Criterion(text="It rambles.", weight=-5.0)]

WEIGHED_ROW = {"text": "It is warm.", "weight": 3}


@pytest.mark.parametrize(
    ("name", "text", "weight"),
    [("criteria", "criterion", "weight"), ("rubric", "text", "weight"), ("rubrics", "description", "points")],
)
def test_criteria_are_read_by_the_names_that_data_give_them(tmp_path: Path, name: str, text: str, weight: str) -> None:
    items = [{text: "It is warm.", weight: 3}, {text: "It rambles.", weight: -5, "tags": ["style"]}]
    assert criteria_in(tmp_path, **{name: items}) == WEIGHED


def test_criterion_without_a_weight_weighs_one(tmp_path: Path) -> None:
    given = ["It is warm.", {"criterion": "It rambles."}]
    assert criteria_in(tmp_path, criteria=given) == [Criterion(text="It is warm."), Criterion(text="It rambles.")]


def test_number_beside_a_criterion_without_a_weight_is_refused(tmp_path: Path) -> None:
    """It would count as 1, whatever its sign."""
    with pytest.raises(SelfalignError, match=r"rows\.jsonl:1: criteria\[0\]: no weight .* in wieght: call it"):
        criteria_in(tmp_path, criteria=[{"text": "It rambles.", "wieght": -5}])
    told = [{"text": "It is warm.", "id": 7, "index": 0, "required": True}]
    assert criteria_in(tmp_path, criteria=told) == [Criterion(text="It is warm.")]
    assert criteria_in(tmp_path, criteria=[{**WEIGHED_ROW, "difficulty": 4}]) == WEIGHED[:1]


@pytest.mark.parametrize("nothing", [{}, {"criteria": []}, {"criteria": None}])
def test_row_without_criteria_is_what_it_was(tmp_path: Path, nothing: dict) -> None:
    """Its line has no such field, so its digest, which is its id, stays the same."""
    [record] = read_instructions(rows(tmp_path, nothing), "given")[0]
    assert record.criteria is UNSET
    plain = {"id": "", "text": "Task 0?", "source": "given", "category": "", "turns": []}
    assert record.id == digest_json(plain)[:16]
    assert json.loads(msgspec.json.encode(record)) == {**plain, "id": record.id}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"criteria": "It is warm."}, r"rows\.jsonl:1: criteria: expected a list of texts"),
        ({"criteria": [3]}, r"criteria\[0\]: expected a text or an object, got 3"),
        ({"criteria": ["Fine.", {"weight": 2}]}, r"criteria\[1\]: expected a text in criterion or text or description"),
        ({"criteria": [{"text": "It is warm.", "weight": 0}]}, r"criteria\[0\]: .*a weight other than 0"),
        ({"criteria": [{"text": "It is warm.", "weight": "much"}]}, r"weight: expected a number, got 'much'"),
        ({"criteria": ["a"], "rubric": ["b"]}, "criteria and rubric are both criteria; keep one"),
    ],
)
def test_other_criteria_are_refused_with_their_place(tmp_path: Path, fields: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=named):
        criteria_in(tmp_path, **fields)


def test_criteria_of_ranked_answers_reach_the_instructions_that_are_judged(tmp_path: Path) -> None:
    answers = [{"text": "Hot.", "rank": 1}, {"text": "Cold.", "rank": 2}]
    questions, _ = read_ranked(
        rows(tmp_path, {"responses": answers, "criteria": ["It is warm."]}, {"responses": answers})
    )
    out = workspace(tmp_path / "out")
    write_questions(out.path, questions)
    asked = read_records(out.path / "instructions.jsonl", Instruction)
    assert [one.criteria for one in asked] == [[Criterion(text="It is warm.")], UNSET]
    assert read_records(out.path / "ranked.jsonl", RankedAnswers) == questions


class Inputs:
    """What a run reads, as far as it is judged."""

    def __init__(self, **artifacts: object) -> None:
        self.instructions = self.questions = self.ranked = None
        vars(self).update(artifacts)


def test_instruction_without_criteria_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    chosen = ["experiment=smoke", "judge=rubric", "data.seed_data.eft_source=none", "data.instruct.source=tasks.jsonl"]
    config, _, _ = composed(*chosen, "judge.criteria.source=given")
    with_some = Instruction(id="a", text="A?", source="given", criteria=WEIGHED)
    without = Instruction(id="b", text="B?", source="given")
    full = records_artifact(tmp_path / "full", instructions=[with_some])
    lacking = records_artifact(tmp_path / "lacking", instructions=[with_some, without])
    base = artifact(tmp_path / "full")
    assert list(_criteria(config, base, Inputs(instructions=full, questions=full))) == []
    [problem] = _criteria(config, base, Inputs(instructions=full, questions=lacking))
    assert problem.startswith("judge.criteria.source=given, but record b of evaluate.instructions has no criteria")
    config, _, _ = composed(*chosen)
    assert list(_criteria(config, base, Inputs(questions=lacking))) == []


CHOSEN = ["experiment=smoke", "judge=rubric", "data.seed_data.eft_source=none"]


@dataclass
class Recorder(Planner):
    """A planner that keeps the inputs of each stage, by its label."""

    made: dict[str, Any] = field(default_factory=dict)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        self.made[str(label)] = to_key_json(inputs)
        return Planner.make(self, label, stage, **inputs)


def recorded(*overrides: str) -> dict[str, Any]:
    """The inputs of each stage of a run."""
    recorder = Recorder()
    run_pipeline(composed(*CHOSEN, *overrides)[0], recorder)
    return recorder.made


def test_answers_of_all_models_are_judged_by_the_criteria_of_one_writer() -> None:
    made = recorded()
    first, second, third = (made[f"evaluation_M{n}/answer_criteria"] for n in (1, 2, 3))
    assert first == second == third
    writers = [made[f"iteration_{n}/criteria"]["policy"]["digest"] for n in (1, 2)]
    assert writers == ["M1", "M2"], "whoever judges writes"


@pytest.mark.parametrize(("writer", "wrote"), [("base", "M0"), ("sft", "M1"), ("self", "M2")])
def test_another_model_of_the_run_may_write_the_criteria(writer: str, wrote: str) -> None:
    made = recorded(f"judge.criteria.model={writer}")
    assert made["iteration_2/criteria"]["policy"]["digest"] == wrote


def test_dry_run_judges_by_as_many_criteria_as_an_instruction_has_at_most(tmp_path: Path) -> None:
    estimator = StageEstimator(composed()[0], tmp_path)
    judge = RubricScore(prompt="{instruction}{response}{criterion}", criteria=CriteriaConfig(count=3))
    few, many = (Instruction(id=str(n), text="?", source="given", criteria=WEIGHED[:n]) for n in (1, 2))
    given = records_artifact(tmp_path / "given", instructions=[few, many])
    planned = PlannedArtifact("write_criteria", "criteria", tmp_path, digest="", counts={}, seconds=0.0)
    assert estimator._criteria_each(judge, given) == 2
    assert estimator._criteria_each(judge, planned) == 3
    assert estimator._criteria_each(ExpectedScore(prompt="{instruction}{response}"), given) is None
