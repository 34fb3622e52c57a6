"""How the trained policy lies over the processes of a run, and which examples each of them takes.

All processes do as many forward and backward passes of a step as any other, because the layouts exchange weights or
gradients in each.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import nn

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.models.batches import S, split_by_tokens

if TYPE_CHECKING:
    from accelerate import Accelerator

KINDS = ("ddp", "fsdp2")


@dataclass(kw_only=True, slots=True)
class Parallelism:
    """What each process keeps of the policy in training; with one process there is nothing to lay out.

    Attributes:
        strategy: "ddp" keeps all of it in every process (Li et al. 2020, arXiv 2006.15704); "fsdp2" a share of each
            weight, its gradient and its optimiser state, and puts a layer's weights together while it is computed
            (Zhao et al. 2023, arXiv 2304.11277).
        reshard_after_forward: whether "fsdp2" lets go of a layer's weights between its forward and its backward
            pass; false needs more memory and less communication.
    """

    strategy: str = "ddp"
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in KINDS:
            raise SelfalignError(f"train.parallelism.strategy must be one of {', '.join(KINDS)}; got {self.strategy!r}")
        if not (self.reshard_after_forward or self.sharded):
            raise SelfalignError("train.parallelism.reshard_after_forward=false has a meaning with strategy=fsdp2 only")

    @property
    def sharded(self) -> bool:
        """Whether a process has only a share of the weights."""
        return self.strategy == "fsdp2"

    def check_possible(self) -> None:
        """Refuses to share weights out among one process.

        Raises:
            SelfalignError: with what to do.
        """
        if self.sharded and distributed.count() == 1:
            raise SelfalignError(
                "train.parallelism.strategy=fsdp2 needs several processes, and this is the only one: start it with "
                "torchrun --nproc-per-node N -m selfalign, or set train.parallelism.strategy=ddp"
            )

    def arguments(self) -> dict[str, Any]:
        """What transformers' TrainingArguments are told."""
        if not self.sharded:
            return {"ddp_find_unused_parameters": False}
        return {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": self.reshard_after_forward}}

    def check_effect(self, accelerator: "Accelerator", model: Any) -> None:
        """Makes sure that training is laid out as asked for.

        Args:
            accelerator: what prepared the model.
            model: as it was prepared.

        Raises:
            SelfalignError: it is not.
        """
        from accelerate import DistributedType
        from torch.distributed.tensor import DTensor
        from torch.nn.parallel import DistributedDataParallel

        if self.sharded:
            shared = all(isinstance(parameter, DTensor) for parameter in model.parameters())
            done = accelerator.distributed_type == DistributedType.FSDP and shared
        else:
            alone = distributed.count() == 1 and not isinstance(model, nn.DataParallel)
            done = isinstance(model, DistributedDataParallel) or alone
        if not done or accelerator.num_processes != distributed.count():
            raise SelfalignError(
                f"train.parallelism.strategy={self.strategy} did not take effect: accelerate runs "
                f"{accelerator.distributed_type} on "
                f"{accelerator.num_processes} processes of {distributed.count()}, with a {type(model).__name__}"
            )


@dataclass(frozen=True, slots=True)
class Microbatch(Generic[S]):
    """Examples of one forward pass; `repeated` ones count nothing, they keep step with the other processes."""

    examples: list[S]
    repeated: bool = False


def assign_microbatches(examples: Sequence[S], budget: int, rank: int, count: int) -> list[Microbatch[S]]:
    """The passes of process `rank` over its share of the examples, as many as every other process has.

    The longest example goes first, each to the process with the fewest tokens so far, so that shares are even. A share
    that needs fewer passes than another, or is empty, is filled up with repetitions of the shortest example.

    Args:
        examples: those of a whole step.
        budget: the most tokens of a pass.
        rank: of the process, from 0.
        count: how many processes there are.
    """
    shares: list[list[S]] = [[] for _ in range(count)]
    loads = [(0, process) for process in range(count)]
    for example in sorted(examples, key=len, reverse=True):
        load, process = loads[0]
        shares[process].append(example)
        heapq.heapreplace(loads, (load + len(example), process))
    runs = [list(split_by_tokens(sorted(share, key=len), budget)) for share in shares]
    missing = max(map(len, runs)) - len(runs[rank])
    return [*map(Microbatch, runs[rank]), *[Microbatch([min(examples, key=len)], repeated=True)] * missing]


def local_microbatches(examples: Sequence[S], budget: int) -> list[Microbatch[S]]:
    """The passes of this process, see `deal`."""
    return assign_microbatches(examples, budget, distributed.rank(), distributed.count())


def out_of_wrapper(model: Any) -> Any:
    """The model itself, where DDP has wrapped it: with its config, its device and its adapter."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def upcast_trainable(model: nn.Module) -> Any:
    """Makes the trained weights float32, for the optimiser, before they are shared out.

    Returns:
        FSDP2's MixedPrecisionPolicy, which has them multiplied in the dtype they had.
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
def gather_full_tensors(model: nn.Module, whole: nn.Module | None) -> None:
    """Puts the trained weights, of which each process has a share, together into a model that is whole.

    Args:
        model: the shared one; all processes come here.
        whole: the same architecture in this process; None where its weights are not wanted.
    """
    places = dict(whole.named_parameters()) if whole else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
            if whole:
                places[name].copy_(value)
