"""The report of a run while it goes: written again between stages, as long as that costs the run next to nothing."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from selfalign.core.errors import SelfalignError, one_line, reason_of
from selfalign.core.failures import explain_failure
from selfalign.report import write_report
from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger
from selfalign.runs.progress import Progress, forget_progress
from selfalign.runs.summary import summarise

logger = logging.getLogger(__name__)

SHARE = 0.02
"""The part of a run's time that may go into writing its report between stages."""

FINISHED = "finished.json"
"""Requested outputs besides the artifacts. Written last, after the pages, the end of tracking and the push."""


@dataclass(slots=True)
class LiveReport:
    """Keeps progress.json and report.html of a run up to date. What goes wrong here is a warning and stops no run.

    As a context it marks both as stopped if the block fails. A run that was finished before keeps its report until
    something has to be made again.

    Attributes:
        folder: the run folder.
        described: entries of the summary that are known beforehand.
        models: returns the names of the evaluated models, in order, from the labels of the artifacts.
        progress: as it was written last.
        cost: the seconds that the last writing took.
        written: when that was; 0 before the first.
        unfinished: whether the run has no complete report, or something of it is made again.
        broken: whether writing has failed, and is not tried again.
    """

    folder: Path
    described: dict[str, Any]
    models: Callable[[Iterable[Label]], Sequence[str]]
    progress: Progress = field(default_factory=Progress)
    cost: float = 0.0
    written: float = 0.0
    unfinished: bool = False
    broken: bool = False

    def __enter__(self) -> Self:
        self.unfinished = not (self.folder / "summary.json").exists()
        if self.unfinished:
            self._tell(replace(self.progress, summary={**self.described, **summarise({}, [])}))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self.unfinished:
            self._tell(replace(self.progress, error=reason(error)), stopped=True)

    def begin(self, ledger: Ledger, progress: Progress) -> None:
        """Note that an artifact is now being made, and write the report if enough time has passed since the last."""
        self.unfinished = True
        (self.folder / FINISHED).unlink(missing_ok=True)
        self._tell(replace(progress, summary=self.summary(ledger, self.models(ledger.artifacts))))

    def summary(self, ledger: Ledger, models: Sequence[str]) -> dict[str, Any]:
        """Return the summary of what is made; `models` are the evaluated ones."""
        return {**self.described, **summarise(ledger.artifacts, models)}

    def finish(self) -> None:
        """Note that the run has its summary. The report that is written next is the last."""
        forget_progress(self.folder)
        self.unfinished = False

    def _tell(self, progress: Progress, *, stopped: bool = False) -> None:
        self.progress = progress
        if self.broken:
            return
        try:
            progress.write(self.folder)
            started = time.monotonic()
            if stopped or not self.written or started - self.written >= self.cost / SHARE:
                write_report(self.folder)
                self.written = time.monotonic()
                self.cost = self.written - started
        except Exception as error:  # noqa: BLE001 - a page that nobody needs yet must not end a run
            self.broken = True
            if not stopped:
                logger.warning("the report is not written before the run ends: %s", one_line(reason_of(error)))


def reason(error: BaseException) -> str:
    """Return why a run stopped, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return one_line(error if isinstance(error, SelfalignError) else explain_failure(error) or reason_of(error))
