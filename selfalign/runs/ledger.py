"""The account of one run, in its folder: links to what it makes, and rows of metrics."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfalign.core import distributed
from selfalign.core.failures import naming
from selfalign.runs.labels import Label
from selfalign.runs.tracker import NoTracker, Tracker
from selfalign.store.artifacts import Artifact, Counts


@dataclass(slots=True)
class Ledger:
    """Keeps account of a run's artifacts; of several processes the main one has it.

    Attributes:
        folder: metrics.jsonl, summary.json, report.html, config.yaml, provenance.json, and links below artifacts/.
        show: is told of each artifact when it is there.
        tracker: receives every row too.
        artifacts: what was made or found so far.
        reused: what of it was found.
        step: of the last row.
        logged: rows of the artifact in work.
    """

    folder: Path
    show: Callable[["Ledger", Label], None] = lambda ledger, label: None
    tracker: Tracker = field(default_factory=NoTracker)
    artifacts: dict[Label, Artifact] = field(default_factory=dict)
    reused: set[Label] = field(default_factory=set)
    step: int = 0
    logged: int = 0

    def link(self, label: Label, place: Path) -> None:
        """Link an artifact before it is looked for, because what is linked is not cleaned away."""
        link = label.link_in(self.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(place, link.parent)
        if not link.is_symlink() or link.readlink() != Path(target):
            link.unlink(missing_ok=True)
            link.symlink_to(target, target_is_directory=True)

    def log(self, label: Label, stage: str, row: dict[str, Any]) -> None:
        """Write down a row that a stage has logged while it ran."""
        self.logged += 1
        self._write(label, stage, {f"{stage}/step" if name == "step" else name: v for name, v in row.items()})

    def enter(self, label: Label, artifact: Artifact) -> None:
        """Write down an artifact that is there: the rows of it that are not logged yet, and its counts."""
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
    """Return the account of a run in the process that keeps it, the main one; None in the others."""
    return Ledger(folder, show) if distributed.is_main() else None


def flat_numbers(counts: Counts) -> dict[str, float]:
    """The numbers in a stage's counts, one level of nesting spelled as name/key."""
    flat: dict[str, float] = {}
    for name, value in counts.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat
