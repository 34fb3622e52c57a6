"""What the records of a file are filtered by: a few numbers a record, computed once."""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import numpy as np

from selfalign.core.records import (
    Comparison,
    Demonstration,
    Instruction,
    Judgement,
    LabelledResponse,
    PairMargin,
    PreferencePair,
    Response,
    ResponseScore,
)
from selfalign.runs.labels import Label
from selfalign.ui.candidates import judges_disagree, orders_disagree, roles_in, stream_candidates
from selfalign.ui.record_file import RecordFile, texts_of
from selfalign.ui.run_records import RunRecords


@dataclass(slots=True)
class Facts:
    """What is known of one record.

    Attributes:
        score: a judge's score, or another number that stands for it; NaN if there is none.
        status: why a text ended, the outcome of a judgement, or the role of a record; empty if there is none.
        reason: why nothing was made of it; empty if something was.
        judges: whether judges disagree about it.
        orders: whether the verdict depends on the order in which two responses are shown.
        length: characters of its text.
    """

    score: float = math.nan
    status: str = ""
    reason: str = ""
    judges: bool = False
    orders: bool = False
    length: int = 0


@dataclass(slots=True)
class Words:
    """A text of each record, of which there are only a few different ones."""

    _codes: dict[str, int] = field(default_factory=dict)
    _column: "array[int]" = field(default_factory=lambda: array("H"))

    def add(self, text: str) -> None:
        """Add the text of the next record: words with a comma between them."""
        self._column.append(self._codes.setdefault(text, len(self._codes)))

    @property
    def choices(self) -> list[str]:
        """All words, sorted."""
        return sorted({word for text in self._codes for word in text.split(", ") if word})

    def having(self, word: str) -> np.ndarray:
        """Return which records have the word."""
        fitting = [code for text, code in self._codes.items() if word in text.split(", ")]
        return np.isin(np.frombuffer(self._column, dtype=np.uint16), fitting)

    def at(self, row: int) -> str:
        """Return the text of a record."""
        return [*self._codes][self._column[row]]


FACT = np.dtype([("score", "f8"), ("judges", "?"), ("orders", "?"), ("length", "i8")])


@dataclass(slots=True)
class Columns:
    """The facts of all records of a file, column by column: 26 bytes a record."""

    score: np.ndarray
    status: Words
    reason: Words
    judges: np.ndarray
    orders: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, facts: Iterable[Facts]) -> "Columns":
        statuses, reasons = Words(), Words()

        def rows() -> Iterator[tuple[float, bool, bool, int]]:
            for one in facts:
                statuses.add(one.status)
                reasons.add(one.reason)
                yield one.score, one.judges, one.orders, one.length

        table = np.fromiter(rows(), FACT)
        return cls(
            score=table["score"],
            status=statuses,
            reason=reasons,
            judges=table["judges"],
            orders=table["orders"],
            length=table["length"],
        )


def columns_of(run: RunRecords, label: Label, file: RecordFile) -> Columns:
    """Return what the records of an artifact's file are filtered by.

    Raises:
        SelfalignError: a file is damaged.
    """
    joined = {Response: _facts_of_responses, Instruction: _facts_of_instructions, PreferencePair: _facts_of_pairs}
    if file.kind in joined:
        return Columns.of(joined[file.kind](run, label, file))
    return Columns.of(map(PLAIN.get(file.kind, _of_any), file.stream()))


def _facts_of_responses(run: RunRecords, label: Label, file: RecordFile) -> Iterator[Facts]:
    if run.instructions_of(label) is None:
        yield from map(_of_response, file.stream())
        return
    for group in stream_candidates(run, label):
        judges, orders = group.disputed_by_judges(), group.disputed_by_order()
        for response in group.responses:
            name, facts = response.id, _of_response(response)
            facts.score = group.scores.get(name, math.nan)
            facts.status = ", ".join(filter(None, (facts.status, group.roles.get(name, ""))))
            facts.reason = group.reasons.get(name, "")
            facts.judges, facts.orders = name in judges, name in orders
            yield facts


def _facts_of_instructions(run: RunRecords, label: Label, file: RecordFile) -> Iterator[Facts]:
    """Yield the facts of instructions, by the responses of which training data were made where there are such."""
    responses = [*run.made_from(label, "instructions", "respond"), *run.made_from(label, "instructions")]
    paired = next((one for one in responses if run.records(one, Response) and run.pairs_of(one)), None)
    groups = stream_candidates(run, paired) if paired else repeat(None)
    for record in file.stream():
        facts, group = Facts(status=record.source, length=len(record.text)), next(groups)
        if group is not None:
            facts.reason = group.reason
            facts.judges, facts.orders = bool(group.disputed_by_judges()), bool(group.disputed_by_order())
        yield facts


def _facts_of_pairs(run: RunRecords, label: Label, file: RecordFile) -> Iterator[Facts]:
    """Yield the facts of pairs; of those that were made of judged responses also what the judges say about them."""
    if parts := run.sources(label, "parts"):
        files = [(part, run.records(part, PreferencePair)) for part in parts]
        yield from chain.from_iterable(_facts_of_pairs(run, part, one) for part, one in files if one is not None)
        return
    responses = run.source(label, "responses")
    judged = responses is not None and run.finished[label].inputs["stage"] == "pair" and run.instructions_of(responses)
    groups = stream_candidates(run, responses) if responses and judged else None
    group = None
    for pair in file.stream():
        facts = Facts(score=_number(pair.chosen_score), length=len(pair.chosen))
        while groups is not None and (group is None or group.instruction.id != pair.instruction_id):
            group = next(groups)
        if group is not None:
            both = {pair.chosen_id, pair.rejected_id}
            facts.judges = judges_disagree(group.by_judge.values(), pair.chosen_id, pair.rejected_id)
            facts.orders = any(orders_disagree(c) for c in group.comparisons if {c.first_id, c.second_id} == both)
        yield facts


def _of_response(record: Response) -> Facts:
    return Facts(status=record.finish_reason.value, length=len(record.text))


def _of_comparison(record: Comparison) -> Facts:
    length, disputed = sum(map(len, record.texts)), orders_disagree(record)
    return Facts(_number(record.outcome), record.status.value, orders=disputed, length=length)


def _of_labelled(record: LabelledResponse) -> Facts:
    [(_, role)] = roles_in(record)
    return Facts(_number(record.score), role, length=len(record.response))


def _of_any(record: Any) -> Facts:
    return Facts(length=sum(map(len, texts_of(record))))


PLAIN: dict[type[Any], Callable[[Any], Facts]] = {
    Judgement: lambda one: Facts(_number(one.score), one.status.value, length=len(one.text)),
    ResponseScore: lambda one: Facts(_number(one.score)),
    Comparison: _of_comparison,
    Demonstration: lambda one: Facts(status=one.source, length=len(one.response)),
    LabelledResponse: _of_labelled,
    PairMargin: lambda one: Facts(_number(one.score_difference)),
}
"""What is known of a record by itself, by its class."""


def _number(value: float | None) -> float:
    return math.nan if value is None else value
