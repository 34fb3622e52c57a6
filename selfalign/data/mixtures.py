"""Data sources as a setting names them: one, one whose columns are renamed, or a mixture of several."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_json
from selfalign.core.records import Demonstration, Instruction, PreferencePair, RankedAnswers
from selfalign.data.containers import Placed, find_data, identify_data, read_rows
from selfalign.data.rows import READ

R = TypeVar("R", Demonstration, Instruction, PreferencePair, RankedAnswers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A source of a mixture.

    Attributes:
        source: a file, a folder, a data set on the hub, or shipped data.
        count: takes exactly so many of its records, drawn by the mixture's seed; 0 takes all.
        weight: its share of the mixture, relative to the weights of the other parts; 0 where there are no weights.
        columns: {column: the field it is read as}; null for a column that is ignored.
    """

    source: str
    count: int = 0
    weight: float = 0.0
    columns: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Several sources read as one.

    Attributes:
        parts: the sources. With weights the mixture is as large as the parts allow without a repetition.
        seed: decides which records of a part are taken, and in which order all of them come.
    """

    parts: tuple[Part, ...]
    seed: int = 0

    def __str__(self) -> str:
        return " + ".join(part.source for part in self.parts)


DataSource = str | Mixture
"""What a setting that names data holds."""


def data_source(value: Any, key: str) -> DataSource:
    """Return the data source that a setting names: a text, a mapping (`Part`, or `Mixture` by its parts), or a list.

    Raises:
        SelfalignError: the value is none of these, or contradicts itself; the message names the setting, `key`.
    """
    if isinstance(value, str | Mixture):
        return value
    whole = value if isinstance(value, Mapping) and "parts" in value else {"parts": value}
    listed = whole["parts"] if isinstance(whole["parts"], Sequence) else [whole["parts"]]
    parts = [_part(part, f"{key}[{number}]" if len(listed) > 1 else key) for number, part in enumerate(listed)]
    mixture = _typed(Mixture, dict(whole) | {"parts": parts}, key)
    weights = [part.weight for part in parts if part.weight]
    if not parts:
        raise SelfalignError(f"{key}: the mixture has no part")
    if weights and (len(weights) < len(parts) or any(part.count for part in parts)):
        raise SelfalignError(f"{key}: give every part of the mixture a weight and none a count, or none a weight")
    return mixture


def find_sources(source: DataSource, key: str) -> list[Path | None]:
    """Return the files and saved folders of a data source, unread; None stands for data in no file, as on the hub.

    Raises:
        SelfalignError: there is no such source; the message names the setting, `key`.
    """
    return [found for part in _sources_of(source) for found in find_data(part, key) or [None]]


def identify_source(source: DataSource, key: str) -> Any:
    """Return what a data source counts as in keys: of a mixture, a list with each of its parts.

    Raises:
        SelfalignError: as `find_sources`.
    """
    identities = [identify_data(part, key) for part in _sources_of(source)]
    return identities[0] if isinstance(source, str) else identities


def parts_of(source: Any, content: Any) -> list[tuple[str, str]]:
    """Return (name, identity) of each part of a data source, as it and its identity stand in an artifact's inputs."""
    if isinstance(source, str):
        return [(source, content)]
    return [(part["source"], identity) for part, identity in zip(source["parts"], content, strict=True)]


def mix(mixture: Mixture, read: Callable[[Part], tuple[list[R], Counter[str]]]) -> tuple[list[R], Counter[str]]:
    """Return the records of a mixture in an order drawn by its seed, and the number of records left out, by reason.

    Records of equal content count once (`duplicate`). Of two records with one id and different content the later is
    named by its content.

    Args:
        mixture: the parts, with their counts or weights.
        read: reads one part.

    Raises:
        SelfalignError: a part has fewer records than its count.
    """
    drops: Counter[str] = Counter()
    whole: dict[str, R] = {}
    known: set[str] = set()
    groups: list[dict[str, R]] = []
    for part in mixture.parts:
        records, reasons = read(part)
        drops += reasons
        new: dict[str, R] = {}
        for record in records:
            content = digest_json(msgspec.to_builtins(replace(record, id="")))[:16]
            if content in known:
                drops["duplicate"] += 1
            else:
                known.add(content)
                new[content] = record
        groups.append(new)
    for part, group, size in zip(mixture.parts, groups, _sizes(mixture, groups), strict=True):
        if size > len(group):
            raise SelfalignError(f"{part.source}: the mixture takes {size} of it, but it has {len(group)} records")
        drops["not_drawn"] += len(group) - size
        for content in _drawn(group, mixture.seed)[:size]:
            record = group[content]
            whole[content] = record
    ids = Counter(record.id for record in whole.values())
    return [
        record if ids[record.id] == 1 else replace(record, id=content)
        for content in _drawn(whole, mixture.seed)
        for record in [whole[content]]
    ], drops


def renamed(part: Part) -> Iterator[Placed]:
    """Yield a part's rows with their columns named as its `columns` say.

    Raises:
        SelfalignError: a row has a field twice by that, or no row has one of the columns.
    """
    missing = set(part.columns)
    for where, row in read_rows(part.source):
        missing -= row.keys()
        kept = {name: value for name, value in row.items() if name not in part.columns}
        named = {new: row[old] for old, new in part.columns.items() if new is not None and old in row}
        if twice := sorted(kept.keys() & named.keys()):
            raise SelfalignError(f"{where}: {twice[0]} is a column beside the one that is read as it; set it to null")
        yield where, kept | named
    if missing:
        raise SelfalignError(f"{part.source}: no row has the column {sorted(missing)[0]!r}, which columns names")


def _drawn(contents: Iterable[str], seed: int) -> list[str]:
    """Return contents in an order drawn by a seed, the same whatever order they had."""
    return sorted(contents, key=lambda content: digest_json([seed, content]))


def _sizes(mixture: Mixture, groups: Sequence[dict[str, Any]]) -> list[int]:
    """Return how many records of each part are taken."""
    if any(part.weight for part in mixture.parts):
        unit = min(len(group) / part.weight for part, group in zip(mixture.parts, groups, strict=True))
        return [int(unit * part.weight + 1e-9) for part in mixture.parts]
    return [part.count or len(group) for part, group in zip(mixture.parts, groups, strict=True)]


def _sources_of(source: DataSource) -> list[str]:
    return [source] if isinstance(source, str) else [part.source for part in source.parts]


def _part(value: Any, key: str) -> Part:
    part = _typed(Part, {"source": value} if isinstance(value, str) else value, key)
    if part.count < 0 or part.weight < 0:
        raise SelfalignError(f"{key}: count and weight must be 0 or more, got {part.count} and {part.weight}")
    for column, name in part.columns.items():
        if name is not None and name not in READ:
            near = get_close_matches(name, sorted(READ), n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(READ))}"
            raise SelfalignError(f"{key}.columns.{column}: {name!r} is not a field that is read{meant}")
    if twice := [name for name, n in Counter(filter(None, part.columns.values())).items() if n > 1]:
        raise SelfalignError(f"{key}.columns: several columns are read as {twice[0]}")
    return part


def _typed(kind: type[Any], value: Any, key: str) -> Any:
    """Return a mapping as a dataclass.

    Raises:
        SelfalignError: it is no mapping, or a name or a type is wrong.
    """
    if not isinstance(value, Mapping):
        raise SelfalignError(f"{key}: expected a data source, or a list of them, got {value!r}")
    known = [one.name for one in fields(kind)]
    for name in value:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            meant = f"did you mean {key}.{near[0]}?" if near else f"there are {', '.join(known)}"
            raise SelfalignError(f"no {key}.{name}; {meant}")
    try:
        return msgspec.convert(dict(value), kind)
    except msgspec.ValidationError as error:
        raise SelfalignError(f"{key}: {error}") from error
