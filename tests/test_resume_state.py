"""What a killed training goes on from: every number of every optimiser's state, and the schedule."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import file_limit
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim.lr_scheduler import LambdaLR

from selfalign.core.distributed import TOLD, PeerProcessExited
from selfalign.core.errors import SelfalignError
from selfalign.training import resume_state
from selfalign.training.config import Optimization
from selfalign.training.optimizers import MasterWeights, build_optimizer

WIDTH = 96
"""Wide enough for the 8-bit optimiser to keep 8 bits."""


class Training:
    """A linear layer, an optimiser and a schedule, and gradients that depend on the step alone."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Linear(WIDTH, WIDTH).to(dtype)
        self.model.bias.requires_grad_(False)
        settings = Optimization(learning_rate=1e-2, optimizer=name, dtype="float32")
        self.optimizer = build_optimizer(self.model.parameters(), settings)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def go(self, steps: range) -> "Training":
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            weight = self.model.weight
            weight.grad = torch.randn(weight.shape, generator=draw).to(weight.dtype)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return self

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adamw_8bit"])
def test_training_goes_on_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    whole = Training(name, dtype).go(range(6))
    resume_state.save(tmp_path / "three", *Training(name, dtype).go(range(3)).parts())
    again = Training(name, dtype)
    resume_state.load(tmp_path / "three", *again.parts())
    again.go(range(3, 6))
    assert torch.equal(again.model.weight, whole.model.weight)
    assert torch.equal(again.model.bias, whole.model.bias)
    assert again.schedule.get_last_lr() == whole.schedule.get_last_lr()
    if isinstance(again.optimizer, MasterWeights):
        assert isinstance(whole.optimizer, MasterWeights)
        assert torch.equal(again.optimizer.masters[0], whole.optimizer.masters[0])


def test_a_snapshot_holds_nothing_that_could_run_as_code_and_nothing_of_an_earlier_attempt(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    stale = tmp_path / "one" / "shard-00002-model-00001-of-00001.safetensors"
    stale.write_bytes(b"of a process that is no more")
    resume_state.save(tmp_path / "one", *Training("adamw", torch.float32).parts())
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["schedule.json", "shard-00001-model-00001-of-00001.safetensors"]


# --- failures ----------------------------------------------------------------------------------------------------


class RefusingWriter(HuggingFaceStorageWriter):
    """Fails as it is told to, where torch writes; what is raised there comes back in torch's own exception."""

    error: BaseException = OSError()

    def write_data(self, *arguments: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("library", ["python", "rust"])
def test_snapshot_that_cannot_be_written_is_a_system_error_that_names_it_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, library: str
) -> None:
    said = f"I/O error: {os.strerror(number)} (os error {number})"
    error = OSError(number, os.strerror(number)) if library == "python" else SafetensorError(said)
    monkeypatch.setattr(RefusingWriter, "error", error)
    monkeypatch.setattr(resume_state, "HuggingFaceStorageWriter", RefusingWriter)
    with pytest.raises(OSError) as caught:
        resume_state.save(tmp_path / "one", *Training("adamw", torch.float32).parts())
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "one"))
    assert not (tmp_path / "one").exists()


def test_snapshot_beyond_the_limit_on_file_sizes_is_that_error(tmp_path: Path) -> None:
    with file_limit(), pytest.raises(OSError) as caught:
        resume_state.save(tmp_path / "one", *Training("adamw", torch.float32).parts())
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "one"))
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), PeerProcessExited(TOLD)])
def test_what_ends_the_process_is_no_failure_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """torch hands back whatever is raised while it writes, Ctrl-C included."""
    monkeypatch.setattr(RefusingWriter, "error", error)
    monkeypatch.setattr(resume_state, "HuggingFaceStorageWriter", RefusingWriter)
    with pytest.raises(type(error)) as caught:
        resume_state.save(tmp_path / "one", *Training("adamw", torch.float32).parts())
    assert caught.value is error


def truncate(folder: Path, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def empty(folder: Path, shard: Path) -> None:
    shard.write_bytes(b"")


def spoil(folder: Path, shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:8] + b"\xff" * 40 + content[48:])


def replace_by_a_folder(folder: Path, shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def take_from_another_model(folder: Path, shard: Path) -> None:
    save_file({"weights.weight": torch.zeros(3, 3)}, shard)


def cut_in_three_and_lose_the_second(folder: Path, shard: Path) -> None:
    """As three processes write it; what torch reads then is right in its first and last third."""
    with safe_open(shard, framework="pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    shard.unlink()
    for number, rows in ((1, slice(0, 32)), (3, slice(64, 96))):
        parts = {name: tensor[rows].clone() for name, tensor in whole.items() if tensor.dim()}
        offsets = {name: {SAVED_OFFSETS_KEY: [rows.start, 0]} for name in parts}
        if number == 1:
            scalars = {name: tensor for name, tensor in whole.items() if not tensor.dim()}
            parts, offsets = parts | scalars, offsets | {name: {SAVED_OFFSETS_KEY: []} for name in scalars}
        told = {CUSTOM_METADATA_KEY: json.dumps(offsets), "format": "pt"}
        save_file(parts, folder / f"shard-0000{number}-model-00001-of-00001.safetensors", metadata=told)


def write_schedule(text: str) -> Any:
    return lambda folder, shard: (folder / resume_state.SCHEDULE).write_text(text)


DAMAGE = {
    "shard cut": truncate,
    "shard empty": empty,
    "header overwritten": spoil,
    "shard gone": lambda folder, shard: shard.unlink(),
    "second of three shards gone": cut_in_three_and_lose_the_second,
    "shard is a folder": replace_by_a_folder,
    "shard of another model": take_from_another_model,
    "schedule gone": lambda folder, shard: (folder / resume_state.SCHEDULE).unlink(),
    "schedule cut": write_schedule('{"base_lrs": [0.01'),
    "schedule of something else": write_schedule('{"a": 1}'),
    "schedule is a list": write_schedule("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_snapshot_is_one_line_that_says_which_folder_to_delete(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "checkpoint-3"
    resume_state.save(folder, *Training("adamw", torch.float32).go(range(3)).parts())
    (shard,) = folder.glob("*.safetensors")
    DAMAGE[damage](folder, shard)
    with pytest.raises(SelfalignError) as caught:
        resume_state.load(folder, *Training("adamw", torch.float32).parts())
    said = str(caught.value)
    assert said.startswith(f"{folder}: this checkpoint is damaged, or of another training (")
    assert "Delete the folder; then the same command trains this model from its start" in said
    assert "\n" not in said


def test_snapshot_of_another_user_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-3"
    resume_state.save(folder, *Training("adamw", torch.float32).parts())

    class Locked(HuggingFaceStorageReader):
        def read_metadata(self, *arguments: Any, **more: Any) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder / "shard"))

    monkeypatch.setattr(resume_state, "HuggingFaceStorageReader", Locked)
    with pytest.raises(PermissionError, match="Permission denied"):
        resume_state.load(folder, *Training("adamw", torch.float32).parts())
