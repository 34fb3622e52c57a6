"""Checkpoints that compete: the one whose answers win is taken, also when the run is killed in between."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from builders import RUBRIC, instruction, policy_artefact, records_artefact, workspace

from selfalign import checkpoint_selection as module
from selfalign.checkpoint_selection import CheckpointSelection, CheckpointSelector
from selfalign.errors import SelfalignError
from selfalign.generation import Sampling, Transformers
from selfalign.models import Policy, PolicyFiles
from selfalign.records import Response, read_records
from selfalign.stages.judge import ExpectedScore
from selfalign.training import ChooseConfig


def selection_of(policy: PolicyFiles, folder: Path) -> CheckpointSelection:
    asked = records_artefact(folder / "asked", instructions=[instruction("a"), instruction("b"), instruction("c")])
    return CheckpointSelection(
        every_steps=2,
        instructions=asked,
        judge=ExpectedScore(prompt=RUBRIC),
        judged_by=policy_artefact(policy),
        reference=None,
        generate=Transformers(dtype="float32"),
        sampling=Sampling(max_new_tokens=4),
        seed=0,
    )


@dataclass
class Scores:
    """Stands in for the judge: a score of every answer, by step."""

    by_step: dict[int, float]
    asked: list[int] = field(default_factory=list)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scores:
    scores = Scores({})

    def enter(selector: CheckpointSelector, policy: Any, step: int) -> None:
        path = selector._result(step)
        if not path.exists():
            scores.asked.append(step)
            path.parent.mkdir(parents=True)
            module.write_json(path, {"a": scores.by_step[step], "b": scores.by_step[step]})

    monkeypatch.setattr(CheckpointSelector, "_enter", enter)
    return scores


def run(selector: CheckpointSelector, start: int = 0, end: int = 7) -> list[int]:
    """Where a training of seven steps stops early, between these two."""
    nobody: Any = None
    for step in range(start + 1, end + 1):
        if selector.visit(nobody, step, last=step == 7):
            return [step]
    return []


@pytest.mark.parametrize(
    ("by_step", "stopped", "chosen", "asked"),
    [
        ({2: 1.0, 4: 2.0, 6: 3.0, 7: 4.0}, [], 7, [2, 4, 6, 7]),
        ({2: 1.0, 4: 2.0, 6: 1.5, 7: 9.0}, [6], 4, [2, 4, 6]),
        ({2: 1.0, 4: 1.0, 6: 1.0, 7: 1.0}, [], 7, [2, 4, 6, 7]),
        ({2: 3.0, 4: 2.0, 6: 1.0, 7: 0.0}, [4], 2, [2, 4]),
        ({2: 1.0, 4: 2.0, 6: 3.0, 7: 0.0}, [7], 6, [2, 4, 6, 7]),
    ],
    ids=["always_better", "worse_once", "ties_go_on", "worse_at_once", "only_the_last_is_worse"],
)
def test_training_stops_when_a_checkpoint_loses_and_the_one_before_is_taken(
    tiny_policy: PolicyFiles,
    tmp_path: Path,
    scripted: Scores,
    by_step: dict[int, float],
    stopped: list[int],
    chosen: int,
    asked: list[int],
) -> None:
    scripted.by_step = by_step
    selector = CheckpointSelector(workspace(tmp_path / "M2"), selection_of(tiny_policy, tmp_path), tiny_policy)
    assert run(selector) == stopped
    assert selector.chosen == chosen
    assert scripted.asked == asked


@pytest.mark.parametrize("done", [1, 3, 4, 6])
def test_killed_selection_continues_to_the_same_choice(
    tiny_policy: PolicyFiles, tmp_path: Path, scripted: Scores, done: int
) -> None:
    scripted.by_step = {2: 1.0, 4: 2.0, 6: 1.5, 7: 9.0}
    out = workspace(tmp_path / "M2")
    run(CheckpointSelector(out, selection_of(tiny_policy, tmp_path), tiny_policy), end=done)
    again = CheckpointSelector(out, selection_of(tiny_policy, tmp_path), tiny_policy)
    if again.resume(done):
        assert done == 6
    else:
        assert run(again, start=done) == [6]
    assert (again.chosen, again.win_rates) == (4, {4: 1.0, 6: 0.0})
    assert scripted.asked == [2, 4, 6], "a checkpoint was compared twice"


def test_checkpoint_answers_and_is_judged_for_real(tiny_policy: PolicyFiles, tmp_path: Path) -> None:
    out = workspace(tmp_path / "M2")
    selector = CheckpointSelector(out, selection_of(tiny_policy, tmp_path), tiny_policy)
    policy: Policy = tiny_policy.load("float32", trainable=True)
    assert not selector.visit(policy, 1, last=False)
    assert not selector.visit(policy, 2, last=False)
    assert not selector.visit(policy, 4, last=False)
    answers = [read_records(out.scratch / f"selection/{step}/answers/responses.jsonl", Response) for step in (2, 4)]
    assert [response.text for response in answers[0]] == [response.text for response in answers[1]]
    assert len(answers[0]) == 3
    assert selector.win_rates == {4: 0.5}, "equal checkpoints tie"
    assert selector.files(4).digest == selector.files(2).digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 5}, "every_steps and train.choose.instructions are given together"),
        ({"instructions": "a.jsonl"}, "every_steps and train.choose.instructions are given together"),
        ({"every_steps": -1, "instructions": "a.jsonl"}, "must be 0 or more"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        ChooseConfig(**options)
