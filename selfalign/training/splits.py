"""Which preference pairs are held out: such as share no text with anything that is trained on.

Two pairs share a text when the prompt or a response of one stands in the other: as its prompt, as a response, or as the
beginning or an earlier answer of the dialogue that is its prompt. Texts are compared as `compared` has them, and
prompts without their system turn. Of every text a digest of eight bytes is kept, so a pair needs some hundred bytes
and not its texts.
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
from selfalign.core.records import Demonstration, PreferencePair, Prompt, RankedAnswers
from selfalign.data.turns import as_prompt, as_text, compared, texts_in
from selfalign.store.artifacts import Artifact
from selfalign.training.dataset import StoredExamples

Digests = np.ndarray[Any, np.dtype[np.uint64]]
Rows = np.ndarray[Any, np.dtype[np.int64]]
E = TypeVar("E", bound=HasId)


@dataclass(frozen=True, slots=True)
class Texts:
    """Digests of what a record says.

    Attributes:
        own: of its prompt, then of its responses.
        around: of the beginnings of its dialogue that ask something, and of the answers in it.
    """

    own: list[int]
    around: list[int]


def texts_of(prompt: Prompt, *responses: str) -> Texts:
    """A prompt with its responses."""
    if isinstance(prompt, str):
        return Texts([_digest("prompt", prompt), *(_digest("response", text) for text in responses)], [])
    said = [turn for turn in prompt if turn["role"] != "system"]
    around = [
        _digest("prompt", as_text(said[: place + 1]))
        if turn["role"] == "user"
        else _digest("response", turn["content"])
        for place, turn in enumerate(said)
        if turn["role"] != "user" or place + 1 < len(said)
    ]
    return Texts([_digest("prompt", as_text(said)), *(_digest("response", text) for text in responses)], around)


def _digest(kind: str, text: str) -> int:
    said = f"{kind}\0{compared(text)}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(said, digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class KnownTexts:
    """What was trained on, as digests in ascending order.

    Attributes:
        own: of the prompts and responses of demonstrations and pairs, and of the questions whose answers M1 learnt to
            judge.
        every: the same with what stands around them.
        judged: of those answers. They stand in what teaches judging, but nothing teaches to give them.
    """

    own: Digests
    every: Digests
    judged: Digests

    @classmethod
    def of(cls, artifacts: Sequence[Artifact]) -> "KnownTexts":
        """All demonstrations, pairs and taught ranked answers of these artifacts."""
        own, around, judged = array("Q"), array("Q"), array("Q")
        for artifact in artifacts:
            for texts in _stream_texts(artifact.path):
                own.extend(texts.own)
                around.extend(texts.around)
            for question in _stream(artifact.path / "taught.jsonl", RankedAnswers):
                asked, *answers = texts_of(as_prompt(question.instruction), *question.texts).own
                own.append(asked)
                judged.extend(answers)
        every = np.concatenate([_as_array(own), _as_array(around)])
        return cls(*map(np.unique, (_as_array(own), every, _as_array(judged))))

    def shares(self, texts: Texts) -> bool:
        """Whether a pair has a prompt or a response that was trained on."""
        own, around = (np.array(digests, dtype=np.uint64) for digests in (texts.own, texts.around))
        return bool(_among(own, self.every).any() or _among(around, self.own).any())


def _stream_texts(folder: Path) -> Iterator[Texts]:
    """What an artifact's demonstrations and pairs say."""
    for shown in _stream(folder / "demonstrations.jsonl", Demonstration):
        yield texts_of(shown.prompt, shown.response)
    for pair in _stream(folder / "pairs.jsonl", PreferencePair):
        yield texts_of(pair.prompt, pair.chosen, pair.rejected)


def prompts_of(artifact: Artifact) -> Iterator[str]:
    """Yields what is said in the prompts of its demonstrations and pairs, as it is compared."""
    for name, kind in (("demonstrations", Demonstration), ("pairs", PreferencePair)):
        for record in _stream(artifact.path / f"{name}.jsonl", kind):
            yield from texts_in(record.prompt)


def _stream(path: Path, kind: type[E]) -> Iterator[E]:
    """The records of a file that may be missing or empty."""
    return stream_records(path, kind) if path.is_file() and path.stat().st_size else iter(())


@dataclass(frozen=True, slots=True)
class Split:
    """Pairs by their place.

    Attributes:
        training: those to train on, in their order.
        held_out: those to measure on, in their order.
        beside: how many are neither, because they share a text with one that is held out.
        passed_over: how many cannot be held out, because they share a text with what was trained on before.
    """

    training: Rows
    held_out: Rows
    beside: int
    passed_over: int


def split_pairs(pairs: Iterable[PreferencePair], count: int, known: KnownTexts) -> Split:
    """Sets pairs aside that share no text with each other, with the pairs that are left to train on, or with `known`.

    The pairs that share a text with one that is held out are set aside with it and used for nothing: the others of the
    same instruction always, so one pair an instruction is measured and an interval over pairs counts no instruction
    twice. It goes by neighbours and not by everything that hangs together over several steps, since a response that
    recurs everywhere ("Yes.") would tie most pairs into one group. Those are held out first that have the fewest other
    instructions as neighbours, so that such a response costs no training pair while there are enough others; among
    equal ones, and in most data all have none, the digests of their ids decide. So the choice does not depend on the
    order of the pairs, and those of a smaller count are among those of a larger one.

    Raises:
        SelfalignError: there are not so many such pairs, or none would be left to train on.
    """
    table = _Table.of(pairs)
    before = np.union1d(known.every, known.judged)
    taken = _among(table.own, before).any(axis=1) | table.around_is_among(known.own)
    held = _pick(table, count, taken)
    size, passed = len(table.own), int(taken.sum())
    if count >= size:
        raise SelfalignError(f"train.validation_pairs={count} of {size} pairs leaves none to train on: lower it")
    if len(held) < count:
        raise SelfalignError(
            f"train.validation_pairs={count}: of {size} pairs only {len(held)} share no prompt and no response with "
            f"each "
            f"other and with what was trained on before ({passed} share one with that, as with SFT data); lower it, or "
            "measure on other pairs with evaluate.preference_pairs.source"
        )
    own, every = table.texts_of(held)
    aside = _among(table.own, every).any(axis=1) | table.around_is_among(own)
    training = np.flatnonzero(~aside)
    if not len(training):
        raise SelfalignError(
            f"train.validation_pairs={count} of {size} pairs leaves none to train on: all the others share a prompt or "
            "response with one that is held out"
        )
    return Split(training, held, int(aside.sum()) - len(held), passed)


def hold_out(
    examples: StoredExamples[E], file: Path, count: int, trained_on: Sequence[Artifact]
) -> tuple[StoredExamples[E], StoredExamples[E], Split | None]:
    """(pairs to train on, pairs to measure on, how that came about); all of them, none and None where none is wanted.

    Args:
        examples: the pairs that are not too long.
        file: pairs.jsonl with their texts, in the same order.
        count: how many to measure on.
        trained_on: artifacts with what the policy has learnt from.

    Raises:
        SelfalignError: as `split_pairs`.
    """
    if not count:
        return examples, examples.take([]), None
    records = stream_records(file, PreferencePair)
    fitting = (next(pair for pair in records if pair.id == name) for name in examples.ids())
    split = split_pairs(fitting, count, KnownTexts.of(trained_on))
    return examples.take(split.training), examples.take(split.held_out), split


@dataclass(frozen=True, slots=True)
class _Table:
    """What pairs say, one row a pair.

    Attributes:
        own: digests of prompt, chosen and rejected response, shape (pairs, 3).
        around: digests of what stands in the dialogues besides, all pairs' one behind the other.
        ends: where each pair's part of `around` ends.
        order: digest of the pair's id.
    """

    own: Digests
    around: Digests
    ends: Rows
    order: Digests

    @classmethod
    def of(cls, pairs: Iterable[PreferencePair]) -> "_Table":
        own, around, ends, order = array("Q"), array("Q"), array("q"), array("Q")
        for pair in pairs:
            texts = texts_of(pair.prompt, pair.chosen, pair.rejected)
            own.extend(texts.own)
            around.extend(texts.around)
            ends.append(len(around))
            order.append(int(digest_text(pair.id)[:16], 16))
        return cls(_as_array(own).reshape(-1, 3), _as_array(around), np.array(ends, np.int64), _as_array(order))

    def around_is_among(self, ordered: Digests) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Of each pair, whether one of the texts around it is among these."""
        found = np.concatenate([[0], np.cumsum(_among(self.around, ordered))])
        return found[self.ends] > found[np.concatenate([[0], self.ends[:-1]])]

    def texts_of(self, rows: Rows) -> tuple[Digests, Digests]:
        """(the own texts of these pairs, all their texts), in ascending order."""
        around = [self.around[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows]
        own = self.own[rows].ravel()
        return np.unique(own), np.unique(np.concatenate([own, *around]))

    def costs(self) -> Rows:
        """Of each pair, how many other instructions have pairs with one of its own texts."""
        lengths = np.diff(self.ends, prepend=0)
        asked = np.concatenate([np.repeat(self.own[:, 0], 3), np.repeat(self.own[:, 0], lengths)])
        said = np.concatenate([self.own.ravel(), self.around])
        order = np.lexsort((asked, said))
        said, asked = said[order], asked[order]
        first = np.ones(len(said), dtype=bool)
        first[1:] = (said[1:] != said[:-1]) | (asked[1:] != asked[:-1])
        texts, instructions = np.unique(said[first], return_counts=True)
        return (instructions[np.searchsorted(texts, self.own)] - 1).sum(axis=1)


def _pick(table: _Table, count: int, taken: np.ndarray[Any, np.dtype[np.bool_]]) -> Rows:
    """The pairs to hold out, in the order of the table: those that cost least, as far as they share no text."""
    held: list[int] = []
    own: set[int] = set()
    every: set[int] = set()
    order = np.lexsort((table.order, table.costs()))
    for row in order[~taken[order]]:
        if len(held) == count:
            break
        mine, all_mine = (set(texts.tolist()) for texts in table.texts_of(np.array([row])))
        if mine.isdisjoint(every) and all_mine.isdisjoint(own):
            held.append(int(row))
            own |= mine
            every |= all_mine
    return np.array(sorted(held), dtype=np.int64)


def _among(digests: Digests, ordered: Digests) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Of each digest, whether it is among those in ascending order."""
    if not len(ordered):
        return np.zeros(digests.shape, dtype=bool)
    places = np.searchsorted(ordered, digests)
    return ordered[np.minimum(places, len(ordered) - 1)] == digests


def _as_array(digests: "array[int]") -> Digests:
    return np.frombuffer(digests, dtype=np.uint64) if len(digests) else np.zeros(0, np.uint64)
