"""train.choose: which checkpoint of an alignment becomes the policy, as far as the trainer knows of it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from selfalign.core.errors import SelfalignError
from selfalign.engines.protocol import Sampling
from selfalign.models.checkpoint import Policy, PolicyFiles
from selfalign.store.artifacts import Counts, Workspace


@dataclass(kw_only=True, slots=True)
class ChooseConfig:
    """Which checkpoint of an alignment becomes the policy: the last that did not lose against the one before.

    Attributes:
        every_steps: how often checkpoints are compared; 0 always takes the last step.
        instructions: a data source of validation instructions, apart from those of the evaluation.
        count: the first so many of them; 0 takes all.
        head_to_head: who compares the answers of two checkpoints, in both orders: a `CheckpointComparator` of
            checkpoint_selection.py.
        level: a checkpoint loses, and training stops, where so few wins or fewer among wins and losses had a smaller
            probability than this if both were as good (one-sided sign test). At 0.005 with 253 instructions, 2 to 3 %
            of runs with eight equally good checkpoints stop early.
        sampling: how the instructions are answered.
    """

    every_steps: int = 0
    instructions: str = ""
    count: int = 0
    head_to_head: Any = None
    level: float = 0.005
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self.sampling.check("train.choose.sampling")
        if self.every_steps < 0 or self.count < 0:
            raise SelfalignError("train.choose.every_steps and train.choose.count must be 0 or more")
        if bool(self.every_steps) != bool(self.instructions):
            raise SelfalignError(
                "train.choose.every_steps and train.choose.instructions are given together, or neither"
            )
        if not 0 < self.level < 0.5:
            raise SelfalignError(f"train.choose.level must be above 0 and below 0.5, got {self.level}")
        if self.every_steps and self.head_to_head is None:
            raise SelfalignError(
                "train.choose.every_steps needs train.choose.head_to_head, who compares checkpoints; "
                "conf/train/full.yaml shows how"
            )


class CheckpointSelection(Protocol):
    """What decides between the checkpoints of a training: `selfalign.pipeline.checkpoint_selection`."""

    def open(self, out: Workspace, base: PolicyFiles) -> "CheckpointSelector": ...


class CheckpointSelector(Protocol):
    """The selection in one training: which step's policy is taken."""

    chosen: int | None

    def visit(self, policy: Policy, step: int, *, last: bool) -> bool: ...

    def resume(self, done: int) -> bool: ...

    def files(self, step: int) -> PolicyFiles: ...

    def counts(self) -> Counts: ...
