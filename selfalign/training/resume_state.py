"""What a killed training goes on from: the trained weights, the optimiser's state, and where the schedule stands.

Every process writes the part it keeps, as safetensors, and reads the parts it needs, so that training goes on with
another number of processes or in another layout.
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
"""What the system says of files that may be whole."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Writes a snapshot; all processes come here.

    Args:
        folder: of the snapshot; what an earlier, killed attempt left there is removed.
        model: in training, whole or sharded, not in DDP's wrapper.
        optimizer: over its trained weights.
        schedule: the learning rate's.

    Raises:
        OSError: it cannot be written; then nothing of it stays in the way of what else is to be written.
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
    tensors = {name: torch.as_tensor(value) for name, (_, _, value) in _places(model, optimizer).items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            state_dict_saver.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # It is no Exception, and its text is a traceback.
        raise _first_failure(error) from error


@torch.no_grad()
def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Takes a snapshot back; all processes come here, and the arguments are as in `save`.

    Raises:
        SelfalignError: it is damaged, or not one of this training.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # So that there is a state to be read into.
    optimizer.zero_grad()
    places = _places(model, optimizer)
    tensors = {name: torch.as_tensor(value) for name, (_, _, value) in places.items()}
    rates = _read(folder, tensors, schedule)
    for name, (state, key, value) in places.items():
        if not isinstance(value, Tensor):
            state[key] = tensors[name].item()
    if isinstance(optimizer, MasterWeights):
        optimizer.write_back()
    schedule.load_state_dict(rates)
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def _read(folder: Path, tensors: dict[str, Tensor], schedule: Any) -> dict[str, Any]:
    """Fills the tensors, and returns the state of the schedule."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        # torch would log a failure here with a traceback, and would not miss a file between two others.
        known: Any = reader.read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            if sum(chunk.sizes.numel() for chunk in known[name].chunks) != tensor.numel():
                raise ValueError(f"parts of {name} are missing")
        with _quiet():
            state_dict_loader.load(tensors, storage_reader=reader)
        rates = read_json(folder / SCHEDULE)
        if rates.keys() != schedule.state_dict().keys():
            raise ValueError(f"{SCHEDULE} is of something else")
    except CheckpointException as error:
        failure = _first_failure(error)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        failure = error
    else:
        return rates
    refused = system_error(failure)
    if refused is not None and refused.errno in REFUSED:
        refused.filename = refused.filename or str(folder)
        raise refused from failure
    if is_out_of_memory(failure) or not isinstance(failure, Exception) or isinstance(failure, SelfalignError):
        raise failure
    said = one_line(f"{type(failure).__name__}: {failure}", 200)
    raise SelfalignError(
        f"{folder}: this checkpoint is damaged, or of something else ({said}); delete the folder, and the same command "
        "trains this model from its start; all else that was finished is kept"
    ) from failure


def _first_failure(error: CheckpointException) -> BaseException:
    """What failed, in whichever process; it may be Ctrl-C, which torch takes for a failure too."""
    failures = [failure for failure, _ in error.failures.values()]
    return next((failure for failure in failures if not isinstance(failure, Exception)), failures[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of every single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _places(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[dict[str, Any], str, Any]]:
    """{name: (where it is kept, under which key, value)} of all that makes up the state of training."""
    masters: dict[nn.Parameter, nn.Parameter] = {}
    if isinstance(optimizer, MasterWeights):
        masters, optimizer = dict(zip(optimizer.weights, optimizer.masters, strict=True)), optimizer.inner
    places: dict[str, tuple[dict[str, Any], str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = masters.get(parameter, parameter)
            places[f"weights.{name}"] = ({}, name, owner.detach())
            state = optimizer.state[owner]
            places |= {f"optimizer.{name}.{key}": (state, key, value) for key, value in state.items()}
    return places
