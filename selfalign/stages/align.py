"""align: M_t + preference pairs → M_{t+1}."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from selfalign.batches import PairExample, encode_pairs, make_batch
from selfalign.errors import SelfalignError
from selfalign.losses import PairLogps, PreferenceLoss, SrDPO, SrIPO
from selfalign.metrics import averages, reward_metrics
from selfalign.models import Policy, PolicyFiles
from selfalign.records import PairReference, PreferencePair, read_records
from selfalign.refinement import Refinement, refinement
from selfalign.scoring import Scorer
from selfalign.store import Artefact, Counts, Workspace
from selfalign.training import Optimization, Outcome, Weights, forward, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def align(
    out: Workspace,
    *,
    policy: Artefact,
    base: Artefact,
    pairs: Artefact,
    reference: Artefact,
    loss: PreferenceLoss,
    starts_as_reference: bool,
    optimization: Optimization,
    weights: Weights,
) -> Counts:
    """Trains a policy on preference pairs.

    Args:
        out: gets the trained policy.
        policy: M_t, where training starts.
        base: M0, which an adapter belongs to.
        pairs: pairs.jsonl.
        reference: references.jsonl, the reference policy's log-probabilities of these pairs.
        loss: one of `selfalign.losses`.
        starts_as_reference: the reference is M_t itself, so the first step has a known loss, which is checked.
        optimization: rates, sizes and lengths.
        weights: which weights are trained.
    """
    records = read_records(pairs.path / "pairs.jsonl", PreferencePair)
    references = {r.id: r for r in read_records(reference.path / "references.jsonl", PairReference)}
    tokenizer = PolicyFiles(policy.path).load_tokenizer()
    examples, too_long = encode_pairs(tokenizer, records, refinement_of(loss), optimization.max_length)
    missing = [example.id for example in examples if example.id not in references]
    if missing:
        raise SelfalignError(f"{reference.path}: no reference for pair {missing[0]} ({len(missing)} in all)")
    trained = train(
        out,
        policy=PolicyFiles(policy.path),
        base=PolicyFiles(base.path),
        examples=examples,
        objective=Preference(loss, references, starts_as_reference, optimization.dtype),
        optimization=optimization,
        weights=weights,
    )
    autocast = optimization.precision(weights.dtype).autocast
    rewards = rewards_after(trained, examples, references, loss.beta, optimization.batch_tokens, autocast)
    return {"pairs": len(examples), "dropped": {"too_long": too_long}, **rewards}


@dataclass(slots=True)
class Preference:
    """A preference loss over pairs, with the refinement pass where the loss asks for one.

    Attributes:
        loss: one of `selfalign.losses`.
        references: the reference policy's log-probabilities by pair id.
        starts_as_reference: whether the first step's values are known.
        dtype: what the policy multiplies in; it decides how far the first step may be off.
    """

    loss: PreferenceLoss
    references: dict[str, PairReference]
    starts_as_reference: bool
    dtype: str

    def weight(self, examples: Sequence[PairExample]) -> float:
        """The loss is averaged over pairs."""
        return float(len(examples))

    def __call__(self, model: "PreTrainedModel", examples: Sequence[PairExample]) -> Outcome:
        policy = pair_logps(model, examples)
        reference = reference_logps(self.references, examples, model.device)
        delta = self._refinement(model, examples)
        losses = self.loss(policy, reference, delta)
        chosen = self.loss.beta * (policy.chosen - reference.chosen).detach()
        rejected = self.loss.beta * (policy.rejected - reference.rejected).detach()
        deltas = None if delta is None else delta.tolist()
        metrics = reward_metrics(chosen.tolist(), rejected.tolist(), deltas)
        distance = max(map(abs, [*chosen.tolist(), *rejected.tolist(), *(deltas or [])]))
        metrics["logps/chosen"] = (float(policy.chosen.detach().sum()), float(len(examples)))
        metrics["logps/rejected"] = (float(policy.rejected.detach().sum()), float(len(examples)))
        metrics["loss"] = (float(losses.detach().sum()), float(len(examples)))
        return Outcome(losses.sum(), metrics, distance)

    def _refinement(self, model: "PreTrainedModel", examples: Sequence[PairExample]) -> torch.Tensor | None:
        """Δ of each pair under the current policy, without gradient; None where the loss has none."""
        if refinement_of(self.loss) is None:
            return None
        with torch.no_grad():
            policy_p = pair_logps(model, examples, augmented=True)
        reference_p = reference_logps(self.references, examples, model.device, augmented=True)
        return refinement(policy_p, reference_p, self.loss.beta)

    def check_first_step(self, distance: float) -> None:
        """Stops the run if the policy does not start as the reference, where every reward and every Δ is 0.

        Args:
            distance: the largest of them, either sign.

        Raises:
            SelfalignError: one is too far from 0, with the likely causes.
        """
        tolerance = self.loss.beta * (1.0 if self.dtype == "bfloat16" else 1e-2)
        if self.starts_as_reference and distance > tolerance:
            raise SelfalignError(
                "the policy does not start as its reference: at the first step a reward or refinement is "
                f"{distance:.3g} away from 0. Likely causes: dropout is active, policy and reference "
                "were loaded in different dtypes, or the stored reference belongs to other weights or token ids"
            )


def pair_logps(model: "PreTrainedModel", examples: Sequence[PairExample], *, augmented: bool = False) -> PairLogps:
    """Summed log-probabilities of both responses of each pair, given x or p⊕x."""
    groups = [example.augmented if augmented else example.plain for example in examples]
    batch = make_batch(model, [group for group in groups if group is not None]).to(model.device)
    sums = batch.sum_by_response(forward(model, batch)).view(-1, 2)
    tokens = batch.tokens.view(-1, 2)
    return PairLogps(chosen=sums[:, 0], rejected=sums[:, 1], chosen_tokens=tokens[:, 0], rejected_tokens=tokens[:, 1])


def reference_logps(
    references: dict[str, PairReference],
    examples: Sequence[PairExample],
    device: torch.device,
    *,
    augmented: bool = False,
) -> PairLogps:
    """The stored values of these pairs, in their order.

    Raises:
        ValueError: a value is missing or not a number.
    """
    records = [references[example.id] for example in examples]
    values = [(r.augmented_chosen, r.augmented_rejected) if augmented else (r.chosen, r.rejected) for r in records]
    table = torch.tensor([[math.nan if v is None else v for v in row] for row in values], device=device)
    if not bool(torch.isfinite(table).all()):
        raise ValueError("a stored reference log-probability is missing or not finite")
    return PairLogps(chosen=table[:, 0], rejected=table[:, 1])


def rewards_after(
    policy: Policy,
    examples: Sequence[PairExample],
    references: dict[str, PairReference],
    beta: float,
    batch_tokens: int,
    autocast: str,
) -> dict[str, float]:
    """Margin and accuracy of the trained policy on all its pairs."""
    scorer = Scorer(policy, batch_tokens, autocast=autocast)
    groups = [example.plain for example in examples]
    sums = [pair for batch in scorer.plan(groups) for pair in scorer.score(batch)]
    chosen = [beta * (s[0] - references[e.id].chosen) for s, e in zip(sums, examples, strict=True)]
    rejected = [beta * (s[1] - references[e.id].rejected) for s, e in zip(sums, examples, strict=True)]
    return averages(reward_metrics(chosen, rejected))


def refinement_of(loss: PreferenceLoss) -> Refinement | None:
    """The refinement a loss asks for, or None."""
    return loss.refinement if isinstance(loss, SrDPO | SrIPO) else None
