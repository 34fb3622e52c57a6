"""How large M0 is by its files' headers, and whether disk and memory hold what is trained from it.

A lack that is certain is an error; where it only gets close, because not all is known before, it is a warning.
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
"""Bytes that an optimiser keeps for each trained weight, at least."""

IN_A_LAYER = re.compile(r"\.\d+\..*\.weight$")
"""Weights of the layers that repeat, which are what adapters and quantisation are about; not the embeddings."""

ROOM = "make room there (selfalign-store clean removes what no run uses), set another output_dir, or train adapters"
LESS = (
    "train adapters (model.lora.rank=16), keep the base in 4 bits (model.quantization=nf4), take model.dtype=bfloat16 "
    "or optimizer=adamw_8bit, or share it out among processes (train.parallelism.strategy=fsdp2)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """How much a policy takes.

    Attributes:
        parameters: all weights.
        trained: those that training moves: all, or an adapter's.
        in_layers: the weights of linear layers, which are those that quantisation makes small.
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
        """The size of a checkpoint's policy; None where its files do not tell."""
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
        """Bytes of a checkpoint on disk: the trained weights, in float32, and the optimiser's state."""
        return self.trained * (4 + STATE[optimizer])

    def loaded(self, width: int) -> int:
        """Bytes of the weights in memory, of so many bytes each where they are not quantised."""
        quantised = self.in_layers if self.quantised else 0
        return quantised // 2 + (self.parameters - quantised) * width

    def training(self, optimizer: str) -> int:
        """Bytes in memory without gradients and activations: weights, their float32 copy, the optimiser's state."""
        copy = 4 if self.adapter or self.width < 4 else 0
        return self.loaded(self.width) + self.trained * (copy + STATE[optimizer])

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of the trained weights."""
        return self.trained * (4 if self.adapter else self.width)


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """{weight: its shape} of a checkpoint, from the headers of its files; empty where they do not tell."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        files = sorted(set(named.values())) or ["model.safetensors"]
        shapes = {name: shape for file in files for name, shape in _header(folder / file)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return {}  # What is damaged is named where it is loaded.
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
    """How many weights an adapter has beside these."""
    ends = ("",) if ALL_LINEAR in lora.names else tuple(f".{name}.weight" for name in lora.names)
    adapted = [shape for name, shape in linear.items() if name.endswith(ends)]
    return sum(lora.rank * sum(shape) for shape in adapted)


# --- disk --------------------------------------------------------------------------------------------------------


def disk_lack(size: Footprint, models: int, optimizers: Collection[str], output: Path) -> list[str]:
    """What is wrong with the disk, if so many models are still to be trained, with these optimisers."""
    checkpoint, free = max(map(size.checkpoint, optimizers)), free_space(output)
    needed = models * size.model + checkpoint
    said = (
        f"output_dir={output}: {amount(free)} are free there, and {plural(models, 'model')} of {amount(size.model)} "
        f"with checkpoints of {amount(checkpoint)} are still to be written"
    )
    if free < needed:
        return [f"{said}, {amount(needed)} in all: {ROOM}"]
    if free < needed + checkpoint:
        logger.warning("%s; for a moment there are two checkpoints: %s", said, ROOM)
    return []


def free_space(folder: Path) -> int:
    """Bytes that may be written below a folder, which need not be there yet."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free


# --- memory ------------------------------------------------------------------------------------------------------


def training_lack(size: Footprint, optimizers: dict[str, str], layout: Parallelism) -> list[str]:
    """What is wrong with the memory, if {setting: optimiser} train."""
    among = distributed.count() if layout.sharded else 1
    capacity, where = memory()
    lines: list[str] = []
    for key, optimizer in optimizers.items():
        needed, gradients = size.training(optimizer) // among, size.gradients // among
        said = (
            f"{key}: {plain_count(size.parameters)} weights, and the state of {optimizer} for the "
            f"{plain_count(size.trained)} that are trained, take {amount(needed)}, and {where} has {amount(capacity)}"
        )
        if needed > capacity:
            lines.append(f"{said}: {LESS}")
        elif needed + gradients > capacity:
            logger.warning("%s; gradients take another %s: %s", said, amount(gradients), LESS)
    return lines


def writing_lack(size: Footprint, dtype: str) -> list[str]:
    """What is wrong with the memory, if a policy writes in this dtype."""
    (capacity, where), needed = memory(), size.loaded(WIDTH[dtype])
    if needed <= capacity:
        return []
    return [
        f"engine.dtype={dtype}: the weights take {amount(needed)}, and {where} has {amount(capacity)}: take "
        "engine.dtype=bfloat16, model.quantization=nf4, or another engine"
    ]


def memory() -> tuple[int, str]:
    """Bytes that one process of the run may have at most, and what has them."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, "the GPU"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = f" for each of {here} processes" if here > 1 else ""
    return main_memory(Path("/")) // here, f"this machine{share}"


def main_memory(root: Path) -> int:
    """Bytes of main memory and swap that this process may have; of the machine, or of its control group.

    Args:
        root: where /proc and /sys lie.
    """
    told = (root / "proc/meminfo").read_text(encoding="utf-8") if (root / "proc/meminfo").is_file() else ""
    sizes = {
        name: int(size) * 1024 for name, size in re.findall(r"^(MemTotal|SwapTotal): *(\d+) kB", told, re.MULTILINE)
    }
    total = sizes.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_group_limits(root)]) + sizes.get("SwapTotal", 0)


def _group_limits(root: Path) -> Iterator[int]:
    """The limits of this process's control groups, of version 2 and 1."""
    own = root / "proc/self/cgroup"
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else ():
        _, kinds, place = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if kinds else ("sys/fs/cgroup", "memory.max")
        steps = [part for part in place.split("/") if part and part != ".."]
        for depth in range(len(steps) + 1):
            limit = root.joinpath(top, *steps[:depth], name)
            if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdecimal():
                yield int(text)


def plain_count(number: int) -> str:
    """A number of weights, to read."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
