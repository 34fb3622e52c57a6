"""Where a run's rows go besides its folder: the protocol of trackers, and the one that keeps nothing."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from selfalign.core.files import digest_json


class Tracker(Protocol):
    """Receives the rows of metrics.jsonl as they are written, tables of records, and what a run comes to."""

    def log(self, row: dict[str, Any]) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None: ...

    def summarise(self, values: dict[str, Any]) -> None: ...

    def attach(self, files: Sequence[Path]) -> None: ...

    @property
    def place(self) -> str: ...


class Tracking(Protocol):
    """A component of `tracker`: opens the tracker of a run folder, given the configuration as plain dictionaries."""

    def open(self, folder: Path, config: dict[str, Any]) -> AbstractContextManager[Tracker]: ...


@dataclass(frozen=True, slots=True)
class NoTracker:
    """Takes everything and keeps nothing; `reason` is why."""

    reason: str = "tracker=none"

    def log(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Nothing; the rows are not even read."""

    def summarise(self, values: dict[str, Any]) -> None:
        """Nothing."""

    def attach(self, files: Sequence[Path]) -> None:
        """Nothing."""

    @property
    def place(self) -> str:
        """Nowhere."""
        return f"none ({self.reason})"


LIVES = "tracked_anew.txt"
"""In a run folder: a line for each time that its data have become others, so that W&B has a new run for them."""


def tracked_id(folder: Path) -> str:
    """The W&B id of a folder's run, the same whenever it goes on; that of the same settings elsewhere is another."""
    lives = (folder / LIVES).read_text(encoding="utf-8") if (folder / LIVES).exists() else ""
    place = digest_json([str(folder.resolve()), os.getuid(), lives])[:6]
    return f"{folder.name[-50:]}-{place}"


def forget_tracked(folder: Path) -> None:
    """From now on the folder's run is another one, because its data are."""
    with (folder / LIVES).open("a", encoding="utf-8") as file:
        file.write("another\n")
