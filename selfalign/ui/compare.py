"""Answers of two models, or of two runs, to the same instructions, side by side."""

from dataclasses import dataclass

import numpy as np

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Instruction, Response
from selfalign.data.turns import compared_prompt
from selfalign.runs.labels import Label
from selfalign.ui.lineage import Candidates, candidates_of
from selfalign.ui.record_file import RecordFile
from selfalign.ui.search import Searcher, place_among

SHOWN = 10
"""Instructions on a page."""


@dataclass(frozen=True, slots=True)
class Side:
    """Responses of one run that are compared."""

    searcher: Searcher
    label: Label

    def instructions(self) -> RecordFile:
        """Return the instructions that they answer.

        Raises:
            SelfalignError: they are missing.
        """
        run = self.searcher.run
        label = run.instructions_of(self.label)
        file = run.records(label, Instruction) if label else None
        if file is None:
            raise SelfalignError(f"{run.name}: the instructions of {self.label} are missing")
        return file


@dataclass(frozen=True, slots=True)
class SharedInstruction:
    """An instruction with the responses of both sides."""

    instruction: Instruction
    first: Candidates
    second: Candidates


@dataclass(frozen=True, slots=True)
class Comparisons:
    """A page of shared instructions; `number` counts pages from 1, `found` instructions."""

    shown: list[SharedInstruction]
    number: int
    pages: int
    found: int


def answer_labels(searcher: Searcher) -> list[Label]:
    """Return the responses of a run, those of the last evaluated model first."""
    run = searcher.run
    labels = [label for label in run.finished if run.records(label, Response) and run.instructions_of(label)]
    return sorted(labels, key=lambda label: (label.part != "answers", -label.model_number))


def compare(first: Side, second: Side, text: str = "", number: int = 1) -> Comparisons:
    """Return a page of the instructions that both sides answer, in the order of the first.

    Instructions are the same if their turns are, whatever their ids.

    Args:
        first: one side.
        second: the other.
        text: a part of the instruction, whatever its capitals; empty for any.
        number: of the page, from 1.

    Raises:
        SelfalignError: a file is damaged, or instructions are missing.
    """
    one, other = first.instructions(), second.instructions()
    own, others = _hashes(one), _hashes(other)
    _, rows, other_rows = np.intersect1d(own, others, return_indices=True)
    found = sorted(zip(rows.tolist(), other_rows.tolist(), strict=True))
    if text:
        wanted = text.casefold()
        fits = {row for row, record in enumerate(one.stream()) if wanted in record.text.casefold()}
        found = [pair for pair in found if pair[0] in fits]
    number, pages = place_among(len(found), SHOWN, number)
    shown = found[(number - 1) * SHOWN :][:SHOWN]
    records = zip(one.read([row for row, _ in shown]), other.read([row for _, row in shown]), strict=True)
    return Comparisons(
        [
            SharedInstruction(
                record,
                candidates_of(first.searcher, first.label, record.id),
                candidates_of(second.searcher, second.label, same.id),
            )
            for record, same in records
        ],
        number,
        pages,
        len(found),
    )


def _hashes(instructions: RecordFile) -> np.ndarray:
    """Return a hash of what each instruction asks."""
    return np.fromiter((hash(compared_prompt(one.prompt)) for one in instructions.stream()), np.int64)
