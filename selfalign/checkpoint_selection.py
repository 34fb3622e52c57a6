"""Where an alignment stops, by what its checkpoints answer (arXiv 2401.10020, section 3.1).

Every so many steps the policy answers validation instructions. When these answers no longer win against those of the
checkpoint before, that one becomes the policy.
"""

from dataclasses import dataclass
from pathlib import Path

from selfalign import processes
from selfalign.files import read_json, write_json
from selfalign.generation import Backend, Sampling
from selfalign.metrics import outcomes_by_score
from selfalign.models import Policy, PolicyFiles
from selfalign.stages.evaluate import Answers
from selfalign.stages.judge import Judge, judge
from selfalign.stages.respond import RespondConfig, respond
from selfalign.store import Artefact, Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSelection:
    """What decides between checkpoints.

    Attributes:
        every_steps: how often.
        instructions: instructions.jsonl, what they answer.
        judge: how answers are scored.
        judged_by: the policy that scores them, if it is one of this run.
        reference: what that policy was trained from.
        generate: the backend that answers.
        sampling: how.
        seed: draws the tokens, the same for every checkpoint.
    """

    every_steps: int
    instructions: Artefact
    judge: Judge
    judged_by: Artefact | None
    reference: Artefact | None
    generate: Backend
    sampling: Sampling
    seed: int

    def open(self, out: Workspace, base: PolicyFiles) -> "CheckpointSelector":
        """The selection in one training.

        Args:
            out: the training's workspace; checkpoints and their answers lie in its scratch.
            base: the checkpoint that an adapter belongs to.
        """
        return CheckpointSelector(out, self, base)


class CheckpointSelector:
    """The selection in one training; what it finds out is kept in the stage's scratch, so a killed run continues."""

    def __init__(self, out: Workspace, selection: CheckpointSelection, base: PolicyFiles) -> None:
        self.out = out
        self.selection = selection
        self.base = base
        self.chosen: int | None = None
        self.win_rates: dict[int, float] = {}

    def visit(self, policy: Policy, step: int, *, last: bool) -> bool:
        """Lets the policy after this step compete, if it is its turn; returns whether training stops.

        Args:
            policy: in training.
            step: optimiser steps done.
            last: there are no more steps; the last one always competes.
        """
        if step % self.selection.every_steps and not last:
            return False
        self._enter(policy, step)
        return self._loses(step)

    def resume(self, done: int) -> bool:
        """Goes through the checkpoints of a training that was killed, up to the step it continues from.

        Returns:
            Whether one of them had stopped it already.
        """
        steps = range(self.selection.every_steps, done + 1, self.selection.every_steps)
        return any(self._loses(step) for step in steps if self._result(step).exists())

    def files(self, step: int) -> PolicyFiles:
        """The policy after a step that competed."""
        return PolicyFiles(self._folder(step) / "policy")

    def _loses(self, step: int) -> bool:
        """Compares with the checkpoint chosen so far; chooses this one unless it loses."""
        if self.chosen is not None:
            won = outcomes_by_score(read_json(self._result(step)), read_json(self._result(self.chosen))).values()
            self.win_rates[step] = sum(won) / len(won) if won else 0.0
            if self.win_rates[step] < 0.5:
                return True
        self.chosen = step
        return False

    def _result(self, step: int) -> Path:
        return self._folder(step) / "scores.json"

    def _folder(self, step: int) -> Path:
        return self.out.scratch / "selection" / str(step)

    def _enter(self, policy: Policy, step: int) -> None:
        """Has the policy answer and its answers scored, once."""
        folder, selection, files = self._folder(step), self.selection, self.files(step)
        if processes.broadcast(self._result(step).exists()):
            return
        if processes.is_main():
            files.path.mkdir(parents=True, exist_ok=True)
            files.save(policy, self.base)
        processes.wait_for_all()
        label = f"{self.out.label} after {step} steps"
        answers, judged = (Workspace(folder / name, label, lambda row: None) for name in ("answers", "judged"))
        shared = {"instructions": selection.instructions, "generate": selection.generate, "seed": selection.seed}
        config = RespondConfig(candidates=1, sampling=selection.sampling)
        respond(answers, config=config, policy=_artefact(files.path), **shared)
        answered = _artefact(answers.path)
        who = {"judge": selection.judge, "policy": selection.judged_by, "reference": selection.reference}
        judge(judged, responses=answered, **who, **shared)
        if processes.is_main():
            write_json(self._result(step), Answers.of(answered, _artefact(judged.path)).scores)
        processes.wait_for_all()


def _artefact(path: Path) -> Artefact:
    return Artefact(stage="checkpoint", key="", path=path, digest="", counts={}, seconds=0.0)
