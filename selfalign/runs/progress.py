"""The progress of a run that is not finished, in its folder: what it works on, and its summary so far."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.runs.time_left import TimeLeft

PROGRESS = "progress.json"
"""The file. A finished run has none."""

LOCK = ".lock"
"""Lock of a run's or a sweep's folder, which a process holds while it works there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The progress of a run.

    Attributes:
        label: of the artifact that is being made; empty before the first.
        number: of its stage, from 1.
        total: number of stages; 0 if it is not known.
        began: when that stage began, in seconds since 1970.
        seconds_left: the time that it and the later ones take; None if it is not known.
        sources: whose times that is estimated from.
        error: what stopped the run; empty while it goes, and if its process was killed.
        summary: the contents of summary.json so far.
    """

    label: str = ""
    number: int = 0
    total: int = 0
    began: float = 0.0
    seconds_left: float | None = None
    sources: Sequence[str] = ()
    error: str = ""
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """The stage in words: "iteration_1/responses, stage 12 of 34"."""
        of = f" of {self.total}" if self.total else ""
        return f"{self.label}, stage {self.number}{of}" if self.label else "checks before the first stage"

    @property
    def left(self) -> str:
        """The time left in words; empty if it is not known, or was estimated too low."""
        seconds = (self.seconds_left or 0.0) - (time.time() - self.began)
        return TimeLeft(seconds, tuple(self.sources)).text() if seconds > 0 else ""

    def write(self, folder: Path) -> None:
        """Write the file of a run folder."""
        write_json(folder / PROGRESS, asdict(self))


def read_progress(folder: Path) -> Progress | None:
    """Return the progress of an unfinished run; None if the folder has none.

    Raises:
        SelfalignError: the file is damaged.
    """
    try:
        return Progress(**read_json(folder / PROGRESS))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise SelfalignError(f"{folder / PROGRESS} is damaged. Repeat the run's command, which continues it") from error


def forget_progress(folder: Path) -> None:
    """Remove the file, because the run is finished."""
    (folder / PROGRESS).unlink(missing_ok=True)


def is_held(folder: Path) -> bool:
    """Return whether a process works in the folder of a run or a sweep."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True


def is_running(folder: Path, progress: Progress) -> bool:
    """Return whether an unfinished run goes: it has not stopped, and a process works in its folder."""
    return not progress.error and is_held(folder)
