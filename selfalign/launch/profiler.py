"""What a stage takes: its batches or steps by the clock, and the most memory it has held."""

import ctypes
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfalign.core import distributed
from selfalign.core.failures import fits
from selfalign.models.checkpoint import default_device, release_memory
from selfalign.store.artifacts import StageOutput
from selfalign.store.journal import Journal, Task
from selfalign.training.trainer import peak_memory


class StopProfiling(Exception):
    """Ends a stage behind its first batch."""


class ProfilingOutput(StageOutput):
    """A workspace that times every batch a stage journals, shows no progress, and may end the stage behind the first.

    Attributes:
        rows: what the stage logged.
        batches: (size, seconds) of every batch.
        total: how many units the stage said there were.
    """

    def __init__(self, path: Path, label: str, *, first_alone: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.batches: list[tuple[int, float]] = []
        self.total = 0
        self._first_alone = first_alone
        super().__init__(path, label, self.rows.append)

    @contextmanager
    def journal(self, total: int, unit: str) -> Iterator[Journal]:
        """A journal whose batches are timed."""
        self.total += total
        yield ProfilingJournal(self.scratch, self.batches, self._first_alone)


class ProfilingJournal(Journal):
    """Adds the size and the seconds of every batch to a list; every process makes all of them, and keeps none."""

    def __init__(self, folder: Path, timed: list[tuple[int, float]], first_alone: bool) -> None:
        super().__init__(folder, lambda size: None)
        self._timed = timed
        self._first_alone = first_alone

    def batches(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """The results of all batches in their order.

        Raises:
            Enough: there is one, and one is enough.
        """
        for _, size, work in tasks:
            started = time.monotonic()
            result = work()
            self._timed.append((size, time.monotonic() - started))
            if self._first_alone:
                raise StopProfiling
            yield json.loads(json.dumps(result))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a stage took on a few records.

    Attributes:
        each: seconds of its slowest batch; of a training the last step, when all is warmed up.
        around: seconds of all the rest, such as loading the model.
        peak: the most memory of a process, bytes.
        batches: how many batches these records would have been; a stage that journals none is one.
    """

    each: float
    around: float
    peak: int
    batches: float

    def batches_of(self, share: float) -> int:
        """How many batches `share` times as many records make."""
        return math.ceil(round(self.batches * share, 6))


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEstimate:
    """What a stage of the run will take.

    Attributes:
        label: the stage's.
        count: how many batches, steps or requests.
        unit: which of these.
        each: seconds of one of them.
        around: seconds of all the rest.
        peak: the most memory, bytes.
        cost: of a server's tokens.
    """

    label: str
    count: int
    unit: str
    each: float = 0.0
    around: float = 0.0
    peak: int = 0
    cost: float = 0.0

    @property
    def seconds(self) -> float:
        """In all."""
        return self.count * self.each + self.around


def measure(watch: ProfilingOutput, stage: Callable[[StageOutput], Any]) -> Measured:
    """Runs a stage on a few records and takes its time and memory; all processes of a run do.

    Raises:
        SelfalignError: it does not fit into memory.
    """
    forget_peak_memory()
    started = time.monotonic()
    with fits(watch.label), suppress(StopProfiling):
        stage(watch)
    seconds = time.monotonic() - started
    steps = [float(row["step_seconds"]) for row in watch.rows if "step_seconds" in row]
    timed = steps or [spent for _, spent in watch.batches] or [seconds]
    size = watch.batches[0][0] if watch.batches else 0
    return Measured(
        each=steps[-1] if steps else max(timed),
        around=max(0.0, seconds - sum(timed)),
        peak=max(distributed.gather(peak())),
        batches=watch.total / size if size else len(timed),
    )


def peak() -> int:
    """The most memory since it was last forgotten, bytes."""
    return peak_memory(torch.device(default_device()))


def forget_peak_memory() -> None:
    """Lets the peak begin anew from what is held now; where the system cannot, it goes on being that of the process."""
    release_memory()
    if default_device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # What was freed goes back to the system.
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
