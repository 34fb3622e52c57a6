"""What a loss declares of itself, so that nobody has to know which loss it is."""

from enum import StrEnum
from typing import Protocol, TypeGuard, runtime_checkable

from selfalign.losses.logps import PairLogps, Values
from selfalign.losses.refinement import Refinement


class Offset(StrEnum):
    """The values that offset a loss, one a pair, besides the log-probabilities given x.

    `refinement` is Δ; `score_gap` is s⁺ - s⁻, the difference of the judge's mean scores, above 0.
    """

    none = "none"
    refinement = "refinement"
    score_gap = "score_gap"


@runtime_checkable
class Loss(Protocol):
    """What every choice of `loss` declares.

    Attributes:
        title: its name in reports and model cards.
        formula: its value for a pair, as plain text.
        pairwise: whether it compares the two responses of a pair; else chosen responses are fine-tuned on.
        offset: what it is called with besides the log-probabilities.
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
    """A pairwise loss: policy, reference and, where `offset` names one, the offset, to losses; each (pairs,)."""

    @property
    def beta(self) -> float: ...

    def __call__(self, policy: PairLogps, reference: PairLogps, offset: Values | None = None, /) -> Values: ...


@runtime_checkable
class FineTuningLoss(Loss, Protocol):
    """No pairwise loss: good responses are fine-tuned on, from the "previous" model or from the "base"."""

    @property
    def init(self) -> str: ...


@runtime_checkable
class RefinedLoss(PreferenceLoss, Protocol):
    """A preference loss with the offset Δ."""

    @property
    def refinement(self) -> Refinement: ...

    def delta(self, policy_p: PairLogps, reference_p: PairLogps) -> Values: ...


def is_refined(loss: Loss) -> TypeGuard[RefinedLoss]:
    """Tells whether a loss is offset by Δ."""
    return loss.offset is Offset.refinement


def refinement_of(loss: Loss) -> Refinement | None:
    """The refinement a loss asks for, or None."""
    return loss.refinement if is_refined(loss) else None


def augmentation_of(loss: Loss) -> Refinement | None:
    """What a loss's second pass depends on; None where it has no second pass."""
    source = refinement_of(loss)
    return source.augmentation() if source else None
