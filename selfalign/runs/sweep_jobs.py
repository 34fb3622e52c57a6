"""The jobs of a sweep and their states, as jobs.json has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json


class JobState(StrEnum):
    """What has become of a job."""

    waiting = "waiting"
    running = "running"
    finished = "finished"
    failed = "failed"
    interrupted = "interrupted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A line of jobs.json.

    Attributes:
        number: its place in the sweep, from 1.
        overrides: what it is told, such as "loss.lam=0.3".
        state: what has become of it.
        there: whether it had been finished before, and nothing was done.
        folder: its run folder, as seen from the sweep's; none as long as its settings were not accepted.
        seconds: how long it took when it was last done.
        error: the line it failed with.
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
        """The state as a person reads it."""
        return "there" if self.there else self.state.value


def varying_overrides(job: Job, jobs: Sequence[Job]) -> str:
    """A job's overrides that not all jobs have in common."""
    others = [other for other in jobs if other.number != job.number]
    common = set(job.overrides).intersection(*(other.overrides for other in others)) if others else set()
    return " ".join(text for text in job.overrides if text not in common) or "all overrides in common"


def state_text(job: Job) -> str:
    """A job's state in a few words."""
    match job.state:
        case JobState.failed:
            return f"failed: {job.error}"
        case JobState.finished if not job.there:
            return f"finished in {seconds(job)} s"
        case _:
            return job.outcome


def seconds(job: Job) -> str:
    """How long it took, if it is known."""
    return "–" if job.seconds is None else f"{job.seconds:.0f}"


JOBS = "jobs.json"
"""A sweep's file: a list of jobs."""

OF_JOB = ("number", "overrides", "state", "folder", "error")
"""What it says of each, and more."""


def read_jobs(file: Path) -> list[dict[str, Any]]:
    """The lines of a sweep's file.

    Raises:
        SelfalignError: it is damaged.
    """
    try:
        return [{**entry, **{name: entry[name] for name in OF_JOB}} for entry in read_json(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise SelfalignError(f"{file}: not the jobs of a sweep ({error!r})") from error
