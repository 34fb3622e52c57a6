"""The jobs of a sweep and their states, stored in jobs.json."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.formatting import about, plural


class JobState(StrEnum):
    """The state of a job."""

    waiting = "waiting"
    running = "running"
    finished = "finished"
    failed = "failed"
    interrupted = "interrupted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """An entry of jobs.json.

    Attributes:
        number: its number in the sweep, from 1.
        overrides: its overrides, such as "loss.lam=0.3".
        state: its state.
        there: whether the run had been finished before, so that the job did nothing.
        folder: its run folder, relative to the sweep's folder; None until its settings are accepted.
        seconds: the duration of its last run.
        error: its error message, in one line.
    """

    number: int
    overrides: list[str]
    state: JobState = JobState.waiting
    there: bool = False
    folder: str | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def outcome(self) -> str:
        """The state, or "finished before"."""
        return "finished before" if self.there else self.state.value


def varying_overrides(job: Job, jobs: Sequence[Job]) -> str:
    """Return the overrides of a job that the other jobs do not all have."""
    others = [other for other in jobs if other.number != job.number]
    common = set(job.overrides).intersection(*(other.overrides for other in others)) if others else set()
    return " ".join(text for text in job.overrides if text not in common) or "all overrides in common"


def state_text(job: Job) -> str:
    """Return a job's state in a few words."""
    match job.state:
        case JobState.failed:
            return f"failed: {job.error}"
        case JobState.finished if not job.there:
            return f"finished in {seconds(job)} s"
        case _:
            return job.outcome


def seconds(job: Job) -> str:
    """Return the duration of a job in seconds, or a dash if it is unknown."""
    return "–" if job.seconds is None else f"{job.seconds:.0f}"


def progress_text(jobs: Sequence[Job]) -> str:
    """Return how many jobs have ended, and the time left: "3 of 8 jobs ended, about 12 min left, …"."""
    ended = sum(job.state not in (JobState.waiting, JobState.running) for job in jobs)
    left = time_left(jobs, sum(job.state is JobState.running for job in jobs))
    return f"{ended} of {plural(len(jobs), 'job')} ended{f', {left}' if left else ''}"


def time_left(jobs: Sequence[Job], at_once: int) -> str:
    """Return the time left of a sweep in words; empty if no job has finished or none is left.

    A job takes as long as the median of those that finished, which share stages as it does.

    Args:
        jobs: of the sweep.
        at_once: number of jobs that run side by side.
    """
    took = [job.seconds for job in jobs if job.state is JobState.finished and not job.there and job.seconds is not None]
    left = sum(job.state in (JobState.waiting, JobState.running) for job in jobs)
    if not took or not left:
        return ""
    seconds = statistics.median(took) * left / max(1, at_once)
    return f"{about(seconds)} left, from the median of {plural(len(took), 'finished job')}"


JOBS = "jobs.json"
"""Name of a sweep's file, a list of jobs."""

REQUIRED = ("number", "overrides", "state", "folder", "error")
"""Keys that every entry must have."""


def read_jobs(file: Path) -> list[dict[str, Any]]:
    """Read the entries of a sweep's file.

    Raises:
        SelfalignError: the file is damaged.
    """
    try:
        return [{**entry, **{name: entry[name] for name in REQUIRED}} for entry in read_json(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise SelfalignError(
            f"{file}: not the jobs of a sweep ({error!r}). Delete it and start the sweep again"
        ) from error


def jobs_in(folder: Path) -> list[Job]:
    """Return the jobs of a sweep's folder that are known so far."""
    return [Job(**{**row, "state": JobState(row["state"])}) for row in read_jobs(folder / JOBS)]
