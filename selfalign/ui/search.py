"""Searching the records of a run: which files are looked at, what is asked of a record, and the pages of what fits."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfalign.runs.labels import Label
from selfalign.ui.columns import Columns, columns_of
from selfalign.ui.record_file import RecordFile
from selfalign.ui.run_records import RunRecords

PAGE = 20
"""Records on a page."""

REMEMBERED = 8
"""Searches whose results are kept, so that turning a page searches nothing again."""

JUDGES, ORDERS = "between judges", "between orders"


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What is asked of the records of a run.

    Attributes:
        file: name of the files that are looked at, such as "responses.jsonl".
        artifact: the only artifact that is looked at; empty for all.
        iteration: the only iteration that is looked at; None for all.
        text: a part of one of the record's texts, whatever its capitals; empty for any.
        status: one of the words of its status; empty for any.
        reason: why nothing was made of it; empty for any.
        disagreement: JUDGES, ORDERS, or empty for any.
        scores: the lowest and the highest score; None for no limit. A record without a score is within no limit.
        lengths: the fewest and the most characters; None for no limit.
    """

    file: str
    artifact: str = ""
    iteration: int | None = None
    text: str = ""
    status: str = ""
    reason: str = ""
    disagreement: str = ""
    scores: tuple[float | None, float | None] = (None, None)
    lengths: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True)
class Hit:
    """A record that was found.

    Attributes:
        label: its artifact.
        row: its row in the file, from 0.
        record: the record.
        score: see `Facts`; None if it has none.
        status: see `Facts`.
        reason: see `Facts`.
    """

    label: Label
    row: int
    record: Any
    score: float | None
    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the records that were found.

    Attributes:
        hits: the records of the page.
        number: of the page, from 1.
        pages: the number of pages, at least 1.
        found: the number of records that fit.
        searched: the number of records that were looked at.
    """

    hits: list[Hit]
    number: int
    pages: int
    found: int
    searched: int


@dataclass(slots=True)
class Searcher:
    """Searches the records of a run.

    Attributes:
        run: the run.
    """

    run: RunRecords
    _columns: dict[tuple[Label, str], Columns] = field(default_factory=dict)
    _results: OrderedDict[tuple[Query, tuple[Label, ...]], list[np.ndarray]] = field(default_factory=OrderedDict)

    def reload(self) -> None:
        """Look for artifacts that were finished since."""
        self.run.reload()
        self._columns.clear()
        self._results.clear()

    def labels(self, query: Query) -> list[Label]:
        """Return the artifacts that a query looks at."""
        return [
            label
            for label in self.run.file_names().get(query.file, [])
            if query.artifact in ("", str(label)) and query.iteration in (None, label.iteration_number)
        ]

    def columns(self, label: Label, name: str) -> Columns:
        """Return what the records of a file are filtered by. It is computed once.

        Raises:
            SelfalignError: a file is damaged.
        """
        if (label, name) not in self._columns:
            self._columns[label, name] = columns_of(self.run, label, self._file(label, name))
        return self._columns[label, name]

    def statuses(self, query: Query) -> list[str]:
        """Return the words of the statuses in the files of a query."""
        known = (self.columns(label, query.file).status.choices for label in self.labels(query))
        return sorted({word for words in known for word in words})

    def reasons(self, query: Query) -> list[str]:
        """Return the reasons in the files of a query."""
        known = (self.columns(label, query.file).reason.choices for label in self.labels(query))
        return sorted({word for words in known for word in words})

    def page(self, query: Query, number: int = 1) -> Page:
        """Return a page of the records that fit; the last one where there are fewer pages.

        Raises:
            SelfalignError: a file is damaged.
        """
        labels = self.labels(query)
        results = self._search(query, tuple(labels))
        found = sum(map(len, results))
        number, pages = place_among(found, PAGE, number)
        searched = sum(len(self._file(label, query.file)) for label in labels)
        return Page(self._hits(query, labels, results, (number - 1) * PAGE), number, pages, found, searched)

    def _file(self, label: Label, name: str) -> RecordFile:
        file = self.run.file(label, name)
        assert file is not None, "a label is listed with the files that it has"
        return file

    def _search(self, query: Query, labels: tuple[Label, ...]) -> list[np.ndarray]:
        """Return the rows that fit, file by file."""
        key = (query, labels)
        if key not in self._results:
            self._results[key] = [self._rows(query, label) for label in labels]
            if len(self._results) > REMEMBERED:
                self._results.popitem(last=False)
        return self._results[key]

    def _rows(self, query: Query, label: Label) -> np.ndarray:
        columns = self.columns(label, query.file)
        fits = within(columns.score, query.scores) & within(columns.length, query.lengths)
        if query.status:
            fits &= columns.status.having(query.status)
        if query.reason:
            fits &= columns.reason.having(query.reason)
        if query.disagreement:
            fits &= columns.judges if query.disagreement == JUDGES else columns.orders
        if query.text:
            fits &= self._file(label, query.file).rows_with_text(query.text, fits)
        return np.flatnonzero(fits)

    def _hits(self, query: Query, labels: Sequence[Label], results: Sequence[np.ndarray], start: int) -> list[Hit]:
        hits: list[Hit] = []
        for label, rows in zip(labels, results, strict=True):
            shown = rows[max(0, start) :][: PAGE - len(hits)].tolist()
            columns = self.columns(label, query.file)
            for row, record in zip(shown, self._file(label, query.file).read(shown), strict=True):
                score = float(columns.score[row])
                known = None if np.isnan(score) else score
                hits.append(Hit(label, row, record, known, columns.status.at(row), columns.reason.at(row)))
            start -= len(rows)
        return hits


def place_among(found: int, size: int, number: int) -> tuple[int, int]:
    """Return the number of the page that is shown, at most the last one, and how many pages there are."""
    pages = max(1, -(-found // size))
    return min(max(1, number), pages), pages


def within(values: np.ndarray, limits: tuple[float | None, float | None]) -> np.ndarray:
    """Return which values are within limits, the limits included; without limits every value is, NaN too."""
    fits = np.ones(len(values), dtype=bool)
    low, high = limits
    if low is not None:
        fits &= values >= low
    if high is not None:
        fits &= values <= high
    return fits
