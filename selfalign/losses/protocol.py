"""The protocols of losses. Other code reads what a loss declares instead of testing its class."""

from enum import StrEnum
from typing import Protocol, TypeGuard, runtime_checkable

from selfalign.losses.logps import PairLogps, Values
from selfalign.losses.refinement import Refinement


class Offset(StrEnum):
    """The offset of a loss, one value for each pair.

    `refinement` is Δ. `score_gap` is s⁺ - s⁻, the difference of the judge's mean scores, which must be above 0.
    """

    none = "none"
    refinement = "refinement"
    score_gap = "score_gap"


@runtime_checkable
class Loss(Protocol):
    """The declarations of every choice of `loss`.

    Attributes:
        title: its name in reports and model cards.
        formula: its formula for a pair, as plain text.
        pairwise: whether it compares the two responses of a pair. If false, the policy is fine-tuned on chosen ones.
        offset: the offset that it needs besides the log-probabilities.
    """

    @property
    def title(self) -> str: ...

    @property
    def formula(self) -> str: ...

    @property
    def pairwise(self) -> bool: ...

    @property
    def offset(self) -> Offset: ...


@runtime_checkable
class PreferenceLoss(Loss, Protocol):
    """A pairwise loss. It maps log-probabilities of policy and reference, and its offset, to losses, shape (pairs,)."""

    @property
    def beta(self) -> float: ...

    def __call__(self, policy: PairLogps, reference: PairLogps, offset: Values | None = None, /) -> Values: ...


@runtime_checkable
class FineTuningLoss(Loss, Protocol):
    """A loss that fine-tunes on good responses; `init` is the model to start from, "previous" or "base"."""

    @property
    def init(self) -> str: ...


@runtime_checkable
class RefinedLoss(PreferenceLoss, Protocol):
    """A preference loss with the offset Δ."""

    @property
    def refinement(self) -> Refinement: ...

    def delta(self, policy_p: PairLogps, reference_p: PairLogps) -> Values: ...


def is_refined(loss: Loss) -> TypeGuard[RefinedLoss]:
    """Whether the offset of a loss is Δ."""
    return loss.offset is Offset.refinement


def refinement_of(loss: Loss) -> Refinement | None:
    """Return the refinement of a loss, or None."""
    return loss.refinement if is_refined(loss) else None


def augmentation_of(loss: Loss) -> Refinement | None:
    """Return the settings of a loss's second pass, given p⊕x; None if it has no second pass."""
    source = refinement_of(loss)
    return source.augmentation() if source else None
