"""What is minimised: an example, an objective over a step's examples, and SFT's likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from selfalign.losses.logps import PairLogps
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean, Sums
from selfalign.models.batches import Batch, SharedPrompt, make_batch
from selfalign.training.parallelism import out_of_wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Example(Protocol):
    """One record to train on: its tokens, and what else the objective wants to know."""

    @property
    def id(self) -> str: ...

    def __len__(self) -> int: ...


class Objective(Protocol):
    """What is minimised: a sum over a step's examples, as `arrange` leaves them, divided by their weight."""

    def arrange(self, examples: Sequence[Any]) -> Sequence[Any]: ...

    def weight(self, examples: Sequence[Any]) -> float: ...

    def __call__(self, model: "PreTrainedModel", examples: Sequence[Any]) -> "ObjectiveOutput": ...

    def check_first_step(self, distance: float, loss_distance: float) -> None: ...


@dataclass(slots=True)
class ObjectiveOutput:
    """A forward pass: the loss summed over its examples, and metrics as (weighted sum, weight).

    `distance` is the largest value, either sign, of what must be 0 at the first step; `loss_distance` how far a loss
    is from its value there, as a share of it. `router_loss` is that of the pass, where the model has experts.
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
        """As they are."""
        return examples

    def weight(self, examples: Sequence[SharedPrompt]) -> float:
        """How many tokens, or examples, the step's loss is averaged over."""
        if self.loss_reduction == "examples":
            return float(sum(len(group.responses) for group in examples))
        return float(sum(sum(group.scored()) for group in examples))

    def __call__(self, model: "PreTrainedModel", examples: Sequence[SharedPrompt]) -> ObjectiveOutput:
        batch, scores = forward(model, examples, training_pass=True)
        losses = -batch.sum_by_response(scores.logps)
        total, right, tokens = float(losses.sum().detach()), float(scores.hits.sum()), float(batch.tokens.sum())
        if self.loss_reduction == "examples":
            losses = losses / batch.tokens
        metrics: Sums = {
            catalog.LOSS_PER_TOKEN.name: Mean(total, tokens),
            catalog.TOKEN_ACCURACY.name: Mean(right, tokens),
        }
        return ObjectiveOutput(losses.sum(), metrics, router_loss=scores.router_loss)

    def check_first_step(self, distance: float, loss_distance: float) -> None:
        """SFT has no known starting value."""


def forward(model: "PreTrainedModel", groups: Sequence[SharedPrompt], **options: bool) -> tuple[Batch, Any]:
    """The groups as a batch, and log p of its targets (nats), shape (response tokens,).

    With `training_pass` they are `TokenScores`. The model may be in DDP's wrapper.
    """
    own = out_of_wrapper(model)
    batch = make_batch(own, groups).to(own.device)
    return batch, model(logit_positions=batch.logit_positions, targets=batch.targets, **batch.inputs, **options)


def pair_logps(model: "PreTrainedModel", groups: Sequence[SharedPrompt]) -> PairLogps:
    """Summed log-probabilities of both responses of each pair."""
    return by_pair(*forward(model, groups))


def by_pair(batch: Batch, logps: Tensor) -> PairLogps:
    """The log-probabilities of tokens, summed over both responses of each pair."""
    sums = batch.sum_by_response(logps).view(-1, 2)
    tokens = batch.tokens.view(-1, 2)
    return PairLogps(chosen=sums[:, 0], rejected=sums[:, 1], chosen_tokens=tokens[:, 0], rejected_tokens=tokens[:, 1])


@torch.no_grad()
def frozen_logps(model: "PreTrainedModel", groups: Sequence[SharedPrompt]) -> PairLogps:
    """The same without gradient and dropout."""
    training = model.training
    model.eval()
    try:
        return pair_logps(model, groups)
    finally:
        model.train(training)
