"""The optimisers a training stage can choose, and float32 master weights for models kept in bfloat16."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfalign.core.errors import SelfalignError
from selfalign.training.config import Optimization

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

EIGHT_BIT_NEEDS = "optimizer=adamw_8bit needs bitsandbytes: pip install 'selfalign[8bit]'"


def build_optimizer(parameters: Iterable[nn.Parameter], optimization: Optimization) -> torch.optim.Optimizer:
    """The optimiser over the parameters that take gradients, on a float32 copy of those that are not float32.

    Raises:
        SelfalignError: the optimiser's package is not installed.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    build = _builder(optimization)
    if all(parameter.dtype == torch.float32 for parameter in trained):
        return build(trained)
    return MasterWeights(trained, build)


def _builder(optimization: Optimization) -> Build:
    rate, decay = optimization.learning_rate, optimization.weight_decay
    if optimization.optimizer == "rmsprop":
        return lambda parameters: torch.optim.RMSprop(parameters, lr=rate)
    if optimization.optimizer == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise SelfalignError(EIGHT_BIT_NEEDS) from error
    return lambda parameters: AdamW8bit(parameters, lr=rate, weight_decay=decay)


class MasterWeights(torch.optim.Optimizer):
    """An optimiser that works on a float32 copy of the weights, and writes each step's result back to them.

    A step of usual size is smaller than bfloat16's spacing at most weights, so in place it would be lost.
    """

    def __init__(self, parameters: list[nn.Parameter], build: Build) -> None:
        super().__init__(parameters, {})
        self.weights = parameters
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
        self.inner = build(self.masters)
        # Schedulers set the rate here, so these are the groups that count; some ask for its peak.
        self.param_groups = self.inner.param_groups
        self.defaults = self.inner.defaults

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step from the weights' gradients."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        self.inner.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Gives the weights the values of their float32 copies."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the weights and of their copies."""
        for parameter in [*self.weights, *self.masters]:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimiser's state and the float32 weights."""
        return {"inner": self.inner.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes both back; the groups stay shared with the wrapped optimiser."""
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups
        masters: list[Tensor] = state_dict["masters"]
        for master, saved in zip(self.masters, masters, strict=True):
            master.copy_(saved)
