"""The tails of preference pairs: what the assistant says behind a prompt, in one turn or in several."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET

from selfalign.core.records import LabelledResponse, Message, PreferencePair, Prompt
from selfalign.data.turns import as_text, said, texts_in


@dataclass(frozen=True, slots=True)
class Tail:
    """Turns behind a prompt that end with the assistant's answer.

    Attributes:
        text: the text of the answer.
        turns: the turns before it, the first of them the assistant's.
        calls: the tool calls of the answer.
    """

    text: str
    turns: list[Message] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, turns: Sequence[Message]) -> "Tail | None":
        """Return turns as a tail; None unless the first is the assistant's, and the last one its answer to another."""
        roles = [turn["role"] for turn in turns]
        if roles[:1] != ["assistant"] or roles[-1] != "assistant" or roles[-2:] == ["assistant", "assistant"]:
            return None
        return cls(turns[-1]["content"], list(turns[:-1]), turns[-1].get("tool_calls", []))

    def as_text(self) -> str:
        """Return the tail to read: its only answer, or its turns with their roles."""
        answer = said(self.text, self.calls)
        return as_text([*self.turns, {"role": "assistant", "content": answer}]) if self.turns else answer


def pair_of(
    prompt: Prompt,
    chosen: Tail,
    rejected: Tail,
    scores: tuple[float | None, float | None],
    label_smoothing: float | None = None,
) -> PreferencePair:
    """Return the pair of two tails, with an empty `id`."""
    return PreferencePair(
        id="",
        prompt=prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_score=scores[0],
        rejected_score=scores[1],
        chosen_turns=chosen.turns or UNSET,
        rejected_turns=rejected.turns or UNSET,
        chosen_calls=chosen.calls or UNSET,
        rejected_calls=rejected.calls or UNSET,
        label_smoothing=UNSET if label_smoothing is None else float(label_smoothing),
    )


def tails_of(pair: PreferencePair | LabelledResponse) -> tuple[Tail, ...]:
    """Return the tails of a pair, the chosen one first, or the only tail of a labelled response."""
    if isinstance(pair, LabelledResponse):
        return (Tail(pair.response, pair.turns or [], pair.calls or []),)
    return (
        Tail(pair.chosen, pair.chosen_turns or [], pair.chosen_calls or []),
        Tail(pair.rejected, pair.rejected_turns or [], pair.rejected_calls or []),
    )


def is_plain(pair: PreferencePair) -> bool:
    """Whether both responses of a pair are a single turn of text."""
    return not any(tail.turns or tail.calls for tail in tails_of(pair))


def texts_asked_in(pair: PreferencePair | LabelledResponse) -> set[str]:
    """Return the texts of a pair's prompt with the turns before its answers, as `texts_in` returns them."""
    if isinstance(pair.prompt, str):
        return texts_in(pair.prompt)
    return set[str]().union(*(texts_in([*pair.prompt, *tail.turns]) for tail in tails_of(pair)))


def common_turns(own: Sequence[Message], other: Sequence[Message]) -> int:
    """Return the number of common turns at the beginning of two conversations, without the last of the shorter one."""
    pairs = enumerate(zip(own, other, strict=False))
    return next((index for index, (one, two) in pairs if one != two), min(len(own), len(other)) - 1)
