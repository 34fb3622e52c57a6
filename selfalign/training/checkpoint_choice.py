"""train.choose: which checkpoint of an alignment becomes the policy, as far as the trainer knows of it."""

from typing import Protocol

from selfalign.models.checkpoint import Policy, PolicyFiles
from selfalign.store.artifacts import Counts, Workspace


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
