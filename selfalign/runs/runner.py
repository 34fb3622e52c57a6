"""One run: its folder, what it has made, and where that came from."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from selfalign.core.failures import naming
from selfalign.runs.labels import Label
from selfalign.runs.tracker import NoTracker, Tracker
from selfalign.store.artifacts import Artefact, Counts, Store

logger = logging.getLogger(__name__)


StageFunction = Callable[..., Counts]


class Maker(Protocol):
    """What the pipeline asks for: the artefact of a stage, whether found or made."""

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artefact: ...


@dataclass(slots=True)
class Run:
    """Makes the artefacts of one configuration and keeps account of them in its folder.

    Attributes:
        folder: metrics.jsonl, summary.json, report.html, config.yaml, provenance.json, and links below artefacts/.
        store: where artefacts really lie.
        tracker: receives every row too.
        attempt: empty, or the name of a run that shares nothing with others (`fresh=true`).
        artefacts: what was made or found so far, by label.
        reused: the labels that were found.
    """

    folder: Path
    store: Store
    tracker: Tracker = field(default_factory=NoTracker)
    attempt: str = ""
    artefacts: dict[Label, Artefact] = field(default_factory=dict)
    reused: set[Label] = field(default_factory=set)
    step: int = 0

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artefact:
        """The artefact of a stage: found in the store, or made now.

        Args:
            label: its name in this run; also its link below artefacts/.
            stage: the function that makes it, called as `stage(out, **inputs)`.
            inputs: artefacts, settings and seeds; together they are its key.
        """
        name, keyed, seen = stage.__name__, keyed_inputs(inputs, self.attempt), 0
        self._link(label, self.store.place(name, keyed))

        def on_row(row: dict[str, Any]) -> None:
            nonlocal seen
            seen += 1
            self._log(label, name, row, training=True)

        if self.store.find(name, keyed) is not None:
            self.reused.add(label)
        else:
            logger.info("%s: %s", label, name)
        artefact = make(self.store, self.attempt, label, stage, inputs, on_row)
        for row in artefact.rows()[seen:]:
            self._log(label, name, row, training=True)
        self.artefacts[label] = artefact
        self._log(label, name, {**flat_numbers(artefact.counts), "seconds": artefact.seconds}, training=False)
        return artefact

    def _log(self, label: Label, stage: str, row: dict[str, Any], *, training: bool) -> None:
        values = {f"{stage}/{name}" if name == "seconds" else name: value for name, value in row.items()}
        if training:
            values[f"{stage}/step"] = values.pop("step")
        self.step += 1
        whole = {
            "step": self.step,
            "iteration": label.iteration_number,
            "label": str(label),
            "stage": stage,
            **values,
        }
        path = self.folder / "metrics.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
        self.tracker.log(whole)

    def _link(self, label: Label, place: Path) -> None:
        """Says, before it is looked for, that this run uses an artefact: what is linked is not cleaned away."""
        link = label.link_in(self.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(place, link.parent)
        if not link.is_symlink() or link.readlink() != Path(target):
            link.unlink(missing_ok=True)
            link.symlink_to(target, target_is_directory=True)


@dataclass(frozen=True, slots=True)
class Fellow:
    """Another process of a run than the main one: makes artefacts with it, and keeps account of nothing.

    Attributes:
        store: where artefacts lie.
        attempt: as of the run.
    """

    store: Store
    attempt: str = ""

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artefact:
        """The artefact of a stage, made together with the main process or waited for."""
        return make(self.store, self.attempt, label, stage, inputs)


def make(
    store: Store,
    attempt: str,
    label: Label,
    stage: StageFunction,
    inputs: dict[str, Any],
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Artefact:
    """The artefact of a stage, found in the store or made there."""
    return store.make(
        stage.__name__,
        keyed_inputs(inputs, attempt),
        lambda out: stage(out, **inputs),
        label=str(label),
        on_row=on_row,
        together=getattr(stage, "together", False),
    )


class NotMadeYet(Exception):
    """The first artefact of a run that is not in the store."""


@dataclass(slots=True)
class Look:
    """Walks a pipeline without making anything, up to the first artefact that is not there.

    Attributes:
        store: where it looks.
        attempt: as of the run.
        there: {label: key} of what it found.
    """

    store: Store
    attempt: str = ""
    there: dict[Label, str] = field(default_factory=dict)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artefact:
        """The artefact, if it is in the store.

        Raises:
            NotMadeYet: it is not.
        """
        artefact = self.store.find(stage.__name__, keyed_inputs(inputs, self.attempt))
        if artefact is None:
            raise NotMadeYet(str(label))
        self.there[label] = artefact.key
        return artefact


def keyed_inputs(inputs: dict[str, Any], attempt: str) -> dict[str, Any]:
    """A stage's inputs, with the name of a run that must not find what others made."""
    return inputs | ({"attempt": attempt} if attempt else {})


def flat_numbers(counts: Counts) -> dict[str, float]:
    """The numbers in a stage's counts, one level of nesting spelled as name/key."""
    flat: dict[str, float] = {}
    for name, value in counts.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        elif isinstance(value, int | float):
            flat[name] = value
    return flat
