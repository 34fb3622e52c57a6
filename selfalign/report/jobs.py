"""The jobs of a comparison, read back from their folders: what tells them apart, what they share, which did best."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from selfalign.core.errors import SelfalignError
from selfalign.metrics import catalog
from selfalign.metrics.catalog import signed
from selfalign.report.html import is_number
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished
from selfalign.runs.sweep_jobs import JOBS, read_jobs

Row = dict[str, Any]


FINISHED = "finished"

FEW = 3
"""Settings that still can be told in a sentence."""

NOTHING = (None, {}, [])
"""What stands where a group of settings is empty."""

LEADING = 6
"""Jobs that are drawn as lines of their own, and whose answers are shown."""

MARK = 8
"""Letters that a job's name in a chart may have."""


@dataclass(kw_only=True, slots=True)
class JobResult:
    """One job.

    Attributes:
        name: its folder's name, or its overrides where it never had a folder.
        folder: the run folder.
        state: "finished", or what else became of it.
        error: the line it stopped with.
        settings: {key: value} of its configuration, keys with dots; a group's class stands under the group's name.
        run: the finished run; None for any other job, which has no numbers.
        number: its place in the sweep, or else in the comparison, from 1.
    """

    name: str
    folder: Path | None = None
    state: str = FINISHED
    error: str = ""
    settings: Row = field(default_factory=dict)
    run: Finished | None = None
    number: int = 0

    @property
    def models(self) -> list[Row]:
        """The numbers of every model; none of an unfinished job."""
        return self.run.models if self.run else []

    @property
    def last(self) -> Row:
        """The numbers of its last model; none of an unfinished job."""
        return self.models[-1] if self.models else {}


def find_jobs(paths: Sequence[Path]) -> list[JobResult]:
    """The jobs in these places, each once.

    Args:
        paths: run folders, sweep folders with their jobs.json, or folders that hold several runs; what only measured
            other runs' models is taken where it is named itself.

    Raises:
        SelfalignError: a place has neither, or a finished run cannot be read.
    """
    found = [job for path in paths for job in _jobs_at(path)]
    return list({str(job.folder) if job.folder else job.name: job for job in reversed(found)}.values())[::-1]


def is_run(folder: Path) -> bool:
    """Whether a run was begun here."""
    return (folder / "config.yaml").is_file()


def _jobs_at(path: Path) -> list[JobResult]:
    if (path / JOBS).is_file():
        entries = read_jobs(path / JOBS)
        common = set.intersection(*(set(entry["overrides"]) for entry in entries)) if entries else set()
        return [_of_sweep(path, entry, common) for entry in entries]
    folders = [path] if is_run(path) else sorted(child for child in path.glob("*") if is_run(child))
    if not folders:
        raise SelfalignError(f"{path}: no run, no sweep and no folder of runs")
    found = map(_of_folder, folders)
    return [job for job in found if not (job.run and "evaluated" in job.run.summary and job.folder != path.resolve())]


def _of_sweep(path: Path, entry: Row, common: set[str]) -> JobResult:
    """A job as the sweep tells of it; one whose settings were refused has no folder, and its own overrides for them."""
    folder, done = path / (entry["folder"] or ""), entry["state"] == FINISHED
    if entry["folder"] and is_run(folder):
        job = _finished(folder) if done and _has_finished(folder) else _unfinished(folder)
    else:
        own = [override.lstrip("+").partition("=") for override in entry["overrides"] if override not in common]
        settings = {key: _value(value) for key, _, value in own}
        job = JobResult(name=" ".join(entry["overrides"]), settings=settings)
    state = "gone" if done and not job.run else entry["state"]
    return replace(job, number=entry["number"], state=state, error=entry["error"])


def _value(text: str) -> Any:
    """What an override's text stands for; the text itself where that is not YAML, or something else there."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text.strip("'\"").replace("\\'", "'")
    return value if value is None or isinstance(value, str | int | float | list | dict) else text


def _of_folder(folder: Path) -> JobResult:
    """A job as its own folder tells of it."""
    return _finished(folder) if _has_finished(folder) else _unfinished(folder)


def _has_finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def _finished(folder: Path) -> JobResult:
    run = Finished.load(folder)
    return JobResult(name=folder.name, folder=folder.resolve(), settings=flat(run.config), run=run)


def _unfinished(folder: Path) -> JobResult:
    error = _last_error(folder / "run.log")
    settings = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    state = "failed" if error else "unfinished"
    return JobResult(name=folder.name, folder=folder.resolve(), state=state, error=error, settings=settings)


def _last_error(log: Path) -> str:
    """The line a log ends with, if it is a traceback's and not a message's."""
    lines = log.read_text(encoding="utf-8").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    is_message = re.match(r"\d{4}-\d\d-\d\d .* [A-Z]+ ", last)
    return "" if is_message else last.removeprefix("selfalign.core.errors.SelfalignError: ")


def flat(config: Mapping[str, Any]) -> Row:
    """A configuration as {key with dots: value}; `choices` stand under their groups' names, `overrides` say no more."""

    def leaves(node: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping) and value:
                yield from leaves(value, f"{before}{name}.")
            else:
                yield f"{before}{name}", value

    values = {name: value for name, value in config.items() if name != "overrides"}
    classes = values.pop("choices", {})
    return {**classes, **{key: value for key, value in leaves(values, "") if key not in classes}}


def as_text(value: object) -> str:
    """A setting as it was given; the same number is the same text."""
    if isinstance(value, str):
        return value or '""'
    return repr(value).removesuffix(".0") if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def differing(jobs: Sequence[JobResult]) -> list[str]:
    """The keys whose values differ among the jobs that have them; those with the most values first."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    values = {key: {as_text(job.settings[key]) for job in jobs if key in job.settings} for key in keys}
    several = [key for key, different in values.items() if len(different) > 1]
    return sorted(several, key=lambda key: len(values[key]), reverse=True)


def with_absent(jobs: Sequence[JobResult]) -> list[JobResult]:
    """The jobs, with null for every setting, or group of settings, that only others of them have.

    A group that a job has none of stands as one value in the others: the endpoint's parameters, or a benchmark. What a
    class of a component has and another has not is told by the component's own name.
    """
    lacking = {owner for job in jobs for other in jobs for owner in _lacking(job, other)}
    return [replace(job, settings={**{key: _group(job, key) for key in lacking}, **job.settings}) for job in jobs]


def _lacking(job: JobResult, other: JobResult) -> Iterator[str]:
    """The highest keys of what another job has set, and this one has not, or has as nothing."""
    if job.folder is None or other.folder is None:
        return  # Of a job whose settings were refused only its own overrides are known.
    there = {owner for key in job.settings for owner in _owners(key) if job.settings.get(owner, key) not in NOTHING}
    for key in other.settings.keys() - job.settings.keys():
        component = key.partition(".")[0]
        classes = [settings.get(component) for settings in (job.settings, other.settings)]
        if classes[0] == classes[1] or not any(isinstance(name, str) for name in classes):
            yield from islice((owner for owner in _owners(key) if owner not in there), 1)


def _owners(key: str) -> list[str]:
    """The keys of the groups that a setting is in, the highest first, and its own."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _group(job: JobResult, owner: str) -> Row | None:
    """The settings below a key, by the rest of their keys; None without any."""
    below = f"{owner}."
    return {k.removeprefix(below): v for k, v in job.settings.items() if k.startswith(below)} or None


def metric_of(jobs: Sequence[JobResult]) -> str:
    """The number that the jobs' own configuration goes by: `sweep_metric` of the first that has one."""
    named = (job.settings["sweep_metric"] for job in jobs if "sweep_metric" in job.settings)
    return next(named, catalog.EVAL_WIN_RATE.name)


@dataclass(frozen=True, slots=True)
class JobComparison:
    """Jobs side by side.

    Attributes:
        jobs: in order, and numbered.
        keys: these settings.
        metric: what the best job has the highest value of.
        lowest: the best job has the lowest one instead.
    """

    jobs: list[JobResult]
    keys: list[str]
    metric: str
    lowest: bool = False

    @classmethod
    def of(cls, jobs: Sequence[JobResult], metric: str) -> "JobComparison":
        """Brings the jobs into order: a sweep's by their number, others by the settings that differ.

        A sweep's jobs keep their numbers, so those that are another job again are left out. A metric with a "-" before
        its name is one that should be low.
        """
        jobs = with_absent(jobs)
        keys = differing(jobs)
        ordered = sorted(jobs, key=lambda job: (job.number, [_place(job.settings.get(key)) for key in keys]))
        if len({job.number for job in jobs} - {0}) < len(jobs):
            ordered = [replace(job, number=number) for number, job in enumerate(ordered, start=1)]
        name, sign = signed(metric)
        return cls(ordered, keys, name, lowest=sign < 0)

    @property
    def extreme(self) -> str:
        """Which value of the metric is the best."""
        return "lowest" if self.lowest else "highest"

    @property
    def finished(self) -> list[JobResult]:
        """Those with numbers."""
        return [job for job in self.jobs if job.run]

    @property
    def runs(self) -> list[Finished]:
        """Those jobs' runs."""
        return [job.run for job in self.jobs if job.run]

    @property
    def ranked(self) -> list[JobResult]:
        """Those whose last model has the metric, the best value first."""
        known = [job for job in self.finished if is_number(job.last.get(self.metric))]
        return sorted(known, key=lambda job: job.last[self.metric], reverse=not self.lowest)

    @property
    def even(self) -> list[JobResult]:
        """Those that have the best value, in the order of the table."""
        ranked = self.ranked
        return [job for job in self.finished if job in ranked and job.last[self.metric] == ranked[0].last[self.metric]]

    @property
    def leading(self) -> list[JobResult]:
        """The best few, in the order of the table: as many as a chart has colours for."""
        best = [*self.ranked, *(job for job in self.finished if job not in self.ranked)][:LEADING]
        return [job for job in self.finished if job in best]

    def rivals(self) -> list[JobResult]:
        """The jobs whose interval reaches that of the best, or that have none (nor has the best)."""
        best, *others = self.ranked
        low, _ = self._ends(best)
        return [job for job in self.finished if job in others and not self._ends(job)[1] < low]

    def interval(self, job: JobResult) -> tuple[float, float]:
        """The ends of the metric's interval; infinitely far away where there is none."""
        low, high = (job.last.get(f"{self.metric}_{end}") for end in ("low", "high"))
        return (low, high) if is_number(low) and is_number(high) else (-math.inf, math.inf)

    def _ends(self, job: JobResult) -> tuple[float, float]:
        """The worse and the better end, where more is better."""
        low, high = self.interval(job)
        return (-high, -low) if self.lowest else (low, high)

    def told(self, job: JobResult) -> str:
        """What is different about a job, "loss.lam = 0.3, seed = 1"; its name where that is nothing or much."""
        parts = [f"{key} = {shortened(as_text(job.settings[key]))}" for key in self.keys if key in job.settings]
        return ", ".join(parts) if 0 < len(parts) <= FEW else job.name

    def mark(self, job: JobResult) -> str:
        """A few letters for charts: the only setting that differs, where it is short and tells all, else the number."""
        texts = [as_text(job.settings.get(key, "")) for job in self.jobs for key in self.keys]
        short = len(self.keys) == 1 and len(set(texts)) == len(texts) and all(len(text) <= MARK for text in texts)
        return as_text(job.settings.get(self.keys[0], "")) if short else f"{job.number}"

    def by_key(self, label: Label) -> dict[str, list[JobResult]]:
        """{key: finished jobs} of an artifact; a key stands for the same content, wherever it lies."""
        found: dict[str, list[JobResult]] = {}
        for job in self.finished:
            for stage in _stages(job):
                if stage["label"] == str(label):
                    found.setdefault(stage["key"], []).append(job)
        return found


def _place(value: object) -> tuple[int, float, str]:
    """Numbers by size, then texts, then nothing."""
    if is_number(value) and not isinstance(value, bool):
        return 0, value, ""
    return (2, 0.0, "") if value is None else (1, 0.0, as_text(value))


def shortened(text: str, letters: int = 48) -> str:
    """A text that fits into a cell."""
    line = " ".join(text.split())
    return line if len(line) <= letters else line[: letters - 1].rstrip() + "…"


def _stages(job: JobResult) -> list[Row]:
    return job.run.summary["stages"] if job.run else []


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of artifacts that several jobs need: `made`, each counted once, and `reused`, once a further job."""

    made: float = 0.0
    reused: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.made + other.made, self.reused + other.reused)


def costs(jobs: Sequence[JobResult], purpose: Callable[[Label, str], str]) -> dict[str, Cost]:
    """What was spent and what sharing saved, by purpose.

    Args:
        jobs: those that finished count.
        purpose: of a stage, from its label and its name.
    """
    seen: set[Path] = set()
    spent: dict[str, Cost] = {}
    for job in jobs:
        for stage in _stages(job):
            label = Label.parse(stage["label"])
            place, name = artifact(job, label), purpose(label, stage["stage"])
            cost = Cost(reused=stage["seconds"]) if place in seen else Cost(made=stage["seconds"])
            spent[name] = spent.get(name, Cost()) + cost
            seen.add(place)
    return spent


def seconds_alone(job: JobResult) -> float:
    """What a job would have taken by itself."""
    return math.fsum(stage["seconds"] for stage in _stages(job))


def seconds_own(job: JobResult, jobs: Sequence[JobResult]) -> float:
    """What a job took that none of the others needed too."""
    others = {artifact(other, Label.parse(s["label"])) for other in jobs if other is not job for s in _stages(other)}
    return math.fsum(s["seconds"] for s in _stages(job) if artifact(job, Label.parse(s["label"])) not in others)


def artifact(job: JobResult, label: Label) -> Path:
    """Where an artifact of a finished job really lies."""
    assert job.run is not None
    return label.link_in(job.run.folder).resolve()
