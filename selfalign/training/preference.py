"""The preference objective: a preference loss over pairs, with a refinement pass if the loss needs one."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, cast

import torch

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.core.jsonl import stream_records
from selfalign.core.records import PreferencePair
from selfalign.data.labelled import stream_labelled
from selfalign.losses.logps import PairLogps
from selfalign.losses.preference import rewards
from selfalign.losses.protocol import (
    Offset,
    PreferenceLoss,
    RefinedLoss,
    SmoothedLoss,
    UnpairedLoss,
    augmentation_of,
    cannot_train,
    is_refined,
    is_unpaired,
    loss_during,
    misfit,
    reference_augmentation_of,
    refinement_of,
)
from selfalign.losses.refinement import Normalisation
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean, Moments, Sums
from selfalign.metrics.rewards import length_moments, logp_changes, reward_metrics
from selfalign.models.batches import Before, PairExample, encode_pairs
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.labelled import encode_labelled
from selfalign.store.artifacts import Artifact
from selfalign.training.config import Optimization, TrainableWeights
from selfalign.training.objective import (
    ObjectiveOutput,
    by_pair,
    check_start,
    forward,
    frozen_logps,
    pair_logps,
    sum_over,
)
from selfalign.training.parallelism import Microbatch, unwrap
from selfalign.training.reference import References, StoredReferences, groups_of, join_references, open_references
from selfalign.training.unpaired import Unpaired

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_objective(
    loss: PreferenceLoss | UnpairedLoss,
    policy: Artifact,
    base: Artifact,
    reference: Artifact,
    start: Artifact | None,
    optimization: Optimization,
    weights: TrainableWeights,
) -> "Preference | Unpaired":
    """Make the objective of an alignment, with its reference log-probabilities.

    Args:
        loss: one of `selfalign.losses.preference`, of pairs or of labelled responses.
        policy: M_t, the start of training.
        base: M0, the base of an adapter.
        reference: stored log-probabilities of the reference policy, or that policy itself.
        start: stored log-probabilities of M_t if the reference is another policy, else None.
        optimization: rates, sizes and lengths.
        weights: the weights to train.
    """
    references = open_references(reference, base, weights)
    is_reference = start is None and (isinstance(references, StoredReferences) or reference.digest == policy.digest)
    known = is_reference and not optimization.dropout
    dtype = "bfloat16" if "bfloat16" in (optimization.compute_dtype, weights.dtype) else "float32"
    before = StoredReferences("start") if start else references if is_reference else None
    if is_unpaired(loss):
        return Unpaired(loss, references, known, dtype, before)
    # A dropped activation is another one in the next pass, and checkpointing and shards are there to keep little.
    reuses = not (optimization.dropout or optimization.gradient_checkpointing or weights.parallelism.sharded)
    return Preference(cast(PreferenceLoss, loss), references, known, dtype, before, reuses)


def encode_preferences(
    policy: PolicyCheckpoint,
    pairs: Artifact,
    reference: Artifact,
    start: Artifact | None,
    loss: PreferenceLoss | UnpairedLoss,
    limit: int,
    tally: Counter[str],
    *,
    mask_thought: bool = False,
) -> Iterator[PairExample]:
    """Tokenise pairs or labelled responses one by one, and join them with their stored log-probabilities.

    Args:
        policy: the checkpoint whose tokenizer and context are used.
        pairs: pairs.jsonl, or labelled.jsonl for an unpaired loss, which takes both.
        reference: references.jsonl; or the reference policy, which has no stored log-probabilities.
        start: references.jsonl of M_t, or None.
        loss: the loss, which declares whether pairs need p⊕x or scores.
        limit: the longest prompt with a response, in tokens.
        tally: receives the counts of `encode_pairs` or `encode_labelled`.
        mask_thought: whether thoughts are read without being scored.

    Raises:
        SelfalignError: no pair fits, a pair has no stored log-probabilities, or the loss cannot train on it.
    """
    tokenizer = policy.load_tokenizer()
    if is_unpaired(loss):
        labelled = stream_labelled(pairs.path)
        examples = encode_labelled(tokenizer, labelled, limit, tally, mask_thought=mask_thought)
    else:
        records, p = stream_records(pairs.path / "pairs.jsonl", PreferencePair), augmentation_of(loss)
        examples = encode_pairs(tokenizer, records, p, limit, tally, policy.context, mask_thought=mask_thought)
    for role, artifact in (("reference", reference), ("start", start)):
        if artifact is not None and (file := artifact.path / "references.jsonl").exists():
            examples = join_references(examples, file, role)
    yield from check_pairs(loss, examples)


@dataclass(slots=True)
class Preference:
    """A preference loss over pairs, with a refinement pass if the loss needs one.

    Attributes:
        loss: one of `selfalign.losses.preference`.
        references: the reference policy's log-probabilities.
        starts_as_reference: whether the policy starts as its reference, so that the first step is known.
        dtype: the dtype of multiplications, which sets the tolerance of the first step.
        start: M_t's log-probabilities, from which changes are measured; None if they are not computed.
        reuses: whether the pass given p⊕x goes on from what x and p⊕x begin with, as the pass given x has computed it.
        step_loss: the loss of the current step.
        deltas: {pair: Δ} of this process's pairs of the step, where Δ is normalised.
        normalisation: the step's normalisation of Δ.
    """

    loss: PreferenceLoss
    references: References
    starts_as_reference: bool
    dtype: str
    start: References | None = None
    reuses: bool = False
    step_loss: PreferenceLoss = field(init=False)
    deltas: dict[str, float] = field(init=False, default_factory=dict)
    normalisation: Normalisation = field(init=False, default_factory=Normalisation)

    def __post_init__(self) -> None:
        self.step_loss = self.loss

    def arrange(self, examples: Sequence[PairExample]) -> list[PairExample]:
        """Return the pairs of a step. If the refinement is shuffled, each has the p⊕x pass of another pair."""
        source = refinement_of(self.loss)
        if source is None or source.source != "shuffled":
            return list(examples)
        shuffled = list(examples)
        random.Random(derive_seed("shuffled", *(example.id for example in examples))).shuffle(shuffled)
        others = [*shuffled[1:], *shuffled[:1]]
        return [
            replace(one, augmented=other.augmented, augmented_reference=other.augmented_reference)
            for one, other in zip(shuffled, others, strict=True)
        ]

    def weight(self, examples: Sequence[PairExample]) -> float:
        """Return the number of pairs, over which the loss is averaged."""
        return float(len(examples))

    def begin_step(
        self, model: "PreTrainedModel", microbatches: Sequence[Microbatch[PairExample]], share: float
    ) -> None:
        """Take the loss of the step, and compute Δ of all its pairs over all processes if it is normalised."""
        self.step_loss = loss_during(self.loss, share)
        if not is_refined(self.loss) or (kind := self.loss.refinement.normalise) == "none":
            return
        own, moments = unwrap(model), Moments(0.0, 0.0, 0.0)
        self.deltas.clear()
        for microbatch in microbatches:
            deltas = self.delta(self.loss, own, microbatch.examples).tolist()
            self.deltas |= {example.id: delta for example, delta in zip(microbatch.examples, deltas, strict=True)}
            if not microbatch.repeated:
                moments += Moments.of(deltas)
        step = reduce(add, distributed.gather(moments))
        self.normalisation = Normalisation.of(kind, step.total / step.count, step.mean_square, self.loss.beta)

    def __call__(self, model: "PreTrainedModel", examples: Sequence[PairExample]) -> ObjectiveOutput:
        own, groups = unwrap(model), groups_of(examples)
        keep = self.reuses and not self.deltas and augmentation_of(self.loss) is not None
        batch, scores = forward(model, groups, keep=keep, training_pass=True)
        before = Before.of(batch, groups) if keep else None
        policy, reference = by_pair(batch, scores.logps), self.references(own, examples)
        if self.deltas:
            offset = torch.tensor([self.deltas[example.id] for example in examples], device=own.device)
            weighed = self.normalisation(offset)
        else:
            weighed = offset = self.offset(own, examples, policy, reference, before)
        losses = self.losses(examples, policy, reference, weighed)
        start = self.losses(examples, reference, reference, weighed)
        policy = policy.detach()
        zeros = [*rewards(self.loss.beta, policy, reference)]
        if offset is not None and reference_augmentation_of(self.loss):
            zeros.append(offset)
        count = float(len(examples))
        metrics = {
            **self.reward_metrics(policy, reference, offset),
            catalog.LOGPS_CHOSEN.name: Mean(float(policy.chosen.sum()), count),
            catalog.LOGPS_REJECTED.name: Mean(float(policy.rejected.sum()), count),
            catalog.LOSS.name: Mean(float(losses.detach().sum()), count),
        }
        return ObjectiveOutput(
            losses.sum(),
            metrics,
            distance=max(float(values.abs().max()) for values in zeros),
            loss_distance=float(((losses.detach() - start).abs() / start.abs().clamp(min=1e-3)).max()),
            router_loss=scores.router_loss,
        )

    def losses(
        self, examples: Sequence[PairExample], policy: PairLogps, reference: PairLogps, offset: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the step's loss of each pair, with the label smoothing of those that have their own."""
        loss, smoothings = self.step_loss, [example.label_smoothing for example in examples]
        if not isinstance(loss, SmoothedLoss) or not any(one is not None for one in smoothings):
            return loss(policy, reference, offset)
        own = [loss.label_smoothing if one is None else one for one in smoothings]
        return loss(policy, reference, offset, torch.tensor(own, device=policy.chosen.device))

    def offset(
        self,
        model: "PreTrainedModel",
        examples: Sequence[PairExample],
        policy: PairLogps,
        reference: PairLogps,
        before: Before | None = None,
    ) -> torch.Tensor | None:
        """Return the offset that the loss declares, or None.

        Δ and the score gap are of shape (pairs,), win shares of shape (pairs, 2), chosen before rejected; all without
        gradient.
        """
        if self.loss.offset in (Offset.score_gap, Offset.win_shares):
            scores = torch.tensor([example.scores for example in examples], device=model.device)
            return scores if self.loss.offset is Offset.win_shares else scores[:, 0] - scores[:, 1]
        return self.delta(self.loss, model, examples, policy, reference, before) if is_refined(self.loss) else None

    def delta(
        self,
        loss: RefinedLoss,
        model: "PreTrainedModel",
        examples: Sequence[PairExample],
        policy: PairLogps | None = None,
        reference: PairLogps | None = None,
        before: Before | None = None,
    ) -> torch.Tensor:
        """Return Δ as the source of the refinement says, shape (pairs,), without gradient.

        Δ_naive needs the log-probabilities given x of policy and reference, which are computed if they are not given.
        The passes given p⊕x and p⁻⊕x go on from `before`, the pass given x of the same weights, where that is given.
        """
        source = loss.refinement
        if source.source == "constant":
            return torch.full((len(examples),), source.constant, device=model.device)
        if source.source == "naive":
            policy = policy or frozen_logps(model, groups_of(examples))
            return loss.delta(policy, reference or self.references(model, examples))
        policy_p = frozen_logps(model, groups_of(examples, augmented=True), before)
        if source.source == "contrastive":
            negatives = [example.negative for example in examples if example.negative is not None]
            return loss.delta(policy_p, frozen_logps(model, negatives, before))
        return loss.delta(policy_p, self.references(model, examples, augmented=True))

    def check_first_step(self, distance: float, loss_distance: float) -> None:
        """Check that the policy starts as its reference, so that all rewards, and Δ of both, are 0 at the first step.

        Args:
            distance: the largest absolute reward or Δ, in units of reward.
            loss_distance: the largest relative distance of a pair's loss from its known value (ln 2 for DPO and
                Sr-DPO, 1/(4β²) for IPO and Sr-IPO).

        Raises:
            SelfalignError: a distance is too large. The message names the likely causes.
        """
        if self.starts_as_reference:
            check_start(self.loss.beta, self.dtype, distance, loss_distance)

    def measure(self, policy: Policy, examples: Sequence[PairExample], optimization: Optimization) -> Sums:
        """Compute the reward metrics of a trained policy over pairs, and its changes from M_t; see `sum_over`."""
        return sum_over(policy, examples, optimization, partial(self._measure, policy.model))

    def _measure(self, model: "PreTrainedModel", examples: Sequence[PairExample]) -> Sums:
        logps = pair_logps(model, groups_of(examples))
        reference = self.references(model, examples)
        offset = self.offset(model, examples, logps, reference)
        start = self.start(model, examples) if self.start else None
        return {**self.reward_metrics(logps, reference, offset), **self.drift(logps, reference, start)}

    def drift(self, policy: PairLogps, reference: PairLogps, start: PairLogps | None) -> Sums:
        """Return the changes of log-probabilities from M_t, and the correlation of rewards with length, as sums."""
        assert policy.chosen_tokens is not None
        assert policy.rejected_tokens is not None
        tokens = [*policy.chosen_tokens.tolist(), *policy.rejected_tokens.tolist()]
        chosen, rejected = rewards(self.loss.beta, policy, reference)
        moments = length_moments([*chosen.tolist(), *rejected.tolist()], tokens)
        if start is None:
            return moments
        return {
            **logp_changes("chosen", (policy.chosen - start.chosen).tolist(), policy.chosen_tokens.tolist()),
            **logp_changes("rejected", (policy.rejected - start.rejected).tolist(), policy.rejected_tokens.tolist()),
            **moments,
        }

    def reward_metrics(self, policy: PairLogps, reference: PairLogps, offset: torch.Tensor | None) -> Sums:
        """Return the reward metrics of these pairs as sums. They include Δ if it comes from the policy."""
        source = refinement_of(self.loss)
        chosen, rejected = rewards(self.loss.beta, policy, reference)
        assert policy.chosen_tokens is not None
        assert policy.rejected_tokens is not None
        return reward_metrics(
            chosen.tolist(),
            rejected.tolist(),
            None if offset is None or source is None or source.source == "constant" else offset.tolist(),
            chosen_tokens=policy.chosen_tokens.tolist(),
            rejected_tokens=policy.rejected_tokens.tolist(),
        )


def check_pairs(loss: PreferenceLoss | UnpairedLoss, examples: Iterable[PairExample]) -> Iterator[PairExample]:
    """Yield the pairs unchanged, and check that the loss can train on them.

    Raises:
        SelfalignError: after the last pair, if the loss cannot use one; see `misfit`.
    """
    misfits: dict[str, list[str]] = {}
    for example in examples:
        misfits.setdefault(misfit(loss, example.scores, example.label_smoothing), []).append(example.id)
        yield example
    if message := cannot_train(loss, misfits):
        raise SelfalignError(message)
