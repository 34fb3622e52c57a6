"""sft: M0 + demonstrations → M1."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from selfalign.batches import Group, share_prompt
from selfalign.errors import SelfalignError
from selfalign.models import PolicyFiles
from selfalign.records import Demonstration, read_records
from selfalign.store import Artefact, Counts, Workspace, together
from selfalign.tokenization import encode_prompt, encode_response, end_of_turn_id
from selfalign.training import Likelihood, Optimization, Weights, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@together
def sft(
    out: Workspace,
    *,
    policy: Artefact,
    base: Artefact,
    demonstrations: Artefact,
    optimization: Optimization,
    weights: Weights,
) -> Counts:
    """Fine-tunes a policy on demonstrations; the loss is on target tokens only.

    Args:
        out: gets the trained policy.
        policy: where training starts.
        base: M0, which an adapter belongs to.
        demonstrations: demonstrations.jsonl.
        optimization: rates, sizes and lengths.
        weights: which weights are trained.
    """
    records = read_records(demonstrations.path / "demonstrations.jsonl", Demonstration)
    tokenizer = PolicyFiles(policy.path).load_tokenizer()
    groups = group_demonstrations(tokenizer, records, optimization.max_length)
    kept = sum(len(group.responses) for group in groups)
    train(
        out,
        policy=PolicyFiles(policy.path),
        base=PolicyFiles(base.path),
        examples=groups,
        objective=Likelihood(optimization.average),
        optimization=optimization,
        weights=weights,
    )
    return {
        "demonstrations": kept,
        "tokens": sum(map(len, groups)),
        "dropped": {"too_long": len(records) - kept},
    }


def group_demonstrations(tokenizer: "Tokenizer", records: Sequence[Demonstration], max_length: int) -> list[Group]:
    """The demonstrations that fit, as tokens: neighbours of one question together, with what they share computed once.

    Raises:
        SelfalignError: none fits.
    """
    encoded = [encode_demonstration(tokenizer, record) for record in records]
    kept = [example for example in encoded if len(example) <= max_length]
    if not kept:
        raise SelfalignError(
            f"none of {len(records)} demonstrations fits into train.sft.max_length={max_length} tokens"
        )
    return [
        share_prompt(family[0].record.id, [one.prompt for one in family], [one.response for one in family])
        for family in families(kept)
    ]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A demonstration as tokens."""

    record: Demonstration
    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def encode_demonstration(tokenizer: "Tokenizer", record: Demonstration) -> Encoded:
    """Tokenises a prompt with the beginning that is given, and a response that ends its turn.

    Raises:
        SelfalignError: the response's first token would merge with the beginning that is given.
    """
    prompt = encode_prompt(tokenizer, record.prompt, record.prefill)
    if not record.prefill:
        return Encoded(record, prompt, encode_response(tokenizer, record.response, finished=True))
    whole = encode_prompt(tokenizer, record.prompt, record.prefill + record.response)
    if whole[: len(prompt)] != prompt:
        raise SelfalignError(
            f"record {record.id}: this tokenizer writes the end of {record.prefill!r} and what follows as one token"
        )
    return Encoded(record, prompt, [*whole[len(prompt) :], end_of_turn_id(tokenizer)])


def families(examples: list[Encoded]) -> list[list[Encoded]]:
    """Neighbours of one question together, every other demonstration alone."""
    return [list(family) for _, family in groupby(examples, key=lambda one: one.record.question or one.record.id)]
