"""The ledger of a run: links to its artifacts and rows of metrics, in the run folder."""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.failures import naming
from selfalign.runs.labels import Label
from selfalign.runs.planner import PlannedStage
from selfalign.runs.progress import Progress
from selfalign.runs.time_left import time_left
from selfalign.runs.tracker import NoTracker, Tracker
from selfalign.store.artifacts import Artifact, Counts

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Ledger:
    """Records a run's artifacts. Only the main process has a ledger.

    Attributes:
        folder: the run folder, with metrics.jsonl, summary.json, report.html, config.yaml, provenance.json, and links
            below artifacts/.
        show: called with each finished artifact.
        begun: called when the making of an artifact begins.
        planned: all stages of the run, in order; empty if they are not known beforehand.
        tracker: also receives every row.
        artifacts: the artifacts so far, made or found.
        reused: labels of the artifacts that were found.
        step: number of the last row.
        logged: number of rows logged for the artifact that is being made.
    """

    folder: Path
    show: Callable[["Ledger", Label], None] = lambda ledger, label: None
    begun: Callable[["Ledger", Progress], None] = lambda ledger, progress: None
    planned: list[PlannedStage] = field(default_factory=list)
    tracker: Tracker = field(default_factory=NoTracker)
    artifacts: dict[Label, Artifact] = field(default_factory=dict)
    reused: set[Label] = field(default_factory=set)
    step: int = 0
    logged: int = 0

    def link(self, label: Label, path: Path) -> None:
        """Link an artifact. This comes before the search for it, because linked artifacts are not cleaned away.

        Raises:
            SelfalignError: a folder is in the place of the link.
        """
        link = label.link_in(self.folder)
        if link.is_dir() and not link.is_symlink():
            raise SelfalignError(
                f"{link} is a folder where a run has a link: the run was copied by a program that follows links. "
                f"Remove {self.folder / 'artifacts'} and repeat the command, which links what the store has"
            )
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(path, link.parent)
        if not link.is_symlink() or link.readlink() != Path(target):
            link.unlink(missing_ok=True)
            link.symlink_to(target, target_is_directory=True)

    def begin(self, label: Label, stage: str) -> float | None:
        """Say that an artifact is now being made, and what time is left. Return the time of the stages behind it."""
        labels = [one.label for one in self.planned]
        number = labels.index(label) + 1 if label in labels else len(self.artifacts) + 1
        later, whole = (time_left(self.planned[n:], self.planned, self.artifacts) for n in (number, number - 1))
        progress = Progress(label=str(label), number=number, total=len(labels), began=time.time())
        if labels and whole:
            progress = replace(progress, seconds_left=whole.seconds, sources=whole.sources)
        logger.info("%s: %s%s", label, stage, f" · {progress.left}" if progress.left else "")
        self.begun(self, progress)
        return later.seconds if labels and later else None

    def log(self, label: Label, stage: str, row: dict[str, Any]) -> None:
        """Write a row that a running stage has logged."""
        self.logged += 1
        self._write(label, stage, {f"{stage}/step" if name == "step" else name: v for name, v in row.items()})

    def enter(self, label: Label, artifact: Artifact) -> None:
        """Record a finished artifact: write its rows that are not logged yet, and its counts."""
        for row in artifact.rows()[self.logged :]:
            self.log(label, artifact.stage, row)
        self.logged = 0
        self.artifacts[label] = artifact
        self._write(label, artifact.stage, {**flat_numbers(artifact.counts), "seconds": artifact.seconds})
        self.show(self, label)

    def _write(self, label: Label, stage: str, row: dict[str, Any]) -> None:
        self.step += 1
        whole = {
            "step": self.step,
            "iteration": label.iteration_number,
            "label": str(label),
            "stage": stage,
            **{f"{stage}/{name}" if name == "seconds" else name: value for name, value in row.items()},
        }
        path = self.folder / "metrics.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
        self.tracker.log(whole)


def open_ledger(folder: Path, show: Callable[[Ledger, Label], None]) -> Ledger | None:
    """Return the ledger of a run in the main process, and None in the others."""
    return Ledger(folder, show) if distributed.is_main() else None


def flat_numbers(counts: Counts) -> dict[str, float]:
    """Return the numbers of a stage's counts; nested ones are named name/key."""
    flat: dict[str, float] = {}
    for name, value in counts.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat
