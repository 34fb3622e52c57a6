"""Early stopping of an alignment by the win rate of its checkpoints (arXiv 2401.10020, section 3.1).

Every `interval_steps` steps the policy responds to validation instructions, and a judge compares its responses, in both
orders, with those of the checkpoint before. Training stops if a checkpoint loses significantly. The checkpoint before
it becomes the policy.
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
"""Each metric of a checkpoint, with the metric that has its value in the comparison with the checkpoint before."""


@dataclass(kw_only=True, slots=True)
class CheckpointComparator(PairwiseComparator):
    """The judge that compares the responses of two checkpoints. The default is M_t; the paper takes Claude 2."""

    key: ClassVar[str] = "train.checkpoint_selection.head_to_head"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSelection:
    """The settings and inputs of checkpoint selection.

    Attributes:
        interval_steps: optimiser steps between two comparisons.
        level: significance level: a checkpoint loses if the p-value of the sign test is below it.
        instructions: instructions.jsonl, the validation instructions.
        comparator: the judge that compares responses.
        compared_by: the policy that judges; None for a server.
        engine: generates the responses.
        sampling: how responses are sampled.
        seed: seeds the sampling; it is the same for every checkpoint.
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
        """Open the selection for one training.

        Args:
            out: the output of the training; its scratch folder holds the checkpoints and their responses.
            base: the base of an adapter.
        """
        return CheckpointSelector(out, self, base)


class CheckpointSelector:
    """The selection in one training. Its results are in the stage's scratch folder, so a killed run continues.

    Attributes:
        out: the output of the training.
        selection: the settings and inputs.
        base: the base of an adapter.
        chosen: the last step whose checkpoint did not lose; None before the first comparison.
        compared: {step: counts of the comparison with the checkpoint before}.
    """

    def __init__(self, out: StageOutput, selection: CheckpointSelection, base: PolicyCheckpoint) -> None:
        self.out = out
        self.selection = selection
        self.base = base
        self.chosen: int | None = None
        self.compared: dict[int, Counts] = {}

    def on_checkpoint(self, policy: Policy, step: int, *, last: bool) -> bool:
        """Compare the policy with the checkpoint before, if a comparison is due after this step.

        Args:
            policy: the policy in training.
            step: number of optimiser steps done.
            last: whether this is the last step, after which a comparison is always due.

        Returns:
            Whether training stops.
        """
        if step % self.selection.interval_steps and not last:
            return False
        if not distributed.broadcast(self._result(step).exists()):
            self._compare(policy, step)
        return self._is_worse(step)

    def resume(self, done: int) -> bool:
        """Read the results of a killed training, up to the step from which it continues.

        Returns:
            Whether one of them had already stopped the training.
        """
        return any(self._is_worse(step) for step in range(1, done + 1) if self._result(step).exists())

    def files(self, step: int) -> PolicyCheckpoint:
        """Return the checkpoint of a step that was compared."""
        return PolicyCheckpoint(self._folder(step) / "policy")

    def counts(self) -> Counts:
        """Return the chosen step, and wins, losses and win rate of each checkpoint against the one before."""
        return {catalog.CHOSEN_STEP.name: self.chosen or 0} | {
            of_checkpoint.of(step=step).name: counts[metric.name]
            for step, counts in self.compared.items()
            for of_checkpoint, metric in COMPARED
        }

    def _is_worse(self, step: int) -> bool:
        """Read a comparison and return whether the checkpoint lost. If it did not lose, choose it."""
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
        """Save the policy, generate its responses, and compare them with those of the chosen checkpoint."""
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
    """Whether a checkpoint is worse than the one before, by a one-sided sign test without ties.

    A threshold at a win rate of one half would stop nearly every training with equally good checkpoints.
    """
    return sign_test(wins, losses) < level
