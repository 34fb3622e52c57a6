"""Records as lines of JSON: written atomically, read one at a time, joined in constant memory.

The stages write their records in the order of the instructions, so files are joined by walking through them together.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from selfalign.core.errors import SelfalignError
from selfalign.core.files import atomic_file, read_lines
from selfalign.core.records import ResponseScore

CHUNK = 4096
"""How many records a stage holds at a time. Batches are planned within such a chunk, so they depend on the records
alone; it is large enough to find prompts of like length, and for many processes to share."""


class HasId(Protocol):
    """A record with an id."""

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=HasId)
L = TypeVar("L", bound=HasId)
T = TypeVar("T")


def chunks(records: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Yield the records in lists of this size, the last one shorter."""
    remaining = iter(records)
    while chunk := list(islice(remaining, size)):
        yield chunk


def join_sorted(
    leaders: Iterable[L], followers: Iterable[T], owner: Callable[[T], str], file: Path
) -> Iterator[tuple[L, list[T]]]:
    """Join two sorted streams: yield each leader with the followers that belong to it, none or several.

    Args:
        leaders: records, one at a time.
        followers: records that each belong to a leader, in the order of the leaders.
        owner: returns the id of the leader that a follower belongs to.
        file: the file of the followers, for the message.

    Raises:
        SelfalignError: a follower is left after the last leader: its leader is missing or came before.
    """
    remaining = iter(followers)
    follower = next(remaining, None)
    for leader in leaders:
        own: list[T] = []
        while follower is not None and owner(follower) == leader.id:
            own.append(follower)
            follower = next(remaining, None)
        yield leader, own
    if follower is not None:
        raise SelfalignError(
            f"{file}: record for {owner(follower)!r} is missing or out of order. Records must be in the same order as "
            "the instructions."
        )


def write_records(path: Path, records: Iterable[HasId]) -> None:
    """Write one record a line, atomically: the file is there whole or not at all."""
    with open_records(path) as write:
        write(records)


@contextmanager
def open_records(path: Path) -> Iterator[Callable[[Iterable[HasId]], None]]:
    """Open a file for records and yield the function that writes one. The file appears once the block ends."""
    with atomic_file(path) as file:
        yield lambda records: file.writelines(msgspec.json.encode(record) + b"\n" for record in records)


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Return all records of one file, for files that are small by nature, such as evaluation sets.

    Raises:
        SelfalignError: as `stream_records`.
    """
    return list(stream_records(path, kind))


def stream_records(path: Path, kind: type[R]) -> Iterator[R]:
    """Yield the records of one file, holding one at a time.

    A hash of each id (8 bytes) is kept, to find an id that occurs twice.

    Raises:
        SelfalignError: a line is broken or lacks a field (file and line are named), or, behind the last record, an
            id occurs twice.
    """
    hashes = array("q")
    for _, record in read_typed_lines(path, kind):
        hashes.append(hash(record.id))
        yield record
    ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if repeated:
        _refuse_duplicates(path, kind, repeated)


def _refuse_duplicates(path: Path, kind: type[HasId], hashes: set[int]) -> None:
    """Read the file again for an id that occurs twice, among those with these hashes. Two ids may share a hash."""
    seen: set[str] = set()
    for number, record in read_typed_lines(path, kind):
        if hash(record.id) in hashes:
            if record.id in seen:
                raise SelfalignError(f"{path}:{number}: the id {record.id!r} occurs twice; ids must be unique")
            seen.add(record.id)


def count_records(path: Path) -> int:
    """Return the number of records in a file."""
    return sum(1 for _ in read_lines(path))


def read_scores(folder: Path) -> dict[str, float]:
    """Return {response id: score} of a judged artifact, without the unjudged responses."""
    scores = read_records(folder / "scores.jsonl", ResponseScore)
    return {record.id: record.score for record in scores if record.score is not None}


def read_typed_lines(path: Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """Yield (line number, object) for every line of a JSONL file that is not blank.

    Raises:
        SelfalignError: the file is missing, empty or not UTF-8, or a line is not what `kind` says.
    """
    decoder = msgspec.json.Decoder(kind)
    empty = True
    for number, line in read_lines(path):
        empty = False
        try:
            yield number, decoder.decode(line)
        except (msgspec.DecodeError, ValueError) as error:
            raise SelfalignError(f"{path}:{number}: {error}") from error
    if empty:
        raise SelfalignError(f"{path}: the file is empty; expected one JSON object a line")


def as_plain(record: Any) -> Any:
    """Return a record as JSON-ready dictionaries, lists and numbers."""
    return msgspec.to_builtins(record)
