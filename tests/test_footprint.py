"""How large a policy is, by its files' headers, against what torch, peft and a real checkpoint say."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from selfalign.core import distributed
from selfalign.launch import footprint
from selfalign.launch.footprint import (
    Footprint,
    disk_lack,
    free_space,
    main_memory,
    read_shapes,
    training_lack,
    writing_lack,
)
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import LoRA, ModelConfig
from selfalign.training import resume_state
from selfalign.training.config import Optimization, TrainableWeights
from selfalign.training.optimizers import build_optimizer
from selfalign.training.parallelism import Parallelism
from selfalign.training.prepare import prepare

GB = 10**9
LARGE = Footprint(parameters=7 * GB, trained=7 * GB, in_layers=6 * GB, width=2, adapter=False, quantised=False)
"""A model of 7 B weights in bfloat16, all trained."""

SMALL = Footprint(parameters=7 * GB, trained=GB // 100, in_layers=6 * GB, width=2, adapter=True, quantised=True)
"""The same in 4 bits, beside an adapter."""


def tensor_bytes(folder: Path) -> int:
    """Of a folder's safetensors, without their headers."""
    files = [path.read_bytes() for path in folder.glob("*.safetensors")]
    return sum(len(content) - 8 - struct.unpack("<Q", content[:8])[0] for content in files)


def config(path: Path, dtype: str = "float32", **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(path), dtype=dtype, **settings)


def size_of(folder: Path, **settings: Any) -> Footprint:
    size = Footprint.of(folder, config(folder, **settings))
    assert size is not None
    return size


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj", "q_proj, self_attn.v_proj"])
def test_weights_are_counted_as_torch_and_peft_count_them(
    tiny_policy: PolicyCheckpoint, rank: int, targets: str
) -> None:
    lora = LoRA(rank=rank, targets=targets)
    policy = tiny_policy.load("float32", device="cpu", trainable=True)
    total = policy.model.num_parameters()
    prepare(policy, tiny_policy, TrainableWeights(dtype="float32", lora=lora, seed=0), 0.0)
    trained = sum(weight.numel() for weight in policy.model.parameters() if weight.requires_grad)
    size = size_of(tiny_policy.path / "weights", lora=lora)
    assert (size.parameters, size.trained) == (total, trained if rank else total)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_checkpoint_takes_what_it_is_said_to_take(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, dtype: str, rank: int, optimizer: str
) -> None:
    lora = LoRA(rank=rank)
    policy = tiny_policy.load(dtype, device="cpu", trainable=True)
    prepare(policy, tiny_policy, TrainableWeights(dtype=dtype, lora=lora, seed=0), 0.0)
    built = build_optimizer(policy.model.parameters(), Optimization(learning_rate=0.1, optimizer=optimizer))
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    built.step()
    resume_state.save(tmp_path / "one", policy.model, built, LambdaLR(built, lambda step: 1.0))
    said = size_of(tiny_policy.path / "weights", dtype=dtype, lora=lora).checkpoint(optimizer)
    assert said <= tensor_bytes(tmp_path / "one") == pytest.approx(said, rel=0.001)


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("bfloat16", 0), ("float32", 4), ("bfloat16", 4)])
def test_model_takes_on_disk_what_it_is_said_to_take(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, dtype: str, rank: int
) -> None:
    lora = LoRA(rank=rank)
    policy = tiny_policy.load(dtype, device="cpu", trainable=True)
    prepare(policy, tiny_policy, TrainableWeights(dtype=dtype, lora=lora, seed=0), 0.0)
    PolicyCheckpoint(tmp_path).save(policy, tiny_policy)
    part = tmp_path / ("adapter" if rank else "weights")
    assert tensor_bytes(part) == size_of(tiny_policy.path / "weights", dtype=dtype, lora=lora).model


def test_numbers_of_a_large_model_by_hand() -> None:
    assert LARGE.model == 14 * GB
    assert LARGE.checkpoint("adamw") == 7 * 12 * GB
    assert LARGE.training("adamw") == (14 + 7 * (4 + 8)) * GB
    assert LARGE.training("adamw_8bit") == (14 + 7 * (4 + 2)) * GB
    assert LARGE.gradients == 14 * GB
    assert SMALL.loaded(2) == (3 + 2) * GB
    assert SMALL.training("adamw") == 5 * GB + 12 * GB // 100
    assert SMALL.model == 4 * GB // 100


def test_checkpoint_in_several_files_is_counted_once(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    """Beside the files of the index some repositories keep the same weights in another layout."""
    policy = tiny_policy.load("float32", device="cpu")
    policy.model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shutil.copy(tiny_policy.path / "weights/model.safetensors", tmp_path / "consolidated.safetensors")
    assert size_of(tmp_path).parameters == policy.model.num_parameters()


def damaged(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 12}',
        b"x" * 99,
    ],
)
def test_what_cannot_be_read_is_left_to_who_loads_it(tmp_path: Path, content: bytes) -> None:
    assert read_shapes(damaged(tmp_path / "model", content)) == {}
    assert Footprint.of(tmp_path / "model", config(tmp_path)) is None
    assert Footprint.of(tmp_path / "nothing", config(tmp_path)) is None


def test_weights_that_are_stored_in_4_bits_are_not_counted(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy.path / "weights", folder)
    told = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(told))
    assert Footprint.of(folder, config(folder)) is None


# --- disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "lacks", "warns"),
    [(3 * 14 + 84 - 1, True, False), (3 * 14 + 84, False, True), (3 * 14 + 2 * 84, False, False)],
)
def test_disk_has_to_hold_the_models_and_a_checkpoint_and_should_hold_two(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int, lacks: bool, warns: bool
) -> None:
    monkeypatch.setattr(footprint, "free_space", lambda folder: free * GB)
    lines = disk_lack(LARGE, 3, ["adamw", "rmsprop"], Path("/out"))
    assert bool(lines) is lacks
    assert bool(caplog.records) is warns
    said = f"output_dir=/out: {free} GB are free there, and 3 models of 14 GB with checkpoints of 84 GB are still to be"
    assert [*lines, *(record.getMessage() for record in caplog.records)] == [] or said in (lines or [caplog.text])[0]
    assert not lines or "written, 126 GB in all: make room there (selfalign-store clean" in lines[0]


def test_free_space_is_that_of_the_folder_that_will_hold_the_output(tmp_path: Path) -> None:
    assert free_space(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "lacks", "warns"), [(98 * GB - 1, True, False), (98 * GB, False, True), (112 * GB, False, False)]
)
def test_memory_has_to_hold_weights_and_state_and_should_hold_gradients(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capacity: int, lacks: bool, warns: bool
) -> None:
    monkeypatch.setattr(footprint, "memory", lambda: (capacity, "the GPU"))
    lines = training_lack(LARGE, {"train.sft": "adamw"}, Parallelism())
    assert (bool(lines), bool(caplog.records)) == (lacks, warns)
    if lacks:
        assert lines[0].startswith(
            "train.sft: 7 B weights, and the state of adamw for the 7 B trained ones, take 98 GB, and the GPU has "
        )
        assert "model.lora.rank=16" in lines[0]
    if warns:
        assert "gradients take another 14 GB" in caplog.text


def test_shared_weights_are_divided_among_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "memory", lambda: (80 * GB, "the GPU"))
    monkeypatch.setattr(distributed, "count", lambda: 4)
    assert len(training_lack(LARGE, {"train.align": "adamw"}, Parallelism())) == 1
    assert training_lack(LARGE, {"train.align": "adamw"}, Parallelism(strategy="fsdp2")) == []


def test_weights_that_do_not_fit_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "memory", lambda: (24 * GB, "the GPU"))
    (line,) = writing_lack(LARGE, "float32")
    assert line.startswith("engine.dtype=float32: the weights take 28 GB, and the GPU has 24 GB")
    assert writing_lack(LARGE, "bfloat16") == writing_lack(SMALL, "float32") == []


LIMITS = {
    "no group": ({}, 64),
    "version 2": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": f"{8 << 20}"}, 8),
    "version 2, none": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, 64),
    "version 2, above": (
        {
            "proc/self/cgroup": "0::/job/step",
            "sys/fs/cgroup/job/memory.max": f"{6 << 20}",
            "sys/fs/cgroup/job/step/memory.max": "max",
        },
        6,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "7:cpu,memory:/job\n3:cpuset:/other",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{1 << 60}",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{5 << 20}",
        },
        5,
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_memory_is_what_the_machine_or_a_control_group_leaves_with_the_swap(tmp_path: Path, case: str) -> None:
    files, mebibytes = LIMITS[case]
    for name, text in {"proc/meminfo": "MemTotal:  65536 kB\nSwapTotal:   1024 kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main_memory(tmp_path) == (mebibytes + 1) << 20


def test_memory_of_this_machine_is_known() -> None:
    assert 1 << 28 < main_memory(Path("/")) < 1 << 50
