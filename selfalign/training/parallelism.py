"""Distribution of the trained policy and of the examples over the processes of a run: DDP or FSDP2.

All processes do equally many forward and backward passes in a step, because they exchange weights or gradients in each.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import nn

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.models.batches import S, split_by_tokens
from selfalign.models.packed_attention import is_packing

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

KINDS = ("ddp", "fsdp2")


@dataclass(kw_only=True, slots=True)
class Parallelism:
    """The part of the policy that each process holds in training. With one process it is the full policy.

    Attributes:
        strategy: "ddp" holds the full policy in every process (Li et al. 2020, arXiv 2006.15704). "fsdp2" holds a
            shard of each weight, its gradient and its optimiser state, and gathers the weights of a layer while it is
            computed (Zhao et al. 2023, arXiv 2304.11277).
        reshard_after_forward: whether "fsdp2" frees a layer's gathered weights between its forward and its backward
            pass; false needs more memory and less communication.
    """

    strategy: str = "ddp"
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in KINDS:
            raise SelfalignError(f"train.parallelism.strategy must be one of {', '.join(KINDS)}; got {self.strategy!r}")
        if not (self.reshard_after_forward or self.sharded):
            raise SelfalignError(
                "train.parallelism.reshard_after_forward=false needs train.parallelism.strategy=fsdp2; got "
                f"strategy={self.strategy}"
            )

    @property
    def sharded(self) -> bool:
        """Whether a process holds only a shard of the weights."""
        return self.strategy == "fsdp2"

    def check_possible(self) -> None:
        """Check that the run has several processes if weights are sharded.

        Raises:
            SelfalignError: it has only one.
        """
        if self.sharded and distributed.count() == 1:
            raise SelfalignError(
                "train.parallelism.strategy=fsdp2 needs several processes, but there is one: start the run with "
                "torchrun --nproc-per-node N -m selfalign, or set train.parallelism.strategy=ddp"
            )

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments of transformers' TrainingArguments."""
        if not self.sharded:
            return {"ddp_find_unused_parameters": False}
        return {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": self.reshard_after_forward}}

    def check_effect(self, accelerator: "Accelerator", model: Any) -> None:
        """Check that the model is distributed by this strategy.

        Args:
            accelerator: the accelerator that prepared the model.
            model: the prepared model.

        Raises:
            SelfalignError: it is not.
        """
        from accelerate import DistributedType
        from torch.distributed.tensor import DTensor
        from torch.nn.parallel import DistributedDataParallel

        if self.sharded:
            all_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
            effective = accelerator.distributed_type == DistributedType.FSDP and all_sharded
        else:
            single = distributed.count() == 1 and not isinstance(model, nn.DataParallel)
            effective = isinstance(model, DistributedDataParallel) or single
        if not effective or accelerator.num_processes != distributed.count():
            raise SelfalignError(
                f"train.parallelism.strategy={self.strategy} did not take effect: accelerate runs "
                f"{accelerator.distributed_type} on {accelerator.num_processes} of {distributed.count()} processes, "
                f"with a {type(model).__name__}"
            )


@dataclass(frozen=True, slots=True)
class Microbatch(Generic[S]):
    """The examples of one forward pass. A `repeated` microbatch has weight 0; it only fills up a process's passes."""

    examples: list[S]
    repeated: bool = False


def assign_microbatches(
    examples: Sequence[S], budget: int, rank: int, count: int, *, packed: bool = False
) -> list[Microbatch[S]]:
    """Return the microbatches of process `rank`. All processes get equally many.

    Examples are assigned by falling length, each to the process with the fewest tokens so far, so that all have about
    the same number of tokens. A process takes its own by length, or packed ones by their tokens, so that those with a
    common prefix are in one microbatch. One with fewer microbatches gets repetitions of the shortest example.

    Args:
        examples: all examples of an optimiser step.
        budget: the most tokens in a microbatch.
        rank: the rank of the process, from 0.
        count: number of processes.
        packed: whether the model computes a prefix that several examples share once.
    """
    shares: list[list[S]] = [[] for _ in range(count)]
    loads = [(0, process) for process in range(count)]
    for example in sorted(examples, key=len, reverse=True):
        load, process = loads[0]
        shares[process].append(example)
        heapq.heapreplace(loads, (load + len(example), process))
    order: Callable[[S], Any] = (lambda example: example.sequences()) if packed else len
    runs = [list(split_by_tokens(sorted(share, key=order), budget, packed=packed)) for share in shares]
    missing = max(map(len, runs)) - len(runs[rank])
    return [*map(Microbatch, runs[rank]), *[Microbatch([min(examples, key=len)], repeated=True)] * missing]


def local_microbatches(model: "PreTrainedModel", examples: Sequence[S], budget: int) -> list[Microbatch[S]]:
    """Return the microbatches of this process for a model without DDP's wrapper; see `assign_microbatches`."""
    return assign_microbatches(examples, budget, distributed.rank(), distributed.count(), packed=is_packing(model))


def unwrap(model: Any) -> Any:
    """Return the model inside DDP's wrapper, which has its config, its device and its adapter."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def layers_to_shard(model: Any) -> list[str]:
    """Return the classes of a model's layers that FSDP2 shards one by one.

    An architecture also names layers that a model for text alone does not have, such as those for images.
    """
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(model._no_split_modules or ()))


def upcast_trainable(model: nn.Module) -> Any:
    """Convert the trained weights to float32 for the optimiser, before they are sharded.

    Returns:
        FSDP2's MixedPrecisionPolicy with the weights' previous dtype for multiplications.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lower = {parameter.dtype for parameter in trained} - {torch.float32}
    for parameter in trained:
        parameter.data = parameter.data.float()
    return (
        MixedPrecisionPolicy(param_dtype=lower.pop(), reduce_dtype=torch.float32) if lower else MixedPrecisionPolicy()
    )


@torch.no_grad()
def gather_full_tensors(model: nn.Module, full: nn.Module | None) -> None:
    """Gather the trained weights from the shards of all processes. All processes must call this.

    Args:
        model: the sharded model.
        full: a model of the same architecture that receives the weights; None in processes that do not need them.
    """
    targets = dict(full.named_parameters()) if full else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
            if full:
                targets[name].copy_(value)
