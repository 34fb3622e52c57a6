"""align: M_t + preference pairs → M_{t+1}."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Protocol

import torch

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.core.jsonl import chunks, stream_records
from selfalign.core.records import PreferencePair
from selfalign.losses.logps import PairLogps
from selfalign.losses.preference import ODPO, Positives, PreferenceLoss, SrDPO, SrIPO, rewards
from selfalign.losses.refinement import Refinement
from selfalign.metrics.accumulate import Sums, add_sums, averages
from selfalign.metrics.rewards import length_moments, logp_changes, reward_intervals, reward_metrics
from selfalign.models.batches import Group, PairExample, encode_pairs
from selfalign.models.checkpoint import Policy, PolicyFiles, autocast
from selfalign.models.scorer import make_scoring
from selfalign.models.tokenizer import unknown_counts
from selfalign.store.artifacts import Artefact, Counts, Workspace, together
from selfalign.training.checkpoint_selection import CheckpointSelection
from selfalign.training.config import Optimization, Weights
from selfalign.training.dataset import follow_references, store_examples
from selfalign.training.objective import Outcome, forward
from selfalign.training.parallelism import my_passes, out_of_wrapper
from selfalign.training.splits import hold_out
from selfalign.training.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@together
def align(
    out: Workspace,
    *,
    policy: Artefact,
    base: Artefact,
    pairs: Artefact,
    reference: Artefact,
    loss: PreferenceLoss,
    start: Artefact | None,
    held_out: int,
    trained_on: list[Artefact],
    selection: CheckpointSelection | None,
    optimization: Optimization,
    weights: Weights,
) -> Counts:
    """Trains a policy on preference pairs.

    Args:
        out: gets the trained policy.
        policy: M_t, where training starts.
        base: M0, which an adapter belongs to.
        pairs: pairs.jsonl.
        reference: references.jsonl, the reference policy's log-probabilities of these pairs; or that policy itself,
            which is then asked at every step.
        loss: one of `selfalign.losses.preference`.
        start: references.jsonl, M_t's own log-probabilities of these pairs; None where the reference is M_t itself,
            so that the first step has a known loss, which is checked, and where another policy is asked at every step.
        held_out: how many pairs are set aside, to be measured and not trained on; they share no text with others.
        trained_on: artefacts with what the policy has learnt from, with which held-out pairs share no text either.
        selection: what decides after which step the policy is taken; None takes the last.
        optimization: rates, sizes and lengths.
        weights: which weights are trained.
    """
    references = open_references(reference, base, weights)
    examples = store_examples(
        out.scratch / "examples",
        PairExample,
        lambda tally: _encode(PolicyFiles(policy.path), pairs, reference, start, loss, optimization.max_length, tally),
    )
    training, held, split = hold_out(examples, pairs.path / "pairs.jsonl", held_out, trained_on)
    is_reference = start is None and (isinstance(references, StoredReferences) or reference.digest == policy.digest)
    objective = Preference(
        loss,
        references,
        starts_as_reference=is_reference and not optimization.dropout,
        dtype="bfloat16" if "bfloat16" in (optimization.compute_dtype, weights.dtype) else "float32",
        start=StoredReferences("start") if start else references if is_reference else None,
    )
    checkpoints = selection.open(out, PolicyFiles(base.path)) if selection else None
    trained = train(
        out,
        policy=PolicyFiles(policy.path),
        base=PolicyFiles(base.path),
        examples=training,
        objective=objective,
        optimization=optimization,
        weights=weights,
        checkpoints=checkpoints,
    )
    counts: Counts = {
        "pairs": len(training),
        "prompts_cut": examples.counts.get("cut", 0),
        "prompts_cut_behind_p": examples.counts.get("cut_behind_p", 0),
        **unknown_counts(examples.counts),
        "dropped": {"too_long": examples.counts.get("too_long", 0)}
        | ({"beside_held_out": split.beside} if split else {}),
        **averages(objective.measure(trained, training, optimization)),
    }
    if checkpoints is not None:
        counts |= checkpoints.counts()
    if split is not None:
        measured = objective.measure(trained, held, optimization)
        numbers = averages(measured) | reward_intervals(measured)
        counts |= {"held_out_pairs": len(held), "held_out_passed_over": split.passed_over}
        counts |= {f"held_out/{name}": value for name, value in numbers.items()}
    return counts


def _encode(
    policy: PolicyFiles,
    pairs: Artefact,
    reference: Artefact,
    start: Artefact | None,
    loss: PreferenceLoss,
    limit: int,
    tally: Counter[str],
) -> Iterator[PairExample]:
    """The pairs as tokens, with the values that are stored of them."""
    records = stream_records(pairs.path / "pairs.jsonl", PreferencePair)
    examples = encode_pairs(policy.load_tokenizer(), records, augmentation_of(loss), limit, tally, policy.context)
    for role, artefact in (("reference", reference), ("start", start)):
        if artefact is not None and (file := artefact.path / "references.jsonl").exists():
            examples = follow_references(examples, file, role)
    return check_score_gaps(loss, examples)


class References(Protocol):
    """The reference policy's log-probabilities of pairs, given x or (`augmented`) p⊕x, without gradient."""

    def __call__(self, model: "PreTrainedModel", groups: Sequence[Group], *, augmented: bool = False) -> PairLogps: ...


@dataclass(slots=True)
class StoredReferences:
    """Computed before training; they stand with the pairs.

    Attributes:
        role: whose they are, "reference" or "start".
    """

    role: str = "reference"

    def __call__(self, model: "PreTrainedModel", groups: Sequence[Group], *, augmented: bool = False) -> PairLogps:
        """Reads them off.

        Raises:
            ValueError: a value is missing or not a number.
        """
        values = [getattr(group, self.role) or [math.nan] * 2 for group in groups]
        table = torch.tensor(values, device=model.device)
        if not bool(torch.isfinite(table).all()):
            raise ValueError("a stored reference log-probability is missing or not finite")
        tokens = torch.tensor([group.scored() for group in groups], device=model.device).float()
        return PairLogps(
            chosen=table[:, 0], rejected=table[:, 1], chosen_tokens=tokens[:, 0], rejected_tokens=tokens[:, 1]
        )


@dataclass(slots=True)
class SecondModel:
    """Computed at every step by the reference policy, in memory beside the policy that is trained."""

    reference: "PreTrainedModel"

    def __call__(self, model: "PreTrainedModel", groups: Sequence[Group], *, augmented: bool = False) -> PairLogps:
        """Computes them."""
        return frozen_logps(self.reference, groups)


@dataclass(slots=True)
class AdapterSwitchedOff:
    """Computed at every step by the trained policy without its adapter: the base it belongs to."""

    def __call__(self, model: "PreTrainedModel", groups: Sequence[Group], *, augmented: bool = False) -> PairLogps:
        """Computes them."""
        with model.disable_adapter():  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
            return frozen_logps(model, groups)


def open_references(reference: Artefact, base: Artefact, weights: Weights) -> References:
    """The reference values an artefact holds, or its policy ready to be asked for them."""
    if (reference.path / "references.jsonl").exists():
        return StoredReferences()
    if weights.lora.rank and reference.digest == base.digest:
        return AdapterSwitchedOff()
    loaded = PolicyFiles(reference.path).load(weights.dtype, apart=True)
    make_scoring(loaded)
    return SecondModel(loaded.model)


@dataclass(slots=True)
class Preference:
    """A preference loss over pairs, with the refinement pass where the loss asks for one.

    Attributes:
        loss: one of `selfalign.losses.preference`.
        references: the reference policy's log-probabilities.
        starts_as_reference: whether the first step's values are known.
        dtype: what the policy multiplies in; it decides how far the first step may be off.
        start: M_t's log-probabilities, from which changes are measured; None where they are not known.
    """

    loss: PreferenceLoss
    references: References
    starts_as_reference: bool
    dtype: str
    start: References | None = None

    def arrange(self, examples: Sequence[PairExample]) -> list[PairExample]:
        """A step's pairs; where the refinement is shuffled, each with the p⊕x pass of another one."""
        source = refinement_of(self.loss)
        if source is None or source.source != "shuffled":
            return list(examples)
        shuffled = list(examples)
        random.Random(derive_seed("shuffled", *(example.id for example in examples))).shuffle(shuffled)
        others = [*shuffled[1:], *shuffled[:1]]
        return [replace(one, augmented=other.augmented) for one, other in zip(shuffled, others, strict=True)]

    def weight(self, examples: Sequence[PairExample]) -> float:
        """The loss is averaged over pairs."""
        return float(len(examples))

    def __call__(self, model: "PreTrainedModel", examples: Sequence[PairExample]) -> Outcome:
        groups = [example.plain for example in examples]
        own = out_of_wrapper(model)
        policy, reference = pair_logps(model, groups), self.references(own, groups)
        delta = self.refine(own, examples, policy, reference)
        losses = self.loss(policy, reference, delta)
        start = self.loss(reference, reference, delta)
        policy = policy.detach()
        zeros = [*rewards(self.loss.beta, policy, reference)]
        if delta is not None and augmentation_of(self.loss):
            zeros.append(delta)
        count = float(len(examples))
        metrics = {
            **self.reward_metrics(policy, reference, delta),
            "logps/chosen": (float(policy.chosen.sum()), count),
            "logps/rejected": (float(policy.rejected.sum()), count),
            "loss": (float(losses.detach().sum()), count),
        }
        return Outcome(
            losses.sum(),
            metrics,
            distance=max(float(values.abs().max()) for values in zeros),
            loss_distance=float(((losses.detach() - start).abs() / start.abs().clamp(min=1e-3)).max()),
        )

    def refine(
        self, model: "PreTrainedModel", examples: Sequence[PairExample], policy: PairLogps, reference: PairLogps
    ) -> torch.Tensor | None:
        """Δ of each pair under the current policy, without gradient; None where the loss has none."""
        if isinstance(self.loss, ODPO):
            gaps = [example.score_gap or math.nan for example in examples]
            return torch.tensor(gaps, device=model.device).log()
        if not isinstance(self.loss, SrDPO | SrIPO):
            return None
        source = self.loss.refinement
        if source.source == "constant":
            return torch.full_like(reference.chosen, source.constant)
        if source.source == "naive":
            return self.loss.delta(policy, reference)
        groups = [example.augmented for example in examples if example.augmented is not None]
        return self.loss.delta(frozen_logps(model, groups), self.references(model, groups, augmented=True))

    def check_first_step(self, distance: float, loss_distance: float) -> None:
        """Stops the run if the policy does not start as the reference, where every reward and every Δ is 0.

        Args:
            distance: the largest of them, either sign.
            loss_distance: how far the worst pair's loss is from its value there, as a share of that value
                (ln 2 for DPO and Sr-DPO, 1/(4β²) for IPO and Sr-IPO).

        Raises:
            SelfalignError: one is too far off, with the likely causes.
        """
        if not self.starts_as_reference:
            return
        coarse = self.dtype == "bfloat16"
        if distance > self.loss.beta * (1.0 if coarse else 1e-2) or loss_distance > (0.5 if coarse else 0.05):
            raise SelfalignError(
                "the policy does not start as its reference: at the first step a reward or refinement is "
                f"{distance:.3g} away from 0, and the loss {loss_distance:.1%} from its known value. Likely causes: "
                "dropout is active, policy and reference were loaded in different dtypes, or the stored reference "
                "belongs to other weights or token ids"
            )

    @torch.no_grad()
    def measure(self, policy: Policy, examples: Sequence[PairExample], optimization: Optimization) -> Sums:
        """The reward metrics of a trained policy over pairs, and how far it has moved, as sums and weights.

        Every process measures its share of the pairs, and has the sums over all.
        """
        sums: Sums = {}
        policy.model.eval()
        for part in (part for chunk in chunks(examples) for part in my_passes(chunk, optimization.batch_tokens)):
            with autocast(policy.model.device, optimization.compute_dtype):
                groups = [example.plain for example in part.examples]
                logps, reference = pair_logps(policy.model, groups), self.references(policy.model, groups)
                delta = self.refine(policy.model, part.examples, logps, reference)
                start = self.start(policy.model, groups) if self.start else None
            if not part.repeated:
                sums = add_sums(sums, self.reward_metrics(logps, reference, delta))
                sums = add_sums(sums, self.drift(logps, reference, start))
        return reduce(add_sums, distributed.gather(sums))

    def drift(self, policy: PairLogps, reference: PairLogps, start: PairLogps | None) -> Sums:
        """How far the policy has moved from M_t, and what is needed to correlate its rewards with length."""
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

    def reward_metrics(self, policy: PairLogps, reference: PairLogps, delta: torch.Tensor | None) -> Sums:
        """The reward metrics of these pairs; Δ is among them where it comes from the policy."""
        source = refinement_of(self.loss)
        chosen, rejected = rewards(self.loss.beta, policy, reference)
        assert policy.chosen_tokens is not None
        assert policy.rejected_tokens is not None
        return reward_metrics(
            chosen.tolist(),
            rejected.tolist(),
            None if delta is None or source is None or source.source == "constant" else delta.tolist(),
            chosen_tokens=policy.chosen_tokens.tolist(),
            rejected_tokens=policy.rejected_tokens.tolist(),
        )


def pair_logps(model: "PreTrainedModel", groups: Sequence[Group]) -> PairLogps:
    """Summed log-probabilities of both responses of each pair."""
    batch, logps = forward(model, groups)
    sums = batch.sum_by_response(logps).view(-1, 2)
    tokens = batch.tokens.view(-1, 2)
    return PairLogps(chosen=sums[:, 0], rejected=sums[:, 1], chosen_tokens=tokens[:, 0], rejected_tokens=tokens[:, 1])


@torch.no_grad()
def frozen_logps(model: "PreTrainedModel", groups: Sequence[Group]) -> PairLogps:
    """The same without gradient and dropout."""
    training = model.training
    model.eval()
    try:
        return pair_logps(model, groups)
    finally:
        model.train(training)


def refinement_of(loss: PreferenceLoss | Positives) -> Refinement | None:
    """The refinement a loss asks for, or None."""
    return loss.refinement if isinstance(loss, SrDPO | SrIPO) else None


def augmentation_of(loss: PreferenceLoss | Positives) -> Refinement | None:
    """What a loss's second pass depends on; None where it has no second pass."""
    source = refinement_of(loss)
    return source.augmentation() if source else None


def check_score_gaps(loss: PreferenceLoss, examples: Iterable[PairExample]) -> Iterator[PairExample]:
    """The same pairs; ODPO takes the logarithm of their scores' difference.

    Raises:
        SelfalignError: behind the last pair, one has no scores, or its chosen response's is not the higher one.
    """
    wrong: list[str] = []
    for example in examples:
        if isinstance(loss, ODPO) and not (example.score_gap or 0) > 0:
            wrong.append(example.id)
        yield example
    if wrong:
        raise SelfalignError(lacks_score_gaps(wrong))


def lacks_score_gaps(pairs: Sequence[str]) -> str:
    """Says which pairs ODPO cannot be trained on."""
    return f"loss=odpo needs chosen_score above rejected_score in every pair; {len(pairs)} have not, like {pairs[0]}"
