"""The processes of one run, as torchrun starts them: which one this is, and what they tell each other.

All walk through the same pipeline; the first, the main one, keeps the run's folder. A run of one process needs none
of this: every function then answers at once.
"""

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

PATIENCE = timedelta(days=7)
"""How long a process waits for another; a dead one is noticed at once, by its closed connection and by torchrun."""


def join() -> None:
    """Meets the other processes, where the environment names them (RANK, WORLD_SIZE, …), and takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def leave() -> None:
    """Parts from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process keeps the run's folder."""
    return rank() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    gather(None)


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks."""
    if count() == 1:
        return [value]
    values: list[Value | None] = [None] * count()
    dist.all_gather_object(values, value)
    return values  # pyright: ignore[reportReturnType]


def broadcast(value: Value) -> Value:
    """The main process's value."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
