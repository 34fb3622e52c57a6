"""The protocols of losses. Other code reads what a loss declares instead of testing its class."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol, TypeGuard, TypeVar, cast, runtime_checkable

from torch import Tensor

from selfalign.core.formatting import plural
from selfalign.losses.logps import Labels, PairLogps, Responses, Values
from selfalign.losses.refinement import Refinement


class Offset(StrEnum):
    """The offset of a loss, one value for each pair.

    `refinement` is Δ. `score_gap` is s⁺ - s⁻, the difference of the judge's mean scores, which must be above 0.
    `win_shares` are s⁺ and s⁻ themselves, two values for each pair, which must be shares of wins from 0 to 1.
    """

    none = "none"
    refinement = "refinement"
    score_gap = "score_gap"
    win_shares = "win_shares"


@runtime_checkable
class Loss(Protocol):
    """The declarations of every choice of `loss`.

    Attributes:
        title: its name in reports and model cards.
        formula: its formula for a pair, as plain text.
        pairwise: whether it compares the two responses of a pair. If false, it takes responses one by one: labelled
            ones (`UnpairedLoss`), or the good ones, on which the policy is fine-tuned (`FineTuningLoss`).
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

    def __call__(self, policy: PairLogps, reference: PairLogps, offset: Tensor | None = None, /) -> Values: ...


@runtime_checkable
class UnpairedLoss(Loss, Protocol):
    """A loss of labelled responses, each by itself.

    It maps summed log-probabilities of policy and reference, whether each response is desirable, and the estimate z₀ of
    the policy's distance from its reference (nats, without gradient) to losses, shape (responses,).
    """

    @property
    def beta(self) -> float: ...

    @property
    def desirable_weight(self) -> float: ...

    @property
    def undesirable_weight(self) -> float: ...

    def __call__(self, policy: Responses, reference: Responses, desirable: Labels, baseline: float, /) -> Responses: ...


@runtime_checkable
class SmoothedLoss(PreferenceLoss, Protocol):
    """A preference loss with label smoothing. Where pairs have their own, it is called with a value for each pair."""

    @property
    def label_smoothing(self) -> float: ...

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps,
        offset: Tensor | None = None,
        label_smoothing: Values | None = None,
        /,
    ) -> Values: ...


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


@runtime_checkable
class ScheduledLoss(PreferenceLoss, Protocol):
    """A loss that changes over the iterations and over the steps of an alignment, such as by its λ."""

    def check_iterations(self, iterations: int) -> None: ...

    def at(self, iteration: int) -> PreferenceLoss: ...

    def during(self, share: float) -> PreferenceLoss: ...


L = TypeVar("L", bound=Loss)


def loss_at(loss: L, iteration: int) -> L:
    """Return the loss of an iteration, counted from 1."""
    return cast(L, loss.at(iteration)) if isinstance(loss, ScheduledLoss) else loss


def loss_during(loss: PreferenceLoss, share: float) -> PreferenceLoss:
    """Return the loss of a step, before which this share of the alignment's steps was done."""
    return loss.during(share) if isinstance(loss, ScheduledLoss) else loss


def is_unpaired(loss: Loss) -> TypeGuard[UnpairedLoss]:
    """Whether a loss takes labelled responses one by one."""
    return not loss.pairwise and isinstance(loss, UnpairedLoss)


def aligns(loss: Loss) -> bool:
    """Whether a loss aligns the policy against a reference policy, instead of fine-tuning it."""
    return loss.pairwise or is_unpaired(loss)


def is_refined(loss: Loss) -> TypeGuard[RefinedLoss]:
    """Whether the offset of a loss is Δ."""
    return loss.offset is Offset.refinement


def refinement_of(loss: Loss) -> Refinement | None:
    """Return the refinement of a loss, or None."""
    return loss.refinement if is_refined(loss) else None


def misfit(loss: Loss, scores: Sequence[float], label_smoothing: float | None) -> str:
    """Return why a loss cannot train on a pair, for `cannot_train`; empty if it can.

    Args:
        loss: the loss.
        scores: the judge's mean scores of the chosen and the rejected response; empty unless both are known.
        label_smoothing: the pair's own ε, or None.
    """
    if label_smoothing is not None and not isinstance(loss, SmoothedLoss):
        return "has no use for label_smoothing, but it is in"
    if loss.offset is Offset.score_gap and not (scores and scores[0] > scores[1]):
        return "needs chosen_score above rejected_score in every pair, but it is not in"
    if loss.offset is Offset.win_shares and not (scores and all(0 <= score <= 1 for score in scores)):
        return "needs chosen_score and rejected_score, shares of wins from 0 to 1, in every pair, but they are not in"
    return ""


def cannot_train(loss: Loss, misfits: dict[str, list[str]]) -> str:
    """Return the message about pairs that a loss cannot train on; empty if there are none.

    Args:
        loss: the loss.
        misfits: {result of `misfit`: ids of the pairs}.
    """
    return "\n".join(
        f"the loss {loss.title} {why} {plural(len(pairs), 'pair')}, such as {pairs[0]}. Remove these pairs or choose "
        "another loss"
        for why, pairs in misfits.items()
        if why
    )


def augmentation_of(loss: Loss) -> Refinement | None:
    """Return the settings of a loss's passes given p⊕x, and p⁻⊕x; None if it has no such pass."""
    source = refinement_of(loss)
    return source.augmentation() if source else None


def reference_augmentation_of(loss: Loss) -> Refinement | None:
    """Return the settings of the reference's pass given p⊕x; None if a loss does not need it."""
    source = refinement_of(loss)
    return source.augmentation() if source and source.has_reference else None
