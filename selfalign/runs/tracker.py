"""Trackers, which receive a run's metrics besides its folder: their protocol, none, and several as one."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any, Protocol

from selfalign.core.files import digest_json


class Tracker(Protocol):
    """Receives the rows of metrics.jsonl as they are written, tables of records, a summary, and files."""

    def log(self, row: dict[str, Any]) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None: ...

    def summarise(self, values: dict[str, Any]) -> None: ...

    def attach(self, files: Sequence[Path]) -> None: ...

    @property
    def place(self) -> str: ...


class Tracking(Protocol):
    """An option of `tracker`. `open` makes the tracker of a run folder; `config` is plain dictionaries."""

    def check_installed(self) -> None: ...

    def open(self, folder: Path, config: dict[str, Any]) -> AbstractContextManager[Tracker]: ...


@dataclass(frozen=True, slots=True)
class NoTracker:
    """Discards everything; `reason` says why."""

    reason: str = "tracker=none"

    def log(self, row: dict[str, Any]) -> None:
        """Discard the row."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Discard the table without reading its rows."""

    def summarise(self, values: dict[str, Any]) -> None:
        """Discard the values."""

    def attach(self, files: Sequence[Path]) -> None:
        """Discard the files."""

    @property
    def place(self) -> str:
        """The location of the tracked run: none."""
        return f"none ({self.reason})"


@dataclass(frozen=True, slots=True)
class Trackers:
    """Passes everything to several trackers.

    Attributes:
        all: the trackers, in the order of the command line.
    """

    all: tuple[Tracker, ...]

    def log(self, row: dict[str, Any]) -> None:
        """Pass on a row."""
        for tracker in self.all:
            tracker.log(row)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Pass on a table. Its rows are read once."""
        for tracker, own in zip(self.all, tee(rows, len(self.all)), strict=True):
            tracker.table(name, columns, own)

    def summarise(self, values: dict[str, Any]) -> None:
        """Pass on the values."""
        for tracker in self.all:
            tracker.summarise(values)

    def attach(self, files: Sequence[Path]) -> None:
        """Pass on the files."""
        for tracker in self.all:
            tracker.attach(files)

    @property
    def place(self) -> str:
        """The locations of the tracked runs."""
        return ", ".join(tracker.place for tracker in self.all)


@contextmanager
def open_trackers(chosen: Mapping[str, Tracking], folder: Path, config: dict[str, Any]) -> Iterator[Tracker]:
    """Open the chosen trackers of a run folder as one.

    Args:
        chosen: {name: option of `tracker`}.
        folder: of the run.
        config: the experiment as plain dictionaries.
    """
    with ExitStack() as stack:
        opened = tuple(stack.enter_context(tracking.open(folder, config)) for tracking in chosen.values())
        yield Trackers(opened) if len(opened) > 1 else opened[0] if opened else NoTracker()


RESTARTS = "tracked_anew.txt"
"""File in a run folder with one line for each change of its data. Each change starts a new tracked run."""


def tracked_id(folder: Path) -> str:
    """Return the id by which trackers know a run folder. It changes with the data, and differs for another folder."""
    file = folder / RESTARTS
    restarts = file.read_text(encoding="utf-8") if file.exists() else ""
    digest = digest_json([str(folder.resolve()), os.getuid(), restarts])[:6]
    return f"{folder.name[-50:]}-{digest}"


def forget_tracked(folder: Path) -> None:
    """Give the run folder a new id, because its data have changed."""
    with (folder / RESTARTS).open("a", encoding="utf-8") as file:
        file.write("another\n")
