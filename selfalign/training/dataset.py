"""Tokenised examples on disk. They are written once and memory-mapped, so memory holds those of one step only.

They are an Arrow file in a stage's scratch folder, which a resumed stage reuses. The artifact's key covers everything
they depend on: records, tokenizer, lengths and reference log-probabilities.
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
"""Number of examples in one write."""

E = TypeVar("E", bound=HasId)


@dataclass(frozen=True, slots=True)
class StoredExamples(Sequence[E], Generic[E]):
    """Examples in a memory-mapped table. An example is made from its row when it is accessed.

    Attributes:
        table: the table, with one row for each example.
        kind: the class of an example.
        counts: numbers of kept and dropped examples.
        rows: indices of the rows of this sequence, in order.
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
        """Yield the ids of the examples without reading their tokens."""
        column = self.table.data.column("id")
        return (name for rows in chunks(self.rows) for name in column.take(rows).to_pylist())

    def take(self, indices: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]) -> "StoredExamples[E]":
        """Return the examples at these indices, in this order."""
        return replace(self, rows=np.asarray(self.rows)[np.asarray(indices, dtype=np.int64)])


def store_examples(folder: Path, kind: type[E], examples: Iterable[E], tally: Counter[str]) -> StoredExamples[E]:
    """Write examples to disk and map them into memory. If the file exists, only map it.

    Args:
        folder: a folder in a stage's scratch folder.
        kind: the class of an example, a dataclass of texts, numbers, lists of them, and such dataclasses.
        examples: the examples; they are not read if the file exists.
        tally: counts that reading the examples fills. They are stored with the examples.
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
    """Return the Arrow type of a Python type. For an optional type it is the type without None."""
    import pyarrow as pa

    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return pa.struct({field.name: arrow_type(hints[field.name]) for field in fields(kind)})
    if get_origin(kind) is list:
        return pa.list_(arrow_type(*get_args(kind)))
    options = [option for option in get_args(kind) if option is not NoneType]
    scalars = {str: pa.string(), int: pa.int32(), float: pa.float64(), bool: pa.bool_()}
    return arrow_type(*options) if options else scalars[kind]
