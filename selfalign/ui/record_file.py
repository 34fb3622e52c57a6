"""A JSONL file whose records are read one by one: the place of every line is known, and which line has which id."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_typed_lines
from selfalign.core.records import RankedAnswers
from selfalign.runs.reader import FILES

KINDS: dict[str, type[Any]] = {name: kind for kind, name in FILES.items()} | {"taught.jsonl": RankedAnswers}
"""{name of a file: class of its records}. The records of any other file are dictionaries."""


class Keys(msgspec.Struct):
    """The fields of a line by which records are found."""

    id: str = ""
    instruction_id: str = ""
    response_id: str = ""

    @property
    def owner(self) -> str:
        """The instruction that the record belongs to, or the response of one that names no instruction."""
        return self.instruction_id or self.response_id


@dataclass(slots=True)
class HashColumn:
    """Hashes of a text of each line, in order, so that the lines with a text are found by bisection."""

    ordered: np.ndarray
    lines: np.ndarray

    @classmethod
    def of(cls, hashes: Sequence[int]) -> "HashColumn":
        column = np.array(hashes, dtype=np.int64)
        lines = np.argsort(column, kind="stable")
        return cls(column[lines], lines)

    def find(self, text: str) -> list[int]:
        """Return the lines that may have the text, in their order."""
        first, last = (np.searchsorted(self.ordered, hash(text), side) for side in ("left", "right"))
        return sorted(self.lines[first:last].tolist())


@dataclass(slots=True)
class RecordFile:
    """The records of one file. Only places and hashes are kept, 40 bytes a record.

    Attributes:
        path: the file. It is written once and not changed.
        kind: class of its records.
    """

    path: Path
    kind: type[Any] = field(init=False)
    _starts: np.ndarray = field(init=False)
    _ids: HashColumn = field(init=False)
    _owners: HashColumn = field(init=False)

    def __post_init__(self) -> None:
        """Read the file once.

        Raises:
            SelfalignError: a line is no JSON object.
        """
        self.kind = KINDS.get(self.path.name, dict)
        decoder, at = msgspec.json.Decoder(Keys), 0
        starts, ids, owners = list[int](), list[int](), list[int]()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        keys = decoder.decode(line)
                    except (msgspec.DecodeError, ValueError) as error:
                        raise SelfalignError(f"{self.path}:{number}: {error}") from error
                    starts.append(at)
                    ids.append(hash(keys.id))
                    owners.append(hash(keys.owner))
                at += len(line)
        self._starts = np.array(starts, dtype=np.int64)
        self._ids, self._owners = HashColumn.of(ids), HashColumn.of(owners)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, rows: Sequence[int]) -> list[Any]:
        """Return the records of these rows, counted from 0.

        Raises:
            SelfalignError: one is not what the file should hold.
        """
        decoder, records = msgspec.json.Decoder(self.kind), list[Any]()
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(int(self._starts[row]))
                try:
                    records.append(decoder.decode(file.readline()))
                except (msgspec.DecodeError, ValueError) as error:
                    raise SelfalignError(f"{self.path}: record {row + 1}: {error}") from error
        return records

    def stream(self) -> Iterator[Any]:
        """Yield all records, holding one at a time.

        Raises:
            SelfalignError: one is not what the file should hold.
        """
        return (record for _, record in read_typed_lines(self.path, self.kind)) if len(self) else iter(())

    def rows_with_text(self, text: str, asked: np.ndarray) -> np.ndarray:
        """Return which of the rows that are asked about have a part of a text, whatever its capitals.

        Only lines that have its letters somewhere are decoded.
        """
        wanted, decoder = text.casefold(), msgspec.json.Decoder()
        spelled = msgspec.json.encode(text).decode()[1:-1].casefold()
        found, row = np.zeros(len(self), dtype=bool), 0
        with self.path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                if not line.strip():
                    continue
                if asked[row] and spelled in line.casefold():
                    found[row] = any(wanted in one.casefold() for one in texts_of(decoder.decode(line)))
                row += 1
        return found

    def rows_with_id(self, name: str) -> list[int]:
        """Return the rows of the records with this id: one or none."""
        return [row for row, _ in self._find(self._ids, id_of, name)]

    def with_id(self, name: str) -> Any | None:
        """Return the record with this id, or None."""
        return next((record for _, record in self._find(self._ids, id_of, name)), None)

    def of(self, owner: str) -> list[Any]:
        """Return the records that belong to an instruction, or to a response."""
        return [record for _, record in self.rows_of(owner)]

    def rows_of(self, owner: str) -> list[tuple[int, Any]]:
        """Return the same, each behind its row."""
        return self._find(self._owners, owner_of, owner)

    def _find(self, column: HashColumn, value_of: Callable[[Any], str], text: str) -> list[tuple[int, Any]]:
        """Return (row, record) of the records with a text; those that share its hash alone are left out."""
        rows = column.find(text)
        return [(row, one) for row, one in zip(rows, self.read(rows), strict=True) if value_of(one) == text]


def id_of(record: Any) -> str:
    """Return the id of a record; empty if it has none."""
    return _value(record, "id")


def owner_of(record: Any) -> str:
    """Return the id of the instruction, or else of the response, that a record belongs to; empty if it has none."""
    return _value(record, "instruction_id") or _value(record, "response_id")


def _value(record: Any, name: str) -> str:
    found = record.get(name, "") if isinstance(record, dict) else getattr(record, name, "")
    return found if isinstance(found, str) else ""


def texts_of(record: Any) -> Iterator[str]:
    """Yield every text of a record, at any depth, but for the digests of models."""
    value = msgspec.to_builtins(record)
    waiting = [item for name, item in value.items() if name != "model"] if isinstance(value, dict) else [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
