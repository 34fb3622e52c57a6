"""The objective of an unpaired loss: labelled responses against the policy's distance z₀ from its reference."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING

import torch

from selfalign.core import distributed
from selfalign.data.labelled import LABELLED
from selfalign.losses.logps import Labels
from selfalign.losses.protocol import UnpairedLoss
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean, Sums
from selfalign.metrics.rewards import label_metrics, length_moments, logp_changes
from selfalign.models.batches import PairExample, SharedPrompt
from selfalign.models.checkpoint import Policy
from selfalign.store.artifacts import Artifact
from selfalign.store.stage import records_in
from selfalign.training.config import Optimization
from selfalign.training.objective import ObjectiveOutput, check_start, forward, frozen, pair_logps, sum_over
from selfalign.training.parallelism import Microbatch, unwrap
from selfalign.training.reference import References, groups_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def examples_in(pairs: Artifact, *, unpaired: bool) -> int:
    """Return how many examples an artifact has or will have at most: pairs or, for an unpaired loss, responses."""
    count = records_in(pairs, "pairs")
    return records_in(pairs, LABELLED) + 2 * count if unpaired else count


def label_counts(examples: Iterable[PairExample]) -> dict[str, int]:
    """Return the numbers of labelled responses and of desirable ones among them."""
    labels = [bool(example.desirable) for example in examples]
    return {catalog.LABELLED.name: len(labels), catalog.DESIRABLE.name: sum(labels)}


@dataclass(slots=True)
class Unpaired:
    """An unpaired loss over labelled responses.

    Attributes:
        loss: the loss.
        references: the reference policy's log-probabilities.
        starts_as_reference: whether the policy starts as its reference, so that the first step is known.
        dtype: the dtype of multiplications, which sets the tolerance of the first step.
        start: M_t's log-probabilities, from which changes are measured; None if they are not computed.
        reference: {response: its log-probability under the reference} of this process's responses of the step.
        divergence: mean of log π - log π_ref over the step's responses to other prompts, in nats.
    """

    loss: UnpairedLoss
    references: References
    starts_as_reference: bool
    dtype: str
    start: References | None = None
    reference: dict[str, float] = field(init=False, default_factory=dict)
    divergence: float = field(init=False, default=0.0)

    def arrange(self, examples: Sequence[PairExample]) -> Sequence[PairExample]:
        """Return the responses unchanged."""
        return examples

    def weight(self, examples: Sequence[PairExample]) -> float:
        """Return the number of responses, over which the loss is averaged."""
        return float(len(examples))

    def begin_step(
        self, model: "PreTrainedModel", microbatches: Sequence[Microbatch[PairExample]], share: float
    ) -> None:
        """Estimate z₀ from the responses to other prompts, over all microbatches of all processes."""
        own, ratios = unwrap(model), Mean(0.0, 0.0)
        self.reference.clear()
        for microbatch in microbatches:
            examples = microbatch.examples
            reference = self.references(own, examples)
            with frozen(own):
                batch, logps = forward(own, [_other(example) for example in examples])
            policy = batch.sum_by_response(logps)
            stored = zip(examples, reference.chosen.tolist(), strict=True)
            self.reference |= {example.id: logp for example, logp in stored}
            if not microbatch.repeated:
                ratios += Mean(float((policy - reference.rejected).double().sum()), float(len(examples)))
        self.divergence = reduce(add, distributed.gather(ratios)).value or 0.0

    def __call__(self, model: "PreTrainedModel", examples: Sequence[PairExample]) -> ObjectiveOutput:
        own = unwrap(model)
        batch, scores = forward(model, [_labelled(example) for example in examples], training_pass=True)
        policy = batch.sum_by_response(scores.logps)
        reference = torch.tensor([self.reference[example.id] for example in examples], device=own.device)
        desirable = _labels(examples, own.device)
        losses = self.loss(policy, reference, desirable, max(0.0, self.divergence))
        start = self.loss(reference, reference, desirable, 0.0)
        policy = policy.detach()
        beta, count = self.loss.beta, float(len(examples))
        return ObjectiveOutput(
            losses.sum(),
            {
                **label_metrics((beta * (policy - reference)).tolist(), desirable.tolist()),
                catalog.KL.name: Mean(count * self.divergence, count),
                catalog.LOGPS_CHOSEN.name: Mean(float(policy[desirable].sum()), float(desirable.sum())),
                catalog.LOGPS_REJECTED.name: Mean(float(policy[~desirable].sum()), float((~desirable).sum())),
                catalog.LOSS.name: Mean(float(losses.detach().sum()), count),
            },
            distance=beta * max(float((policy - reference).abs().max()), abs(self.divergence)),
            loss_distance=float(((losses.detach() - start).abs() / start).max()),
            router_loss=scores.router_loss,
        )

    def check_first_step(self, distance: float, loss_distance: float) -> None:
        """Check that the policy starts as its reference: all rewards and z₀ are 0, and a loss is half its weight.

        Args:
            distance: the largest absolute reward or β z₀.
            loss_distance: the largest relative distance of a response's loss from its known value.

        Raises:
            SelfalignError: a distance is too large. The message names the likely causes.
        """
        if self.starts_as_reference:
            check_start(self.loss.beta, self.dtype, distance, loss_distance)

    def measure(self, policy: Policy, examples: Sequence[PairExample], optimization: Optimization) -> Sums:
        """Compute the metrics of a trained policy over responses, and its changes from M_t; see `sum_over`."""
        return sum_over(policy, examples, optimization, partial(self._measure, policy.model))

    def _measure(self, model: "PreTrainedModel", examples: Sequence[PairExample]) -> Sums:
        policy, reference = pair_logps(model, groups_of(examples)), self.references(model, examples)
        start = self.start(model, examples) if self.start else None
        assert policy.chosen_tokens is not None
        tokens, desirable = policy.chosen_tokens, _labels(examples, model.device)
        rewards = (self.loss.beta * (policy.chosen - reference.chosen)).tolist()
        divergence = Mean(float((policy.rejected - reference.rejected).sum()), float(len(examples)))
        sums = {
            **label_metrics(rewards, desirable.tolist()),
            **length_moments(rewards, tokens.tolist()),
            catalog.KL.name: divergence,
        }
        if start is not None:
            change = policy.chosen - start.chosen
            sums |= logp_changes("chosen", change[desirable].tolist(), tokens[desirable].tolist())
            sums |= logp_changes("rejected", change[~desirable].tolist(), tokens[~desirable].tolist())
        return sums


def _labels(examples: Sequence[PairExample], device: torch.device) -> Labels:
    return torch.tensor([bool(example.desirable) for example in examples], device=device)


def _labelled(example: PairExample) -> SharedPrompt:
    """Return the labelled response behind its prompt."""
    return _only(example.plain, slice(0, 1))


def _other(example: PairExample) -> SharedPrompt:
    """Return the response to another prompt, behind the prompt of the labelled one."""
    return _only(example.plain, slice(1, 2))


def _only(group: SharedPrompt, which: slice) -> SharedPrompt:
    return replace(
        group,
        responses=group.responses[which],
        num_context_tokens=group.num_context_tokens[which],
        unscored=group.unscored[which],
    )
