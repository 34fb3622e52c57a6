"""The reference policy's log-probabilities of pairs: stored with them, or computed at every step."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import stream_records
from selfalign.core.records import PairReference
from selfalign.losses.logps import PairLogps
from selfalign.models.batches import PairExample, SharedPrompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.scorer import make_scoring
from selfalign.store.artifacts import Artifact
from selfalign.training.config import TrainableWeights
from selfalign.training.objective import frozen_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class References(Protocol):
    """Return the reference policy's log-probabilities of pairs, given x or, if `augmented`, p⊕x; without gradient."""

    def __call__(
        self, model: "PreTrainedModel", examples: Sequence[PairExample], *, augmented: bool = False
    ) -> PairLogps: ...


@dataclass(slots=True)
class StoredReferences:
    """Log-probabilities that were computed before training and are stored with the pairs.

    Attributes:
        role: the policy that they are of: "reference", or "start" for M_t.
    """

    role: str = "reference"

    def __call__(
        self, model: "PreTrainedModel", examples: Sequence[PairExample], *, augmented: bool = False
    ) -> PairLogps:
        """Read the log-probabilities of the pairs.

        Raises:
            ValueError: a log-probability is missing or not finite.
        """
        column = f"augmented_{self.role}" if augmented else self.role
        values = [getattr(example, column) or [math.nan] * 2 for example in examples]
        table = torch.tensor(values, device=model.device)
        if not bool(torch.isfinite(table).all()):
            raise ValueError("a stored reference log-probability is missing or not finite")
        groups = groups_of(examples, augmented=augmented)
        tokens = torch.tensor([group.scored() for group in groups], device=model.device).float()
        return PairLogps(
            chosen=table[:, 0], rejected=table[:, 1], chosen_tokens=tokens[:, 0], rejected_tokens=tokens[:, 1]
        )


@dataclass(slots=True)
class SecondModel:
    """Log-probabilities by the reference policy, a second model in memory, computed at every step."""

    reference: "PreTrainedModel"

    def __call__(
        self, model: "PreTrainedModel", examples: Sequence[PairExample], *, augmented: bool = False
    ) -> PairLogps:
        """Compute the log-probabilities of the pairs."""
        return frozen_logps(self.reference, groups_of(examples, augmented=augmented))


@dataclass(slots=True)
class AdapterSwitchedOff:
    """Log-probabilities by the base, which is the trained policy without its adapter, computed at every step."""

    def __call__(
        self, model: "PreTrainedModel", examples: Sequence[PairExample], *, augmented: bool = False
    ) -> PairLogps:
        """Compute the log-probabilities of the pairs."""
        with model.disable_adapter():  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
            return frozen_logps(model, groups_of(examples, augmented=augmented))


def groups_of(examples: Sequence[PairExample], *, augmented: bool = False) -> list[SharedPrompt]:
    """Return the tokens of each pair's responses given x or, if `augmented`, given p⊕x."""
    if augmented:
        return [example.augmented for example in examples if example.augmented is not None]
    return [example.plain for example in examples]


def open_references(reference: Artifact, base: Artifact, weights: TrainableWeights) -> References:
    """Open stored log-probabilities of an artifact, or load its policy to compute them."""
    if (reference.path / "references.jsonl").exists():
        return StoredReferences()
    if weights.lora.rank and reference.digest == base.digest:
        return AdapterSwitchedOff()
    loaded = PolicyCheckpoint(reference.path).load(weights.dtype, keep_adapter=True)
    make_scoring(loaded)
    return SecondModel(loaded.model)


def join_references(examples: Iterable[PairExample], file: Path, role: str) -> Iterator[PairExample]:
    """Yield the pairs with their stored log-probabilities.

    Args:
        examples: the pairs.
        file: references.jsonl in the order of the pairs; it may have other pairs too.
        role: the policy that the log-probabilities are of: "reference" or "start".

    Raises:
        SelfalignError: a pair has no log-probabilities.
    """
    stored = stream_records(file, PairReference)
    for example in examples:
        found = next((record for record in stored if record.id == example.id), None)
        if found is None:
            raise SelfalignError(
                f"{file}: log-probabilities of pair {example.id} are missing or not in the order of the pairs"
            )
        yield with_reference(example, found, role)


def with_reference(example: PairExample, record: PairReference, role: str) -> PairExample:
    """Return a pair with the log-probabilities of a policy, by the policy's role."""
    plain = [record.chosen, record.rejected]
    if role == "start":
        return replace(example, start=plain)
    chosen_p, rejected_p = record.augmented_chosen, record.augmented_rejected
    behind_p = [] if chosen_p is None or rejected_p is None else [chosen_p, rejected_p]
    return replace(example, reference=plain, augmented_reference=behind_p)
