"""Tokenised examples on disk: written once, then memory-mapped, so that training holds those of one step at a time.

They are an Arrow file in a stage's scratch, which a resumed stage finds again. The key of the artifact names all they
depend on: the records, the tokenizer, the lengths and the reference values.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args, get_origin, get_type_hints, overload

import msgspec
import numpy as np

from selfalign.core import distributed
from selfalign.core.files import read_json, write_json
from selfalign.core.jsonl import HasId, chunks

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

ROWS = 256
"""Examples that are written at once."""

E = TypeVar("E", bound=HasId)


@dataclass(frozen=True, slots=True)
class StoredExamples(Sequence[E], Generic[E]):
    """Examples in a memory-mapped table; each is made of its row when it is asked for.

    Attributes:
        table: one row an example.
        kind: what a row becomes.
        counts: what was kept and dropped while they were written.
        rows: which rows these are, in their order.
    """

    table: "datasets.Dataset"
    kind: type[E]
    counts: Mapping[str, int]
    rows: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> E: ...

    @overload
    def __getitem__(self, index: slice) -> "StoredExamples[E]": ...

    def __getitem__(self, index: int | slice) -> "E | StoredExamples[E]":
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        return msgspec.convert(self.table[int(self.rows[index])]["example"], self.kind)

    def ids(self) -> Iterator[str]:
        """The examples' ids, read without their tokens."""
        column = self.table.data.column("id")
        return (name for rows in chunks(self.rows) for name in column.take(rows).to_pylist())

    def take(self, places: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]) -> "StoredExamples[E]":
        """Those at these places, in this order."""
        return replace(self, rows=np.asarray(self.rows)[np.asarray(places, dtype=np.int64)])


def store_examples(folder: Path, kind: type[E], examples: Iterable[E], tally: Counter[str]) -> StoredExamples[E]:
    """Writes examples to disk, one by one, and maps them; those that are there already are mapped as they are.

    Args:
        folder: of a stage's scratch.
        kind: a dataclass of texts, numbers, lists of them, and such dataclasses.
        examples: left unread where they are there.
        tally: what they count while they are read, kept with them.
    """
    import datasets

    table, counts = folder / "examples.arrow", folder / "counts.json"

    def store() -> None:
        if not counts.exists():  # It is written last.
            folder.mkdir(parents=True, exist_ok=True)
            _write(table, kind, examples)
            write_json(counts, tally)

    distributed.on_main(store)
    opened = datasets.Dataset.from_file(str(table))
    return StoredExamples(opened, kind, read_json(counts), range(len(opened)))


def _write(path: Path, kind: type[E], examples: Iterable[E]) -> None:
    import pyarrow as pa

    schema = pa.schema({"id": pa.string(), "example": arrow_type(kind)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for chunk in chunks(examples, ROWS):
            rows = [{"id": example.id, "example": msgspec.to_builtins(example)} for example in chunk]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))


def arrow_type(kind: Any) -> "pa.DataType":
    """How Arrow stores a value of this type; a type that may be None is stored as what else it may be."""
    import pyarrow as pa

    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return pa.struct({field.name: arrow_type(hints[field.name]) for field in fields(kind)})
    if get_origin(kind) is list:
        return pa.list_(arrow_type(*get_args(kind)))
    options = [option for option in get_args(kind) if option is not NoneType]
    return arrow_type(*options) if options else {str: pa.string(), int: pa.int32(), float: pa.float64()}[kind]
