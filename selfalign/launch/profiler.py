"""Measure a stage: the seconds of its batches or steps, and its peak memory."""

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
    """Ends a stage after its first batch."""


class ProfilingOutput(StageOutput):
    """A stage output that times every journaled batch and shows no progress.

    Attributes:
        rows: the rows that the stage logged.
        batches: (size, seconds) of every batch.
        total: the number of units that the stage announced.
    """

    def __init__(self, path: Path, label: str, *, first_alone: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.batches: list[tuple[int, float]] = []
        self.total = 0
        self._first_alone = first_alone
        super().__init__(path, label, self.rows.append)

    @contextmanager
    def journal(self, total: int, unit: str) -> Iterator[Journal]:
        """Yield a journal that times its batches, and that may end the stage after the first one."""
        self.total += total
        yield ProfilingJournal(self.scratch, self.batches, self._first_alone)


class ProfilingJournal(Journal):
    """A journal that adds (size, seconds) of every batch to a list. Every process makes all batches and stores none."""

    def __init__(self, folder: Path, timed: list[tuple[int, float]], first_alone: bool) -> None:
        super().__init__(folder, lambda size: None)
        self._timed = timed
        self._first_alone = first_alone

    def batches(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """Yield the results of all batches in their order.

        Raises:
            StopProfiling: the first batch is done, and only that one is wanted.
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
    """Time and memory of a stage on a few records.

    Attributes:
        each: seconds of the slowest batch; for a training, of the last step, after warm-up.
        around: seconds of everything else, such as loading the model.
        peak: the highest peak memory of a process, in bytes.
        batches: the number of batches that these records make; 1 for a stage that journals none.
    """

    each: float
    around: float
    peak: int
    batches: float

    def batches_of(self, share: float) -> int:
        """Return the number of batches for `share` times as many records."""
        return math.ceil(round(self.batches * share, 6))


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEstimate:
    """Time, memory and cost of a stage of the run.

    Attributes:
        label: of the stage.
        count: the number of batches, steps or requests.
        unit: "batches", "steps", "requests" or "model".
        each: seconds of one of them.
        around: seconds of everything else.
        peak: peak memory in bytes.
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
        """Seconds of the whole stage."""
        return self.count * self.each + self.around


def measure(out: ProfilingOutput, stage: Callable[[StageOutput], Any]) -> Measured:
    """Run a stage on a few records and return its time and memory. All processes of a run must call this.

    Raises:
        SelfalignError: it does not fit into memory.
    """
    forget_peak_memory()
    started = time.monotonic()
    with fits(out.label), suppress(StopProfiling):
        stage(out)
    seconds = time.monotonic() - started
    steps = [float(row["step_seconds"]) for row in out.rows if "step_seconds" in row]
    timed = steps or [spent for _, spent in out.batches] or [seconds]
    size = out.batches[0][0] if out.batches else 0
    return Measured(
        each=steps[-1] if steps else max(timed),
        around=max(0.0, seconds - sum(timed)),
        peak=max(distributed.gather(peak())),
        batches=out.total / size if size else len(timed),
    )


def peak() -> int:
    """Return the peak memory in bytes since `forget_peak_memory`."""
    return peak_memory(torch.device(default_device()))


def forget_peak_memory() -> None:
    """Reset the peak memory to what is held now. Where the system cannot, the peak stays that of the process."""
    release_memory()
    if default_device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # Return freed memory to the system.
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
