"""Read the jobs of a comparison from their folders: what differs, what they share, and which is best."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import yaml

from selfalign.core.errors import SelfalignError
from selfalign.metrics import catalog
from selfalign.metrics.catalog import signed
from selfalign.report.html import is_number
from selfalign.report.replicates import pooled_models
from selfalign.runs.labels import Label
from selfalign.runs.progress import PROGRESS
from selfalign.runs.reader import Finished
from selfalign.runs.sweep_jobs import JOBS, read_jobs

Row = dict[str, Any]


FINISHED = "finished"

SEED = "seed"

FEW = 3
"""Maximum number of settings that fit into a sentence."""

NOTHING = (None, {}, [])
"""What stands where a group of settings is empty."""

LEADING = 6
"""Number of jobs that are drawn as lines of their own and whose answers are shown."""

MARK = 8
"""Maximum length of a job's name in a chart, in characters."""


@dataclass(kw_only=True, slots=True)
class JobResult:
    """One job.

    Attributes:
        name: name of its folder, or its overrides if it has none.
        folder: the run folder.
        state: "finished", "failed", "unfinished" or another state of the sweep.
        error: the last line of its error.
        settings: {dotted key: value} of its configuration; the choice of a group is under the group's name.
        run: the finished run; None for any other job, which has no metrics.
        number: its number in the sweep, or else in the comparison, from 1.
        seeds: the finished jobs of which this is the mean, because they differ only in their seed; empty for a job of
            its own. `run` and `number` are then those of the first.
        pooled: the rows of metrics of that mean.
    """

    name: str
    folder: Path | None = None
    state: str = FINISHED
    error: str = ""
    settings: Row = field(default_factory=dict)
    run: Finished | None = None
    number: int = 0
    seeds: list["JobResult"] = field(default_factory=list)
    pooled: list[Row] = field(default_factory=list)

    @property
    def models(self) -> list[Row]:
        """The rows of metrics of every model; empty for an unfinished job."""
        return self.pooled or (self.run.models if self.run else [])

    @property
    def each(self) -> list["JobResult"]:
        """The jobs of which this is the mean, or the job itself."""
        return self.seeds or [self]

    @property
    def last(self) -> Row:
        """The row of metrics of the last model; empty for an unfinished job."""
        return self.models[-1] if self.models else {}


def find_jobs(paths: Sequence[Path]) -> list[JobResult]:
    """Return the jobs in these folders, each once.

    Args:
        paths: run folders, sweep folders with their jobs.json, or folders that hold several runs. An evaluation of
            other runs' models is taken only if its own folder is given.

    Raises:
        SelfalignError: a folder holds no run, or a finished run cannot be read.
    """
    found = [job for path in paths for job in _jobs_at(path)]
    return list({str(job.folder) if job.folder else job.name: job for job in reversed(found)}.values())[::-1]


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's."""
    return (folder / "config.yaml").is_file()


def _jobs_at(path: Path) -> list[JobResult]:
    if (path / JOBS).is_file():
        entries = read_jobs(path / JOBS)
        common = set.intersection(*(set(entry["overrides"]) for entry in entries)) if entries else set()
        return [_of_sweep(path, entry, common) for entry in entries]
    folders = [path] if is_run(path) else sorted(child for child in path.glob("*") if is_run(child))
    if not folders:
        raise SelfalignError(f"{path} is not a run folder, a sweep folder or a folder of runs")
    found = map(_of_folder, folders)
    return [job for job in found if not (job.run and "evaluated" in job.run.summary and job.folder != path.resolve())]


def _of_sweep(path: Path, entry: Row, common: set[str]) -> JobResult:
    """Return a job from its entry in the sweep.

    A job whose settings were refused has no folder; its own overrides are its settings.
    """
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
    """Parse an override's value. A text that is not plain YAML is returned as it is."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text.strip("'\"").replace("\\'", "'")
    return value if value is None or isinstance(value, str | int | float | list | dict) else text


def _of_folder(folder: Path) -> JobResult:
    """Return a job from its run folder."""
    return _finished(folder) if _has_finished(folder) else _unfinished(folder)


def _has_finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file() and not (folder / PROGRESS).exists()


def _finished(folder: Path) -> JobResult:
    run = Finished.load(folder)
    return JobResult(name=folder.name, folder=folder.resolve(), settings=flat(run.config), run=run)


def _unfinished(folder: Path) -> JobResult:
    error = _last_error(folder / "run.log")
    settings = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    state = "failed" if error else "unfinished"
    return JobResult(name=folder.name, folder=folder.resolve(), state=state, error=error, settings=settings)


def _last_error(log: Path) -> str:
    """Return the last line of a log if it belongs to a traceback, and "" if it is a message."""
    lines = log.read_text(encoding="utf-8").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    is_message = re.match(r"\d{4}-\d\d-\d\d .* [A-Z]+ ", last)
    return "" if is_message else last.removeprefix("selfalign.core.errors.SelfalignError: ")


def flat(config: Mapping[str, Any]) -> Row:
    """Return a configuration as {dotted key: value}.

    `choices` are under their groups' names, and `overrides` are left out.
    """

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
    """Return a setting as text; equal numbers have equal texts."""
    if isinstance(value, str):
        return value or '""'
    return repr(value).removesuffix(".0") if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def differing(jobs: Sequence[JobResult]) -> list[str]:
    """Return the keys whose values differ among the jobs that have them; those with the most values come first.

    An empty group beside the names of classes counts as absent: an unfinished job does not know the class of a
    component without settings.
    """
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    named = {key for job in jobs for key, value in job.settings.items() if isinstance(value, str)}

    def is_known(job: JobResult, key: str) -> bool:
        return key in job.settings and not (key in named and job.settings[key] == {})

    values = {key: {as_text(job.settings[key]) for job in jobs if is_known(job, key)} for key in keys}
    several = [key for key, different in values.items() if len(different) > 1]
    return sorted(several, key=lambda key: len(values[key]), reverse=True)


def with_absent(jobs: Sequence[JobResult]) -> list[JobResult]:
    """Return the jobs with null for every setting, or group of settings, that only other jobs have.

    A group that a job lacks is one value in the others: the parameters of an endpoint, or a benchmark. Settings that
    only one class of a component has are left out, because the name of the class shows the difference.
    """
    lacking = dict.fromkeys(owner for job in jobs for other in jobs for owner in _lacking(job, other))
    return [replace(job, settings={**{key: _group(job, key) for key in lacking}, **job.settings}) for job in jobs]


def _lacking(job: JobResult, other: JobResult) -> Iterator[str]:
    """Yield the highest keys of settings that another job has, and that this one lacks or has empty."""
    if job.folder is None or other.folder is None:
        return  # Of a job whose settings were refused only its own overrides are known.
    there = {owner for key in job.settings for owner in _owners(key) if job.settings.get(owner, key) not in NOTHING}
    for key in (key for key in other.settings if key not in job.settings):
        component = key.partition(".")[0]
        classes = [settings.get(component) for settings in (job.settings, other.settings)]
        if classes[0] == classes[1] or not any(isinstance(name, str) for name in classes):
            yield from islice((owner for owner in _owners(key) if owner not in there), 1)


def _owners(key: str) -> list[str]:
    """Return the keys of the groups that a setting is in, the highest first, and its own key."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _group(job: JobResult, owner: str) -> Row | None:
    """Return {rest of the key: value} of the settings below a key; None without any."""
    below = f"{owner}."
    return {k.removeprefix(below): v for k, v in job.settings.items() if k.startswith(below)} or None


def without_seeds(jobs: Sequence[JobResult], keys: Sequence[str]) -> list[JobResult]:
    """Return the jobs, with those that differ only in their seed as one: their mean, in the place of the first.

    Args:
        jobs: in order.
        keys: the settings that differ among them. Jobs that are equal in all of them are no replicates.
    """
    alike: dict[tuple[str, ...], list[JobResult]] = {}
    for job in jobs:
        others = [as_text(job.settings[key]) if key in job.settings else "" for key in keys if key != SEED]
        alike.setdefault((*others,) if job.run else (*others, str(job.number), job.state), []).append(job)
    groups: list[JobResult] = []
    for group in alike.values():
        seeds = {as_text(job.settings.get(SEED)) for job in group}
        groups += [_mean_of(group)] if 1 < len(group) == len(seeds) else group
    return sorted(groups, key=lambda job: job.number)


def _mean_of(jobs: Sequence[JobResult]) -> JobResult:
    settings = {key: value for key, value in jobs[0].settings.items() if key != SEED}
    rows = pooled_models([job.run for job in jobs if job.run])
    return replace(jobs[0], settings=settings, seeds=list(jobs), pooled=rows)


def metric_of(jobs: Sequence[JobResult]) -> str:
    """Return the `sweep_metric` of the first job that has one."""
    named = (job.settings["sweep_metric"] for job in jobs if "sweep_metric" in job.settings)
    return next(named, catalog.EVAL_WIN_RATE.name)


@dataclass(frozen=True, slots=True)
class JobComparison:
    """Jobs side by side.

    Attributes:
        jobs: in order, and numbered.
        groups: the jobs, with those that differ only in their seed as one.
        keys: the settings that differ.
        metric: ranks the jobs.
        texts: {key: {value as text: it shortened}}, different for different values.
        lowest: whether the lowest value is the best.
    """

    jobs: list[JobResult]
    groups: list[JobResult]
    keys: list[str]
    metric: str
    texts: dict[str, dict[str, str]]
    lowest: bool = False

    @classmethod
    def of(cls, jobs: Sequence[JobResult], metric: str) -> "JobComparison":
        """Sort the jobs: those of a sweep by their number, others by the settings that differ.

        Jobs of a sweep keep their numbers; a job that equals another one has been left out. A metric is lower-is-better
        if its name begins with "-".
        """
        jobs = with_absent(jobs)
        keys = differing(jobs)
        ordered = sorted(jobs, key=lambda job: (job.number, [_sort_key(job.settings.get(key)) for key in keys]))
        if len({job.number for job in jobs} - {0}) < len(jobs):
            ordered = [replace(job, number=number) for number, job in enumerate(ordered, start=1)]
        texts = {
            key: told_apart([as_text(job.settings[key]) for job in ordered if key in job.settings]) for key in keys
        }
        name, sign = signed(metric)
        return cls(ordered, without_seeds(ordered, keys), keys, name, texts, lowest=sign < 0)

    @property
    def extreme(self) -> str:
        """ "lowest" or "highest": which value of the metric is the best."""
        return "lowest" if self.lowest else "highest"

    @property
    def finished(self) -> list[JobResult]:
        """The jobs with metrics."""
        return [job for job in self.jobs if job.run]

    @property
    def measured(self) -> list[JobResult]:
        """The groups with metrics."""
        return [group for group in self.groups if group.run]

    @property
    def has_replicates(self) -> bool:
        """Whether some jobs differ only in their seed."""
        return len(self.groups) < len(self.jobs)

    @property
    def runs(self) -> list[Finished]:
        """The runs of the finished jobs."""
        return [job.run for job in self.jobs if job.run]

    @property
    def ranked(self) -> list[JobResult]:
        """The groups whose last model has the metric, the best value first."""
        known = [job for job in self.measured if is_number(job.last.get(self.metric))]
        return sorted(known, key=lambda job: job.last[self.metric], reverse=not self.lowest)

    @property
    def even(self) -> list[JobResult]:
        """The groups that share the best value, in the order of the table."""
        ranked = self.ranked
        return [job for job in self.measured if job in ranked and job.last[self.metric] == ranked[0].last[self.metric]]

    @property
    def leading(self) -> list[JobResult]:
        """The best groups, in the order of the table: as many as a chart has colours."""
        best = [*self.ranked, *(job for job in self.measured if job not in self.ranked)][:LEADING]
        return [job for job in self.measured if job in best]

    @property
    def shown(self) -> list[JobResult]:
        """The job of each leading group whose answers are shown: the first."""
        return [group.each[0] for group in self.leading]

    def rivals(self) -> list[JobResult]:
        """Return the groups whose interval reaches that of the best one.

        One without an interval is among them; if the best has none, all are.
        """
        best, *others = self.ranked
        low, _ = self._ends(best)
        return [job for job in self.measured if job in others and not self._ends(job)[1] < low]

    def interval(self, job: JobResult) -> tuple[float, float]:
        """Return the ends of the metric's 95 % interval; ±∞ if there is none."""
        low, high = (job.last.get(f"{self.metric}_{end}") for end in ("low", "high"))
        return (low, high) if is_number(low) and is_number(high) else (-math.inf, math.inf)

    def _ends(self, job: JobResult) -> tuple[float, float]:
        """Return the worse and the better end of the interval, negated where lower is better."""
        low, high = self.interval(job)
        return (-high, -low) if self.lowest else (low, high)

    def text(self, job: JobResult, key: str) -> str:
        """Return the job's value of a setting that differs, as a short text that no other value has."""
        return self.texts[key][as_text(job.settings[key])]

    def description(self, job: JobResult) -> str:
        """Return the settings in which a job differs, such as "loss.lam = 0.3, seed = 1".

        If there are none or too many, return its name.
        """
        parts = [f"{key} = {self.text(job, key)}" for key in self.keys if key in job.settings]
        return ", ".join(parts) if 0 < len(parts) <= FEW else job.name

    @property
    def marked_by(self) -> str:
        """The setting that names jobs in charts: the only one that differs, if its values are short and unique.

        Empty if they are named by their numbers.
        """
        keys = [key for key in self.keys if key != SEED or not self.has_replicates]
        texts = [as_text(job.settings.get(key, "")) for job in self.groups for key in keys]
        short = len(keys) == 1 and len(set(texts)) == len(texts) and all(len(text) <= MARK for text in texts)
        return keys[0] if short else ""

    def mark(self, job: JobResult) -> str:
        """Return a name for charts: the value of `marked_by`, or else the number."""
        return as_text(job.settings.get(self.marked_by, "")) if self.marked_by else f"{job.number}"

    def alike_by_seed(self, found: Mapping[str, list[JobResult]]) -> bool:
        """Return whether all jobs have the same of something; among replicates, whether all jobs of one seed have.

        Args:
            found: {digest: jobs that have what it is of}.
        """
        seeds = [
            {as_text(job.settings.get(SEED)) if self.has_replicates else "" for job in jobs} for jobs in found.values()
        ]
        return sum(map(len, seeds)) == len(set().union(*seeds))

    def by_key(self, label: Label) -> dict[str, list[JobResult]]:
        """Return {key of an artifact: finished jobs that have it}. An equal key means equal content."""
        found: dict[str, list[JobResult]] = {}
        for job in self.finished:
            for stage in _stages(job):
                if stage["label"] == str(label):
                    found.setdefault(stage["key"], []).append(job)
        return found


def _sort_key(value: object) -> tuple[int, float, str]:
    """Return a sort key: numbers by size, then texts, then None."""
    if is_number(value) and not isinstance(value, bool):
        return 0, value, ""
    return (2, 0.0, "") if value is None else (1, 0.0, as_text(value))


def told_apart(texts: Sequence[str], letters: int = 48) -> dict[str, str]:
    """Return {text: it on one line, of at most about `letters` characters}, different for different texts.

    Texts that begin alike, such as paths in one folder or versions of a prompt, show where they begin to differ.
    """
    alike: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        alike.setdefault(shortened(text, letters), []).append(text)
    told: dict[str, str] = {}
    for short, group in alike.items():
        lines = [" ".join(text.split()) for text in group]
        shown, same = letters // 3, len([*takewhile(lambda each: len({*each}) == 1, zip(*lines, strict=False))])
        start = max(same - shown, *(lines[0].rfind(end, 0, same) + 1 for end in "/ "))
        for text, line in zip(group, lines, strict=True):
            name = short if len(group) == 1 else f"{line[:shown]}…{shortened(line[start:], letters - shown)}"
            taken = name in told.values()  # They differ in white space alone, or behind another beginning.
            told[text] = f"{name} ({len(told) + 1})" if taken else name
    return told


def shortened(text: str, letters: int = 48) -> str:
    """Return a text on one line, cut to `letters` characters."""
    line = " ".join(text.split())
    return line if len(line) <= letters else line[: letters - 1].rstrip() + "…"


def _stages(job: JobResult) -> list[Row]:
    return job.run.summary["stages"] if job.run else []


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of artifacts that several jobs use.

    Attributes:
        made: of each artifact once.
        reused: of each artifact once for every further job.
    """

    made: float = 0.0
    reused: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.made + other.made, self.reused + other.reused)


def costs(jobs: Sequence[JobResult], purpose: Callable[[Label, str], str]) -> dict[str, Cost]:
    """Return {purpose: seconds spent, and seconds saved by sharing}.

    Args:
        jobs: those that are finished count.
        purpose: returns the purpose of a stage from its label and its name.
    """
    seen: set[Path] = set()
    spent: dict[str, Cost] = {}
    for job in jobs:
        for stage in _stages(job):
            label = Label.parse(stage["label"])
            path, name = artifact(job, label), purpose(label, stage["stage"])
            cost = Cost(reused=stage["seconds"]) if path in seen else Cost(made=stage["seconds"])
            spent[name] = spent.get(name, Cost()) + cost
            seen.add(path)
    return spent


def seconds_alone(job: JobResult) -> float:
    """Return the seconds that a job would take without sharing artifacts."""
    return math.fsum(stage["seconds"] for stage in _stages(job))


def seconds_own(job: JobResult, jobs: Sequence[JobResult]) -> float:
    """Return the seconds of the artifacts that only this job uses."""
    others = {artifact(other, Label.parse(s["label"])) for other in jobs if other is not job for s in _stages(other)}
    return math.fsum(s["seconds"] for s in _stages(job) if artifact(job, Label.parse(s["label"])) not in others)


def artifact(job: JobResult, label: Label) -> Path:
    """Return the real path of an artifact of a finished job."""
    assert job.run is not None
    return label.link_in(job.run.folder).resolve()
