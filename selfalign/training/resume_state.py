"""The state from which a killed training resumes: the trained weights, the optimiser and the schedule.

Every process writes its shards as safetensors and reads the shards it needs. So training can resume with another number
of processes or another parallelism.
"""

import errno
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError, one_line
from selfalign.core.failures import is_out_of_memory, naming, system_error
from selfalign.core.files import read_json, write_json
from selfalign.training.optimizers import MasterWeights

SCHEDULE = "schedule.json"

REFUSED = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENOMEM)
"""System errors after which the files may still be intact."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Write the resume state. All processes must call this.

    Args:
        folder: the folder of the state; files of an earlier, killed attempt are removed.
        model: the model in training, full or sharded, without DDP's wrapper.
        optimizer: the optimiser of its trained weights.
        schedule: the learning rate schedule.

    Raises:
        OSError: the state cannot be written; its folder is then removed to free the disk.
    """
    try:
        with naming(folder):
            _save(folder, model, optimizer, schedule)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / SCHEDULE, schedule.state_dict())

    distributed.on_main(begin)
    tensors = {name: torch.as_tensor(value) for name, (_, _, value) in _state(model, optimizer).items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            state_dict_saver.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # This is no Exception, and its text is a traceback.
        raise _first_failure(error) from error


@torch.no_grad()
def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Load the resume state into the arguments, which are those of `save`. All processes must call this.

    Raises:
        SelfalignError: the state is damaged, or it is of another training.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # A step creates the state that is loaded into.
    optimizer.zero_grad()
    entries = _state(model, optimizer)
    tensors = {name: torch.as_tensor(value) for name, (_, _, value) in entries.items()}
    schedule_state = _read(folder, tensors, schedule)
    for name, (state, key, value) in entries.items():
        if not isinstance(value, Tensor):
            state[key] = tensors[name].item()
    if isinstance(optimizer, MasterWeights):
        optimizer.write_back()
    schedule.load_state_dict(schedule_state)
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def _read(folder: Path, tensors: dict[str, Tensor], schedule: Any) -> dict[str, Any]:
    """Load into the tensors, and return the state of the schedule."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        # torch logs a failure with a traceback, and does not notice a missing shard between two others.
        known: Any = reader.read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            if sum(chunk.sizes.numel() for chunk in known[name].chunks) != tensor.numel():
                raise ValueError(f"parts of {name} are missing")
        with _quiet():
            state_dict_loader.load(tensors, storage_reader=reader)
        schedule_state = read_json(folder / SCHEDULE)
        if schedule_state.keys() != schedule.state_dict().keys():
            raise ValueError(f"{SCHEDULE} is of another schedule")
    except CheckpointException as error:
        failure = _first_failure(error)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        failure = error
    else:
        return schedule_state
    refused = system_error(failure)
    if refused is not None and refused.errno in REFUSED:
        refused.filename = refused.filename or str(folder)
        raise refused from failure
    if is_out_of_memory(failure) or not isinstance(failure, Exception) or isinstance(failure, SelfalignError):
        raise failure
    reason = one_line(f"{type(failure).__name__}: {failure}", 200)
    raise SelfalignError(
        f"{folder}: this checkpoint is damaged, or of another training ({reason}). Delete the folder; then the same "
        "command trains this model from its start and keeps all finished artifacts"
    ) from failure


def _first_failure(error: CheckpointException) -> BaseException:
    """Return the first failure of any process, preferably one that is no Exception, such as Ctrl-C."""
    failures = [failure for failure, _ in error.failures.values()]
    return next((failure for failure in failures if not isinstance(failure, Exception)), failures[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[dict[str, Any], str, Any]]:
    """Return {name: (dictionary, key, value)} of the weights and the optimiser's state."""
    masters: dict[nn.Parameter, nn.Parameter] = {}
    if isinstance(optimizer, MasterWeights):
        masters, optimizer = dict(zip(optimizer.weights, optimizer.masters, strict=True)), optimizer.inner
    entries: dict[str, tuple[dict[str, Any], str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = masters.get(parameter, parameter)
            entries[f"weights.{name}"] = ({}, name, owner.detach())
            state = optimizer.state[owner]
            entries |= {f"optimizer.{name}.{key}": (state, key, value) for key, value in state.items()}
    return entries
