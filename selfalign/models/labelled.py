"""Labelled responses to tokens, each beside the response to another prompt, from which KTO estimates z₀.

z₀ is the KL divergence of the policy from its reference, estimated from responses to prompts that they do not answer
(arXiv 2402.01306). Which response a prompt gets is settled here, so that the reference's log-probability of it can be
stored with those of the labelled responses, and no split into microbatches or processes changes it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from selfalign.core.errors import SelfalignError
from selfalign.core.records import LabelledResponse, Prompt
from selfalign.data.thinking import ask_to_think
from selfalign.models.batches import PairExample, SharedPrompt, encode_group, shorten_group
from selfalign.models.tokenizer import Answer, settle_boundary, text_faults, under_system, warn_of_faults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Labelled(NamedTuple):
    """The tokens of a labelled response behind its prompt, of which the beginning may be cut off.

    `asked` is the whole prompt, by which responses to another one are known.
    """

    asked: Prompt
    group: SharedPrompt
    desirable: bool


def encode_labelled(
    tokenizer: "Tokenizer",
    records: Iterable[LabelledResponse],
    limit: int,
    tally: Counter[str],
    *,
    mask_thought: bool = False,
) -> Iterator[PairExample]:
    """Yield labelled responses as tokens, each beside the response to another prompt, in at most `limit` tokens.

    The i-th response to a prompt is put beside the i-th to the next prompt, whose responses are counted anew behind the
    last; the last prompt takes those of the first. If a prompt with its own response is too long, it loses its
    beginning; the other response, which is never trained on, loses its end.

    Args:
        tokenizer: the policy's.
        records: in any number; those of one prompt follow one another.
        limit: the longest prompt with a response, in tokens.
        tally: counts `labelled` and, of these, `desirable` ones; those with a `cut` prompt; those with the faults that
            `text_faults` names; and those dropped because a response alone is `too_long`.
        mask_thought: whether thoughts are read without being scored.

    Raises:
        SelfalignError: no response fits, or all have the same prompt.
    """
    encoded = _encode(tokenizer, records, limit, tally, mask_thought)
    runs = (list(run) for _, run in groupby(encoded, key=lambda one: one.asked))
    first = next(runs, [])
    before, second = first, None
    for run in runs:
        second = second or run
        yield from _beside(before, run, limit)
        before = run
    warn_of_faults(tokenizer, tally, tally["labelled"], "labelled responses")
    if not first:
        raise SelfalignError(
            f"none of {tally['too_long']} labelled responses fits into train.align.max_length={limit} tokens"
        )
    if second is None:
        raise SelfalignError(
            f"all {len(first)} labelled responses have the same prompt, but KTO takes responses to other prompts too: "
            "raise data.instruct.count, or give pairs of several prompts"
        )
    yield from _beside(before, second if before[0].asked == first[0].asked else first, limit)


def _encode(
    tokenizer: "Tokenizer", records: Iterable[LabelledResponse], limit: int, tally: Counter[str], mask_thought: bool
) -> Iterator[Labelled]:
    for record in records:
        asked = under_system(tokenizer, ask_to_think(record.thought_prompt, record.prompt))
        prompt, answers = settle_boundary(tokenizer, asked, [answer_of_labelled(record)])
        whole = encode_group(tokenizer, record.id, prompt, answers, mask_thought=mask_thought)
        group, prompt = shorten_group(tokenizer, whole, prompt, limit)
        if group is None or prompt is None:
            tally["too_long"] += 1
            continue
        tally.update({"labelled": 1, "desirable": int(record.desirable), "cut": int(group is not whole)})
        tally.update(text_faults(tokenizer, prompt, answers))
        yield Labelled(asked, group, record.desirable)


def _beside(run: Sequence[Labelled], others: Sequence[Labelled], limit: int) -> Iterator[PairExample]:
    """Yield the responses to a prompt, each beside one to another prompt, which is cut to fit."""
    for place, (_, group, desirable) in enumerate(run):
        other = others[place % len(others)].group
        ids = other.responses[0][: limit - len(group.prompt)]
        passed = other.unscored[0] if other.unscored else []
        spans = [[start, min(end, len(ids))] for start, end in passed if start < len(ids)]
        both = replace(
            group,
            responses=[*group.responses, ids],
            num_context_tokens=[*group.num_context_tokens, min(*other.num_context_tokens, len(ids))],
            unscored=[*(group.unscored or [[]]), spans] if group.unscored or spans else [],
        )
        yield PairExample(plain=both, desirable=desirable)


def answer_of_labelled(record: LabelledResponse) -> Answer:
    """Return a labelled response as the text behind its prompt."""
    return Answer(
        text=record.response,
        finished=record.finished,
        ids=record.ids,
        thought=record.thought,
        calls=record.calls or [],
        turns=record.turns or [],
    )
