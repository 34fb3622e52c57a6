"""Follow a run or a sweep from another process: write its page again every few seconds, and say where it is."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from selfalign.core.errors import SelfalignError
from selfalign.metrics import catalog
from selfalign.report.comparison_page import compare_jobs
from selfalign.report.html import compact
from selfalign.report.jobs import find_jobs
from selfalign.report.run_page import write_page
from selfalign.runs.progress import LOCK, is_held, is_running, read_progress
from selfalign.runs.reader import Finished, check_artifacts, last_row
from selfalign.runs.sweep_jobs import JOBS, JobState, jobs_in, progress_text

SECONDS = 5.0
"""Time between two looks."""

SHARE = 0.1
"""The part of the watching process's time that may go into writing pages."""


def watch(folder: Path, say: Callable[[str], None], metric: str = "") -> Path:
    """Write the page of a run or a sweep again and again until it ends. Return the path of the page.

    Args:
        folder: of a run or a sweep, which may have ended.
        say: receives where it is, each time that this changes.
        metric: of a sweep, as for `compare_jobs`.

    Raises:
        SelfalignError: the folder is neither, or belongs to a run that has ended without anything to show.
    """
    where, write = (_where_in_sweep, _write_sweep) if (folder / JOBS).is_file() else (_where_in_run, _write_run)
    said, cost, written = "", 0.0, -math.inf
    while True:
        running, started = is_held(folder), time.process_time()
        try:
            text = where(folder)
            due = time.monotonic() - written >= cost / SHARE
            if due or not running:
                write(folder, metric, running)
                cost, written = time.process_time() - started, time.monotonic()
        except (SelfalignError, OSError, ValueError):  # A run that is just starting makes its folder anew.
            if not running:
                raise
            text = "starting"
        if text != said:
            say(text)
        said = text
        if not running:
            return folder / ("report.html" if write is _write_run else "comparison.html")
        time.sleep(SECONDS)


def _where_in_run(folder: Path) -> str:
    """Return where a run is."""
    progress = read_progress(folder)
    if progress is None:
        check_begun(folder)
        return "finished"
    if is_running(folder, progress):
        return " · ".join(filter(None, [progress.stage, step_text(folder, progress.label), progress.left]))
    return f"stopped in {progress.stage}{f': {progress.error}' if progress.error else ''}"


def _write_run(folder: Path, metric: str, running: bool) -> None:
    if metric:
        raise SelfalignError(f"{folder} is a single run: --metric is only for sweeps")
    write_run(folder)


def _where_in_sweep(folder: Path) -> str:
    """Return where a sweep and its running jobs are."""
    jobs = jobs_in(folder)
    now = [job for job in jobs if job.state is JobState.running and job.folder]
    found = [(job.number, read_progress(folder / (job.folder or ""))) for job in now]
    stages = [f"job {number}: {progress.stage}" for number, progress in found if progress]
    return " · ".join([progress_text(jobs), *stages])


def _write_sweep(folder: Path, metric: str, running: bool) -> None:
    compare_jobs(find_jobs([folder]), folder, metric, running=running)


def check_begun(folder: Path) -> None:
    """Check that a folder has the summary of a run, or that so far.

    Raises:
        SelfalignError: the folder is no run's, or the run has nothing to show.
    """
    if not (folder / "summary.json").is_file() and read_progress(folder) is None:
        is_known = (folder / "config.yaml").is_file() or (folder / LOCK).is_file()
        what = "this run is not finished, and has nothing to report" if is_known else "not a run folder"
        raise SelfalignError(f"{folder}: {what}")


def write_run(folder: Path) -> None:
    """Write the report of a run.

    Raises:
        SelfalignError: the folder is no run's, the run has nothing to show, or an artifact is missing.
    """
    check_begun(folder)
    run = Finished.load(folder)
    check_artifacts(folder, run.stages)
    write_page(run)


def step_text(folder: Path, label: str) -> str:
    """Return the step of the training that goes on, with its loss and margin; empty if none does."""
    row = last_row(folder)
    step = next((value for name, value in row.items() if name.endswith("/step")), None)
    if row.get("label") != label or step is None:
        return ""
    named = {"loss": catalog.LOSS, "loss per token": catalog.LOSS_PER_TOKEN, "margin": catalog.REWARDS_MARGINS}
    values = [f"{name} {compact(row[metric.name])}" for name, metric in named.items() if metric.name in row]
    return ", ".join([f"step {step}", *values])
