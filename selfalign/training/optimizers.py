"""The optimisers of training, and float32 master weights for models in bfloat16."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfalign.core.errors import SelfalignError
from selfalign.training.config import Optimization

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

EIGHT_BIT_NEEDS = "optimizer=adamw_8bit needs bitsandbytes: pip install 'selfalign[8bit]'"


def build_optimizer(parameters: Iterable[nn.Parameter], optimization: Optimization) -> torch.optim.Optimizer:
    """Build the optimiser of the parameters that need gradients. If some are not float32, it works on a float32 copy.

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
    """An optimiser that works on a float32 copy of the weights and writes the result of each step back to them.

    A usual step is smaller than the spacing of bfloat16 at most weights, so it would be rounded away without the copy.
    """

    def __init__(self, parameters: list[nn.Parameter], build: Build) -> None:
        super().__init__(parameters, {})
        self.weights = parameters
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
        self.inner = build(self.masters)
        # Schedulers set the rate in these groups, and some read its peak from the defaults.
        self.param_groups = self.inner.param_groups
        self.defaults = self.inner.defaults

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do one step with the weights' gradients."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        self.inner.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the float32 copies to the weights."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Delete the gradients of the weights and of their copies."""
        for parameter in [*self.weights, *self.masters]:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimiser's state and the float32 weights."""
        return {"inner": self.inner.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both. The parameter groups stay shared with the wrapped optimiser."""
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups
        masters: list[Tensor] = state_dict["masters"]
        for master, saved in zip(self.masters, masters, strict=True):
            master.copy_(saved)
