"""Objectives of training: the protocol of objectives and examples, and the likelihood of SFT."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import chunks
from selfalign.losses.logps import PairLogps
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean, Sums, add_sums
from selfalign.models.batches import Batch, Before, S, SharedPrompt, make_batch
from selfalign.models.checkpoint import Policy, autocast
from selfalign.models.packed_attention import PackedLayout
from selfalign.training.config import Optimization
from selfalign.training.parallelism import Microbatch, local_microbatches, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Example(Protocol):
    """A tokenised training example. Its length is its number of tokens."""

    @property
    def id(self) -> str: ...

    def __len__(self) -> int: ...


class Objective(Protocol):
    """A loss over the examples of an optimiser step: the sum over `arrange(examples)`, divided by their weight.

    Before the forward passes of a step, `begin_step` gets this process's microbatches, and the share of all steps that
    was done before.
    """

    def arrange(self, examples: Sequence[Any]) -> Sequence[Any]: ...

    def weight(self, examples: Sequence[Any]) -> float: ...

    def begin_step(self, model: "PreTrainedModel", microbatches: Sequence[Microbatch[Any]], share: float) -> None: ...

    def __call__(self, model: "PreTrainedModel", examples: Sequence[Any]) -> "ObjectiveOutput": ...

    def check_first_step(self, distance: float, loss_distance: float) -> None: ...


@dataclass(slots=True)
class ObjectiveOutput:
    """The output of one forward pass.

    Attributes:
        loss: the loss, summed over the examples.
        metrics: sums of the metrics.
        distance: the largest absolute value of the quantities that must be 0 at the first step.
        loss_distance: the largest relative distance of a loss from its known value at the first step.
        router_loss: the load balancing loss of the pass, if the model has experts.
    """

    loss: Tensor
    metrics: Sums
    distance: float = 0.0
    loss_distance: float = 0.0
    router_loss: Tensor | None = None


@dataclass(slots=True)
class Likelihood:
    """SFT: the negative log-likelihood of the responses, averaged over target tokens or over examples.

    Attributes:
        loss_reduction: "tokens" or "examples".
    """

    loss_reduction: str

    def arrange(self, examples: Sequence[SharedPrompt]) -> Sequence[SharedPrompt]:
        """Return the examples unchanged."""
        return examples

    def weight(self, examples: Sequence[SharedPrompt]) -> float:
        """Return the number of tokens, or of examples, over which the step's loss is averaged."""
        if self.loss_reduction == "examples":
            return float(sum(len(group.responses) for group in examples))
        return float(sum(sum(group.scored()) for group in examples))

    def begin_step(self, model: "PreTrainedModel", microbatches: Sequence[Microbatch[Any]], share: float) -> None:
        """Do nothing: all steps are alike."""

    def __call__(self, model: "PreTrainedModel", examples: Sequence[SharedPrompt]) -> ObjectiveOutput:
        batch, scores = forward(model, examples, training_pass=True)
        losses = -batch.sum_by_response(scores.logps)
        total, right, tokens = (
            float(losses.sum().detach()),
            float(scores.hits[batch.occurrences].sum()),
            float(batch.tokens.sum()),
        )
        if self.loss_reduction == "examples":
            losses = losses / batch.tokens
        metrics: Sums = {
            catalog.LOSS_PER_TOKEN.name: Mean(total, tokens),
            catalog.TOKEN_ACCURACY.name: Mean(right, tokens),
        }
        return ObjectiveOutput(losses.sum(), metrics, router_loss=scores.router_loss)

    def check_first_step(self, distance: float, loss_distance: float) -> None:
        """Accept every value, because SFT has no known first loss."""


def forward(
    model: "PreTrainedModel",
    groups: Sequence[SharedPrompt],
    *,
    keep: bool = False,
    before: Before | None = None,
    **options: bool,
) -> tuple[Batch, Any]:
    """Return the groups as a batch, and the log-probabilities of its targets: nats, shape (targets,).

    With `training_pass=True`, return `TokenScores` instead. The model may be wrapped by DDP. With `keep`, the batch
    keeps keys and values, if it is packed, for passes with the same weights that go on from it: their `before`.
    """
    own = unwrap(model)
    batch = make_batch(own, groups, before).to(own.device)
    if keep and isinstance(layout := batch.inputs.get("layout"), PackedLayout):
        layout.kept = {}
    return batch, model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs, **options)


def pair_logps(model: "PreTrainedModel", groups: Sequence[SharedPrompt], before: Before | None = None) -> PairLogps:
    """Compute the log-probabilities of both responses of each pair: nats, summed over tokens, shape (pairs,).

    Raises:
        SelfalignError: one is not finite.
    """
    logps = by_pair(*forward(model, groups, before=before))
    finite = (logps.chosen + logps.rejected).isfinite().tolist()
    if wrong := [group.id for group, is_finite in zip(groups, finite, strict=True) if not is_finite]:
        raise SelfalignError(
            f"record {wrong[0]}: its log-probabilities are not finite under this policy: the training that made it has "
            "diverged. Lower its learning rate"
        )
    return logps


def by_pair(batch: Batch, logps: Tensor) -> PairLogps:
    """Sum the log-probabilities of tokens over both responses of each pair: nats, shape (pairs,)."""
    sums = batch.sum_by_response(logps).view(-1, 2)
    tokens = batch.tokens.view(-1, 2)
    return PairLogps(chosen=sums[:, 0], rejected=sums[:, 1], chosen_tokens=tokens[:, 0], rejected_tokens=tokens[:, 1])


def check_start(beta: float, dtype: str, distance: float, loss_distance: float) -> None:
    """Check that a policy that starts as its reference has rewards of 0 and the loss of these at the first step.

    Args:
        beta: of the rewards.
        dtype: of multiplications, which sets the tolerance.
        distance: the largest absolute value that must be 0, in units of reward.
        loss_distance: the largest relative distance of a loss from its known value.

    Raises:
        SelfalignError: a distance is too large. The message names the likely causes.
    """
    coarse = dtype == "bfloat16"
    if distance > beta * (1.0 if coarse else 1e-2) or loss_distance > (0.5 if coarse else 0.05):
        raise SelfalignError(
            "the policy does not start as its reference: at the first step a reward or refinement is "
            f"{distance:.3g} away from 0, and the loss {loss_distance:.1%} from its known value. Likely causes: "
            "dropout is active, policy and reference were loaded in different dtypes, or the stored reference "
            "belongs to other weights or token ids"
        )


@torch.no_grad()
def sum_over(
    policy: Policy, examples: Sequence[S], optimization: Optimization, measure: Callable[[list[S]], Sums]
) -> Sums:
    """Return the sums of a measurement of a trained policy over all examples.

    Every process measures its share, with autocast as in training, and returns the sums over all.

    Args:
        policy: the policy.
        examples: tokenised examples.
        optimization: sizes and dtype.
        measure: returns the sums over the examples of one forward pass.
    """
    sums: Sums = {}
    policy.model.eval()
    for part in (
        part
        for chunk in chunks(examples)
        for part in local_microbatches(policy.model, chunk, optimization.microbatch_tokens)
    ):
        with autocast(policy.model.device, optimization.compute_dtype):
            measured = measure(part.examples)
        if not part.repeated:
            sums = add_sums(sums, measured)
    return reduce(add_sums, distributed.gather(sums))


@contextmanager
def frozen(model: "PreTrainedModel") -> Iterator[None]:
    """Compute without gradient and dropout inside the block."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def frozen_logps(model: "PreTrainedModel", groups: Sequence[SharedPrompt], before: Before | None = None) -> PairLogps:
    """Compute `pair_logps` without gradient and dropout."""
    with frozen(model):
        return pair_logps(model, groups, before)
