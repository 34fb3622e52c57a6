"""Sources of given data: files, folders and data sets on the hub, each read as rows with their place.

A source is "shipped:NAME" (the seed data in this package, or tasks that are made from a seed), a file of JSON (a row a
line, a list of rows, or one row), CSV, TSV (these may be packed by gzip), parquet or Arrow, a folder ("FOLDER:SPLIT",
split "train" by default) that `datasets.save_to_disk` wrote or that holds such files, or a hub id "owner/name",
"owner/name:split", "owner/name:config:split", each with "@revision" behind the name where it is not the newest.
"""

import ast
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import SelfalignError, one_line
from selfalign.core.files import PACKAGE, digest_file, digest_folder, digest_json, path_of, read_lines
from selfalign.data.tasks import TaskSource

if TYPE_CHECKING:
    import pyarrow as pa

SHIPPED = PACKAGE / "data" / "shipped"

TEXT = (".jsonl", ".json", ".csv", ".tsv")
ARROW = (".arrow", ".feather")
READ = (*TEXT, *(f"{ending}.gz" for ending in TEXT), *ARROW, ".parquet")
OTHER = {
    ".xlsx", ".xls", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".pkl", ".db", ".sqlite", ".h5", ".npz",
}  # fmt: skip
"""Formats told by the file's name. Any other name is read as JSON, one row a line."""

HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<config>[^:/@]+)(?=:))?(:(?P<split>[^:/@]+))?"
)
COMMIT = re.compile("[0-9a-f]{40}")
PART = re.compile(r"-(?P<part>\d+)(-of-(?P<of>\d+))?(-[0-9a-f]+)?\.[a-z.]+")
"""End of the name of a part of a data set."""

LISTED = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content|from|value|text|rank|score)['\"]\s*:")
"""Beginning of a cell that spells a list of turns or of ranked answers, as JSON or as Python."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
BATCH = 1024
"""Rows of a table held at a time."""

csv.field_size_limit(2**31 - 1)  # A cell may hold a whole conversation.

Placed = tuple[str, dict[str, Any]]
"""The place of a row, for messages, and the row."""


@dataclass(frozen=True, slots=True)
class HubData:
    """A split of a data set on the hub; `config` is None for its only one."""

    name: str
    revision: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, source: str) -> "HubData | None":
        """Return the hub data that a source names; None if it has not the form of a hub id."""
        found = HUB_ID.fullmatch(source)
        if found is None or source.startswith("."):
            return None
        return cls(found["name"], found["revision"] or "main", found["config"], found["split"] or "train")

    @property
    def commit(self) -> str:
        """The commit that the revision is at. It is asked for once a process, so that what is keyed is what is read.

        Raises:
            SelfalignError: the hub has no such data set or revision, or does not answer and did not before.
        """
        return self.revision if COMMIT.fullmatch(self.revision) else _commit_of(self.name, self.revision)


Places = list[Path] | HubData | TaskSource
"""Where the rows of a source are: in files and saved folders, on the hub, or nowhere until they are made."""


def read_rows(source: str) -> Iterator[Placed]:
    """Yield a source's rows, each with its place: "file:line", or "file row N" counted from 0 in tables and lists.

    Raises:
        SelfalignError: there is no such source, it cannot be read, or it has no row.
    """
    places = _places_of(source)
    match places:
        case HubData():
            rows = _hub_rows(source, places)
        case TaskSource():
            rows = places.placed(source)
        case _:
            rows = chain.from_iterable(map(_rows_at, places))
    empty = True
    for where, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise SelfalignError(f"{where}: a row must be an object with named fields, got {type(row).__name__}")
        yield where, row
    if empty:
        raise SelfalignError(f"{source} has no rows")


def find_data(source: str, key: str) -> list[Path] | None:
    """Return the files and saved folders of a data source, unread; None where it is in no file.

    Raises:
        SelfalignError: there is no such source; the message names the setting, `key`.
    """
    places = _found(source, key)
    return places if isinstance(places, list) else None


def identify_data(source: str, key: str) -> str:
    """Return what a data source counts as in keys: the digest of its files or tasks, or a hub data set's commit, split.

    Raises:
        SelfalignError: as `find_data`.
    """
    places = _found(source, key)
    if isinstance(places, TaskSource):
        return places.digest
    if isinstance(places, HubData):
        return hub_identity(source)
    digests = [digest_json(digest_folder(place)) if place.is_dir() else digest_file(place) for place in places]
    return digests[0] if len(digests) == 1 else digest_json(digests)


def _found(source: str, key: str) -> Places:
    """Return where the rows of a source are, with what is not in files looked up or made.

    Raises:
        SelfalignError: as `find_data`.
    """
    try:
        places = _places_of(source)
        if isinstance(places, HubData):
            assert places.commit
        if isinstance(places, TaskSource):
            assert places.rows
        return places
    except SelfalignError as error:
        raise SelfalignError(f"{key}: {error}") from error


def hub_identity(source: str) -> str:
    """Return a hub data set with the commit its revision is at: "owner/name@COMMIT:split"; "" for other sources."""
    data = HubData.parse(source)
    if data is None or not isinstance(_places_of(source), HubData):
        return ""
    return ":".join(filter(None, (f"{data.name}@{data.commit}", data.config, data.split)))


# --- which files -------------------------------------------------------------------------------------------------


def _places_of(source: str) -> Places:
    """Return the files and saved folders with a source's rows, in their order, or the hub data or tasks that it names.

    Raises:
        SelfalignError: there is nothing that could be read.
    """
    if (tasks := TaskSource.parse(source)) is not None:
        return tasks
    if source.startswith("shipped:"):
        return [_existing(SHIPPED / f"{source.removeprefix('shipped:')}.jsonl")]
    path = path_of(source)
    if path.is_dir():
        return _in_folder(path, "")
    folder, _, split = source.rpartition(":")
    if folder and path_of(folder).is_dir():
        return _in_folder(path_of(folder), split)
    if path.suffix in OTHER and not path.name.endswith(READ):
        raise SelfalignError(
            f"{path}: {path.suffix} files cannot be read; save it as .jsonl or .parquet, for example with "
            "datasets.load_dataset(...).to_parquet(...)"
        )
    if path.name.endswith(READ) or path.exists():
        return [_existing(path)]
    if (data := HubData.parse(source)) is not None:
        return data
    raise SelfalignError(
        f"{source!r} is not a data source: give shipped:NAME, a .jsonl or .parquet file, or a hub id owner/name (with "
        "@revision, :split or :config:split behind it), or a folder"
    )


@cache
def _commit_of(name: str, revision: str) -> str:
    """Return the commit of a revision, from the hub or, where that cannot be reached, from its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns="README.md")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SelfalignError(
            f"{name}: revision {revision} was not found on the hub ({one_line(error)}); check the name and the network "
            "and your access, or download the data and give their folder"
        ) from error
    return Path(cached).name


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise SelfalignError(f"{path}: no such file")
    return path


def _in_folder(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder's split: saved by `datasets`, or with names that begin with the split.

    Raises:
        SelfalignError: there is no such split, or there are several and the source names none.
    """
    if (folder / "state.json").is_file():
        if split:
            raise SelfalignError(f"{folder} is one saved data set, without splits: remove :{split}")
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        saved = sorted(path.parent.name for path in folder.glob("*/state.json"))
        name = split or (saved[0] if len(saved) == 1 else "train")
        if name not in saved:
            raise SelfalignError(f"{folder} has no split {name!r}: set {folder}:SPLIT to one of {saved}")
        return [folder / name]
    files = [path for place in (folder, folder / "data") for path in sorted(place.glob("*")) if _kind_of(path)]
    part = re.compile(rf"{re.escape(split or 'train')}(-\d+(-of-\d+)?(-[0-9a-f]+)?)?\.[a-z.]+")
    chosen = [path for path in files if part.fullmatch(path.name)]
    if not chosen and not split and len(files) == 1:
        chosen = files
    if len({(path.parent, _kind_of(path)) for path in chosen}) != 1:
        names = [path.relative_to(folder).as_posix() for path in files or sorted(folder.iterdir())]
        shown = ", ".join([*names[:8], *(["…"] if len(names) > 8 else [])]) or "nothing"
        raise SelfalignError(
            f"{folder}: {'files of several kinds' if chosen else 'none of its files'} could be the split "
            f"{split or 'train'!r}. Name one file, or {folder}:SPLIT (the folder holds {shown})."
        )
    _check_parts(folder, chosen)
    return chosen


def _check_parts(folder: Path, files: Sequence[Path]) -> None:
    """Check that files named as parts, such as train-00000-of-00003, are the parts of one whole, and all of them.

    Raises:
        SelfalignError: one is missing, as after a download that was broken off, or there are those of several, as
            where a split was written twice, or a smaller one beside the whole.
    """
    named = [PART.search(path.name) for path in files]
    parts = [int(found["part"]) for found in named if found]
    sizes = {int(found["of"] or 0) for found in named if found}
    if len(sizes) > 1 or 0 < len(parts) < len(files) or len(set(parts)) < len(parts):
        names = ", ".join(path.name for path in files[:8])
        raise SelfalignError(
            f"{folder}: holds parts of several data sets ({names}); keep the files of one, or name a file"
        )
    if missing := sorted(set(range(max(sizes, default=0))) - set(parts)):
        raise SelfalignError(
            f"{folder}: {len(missing)} of {max(sizes)} parts are missing, the first is number {missing[0]}"
        )


def _kind_of(path: Path) -> str:
    """Return the ending of a data file's name; "" for another file."""
    return next((end for end in READ if path.name.endswith(end)), "") if path.is_file() else ""


# --- rows of each kind -------------------------------------------------------------------------------------------


def _rows_at(place: Path) -> Iterator[tuple[str, Any]]:
    if place.is_dir():
        return _saved_rows(place)
    if place.suffix in ARROW:
        return _arrow_rows(place)
    if place.suffix == ".parquet":
        return _parquet_rows(place)
    return _csv_rows(place) if place.name.removesuffix(".gz").endswith((".csv", ".tsv")) else _json_rows(place)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a text, which begins as a list, as a single object over several lines, or as one row a line."""
    lines = read_lines(path)
    number, first = next(lines, (0, ""))
    if not number:
        raise SelfalignError(f"{path}: the file is empty; expected one JSON object a line, or a list of them")
    if first.lstrip().startswith("["):
        listed = _decode("".join(chain([first], (line for _, line in lines))), str(path))
        yield from ((f"{path} row {index}", row) for index, row in enumerate(listed))
    elif first.strip() == "{":
        yield f"{path}:{number}", _decode("".join(chain([first], (line for _, line in lines))), f"{path}:{number}")
    else:
        for at, line in chain([(number, first)], lines):
            yield f"{path}:{at}", _decode(line, f"{path}:{at}")


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table in text form, whose first line names the columns. An empty cell is an absent field.

    Raises:
        SelfalignError: a column stands twice, a row has more or fewer cells or repeats the columns' names, or quotes
            do not match.
    """
    lines = (line for _, line in read_lines(path, skip_blank=False))
    rows = csv.reader(lines, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
    try:
        names = next(rows, [])
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise SelfalignError(f"{path}: the column {twice[0]!r} stands twice in the table")
        at = rows.line_num + 1
        for cells in rows:
            where, at = f"{path}:{at}", rows.line_num + 1
            if cells and len(cells) != len(names):
                raise SelfalignError(f"{where}: {len(cells)} cells, but the first line names {len(names)} columns")
            if cells == names:
                raise SelfalignError(f"{where}: the line with the columns' names stands twice; remove it here")
            if cells:
                yield where, {name: _cell(text) for name, text in zip(names, cells, strict=True) if text}
    except csv.Error as error:
        raise SelfalignError(f"{path}:{rows.line_num}: not valid CSV: {error}") from error


def _cell(text: str) -> Any:
    """Return a cell as JSON would have it: turns and ranked answers as a list."""
    if LISTED.match(text):
        for decode in (json.loads, ast.literal_eval):  # As JSON, or as Python programs write lists into tables.
            try:
                return decode(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return text


def _decode(text: str, where: str) -> Any:
    """Return a JSON value, with null for NaN and Infinity, which are not JSON but are written by many programs.

    Raises:
        SelfalignError: the text is not JSON, an object has a key twice, or a character is half of a surrogate pair.
    """
    try:
        value = json.loads(text.lstrip("\ufeff"), object_pairs_hook=_object, parse_constant=lambda name: None)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise SelfalignError(f"{where}: not valid JSON: {error.msg} ({line}character {error.colno})") from error
    except UnicodeEncodeError as error:
        raise SelfalignError(f"{where}: not valid JSON: a \\ud… escape is half of a character") from error
    except (ValueError, RecursionError) as error:
        raise SelfalignError(f"{where}: not valid JSON: {error}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} occurs twice in a row")
    return made


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(BATCH) for row in _plain_rows(str(path), batch))
            yield from ((f"{path} row {index}", row) for index, row in enumerate(rows))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(str(path), error) from error


def _arrow_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of an Arrow stream, as `datasets` writes it, or of an Arrow file (Feather)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                batches = iter(pa.ipc.open_stream(file))
            except pa.ArrowInvalid:
                opened = pa.ipc.open_file(file)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            small = (batch.slice(at, BATCH) for batch in batches for at in range(0, batch.num_rows, BATCH))
            rows = (row for batch in small for row in _plain_rows(str(path), batch))
            yield from ((f"{path} row {index}", row) for index, row in enumerate(rows))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(str(path), error) from error


def _saved_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, DatasetsError) as error:
        raise _unreadable(str(folder), error) from error
    yield from _dataset_rows(str(folder), saved)


def _hub_rows(source: str, data: HubData) -> Iterator[tuple[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        found = datasets.load_dataset(data.name, data.config, split=data.split, revision=data.commit)
    # A data set that is a program is refused with a RuntimeError.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _unreadable(source, error) from error
    # Without the hub, `datasets` takes what its cache holds of any commit; the folder there is named by the commit.
    cached = {Path(file["filename"]).parent.name for file in found.cache_files} - {data.commit}
    if other := sorted(filter(COMMIT.fullmatch, cached)):
        raise SelfalignError(
            f"{source}: the hub cannot be reached, and the cache holds commit {other[0]} instead of {data.commit}; "
            f"take that one with {data.name}@{other[0]}, or fetch the data where there is a network"
        )
    yield from _dataset_rows(source, found)


def _dataset_rows(source: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    """Yield the rows as they lie in the table, so that no picture or sound is decoded."""
    rows = (row for table in dataset.with_format("arrow").iter(BATCH) for row in _plain_rows(source, table))
    yield from ((f"{source} row {index}", row) for index, row in enumerate(rows))


def _plain_rows(source: str, table: "pa.Table | pa.RecordBatch") -> Iterable[dict[str, Any]]:
    """Yield rows as dictionaries, lists, texts and numbers. Values that are stored as JSON texts are decoded.

    Raises:
        SelfalignError: two columns have one name, or a value cannot be read.
    """
    if twice := [name for name, count in Counter(table.schema.names).items() if count > 1]:
        raise SelfalignError(f"{source}: the column {twice[0]!r} stands twice in the table")
    packed = [field for field in table.schema if "arrow.json" in str(field.type)]
    try:
        rows = table.to_pylist()
        for row in rows:
            row.update({field.name: _unpack(row[field.name], field.type) for field in packed})
    except (ValueError, OverflowError) as error:  # A text that is not UTF-8, a date that no calendar has, no JSON.
        raise _unreadable(source, error) from error
    return rows


def _unpack(value: Any, kind: "pa.DataType") -> Any:
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {field.name: _unpack(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_unpack(item, kind.value_type) for item in value]
    return json.loads(value) if getattr(kind, "extension_name", "") == "arrow.json" else value


def _unreadable(source: str, error: Exception) -> SelfalignError:
    return SelfalignError(
        f"{source}: cannot be read as a data set ({one_line(error)}); check the name, file and network; a config of a "
        "hub data set is named as owner/name:config:split"
    )
