"""Trackers, which receive a run's metrics besides its folder: their protocol, and one that keeps nothing."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
    """A choice of `tracker`. `open` makes the tracker of a run folder; `config` is plain dictionaries."""

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


RESTARTS = "tracked_anew.txt"
"""File in a run folder with one line for each change of its data. Each change starts a new W&B run."""


def tracked_id(folder: Path) -> str:
    """Return the W&B id of a run folder. It stays the same until the data change; it differs for another folder."""
    file = folder / RESTARTS
    restarts = file.read_text(encoding="utf-8") if file.exists() else ""
    digest = digest_json([str(folder.resolve()), os.getuid(), restarts])[:6]
    return f"{folder.name[-50:]}-{digest}"


def forget_tracked(folder: Path) -> None:
    """Give the run folder a new W&B id, because its data have changed."""
    with (folder / RESTARTS).open("a", encoding="utf-8") as file:
        file.write("another\n")
