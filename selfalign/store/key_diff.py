"""Why one stage has two keys in two runs: the inputs that differ, followed back to their origin."""

import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.formatting import printable
from selfalign.store.artifacts import MANIFEST

SHOWN = 60
"""Characters of a value that are shown."""

ABSENT = object()
"""Stands for an input that only the other run has."""


@dataclass(frozen=True, slots=True)
class StageKey:
    """The artifact of a label in a run: stage and key, and digest and inputs once it is finished."""

    stage: str
    key: str
    digest: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)


RunStages = dict[str, StageKey]
"""{label: its artifact}, in the order in which the pipeline makes them."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An input that differs between two runs, by its path below the stage's inputs."""

    path: str
    first: Any
    second: Any

    @property
    def cause(self) -> str:
        """Equal for the effects of one setting on several stages. Every seed is derived from the run's."""
        return self.path if self.is_seed else repr((self.path, self.first, self.second))

    @property
    def is_seed(self) -> bool:
        return self.path.rpartition(".")[-1] == "seed"


@dataclass(slots=True)
class KeyDiff:
    """Two runs compared stage by stage.

    Attributes:
        first: one run.
        second: the other.
        same: labels with one key.
        own: {label: its inputs that differ by themselves, not as results of other stages}.
        followed: {label: the labels whose results are its other inputs that differ}.
        unknown: labels with two keys whose inputs are not on record, because one run has not finished them.
    """

    first: RunStages
    second: RunStages
    same: list[str] = field(init=False, default_factory=list)
    own: dict[str, list[Difference]] = field(init=False, default_factory=dict)
    followed: dict[str, set[str]] = field(init=False, default_factory=dict)
    unknown: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for label in [label for label in self.first if label in self.second]:
            one, other = self.first[label], self.second[label]
            if (one.stage, one.key) == (other.stage, other.key):
                self.same.append(label)
            elif one.digest and other.digest:
                self._compare(label, one, other)
            else:
                self.unknown.append(label)

    def _compare(self, label: str, one: StageKey, other: StageKey) -> None:
        self.own[label], self.followed[label] = [], set()
        for difference in differences(one.inputs, other.inputs):
            makers = _labels_of(difference.first, self.first) & _labels_of(difference.second, self.second)
            self.followed[label] |= makers
            if not makers:
                self.own[label].append(difference)

    def causes(self, shown: Collection[str]) -> dict[str, list[Difference]]:
        """For each shown stage with two keys, return the inputs that differ in this stage itself.

        Those already listed for an earlier stage are left out.
        """
        told: set[str] = set()
        found: dict[str, list[Difference]] = {}
        for label in [label for label in self.own if label in shown]:
            found[label] = [difference for difference in self.own[label] if difference.cause not in told]
            told |= {difference.cause for difference in found[label]}
        return found

    def behind(self, label: str) -> set[str]:
        """Return a label and those whose differing results it depends on."""
        found: set[str] = set()
        waiting = [label]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.followed.get(name, ())
        return found

    def value(self, difference: Difference) -> str:
        """Return `first → second`. Long texts are cut around the first difference."""
        one, other = _said(difference.first, self.first), _said(difference.second, self.second)
        same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        return f"{_cut(one, same)} → {_cut(other, same)}"


def read_stages(folder: Path) -> RunStages:
    """Return the artifact of every label of a run, whether the run is finished, killed or still running.

    Raises:
        SelfalignError: the folder is not that of a run, or a manifest is damaged.
    """
    place, log = folder / "artifacts", folder / "metrics.jsonl"
    paths = [Path(parent, name) for parent, folders, files in os.walk(place) for name in folders + files]
    links = {path.relative_to(place).as_posix(): path for path in paths if path.is_symlink()}
    if not links:
        raise SelfalignError(f"{folder}: not a run folder: it has no links below artifacts/")
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    # Links know no order, and a killed run has no summary.
    logged = [label for label in re.findall(r'"label": "([^"]*)"', text) if label in links]
    return {label: _read_made(links[label]) for label in dict.fromkeys([*logged, *sorted(links)])}


def _read_made(link: Path) -> StageKey:
    place = Path(os.path.realpath(link))
    try:
        manifest = read_json(place / MANIFEST)
        # What the key is made of beside the inputs.
        made_by = {"stage": manifest["stage"], "format": manifest["format"]}
        return StageKey(place.parent.name, place.name, manifest["digest"], made_by | manifest["inputs"])
    except (FileNotFoundError, NotADirectoryError):
        return StageKey(place.parent.name, place.name)
    except (ValueError, KeyError, TypeError) as error:
        raise SelfalignError(f"{place / MANIFEST}: damaged; delete {place} to have it made again") from error


def differences(first: Any, second: Any, path: str = "") -> Iterator[Difference]:
    """Yield where two values of canonical JSON differ. A number's type counts, because it is part of the key."""
    if _is_settings(first) and _is_settings(second):
        for name in dict.fromkeys([*first, *second]):
            below = f"{path}.{name}" if path else name
            yield from differences(first.get(name, ABSENT), second.get(name, ABSENT), below)
    elif _is_nested(first) and _is_nested(second):
        for index in range(max(len(first), len(second))):
            one, other = ([*values[index : index + 1], ABSENT][0] for values in (first, second))
            yield from differences(one, other, f"{path}[{index}]")
    elif ABSENT in (first, second) or json.dumps(first, sort_keys=True) != json.dumps(second, sort_keys=True):
        yield Difference(path, first, second)


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and not _is_artifact(value)


def _is_artifact(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"artifact", "digest"}


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict | list) for item in value)


def _labels_of(value: Any, stages: RunStages) -> set[str]:
    """Return the labels whose artifact an input is; empty for any other input."""
    if not _is_artifact(value):
        return set()
    return {name for name, made in stages.items() if (made.stage, made.digest) == (value["artifact"], value["digest"])}


def _said(value: Any, stages: RunStages) -> str:
    if value is ABSENT:
        return "nothing"
    if _is_artifact(value):
        labels = [label for label in stages if label in _labels_of(value, stages)]
        return " = ".join(labels) or f"{value['artifact']} {value['digest'][:8]}"
    if isinstance(value, dict) and "class" in value:
        settings = (f"{name}={_said(item, stages)}" for name, item in value.items() if name != "class")
        return f"{value['class']}({', '.join(settings)})"
    return printable(json.dumps(value, ensure_ascii=False))


def _cut(text: str, same: int) -> str:
    """Return the part of a text around the first character that differs."""
    start = max(0, min(same - SHOWN // 3, len(text) - SHOWN))
    end = start + SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
