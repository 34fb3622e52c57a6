"""The processes of one run, as torchrun starts them: rank, count, and collective calls.

All processes walk through the same pipeline. Rank 0, the main process, keeps the run folder. A run of one process needs
none of this: every function then returns at once, and torch is not imported.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

from selfalign.core.errors import SelfalignError

Value = TypeVar("Value")

COLLECTIVE_TIMEOUT = timedelta(days=7)
"""The longest wait for another process. A dead one is noticed at once, by its closed connection and by torchrun."""

TERMINATE_TIMEOUT = 10.0
"""Seconds that a process has to end by itself when it is told to, before it is killed; torchrun kills after 30."""

TOLD = "told to stop (SIGTERM): "

LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""Signs of a lost connection in errors that have no type of their own."""


@dataclass(slots=True)
class Rank:
    """Rank of this process, and the number of processes."""

    rank: int = 0
    count: int = 1


_here = Rank()
_heard = threading.Event()


class PeerProcessExited(SelfalignError):
    """This process cannot go on, because another process of the same run has ended."""

    def __init__(self, sign: str = "") -> None:
        super().__init__(
            f"{sign}another process of this run has ended; see its message. What was finished is kept, the same "
            "command continues, with as many processes as you like"
        )


def are_named() -> bool:
    """Whether the environment names several processes, as torchrun and accelerate do."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> None:
    """Join the process group that the environment names (RANK, WORLD_SIZE, …), and take a GPU of its own.

    Raises:
        SelfalignError: there are more processes here than GPUs.
    """
    if "SUBMITIT_EXECUTOR" in os.environ and not are_named():
        _take_names_from_submitit()
    if not are_named() or _here.count > 1:
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if here >= gpus:
            raise SelfalignError(
                f"process {here} of this machine has no GPU of its own: each process sees {gpus}. Start {gpus} "
                "processes, or let every process see all GPUs (SLURM: gpus_per_node instead of gpus_per_task)."
            )
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT
        )
    _here.rank, _here.count = dist.get_rank(), dist.get_world_size()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)
        _end_if_it_hangs()


def leave() -> None:
    """Leave the process group."""
    if _here.count > 1:
        import torch.distributed as dist

        _here.rank, _here.count = 0, 1
        dist.destroy_process_group()
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group for the block, if there is one. A process that fails exits, which the others notice."""
    join()
    yield
    leave()


def _take_names_from_submitit() -> None:
    """Name the tasks of a submitit job as torchrun would."""
    from submitit.helpers import TorchDistributedEnvironment  # pyright: ignore[reportMissingImports]

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _stop(number: int, frame: Any) -> None:
    """End this process, as torchrun asks of those that are left when one has failed."""
    _heard.set()
    raise PeerProcessExited(TOLD)


def _end_if_it_hangs() -> None:
    """Kill this process some time after SIGTERM unless `_stop` is called: it waits for a GPU, or deep in a library."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _heard.clear()

    def watch() -> None:
        while os.read(reading, 1) != bytes([signal.SIGTERM]):
            pass
        if not _heard.wait(TERMINATE_TIMEOUT):
            print(f"error in process {rank()}: {PeerProcessExited(TOLD)}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def single_process() -> Iterator[None]:
    """Run the block on the main process without the others, as in a run of one process."""
    rank, count = _here.rank, _here.count
    _here.rank, _here.count = 0, 1
    try:
        yield
    finally:
        _here.rank, _here.count = rank, count


def rank() -> int:
    """Return the rank of this process, from 0."""
    return _here.rank


def count() -> int:
    """Return the number of processes of the run."""
    return _here.count


def is_main() -> bool:
    """Whether this process keeps the run folder."""
    return rank() == 0


def on_main(work: Callable[[], Value]) -> Value:
    """Have the main process do some work, and return its result in every process, once it is done.

    Raises:
        PeerProcessExited: a process is gone.
    """
    return broadcast(work() if is_main() else cast(Value, None))


def wait_for_all() -> None:
    """Wait until every process has called this."""
    gather(None)


def gather(value: Value) -> list[Value]:
    """Return the values of all processes in the order of their ranks.

    Raises:
        PeerProcessExited: a process is gone.
    """
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Value | None] = [None] * count()
    with translate_peer_errors():
        dist.all_gather_object(values, value)
    return values  # pyright: ignore[reportReturnType]


def broadcast(value: Value) -> Value:
    """Return the main process's value.

    Raises:
        PeerProcessExited: a process is gone.
    """
    if count() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    with translate_peer_errors():
        dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Turn a broken connection to another process inside the block into an error that says so.

    Raises:
        PeerProcessExited: in the place of what gloo or NCCL raise.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not _is_of_a_connection(error):
            raise
        raise PeerProcessExited from error


def _is_of_a_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST)
