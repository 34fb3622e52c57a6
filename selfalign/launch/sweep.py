"""Run the jobs of a sweep, each once, record their states in a file, and compare the results."""

import logging
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfalign.config.experiment import ExperimentConfig
from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.launch.experiment import finish_experiment, log_file
from selfalign.metrics.catalog import signed
from selfalign.runs.folder import run_folder
from selfalign.runs.summary import table
from selfalign.runs.sweep_jobs import (
    JOBS,
    Job,
    JobState,
    jobs_in,
    seconds,
    state_text,
    time_left,
    varying_overrides,
)
from selfalign.store.artifacts import locked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sweep:
    """The folder of a sweep.

    Attributes:
        folder: `<output_dir>/sweeps/<name>-<digest of the command>`; equal commands have the same folder.
        held: holds the lock that keeps the same sweep from running twice at once.
    """

    folder: Path
    held: ExitStack = field(default_factory=ExitStack)

    def open(self, jobs: Sequence[Sequence[str]]) -> None:
        """Start or resume the sweep: wait until no other process runs it, and list its jobs.

        Args:
            jobs: the overrides of each job; empty if a search chooses them later. A job that was finished keeps that
                state.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held.enter_context(locked(self.folder / ".lock", f"this sweep is already running in {self.folder}"))
        done = [job for job in self.jobs() if job.state is JobState.finished] if (self.folder / JOBS).exists() else []
        before = {(job.number, *job.overrides): job for job in done}
        listed = [Job(number=number, overrides=list(told)) for number, told in enumerate(jobs, start=1)]
        self._write([before.get((job.number, *job.overrides), job) for job in listed])
        print(f"sweep of {len(jobs) or 'as many'} jobs{'' if jobs else ' as the sweeper chooses'}: {self.folder}")

    def jobs(self) -> list[Job]:
        """Return all jobs known so far."""
        return jobs_in(self.folder)

    def update_job(self, number: int, overrides: Sequence[str], **changes: Any) -> None:
        """Record a change of a job, and print it if the state is among the changes."""
        with locked(self.folder / ".jobs.lock", f"{self.folder / JOBS} is being written"):
            known = {job.number: job for job in self.jobs()}
            job = replace(known.get(number) or Job(number=number, overrides=list(overrides)), **changes)
            known[number] = job
            self._write([known[index] for index in sorted(known)])
        if "state" in changes:
            jobs = list(known.values())
            print(f"job {number} ({varying_overrides(job, jobs)}): {state_text(job)}", flush=True)
            others = sum(one.state is JobState.running for one in jobs)
            if job.state is JobState.finished and (left := time_left(jobs, others + 1)):
                print(f"sweep: {left}", flush=True)

    def interrupt(self) -> None:
        """Record that Ctrl-C has ended all running jobs."""
        self._settle(JobState.interrupted)

    def close(self) -> None:
        """Print the states of the jobs and write the comparison, unless no job was started.

        Raises:
            SelfalignError: a job has failed.
        """
        from selfalign.report.comparison_page import write_comparison

        self._settle(JobState.failed, error="its process was killed")
        jobs = self.jobs()
        if all(job.state is JobState.waiting for job in jobs):
            return
        rows = [[str(j.number), varying_overrides(j, jobs), j.outcome, seconds(j), self.run_of(j)] for j in jobs]
        print("", *table(["job", "overrides", "state", "seconds", "run"], rows), "", sep="\n")
        page = write_comparison([self.folder], self.folder)
        print(f"comparison    {page}\nstates        {self.folder / JOBS}", flush=True)
        failed = [job for job in jobs if job.state is JobState.failed]
        if failed:
            first = f"job {failed[0].number} ({varying_overrides(failed[0], jobs)}): {failed[0].error}"
            raise SelfalignError(f"{len(failed)} of {len(jobs)} jobs failed; repeat the command to retry. {first}")

    def run_of(self, job: Job) -> str:
        """Return the path of a job's run folder, for printing."""
        return os.path.normpath(self.folder / job.folder) if job.folder else "–"

    def _settle(self, state: JobState, **changes: Any) -> None:
        """Set the state of jobs that are recorded as running, though no process runs them any more."""
        for job in self.jobs():
            if job.state is JobState.running:
                self.update_job(job.number, job.overrides, state=state, **changes)

    def _write(self, jobs: Sequence[Job]) -> None:
        write_json(self.folder / JOBS, [asdict(job) for job in jobs])


Prepared = tuple[ExperimentConfig, str, dict[str, Any]]
"""An experiment, its resolved configuration as text, and as plain dictionaries."""


def run_job(
    sweep: Sweep,
    number: int,
    overrides: Sequence[str],
    prepare: Callable[[], Prepared],
    explain: Callable[[BaseException], str | None],
    *,
    searched: bool,
) -> float | None:
    """Run a job that is not finished. An error is recorded and does not stop the other jobs.

    Rank 0 records the progress of the job; any rank that fails records why.

    Args:
        sweep: the sweep that records the job.
        number: of the job, from 1.
        overrides: of the job.
        prepare: returns the experiment with these overrides.
        explain: returns the message of an error that the user can correct, in one line; None for any other error.
        searched: whether a search optimises `sweep_metric`, which the last model must have then.

    Returns:
        That metric, negated if it should be low; None if the job failed or has no such metric.
    """
    started, begun = time.monotonic(), False

    def tell(state: JobState, **changes: Any) -> None:
        took = {} if changes.get("there") else {"seconds": round(time.monotonic() - started, 2)}
        sweep.update_job(number, overrides, state=state, **took, **changes)

    def begin() -> None:
        nonlocal begun
        begun = True
        distributed.on_main(lambda: sweep.update_job(number, overrides, state=JobState.running, there=False, error=""))

    try:
        with restore_global_state(), log_file(sweep.folder / f"job_{number}.log"):
            os.environ.setdefault("WANDB_RUN_GROUP", sweep.folder.name)
            config, text, plain = prepare()
            folder, _ = run_folder(Path(config.output_dir).absolute(), config.name, config, fresh=config.fresh)
            relative = os.path.relpath(folder, sweep.folder)
            distributed.on_main(lambda: sweep.update_job(number, overrides, folder=relative))
            there = finish_experiment(config, text, plain, begin)
            if there is None:
                return None
            model = read_json(folder / "summary.json")["models"][-1]
            metric, sign = signed(config.sweep_metric)
            if searched and metric not in model:
                raise SelfalignError(f"sweep_metric={config.sweep_metric} is not among {', '.join(model)}")
    except KeyboardInterrupt:
        if begun:
            tell(JobState.interrupted)
        raise
    except distributed.PeerProcessExited:
        return None  # The process that failed has recorded why, unless it was killed.
    except Exception as error:  # noqa: BLE001 - the other jobs continue, and the sweep ends with exit code 1
        message = explain(error)
        if message is None:
            traceback.print_exc()
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        tell(JobState.failed, error="; ".join(message.splitlines()))
        return None
    tell(JobState.finished, there=there)
    return sign * model[metric] if metric in model else None


@contextmanager
def restore_global_state() -> Iterator[None]:
    """Restore the environment, the default dtype and the random number generators after the block."""
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
