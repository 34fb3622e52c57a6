"""Where an alignment stops, by what its checkpoints answer (arXiv 2401.10020, section 3.1).

Every so many steps the policy answers validation instructions, and its answers are compared, in both orders, with those
of the checkpoint before. Training stops when a checkpoint loses by more than chance explains; the one before it, the
last that did not lose, becomes the policy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from selfalign.core import distributed
from selfalign.core.files import read_json, write_json
from selfalign.engines.protocol import Engine, Sampling
from selfalign.engines.responses import generate_responses
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.head_to_head import compare_answers
from selfalign.metrics import catalog
from selfalign.metrics.intervals import sign_test
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.store.artifacts import Artifact, Counts, StageOutput

COMPARED = (
    (catalog.CHECKPOINT_WIN_RATE, catalog.WIN_RATE),
    (catalog.CHECKPOINT_WINS, catalog.WINS),
    (catalog.CHECKPOINT_LOSSES, catalog.LOSSES),
)
"""What is told of each checkpoint, and what it is in the comparison with the one before."""


@dataclass(kw_only=True, slots=True)
class CheckpointComparator(PairwiseComparator):
    """Who compares the answers of two checkpoints; by default M_t, where the paper asks Claude 2."""

    key: ClassVar[str] = "train.checkpoint_selection.head_to_head"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSelection:
    """What decides between checkpoints.

    Attributes:
        interval_steps: how often they are compared.
        level: a checkpoint loses where the sign test's p value is below it.
        instructions: instructions.jsonl, what they answer.
        comparator: how answers are compared.
        compared_by: the policy that compares them; None for a server.
        engine: the engine that answers.
        sampling: how.
        seed: draws the tokens, the same for every checkpoint.
    """

    interval_steps: int
    level: float
    instructions: Artifact
    comparator: PairwiseComparator
    compared_by: Artifact | None
    engine: Engine
    sampling: Sampling
    seed: int

    def open(self, out: StageOutput, base: PolicyCheckpoint) -> "CheckpointSelector":
        """Begins the selection in one training.

        Args:
            out: the training's workspace; checkpoints and their answers lie in its scratch.
            base: the checkpoint that an adapter belongs to.
        """
        return CheckpointSelector(out, self, base)


class CheckpointSelector:
    """The selection in one training; what it finds out is kept in the stage's scratch, so a killed run continues.

    Attributes:
        chosen: the step after which the policy is taken, as far as is known.
        compared: {step: counts of the comparison with the checkpoint before}.
    """

    def __init__(self, out: StageOutput, selection: CheckpointSelection, base: PolicyCheckpoint) -> None:
        self.out = out
        self.selection = selection
        self.base = base
        self.chosen: int | None = None
        self.compared: dict[int, Counts] = {}

    def on_checkpoint(self, policy: Policy, step: int, *, last: bool) -> bool:
        """Compares the policy after this step with the checkpoint before, if it is its turn.

        Args:
            policy: in training.
            step: optimiser steps done.
            last: there are no more steps; the last one is always compared.

        Returns:
            Whether training stops.
        """
        if step % self.selection.interval_steps and not last:
            return False
        if not distributed.broadcast(self._result(step).exists()):
            self._compare(policy, step)
        return self._is_worse(step)

    def resume(self, done: int) -> bool:
        """Goes through the checkpoints of a training that was killed, up to the step it continues from.

        Returns:
            Whether one of them had stopped it already.
        """
        steps = range(self.selection.interval_steps, done + 1, self.selection.interval_steps)
        return any(self._is_worse(step) for step in steps if self._result(step).exists())

    def files(self, step: int) -> PolicyCheckpoint:
        """Returns the policy after a step that was compared."""
        return PolicyCheckpoint(self._folder(step) / "policy")

    def counts(self) -> Counts:
        """Returns the step whose policy is taken, and how each checkpoint did against the one before."""
        return {catalog.CHOSEN_STEP.name: self.chosen or 0} | {
            of_checkpoint.of(step=step).name: counts[metric.name]
            for step, counts in self.compared.items()
            for of_checkpoint, metric in COMPARED
        }

    def _is_worse(self, step: int) -> bool:
        """Reads how a checkpoint did; unless it lost it is chosen."""
        if counts := read_json(self._result(step)):
            self.compared[step] = counts
            if is_worse(counts[catalog.WINS.name], counts[catalog.LOSSES.name], self.selection.level):
                return True
        self.chosen = step
        return False

    def _result(self, step: int) -> Path:
        return self._folder(step) / "comparison.json"

    def _folder(self, step: int) -> Path:
        return self.out.scratch / "selection" / str(step)

    def _compare(self, policy: Policy, step: int) -> None:
        """Has the policy answer, and its answers compared with those of the checkpoint chosen so far."""
        folder, selection, files = self._folder(step), self.selection, self.files(step)

        def save() -> None:
            files.path.mkdir(parents=True, exist_ok=True)
            files.save(policy, self.base)

        distributed.on_main(save)
        label = f"{self.out.label} after {step} steps"
        instructions = selection.instructions.path / "instructions.jsonl"
        generate_responses(
            StageOutput(folder / "answers", label, lambda row: None),
            candidates=1,
            sampling=selection.sampling,
            policy=files,
            instructions=instructions,
            engine=selection.engine,
            seed=selection.seed,
        )
        distributed.wait_for_all()
        counts: Counts = {}
        if self.chosen is not None:
            counts = compare_answers(
                StageOutput(folder / "compared", label, lambda row: None),
                judge=selection.comparator,
                policy=PolicyCheckpoint(selection.compared_by.path) if selection.compared_by else None,
                instructions=instructions,
                answers=folder / "answers" / "responses.jsonl",
                opponent=self._folder(self.chosen) / "answers" / "responses.jsonl",
                engine=selection.engine,
                seed=selection.seed,
            )
        distributed.on_main(lambda: write_json(self._result(step), counts))


def is_worse(wins: int, losses: int, level: float) -> bool:
    """Whether a checkpoint is worse than the one before: a one-sided sign test of its wins, ties left out.

    Were training to stop at a win rate below one half, it would nearly always stop among equally good checkpoints.
    """
    return sign_test(wins, losses) < level
