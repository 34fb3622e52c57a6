"""sft: M0 + demonstrations → M1."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import stream_records
from selfalign.core.records import Demonstration
from selfalign.data.thinking import ask_to_think
from selfalign.metrics import catalog
from selfalign.models.batches import SharedPrompt, of_record, share_prompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import (
    Answer,
    count_thought,
    encode_answers,
    encode_prompt,
    fault_counts,
    settle_boundary,
    text_faults,
    under_system,
    warn_of_faults,
)
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, records_in, stage
from selfalign.training.config import Optimization, TrainableWeights
from selfalign.training.dataset import store_examples
from selfalign.training.objective import Likelihood
from selfalign.training.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def size(*, demonstrations: Artifact, optimization: Optimization, **others: object) -> Size:
    """Return the number of demonstrations, the epochs and the batch size."""
    count = amount(records_in(demonstrations, "demonstrations"))
    return Size(f"SFT on {count} demonstrations, epochs {optimization.epochs}, batch {optimization.batch_size}", {})


@stage(size=size, all_ranks=True)
def sft(
    out: StageOutput,
    *,
    policy: Artifact,
    base: Artifact,
    demonstrations: Artifact,
    optimization: Optimization,
    weights: TrainableWeights,
) -> Counts:
    """Fine-tune a policy on demonstrations. The loss is on response tokens only.

    Args:
        out: receives the trained policy.
        policy: the start of training.
        base: M0, the base of an adapter.
        demonstrations: demonstrations.jsonl.
        optimization: rates, sizes and lengths.
        weights: the weights to train.
    """
    records, tally = stream_records(demonstrations.path / "demonstrations.jsonl", Demonstration), Counter[str]()
    tokenizer = PolicyCheckpoint(policy.path).load_tokenizer()
    length, mask = optimization.max_length, optimization.mask_thought
    reduction = optimization.loss_reduction
    groups = group_demonstrations(tokenizer, records, length, tally, mask_thought=mask, loss_reduction=reduction)
    examples = store_examples(out.scratch / "examples", SharedPrompt, groups, tally)
    train(
        out,
        policy=PolicyCheckpoint(policy.path),
        base=PolicyCheckpoint(base.path),
        examples=examples,
        objective=Likelihood(reduction),
        optimization=optimization,
        weights=weights,
    )
    return {
        catalog.DEMONSTRATIONS.name: examples.counts["demonstrations"],
        catalog.TOKENS.name: examples.counts["tokens"],
        **fault_counts(examples.counts),
        "dropped": {"too_long": examples.counts.get("too_long", 0)},
    }


def group_demonstrations(
    tokenizer: "Tokenizer",
    records: Iterable[Demonstration],
    max_length: int,
    tally: Counter[str],
    *,
    mask_thought: bool = False,
    loss_reduction: str = "tokens",
) -> Iterator[SharedPrompt]:
    """Tokenise the demonstrations that fit. Neighbours of one question are grouped and share their prompt's prefix.

    Thoughts that are masked are read as the end of the prompt. If the loss is averaged over tokens, the turns of one
    conversation become one sequence where each goes on from the one before.

    Raises:
        SelfalignError: no demonstration fits.
    """

    def fitting() -> Iterator[Encoded]:
        for record in records:
            example = encode_demonstration(tokenizer, record)
            example = example.masked(tokenizer) if mask_thought else example
            fits = len(example) <= max_length
            tally["demonstrations" if fits else "too_long"] += 1
            if fits:
                said = record.prefill + record.response
                answer = Answer(text=said, ids=record.ids, calls=record.response_calls or [])
                tally.update(text_faults(tokenizer, record.prompt, [answer]))
                yield example

    for group in by_question(fitting()):
        rows = joined_turns(group) if loss_reduction == "tokens" else group
        prompts, responses = [one.prompt for one in rows], [one.response for one in rows]
        shared = share_prompt(group[0].record.id, prompts, responses, [one.unscored for one in rows])
        tally["tokens"] += len(shared)
        yield shared
    warn_of_faults(tokenizer, tally, tally["demonstrations"], "demonstrations")
    if not tally["demonstrations"]:
        raise SelfalignError(
            f"none of {tally['too_long']} demonstrations fits into train.sft.max_length={max_length} tokens"
        )


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised demonstration. `unscored` has the [start, end] of what the response has of later prompts."""

    record: Demonstration
    prompt: list[int]
    response: list[int]
    unscored: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    def masked(self, tokenizer: "Tokenizer") -> "Encoded":
        """The same with its thought as a part of the prompt."""
        length = count_thought(tokenizer, self.prompt, self.response)
        return replace(self, prompt=[*self.prompt, *self.response[:length]], response=self.response[length:])

    def continued(self, later: "Encoded") -> "Encoded | None":
        """This one with a later turn of its conversation behind it; None if that turn's prompt does not begin so."""
        if later.prompt[: len(self)] != [*self.prompt, *self.response]:
            return None
        between = [len(self.response), len(later.prompt) - len(self.prompt)]
        response = [*later.prompt[len(self.prompt) :], *later.response]
        return replace(self, response=response, unscored=[*self.unscored, between])


def encode_demonstration(tokenizer: "Tokenizer", record: Demonstration) -> Encoded:
    """Tokenise a prompt with its prefill, and a response with the end of its turn.

    Raises:
        SelfalignError: the tokenizer merges the prefill with the response's first character, or the chat template
            refuses the prompt. The message names the record.
    """
    with of_record(record.id):
        calls = record.response_calls or []
        answer = Answer(text=record.response, ids=record.ids, thought=record.thought, calls=calls)
        asked = ask_to_think(record.thought_prompt, record.prompt)
        asked = asked if record.source == "eft" else under_system(tokenizer, asked)
        prompt, [answer] = settle_boundary(tokenizer, asked, [answer])
        ids = encode_prompt(tokenizer, prompt, record.prefill)
        if record.prefill and encode_prompt(tokenizer, prompt, record.prefill + record.response)[: len(ids)] != ids:
            raise SelfalignError(
                f"the tokenizer merges the prefill {record.prefill!r} with the next character, so the target has no "
                "own first token. Use another prefill or model."
            )
        [response] = encode_answers(tokenizer, prompt, [answer], record.prefill)
    return Encoded(record, ids, response)


def joined_turns(turns: Iterable[Encoded]) -> list[Encoded]:
    """Return demonstrations of one question with those joined whose prompts go on from the one before.

    A template that changes earlier turns, as by leaving out their thoughts, keeps them apart.
    """
    rows: list[Encoded] = []
    for turn in turns:
        if rows and (longer := rows[-1].continued(turn)) is not None:
            rows[-1] = longer
        else:
            rows.append(turn)
    return rows


def by_question(examples: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    """Group neighbours that have the same question. Other demonstrations are groups of one."""
    return (list(group) for _, group in groupby(examples, key=lambda one: one.record.question or one.record.id))
