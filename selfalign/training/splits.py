"""Choice of the held-out preference pairs, which share no text with the training data.

Two pairs share a text if the prompt or a response of one occurs in the other: as its prompt, as a response, or, if its
prompt is a dialogue, as the dialogue's beginning or as an earlier response in it. If a prompt ends in the beginning of
an answer, it counts without that. Texts are normalised with `compared`, and prompts have no system turn. Each text is
kept as a digest of eight bytes, so a pair needs about a hundred bytes.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_text
from selfalign.core.jsonl import HasId, stream_records
from selfalign.core.records import Demonstration, LabelledResponse, PreferencePair, Prompt, RankedAnswers
from selfalign.data.labelled import LABELLED
from selfalign.data.tails import tails_of, texts_asked_in
from selfalign.data.turns import as_text, compared, said, texts_in, turn_text, without_system
from selfalign.store.artifacts import Artifact
from selfalign.training.dataset import StoredExamples

Digests = np.ndarray[Any, np.dtype[np.uint64]]
Rows = np.ndarray[Any, np.dtype[np.int64]]
E = TypeVar("E", bound=HasId)


@dataclass(frozen=True, slots=True)
class Texts:
    """Digests of the texts of a record.

    Attributes:
        own: digests of its prompt, then of its responses, then of the turns before them in a pair's tails.
        context: digests of the shorter prompts within its dialogue, and of the responses in the dialogue.
    """

    own: list[int]
    context: list[int]


def texts_of(prompt: Prompt, *responses: str) -> Texts:
    """Return the digests of a prompt with its responses."""
    if isinstance(prompt, str):
        return Texts([_digest("prompt", prompt), *(_digest("response", text) for text in responses)], [])
    turns = without_system(prompt)
    context = [
        _digest("prompt", as_text(turns[: index + 1]))
        if turn["role"] == "user"
        else _digest("response", turn_text(turn))
        for index, turn in enumerate(turns)
        if turn["role"] != "user" or index + 1 < len(turns)
    ]
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return Texts([_digest("prompt", as_text(asked)), *(_digest("response", text) for text in responses)], context)


def texts_of_pair(pair: PreferencePair | LabelledResponse) -> Texts:
    """Return the digests of a pair or a labelled response, with each answer and each prompt in its tails."""
    tails = tails_of(pair)
    texts = texts_of(pair.prompt, *(said(tail.text, tail.calls) for tail in tails))
    turns = [] if isinstance(pair.prompt, str) else without_system(pair.prompt)
    more = [
        _digest("response", turn_text(turn))
        if turn["role"] == "assistant"
        else _digest("prompt", as_text([*turns, *tail.turns[: at + 1]]))
        for tail in tails
        for at, turn in enumerate(tail.turns)
        if turn["role"] != "tool"
    ]
    return Texts([*texts.own, *dict.fromkeys(more)], texts.context)


def _digest(kind: str, text: str) -> int:
    data = f"{kind}\0{compared(text)}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class KnownTexts:
    """Digests of the texts of the training data, in ascending order.

    Attributes:
        own: prompts and responses of demonstrations and pairs, and ranked questions of EFT.
        every: the same, and the contexts of their dialogues.
        judged: the answers to the ranked questions of EFT. Models are trained to judge them, not to give them.
    """

    own: Digests
    every: Digests
    judged: Digests

    @classmethod
    def of(cls, artifacts: Sequence[Artifact]) -> "KnownTexts":
        """Collect the demonstrations, pairs and ranked questions of EFT in these artifacts."""
        own, context, judged = array("Q"), array("Q"), array("Q")
        for artifact in artifacts:
            for texts in _stream_texts(artifact.path):
                own.extend(texts.own)
                context.extend(texts.context)
            for question in _stream(artifact.path / "taught.jsonl", RankedAnswers):
                prompt, *answers = texts_of(question.prompt, *question.texts).own
                own.append(prompt)
                judged.extend(answers)
        every = np.concatenate([_as_array(own), _as_array(context)])
        return cls(*map(np.unique, (_as_array(own), every, _as_array(judged))))

    def shares(self, texts: Texts) -> bool:
        """Whether a record shares a prompt or a response with the training data."""
        own, context = (np.array(digests, dtype=np.uint64) for digests in (texts.own, texts.context))
        return bool(_among(own, self.every).any() or _among(context, self.own).any())


def _stream_texts(folder: Path) -> Iterator[Texts]:
    """Yield the texts of an artifact's demonstrations and pairs."""
    for demonstration in _stream(folder / "demonstrations.jsonl", Demonstration):
        yield texts_of(demonstration.prompt, said(demonstration.response, demonstration.response_calls))
    for pair in _stream(folder / "pairs.jsonl", PreferencePair):
        yield texts_of_pair(pair)
    for response in _stream(folder / f"{LABELLED}.jsonl", LabelledResponse):
        yield texts_of_pair(response)


def prompts_of(artifact: Artifact) -> Iterator[str]:
    """Yield the normalised turns of the prompts of an artifact's demonstrations and pairs."""
    for demonstration in _stream(artifact.path / "demonstrations.jsonl", Demonstration):
        yield from texts_in(demonstration.prompt)
    for pair in _stream(artifact.path / "pairs.jsonl", PreferencePair):
        yield from texts_asked_in(pair)
    for response in _stream(artifact.path / f"{LABELLED}.jsonl", LabelledResponse):
        yield from texts_asked_in(response)


def _stream(path: Path, kind: type[E]) -> Iterator[E]:
    """Yield the records of a file; none if it is missing or empty."""
    return stream_records(path, kind) if path.is_file() and path.stat().st_size else iter(())


@dataclass(frozen=True, slots=True)
class Split:
    """A split of pairs, by their indices.

    Attributes:
        training: indices of the pairs to train on, in order.
        held_out: indices of the pairs to measure on, in order.
        beside: number of pairs in neither, because they share a text with a held-out pair.
        passed_over: number of pairs that cannot be held out, because they share a text with earlier training data.
    """

    training: Rows
    held_out: Rows
    beside: int
    passed_over: int


def split_pairs(pairs: Iterable[PreferencePair | LabelledResponse], count: int, known: KnownTexts) -> Split:
    """Hold out pairs that share no text with one another, with the training pairs, or with `known`.

    Pairs that share a text with a held-out pair are used for nothing. These include all other pairs of its instruction,
    so an interval over held-out pairs counts no instruction twice. Only direct neighbours are excluded, not chains of
    them, because a common response ("Yes.") would connect most pairs.

    Pairs with the fewest neighbouring instructions are held out first, so that a common response costs no training pair
    while there are enough others. Most pairs have no neighbours; the digests of their ids decide among equal ones. So
    the choice does not depend on the order of the pairs, and a larger count includes the choice of a smaller one.

    Raises:
        SelfalignError: there are too few such pairs, or no pair would be left to train on.
    """
    table = _Table.of(pairs)
    trained = np.union1d(known.every, known.judged)
    unusable = _among(table.own, trained).any(axis=1) | table.context_is_among(known.own)
    held_out = _pick(table, count, unusable)
    size, passed_over = len(table.own), int(unusable.sum())
    if count >= size:
        raise SelfalignError(f"train.validation_pairs={count} of {size} pairs leaves none to train on: lower it")
    if len(held_out) < count:
        raise SelfalignError(
            f"train.validation_pairs={count}, but only {len(held_out)} of {size} pairs share no prompt and no response "
            f"with one another and with earlier training data ({passed_over} share one with the latter, such as SFT "
            "data): lower it, or measure on other pairs with evaluate.preference_pairs.source"
        )
    own, every = table.texts_of(held_out)
    excluded = _among(table.own, every).any(axis=1) | table.context_is_among(own)
    training = np.flatnonzero(~excluded)
    if not len(training):
        raise SelfalignError(
            f"train.validation_pairs={count} of {size} pairs leaves none to train on, because all other pairs share a "
            "prompt or a response with a held-out pair: lower it"
        )
    return Split(training, held_out, int(excluded.sum()) - len(held_out), passed_over)


def hold_out(
    examples: StoredExamples[E],
    records: Iterator[PreferencePair] | Iterator[LabelledResponse],
    count: int,
    trained_on: Sequence[Artifact],
) -> tuple[StoredExamples[E], StoredExamples[E], Split | None]:
    """Split pairs, or labelled responses, into training and held-out ones.

    Args:
        examples: the pairs that are not too long.
        records: the pairs with their texts, in the same order.
        count: number of pairs to hold out.
        trained_on: artifacts that the policy was trained on before.

    Returns:
        (training pairs, held-out pairs, split). The split is None if `count` is 0.

    Raises:
        SelfalignError: see `split_pairs`.
    """
    if not count:
        return examples, examples.take([]), None
    fitting = (next(pair for pair in records if pair.id == name) for name in examples.ids())
    split = split_pairs(fitting, count, KnownTexts.of(trained_on))
    return examples.take(split.training), examples.take(split.held_out), split


@dataclass(frozen=True, slots=True)
class _Table:
    """The digests of the texts of all pairs.

    Attributes:
        own: digests of prompt, chosen and rejected response, shape (pairs, 3 or more): if tails have several turns, the
            digests of those too. A row that has fewer, as that of a labelled response, repeats its prompt's.
        context: digests of the contexts of the dialogues, of all pairs one after the other.
        ends: index of the end of each pair's part of `context`, shape (pairs,).
        order: digest of each pair's id, shape (pairs,).
    """

    own: Digests
    context: Digests
    ends: Rows
    order: Digests

    @classmethod
    def of(cls, pairs: Iterable[PreferencePair | LabelledResponse]) -> "_Table":
        own, context, ends, order = array("Q"), array("Q"), array("q"), array("Q")
        longer: dict[int, list[int]] = {}
        for row, pair in enumerate(pairs):
            texts = texts_of_pair(pair)
            width = len(tails_of(pair)) + 1
            own.extend([*texts.own[:width], texts.own[0]][:3])
            if more := texts.own[width:]:
                longer[row] = more
            context.extend(texts.context)
            ends.append(len(context))
            order.append(int(digest_text(pair.id)[:16], 16))
        columns = _widened(_as_array(own).reshape(-1, 3), longer)
        return cls(columns, _as_array(context), np.array(ends, np.int64), _as_array(order))

    def context_is_among(self, ordered: Digests) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return for each pair whether a text of its context is among these digests, shape (pairs,)."""
        found = np.concatenate([[0], np.cumsum(_among(self.context, ordered))])
        return found[self.ends] > found[np.concatenate([[0], self.ends[:-1]])]

    def texts_of(self, rows: Rows) -> tuple[Digests, Digests]:
        """Return (own texts, own texts and contexts) of these pairs, in ascending order."""
        context = [self.context[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows]
        own = self.own[rows].ravel()
        return np.unique(own), np.unique(np.concatenate([own, *context]))

    def neighbours(self) -> Rows:
        """Return for each pair the number of other instructions whose pairs have one of its own texts."""
        lengths = np.diff(self.ends, prepend=0)
        prompts = np.concatenate([np.repeat(self.own[:, 0], self.own.shape[1]), np.repeat(self.own[:, 0], lengths)])
        texts = np.concatenate([self.own.ravel(), self.context])
        order = np.lexsort((prompts, texts))
        texts, prompts = texts[order], prompts[order]
        first = np.ones(len(texts), dtype=bool)
        first[1:] = (texts[1:] != texts[:-1]) | (prompts[1:] != prompts[:-1])
        distinct, instructions = np.unique(texts[first], return_counts=True)
        return (instructions[np.searchsorted(distinct, self.own)] - 1).sum(axis=1)


def _widened(own: Digests, longer: dict[int, list[int]]) -> Digests:
    """Return the digests of all pairs with as many columns as the longest row needs."""
    width = max(map(len, longer.values()), default=0)
    columns = np.repeat(own[:, :1], width, axis=1)
    for row, more in longer.items():
        columns[row, : len(more)] = more
    return np.concatenate([own, columns], axis=1)


def _pick(table: _Table, count: int, unusable: np.ndarray[Any, np.dtype[np.bool_]]) -> Rows:
    """Return the indices of the held-out pairs, in order: the fewest neighbours first, if they share no text."""
    held_out: list[int] = []
    own: set[int] = set()
    every: set[int] = set()
    order = np.lexsort((table.order, table.neighbours()))
    for row in order[~unusable[order]]:
        if len(held_out) == count:
            break
        pair_own, pair_every = (set(texts.tolist()) for texts in table.texts_of(np.array([row])))
        if pair_own.isdisjoint(every) and pair_every.isdisjoint(own):
            held_out.append(int(row))
            own |= pair_own
            every |= pair_every
    return np.array(sorted(held_out), dtype=np.int64)


def _among(digests: Digests, ordered: Digests) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return for each digest whether it is among `ordered`, which is in ascending order; same shape as `digests`."""
    if not len(ordered):
        return np.zeros(digests.shape, dtype=bool)
    indices = np.searchsorted(ordered, digests)
    return ordered[np.minimum(indices, len(ordered) - 1)] == digests


def _as_array(digests: "array[int]") -> Digests:
    return np.frombuffer(digests, dtype=np.uint64) if len(digests) else np.zeros(0, np.uint64)
