"""Estimate the size of M0 from its files' headers, and check that disk and memory are large enough for training.

A certain lack is an error. A possible one, which depends on what is not known before the run, is a warning.
"""

import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from selfalign.core import distributed
from selfalign.core.formatting import amount, plural
from selfalign.models.config import ALL_LINEAR, LoRA, ModelConfig
from selfalign.training.parallelism import Parallelism

logger = logging.getLogger(__name__)

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""

STATE = {"adamw": 8, "rmsprop": 4, "adamw_8bit": 2}
"""Bytes of optimizer state for each trained weight, at least."""

IN_A_LAYER = re.compile(r"\.\d+\..*\.weight$")
"""Names of the weights in the repeated layers, to which adapters and quantization apply; embeddings are excluded."""

ROOM = "make room there (selfalign-store clean removes unused artifacts), set another output_dir, or train adapters"
LESS = (
    "train adapters (model.lora.rank=16), keep the base in 4 bits (model.quantization=nf4), take model.dtype=bfloat16 "
    "or optimizer=adamw_8bit, or shard it across processes (train.parallelism.strategy=fsdp2)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Size of a policy.

    Attributes:
        parameters: the number of all weights.
        trained: the number of trained weights: all, or those of the adapter.
        in_layers: the number of weights in linear layers, the ones that quantization compresses.
        width: bytes of a weight.
        adapter: whether an adapter is trained instead of the weights.
        quantised: whether linear layers are kept in 4 bits.
    """

    parameters: int
    trained: int
    in_layers: int
    width: int
    adapter: bool
    quantised: bool

    @classmethod
    def of(cls, folder: Path, config: ModelConfig) -> "Footprint | None":
        """Return the footprint of a checkpoint, or None if its files do not state the shapes."""
        shapes = read_shapes(folder)
        if not shapes:
            return None
        linear = {name: shape for name, shape in shapes.items() if IN_A_LAYER.search(name) and len(shape) == 2}
        parameters = sum(map(_size, shapes.values()))
        return cls(
            parameters=parameters,
            trained=adapter_size(linear, config.lora) if config.lora.rank else parameters,
            in_layers=sum(map(_size, linear.values())),
            width=WIDTH[config.dtype],
            adapter=bool(config.lora.rank),
            quantised=config.quantization != "none",
        )

    @property
    def model(self) -> int:
        """Bytes of a model on disk: its weights, or its adapter."""
        return self.trained * 4 if self.adapter else self.parameters * self.width

    def checkpoint(self, optimizer: str) -> int:
        """Return the bytes of a checkpoint on disk: the trained weights in float32 and the optimizer's state."""
        return self.trained * (4 + STATE[optimizer])

    def loaded(self, width: int) -> int:
        """Return the bytes of the weights in memory, at `width` bytes for each weight that is not quantized."""
        quantised = self.in_layers if self.quantised else 0
        return quantised // 2 + (self.parameters - quantised) * width

    def training(self, optimizer: str) -> int:
        """Return the bytes in memory without gradients and activations: weights, float32 copy and optimizer state."""
        copy = 4 if self.adapter or self.width < 4 else 0
        return self.loaded(self.width) + self.trained * (copy + STATE[optimizer])

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of the trained weights."""
        return self.trained * (4 if self.adapter else self.width)


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """Return {weight: shape} of a checkpoint from the headers of its files; empty if they do not state the shapes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        files = sorted(set(named.values())) or ["model.safetensors"]
        shapes = {name: shape for file in files for name, shape in _header(folder / file)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return {}  # A damaged file is reported when it is loaded.
    return {} if "quantization_config" in config else shapes


def _header(path: Path) -> Iterator[tuple[str, list[int]]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, 1 << 27)))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry["shape"]


def _size(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def adapter_size(linear: dict[str, list[int]], lora: LoRA) -> int:
    """Return the number of weights of a LoRA adapter on these linear layers."""
    ends = ("",) if ALL_LINEAR in lora.names else tuple(f".{name}.weight" for name in lora.names)
    adapted = [shape for name, shape in linear.items() if name.endswith(ends)]
    return sum(lora.rank * sum(shape) for shape in adapted)


# --- disk --------------------------------------------------------------------------------------------------------


def disk_lack(size: Footprint, models: int, optimizers: Collection[str], output: Path) -> list[str]:
    """Return what is wrong with the disk, at most one line; warn if space is tight.

    Args:
        size: of the policy.
        models: how many models are still to be trained.
        optimizers: those of the trainings that remain.
        output: the output folder.
    """
    checkpoint, free = max(map(size.checkpoint, optimizers)), free_space(output)
    needed = models * size.model + checkpoint
    situation = (
        f"output_dir={output}: {amount(free)} are free there, and {plural(models, 'model')} of {amount(size.model)} "
        f"with checkpoints of {amount(checkpoint)} are still to be written"
    )
    if free < needed:
        return [f"{situation}, {amount(needed)} in all: {ROOM}"]
    if free < needed + checkpoint:
        logger.warning("%s; two checkpoints exist for a short time: %s", situation, ROOM)
    return []


def free_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder that need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


# --- memory ------------------------------------------------------------------------------------------------------


def training_lack(size: Footprint, optimizers: dict[str, str], layout: Parallelism) -> list[str]:
    """Return a line for each training that does not fit into memory; warn where gradients may not fit.

    Args:
        size: of the policy.
        optimizers: {setting: name of its optimizer}.
        layout: how the training is distributed.
    """
    shards = distributed.count() if layout.sharded else 1
    capacity, where = memory()
    lines: list[str] = []
    for key, optimizer in optimizers.items():
        needed, gradients = size.training(optimizer) // shards, size.gradients // shards
        situation = (
            f"{key}: {plain_count(size.parameters)} weights, and the state of {optimizer} for the "
            f"{plain_count(size.trained)} trained ones, take {amount(needed)}, and {where} has {amount(capacity)}"
        )
        if needed > capacity:
            lines.append(f"{situation}: {LESS}")
        elif needed + gradients > capacity:
            logger.warning("%s; gradients take another %s: %s", situation, amount(gradients), LESS)
    return lines


def writing_lack(size: Footprint, dtype: str) -> list[str]:
    """Return what is wrong with the memory if a policy generates in this dtype, at most one line."""
    (capacity, where), needed = memory(), size.loaded(WIDTH[dtype])
    if needed <= capacity:
        return []
    return [
        f"engine.dtype={dtype}: the weights take {amount(needed)}, and {where} has {amount(capacity)}: take "
        "engine.dtype=bfloat16, model.quantization=nf4, or another engine"
    ]


def memory() -> tuple[int, str]:
    """Return the bytes of memory available to one process of the run, and the name of the device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, "the GPU"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = f" for each of {processes} processes" if processes > 1 else ""
    return main_memory(Path("/")) // processes, f"this machine{share}"


def main_memory(root: Path) -> int:
    """Return the bytes of main memory and swap available to this process: the machine's, or its control group's.

    Args:
        root: the folder with /proc and /sys.
    """
    meminfo = (root / "proc/meminfo").read_text(encoding="utf-8") if (root / "proc/meminfo").is_file() else ""
    sizes = {
        name: int(size) * 1024 for name, size in re.findall(r"^(MemTotal|SwapTotal): *(\d+) kB", meminfo, re.MULTILINE)
    }
    total = sizes.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_group_limits(root)]) + sizes.get("SwapTotal", 0)


def _group_limits(root: Path) -> Iterator[int]:
    """Yield the memory limits in bytes of this process's control groups, of version 2 and 1."""
    own = root / "proc/self/cgroup"
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else ():
        _, kinds, group = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if kinds else ("sys/fs/cgroup", "memory.max")
        steps = [part for part in group.split("/") if part and part != ".."]
        for depth in range(len(steps) + 1):
            limit = root.joinpath(top, *steps[:depth], name)
            if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdecimal():
                yield int(text)


def plain_count(number: int) -> str:
    """Format a number of weights, such as "1.5 B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
