"""What a killed training goes on from: the trained weights, the optimiser's state, and where the schedule stands.

Every process writes the part it keeps, as safetensors, and reads the parts it needs, so that training goes on with
another number of processes or in another layout.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from selfalign import processes
from selfalign.files import read_json, write_json
from selfalign.optimizers import MasterWeights

SCHEDULE = "schedule.json"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Writes a snapshot; all processes come here.

    Args:
        folder: of the snapshot; what an earlier, killed attempt left there is removed.
        model: in training, whole or sharded, not in DDP's wrapper.
        optimizer: over its trained weights.
        schedule: the learning rate's.
    """
    if processes.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / SCHEDULE, schedule.state_dict())
    processes.wait_for_all()
    tensors = {name: torch.as_tensor(value) for name, (_, _, value) in _places(model, optimizer).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # It says so of every single process.
        state_dict_saver.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


@torch.no_grad()
def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Takes a snapshot back; all processes come here, and the arguments are as in `save`."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # So that there is a state to be read into.
    optimizer.zero_grad()
    places = _places(model, optimizer)
    tensors = {name: torch.as_tensor(value) for name, (_, _, value) in places.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, (state, key, value) in places.items():
        if not isinstance(value, Tensor):
            state[key] = tensors[name].item()
    if isinstance(optimizer, MasterWeights):
        optimizer.write_back()
    schedule.load_state_dict(read_json(folder / SCHEDULE))
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


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
