"""Master weights: bfloat16 models learn from steps that bfloat16 alone would lose."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

from selfalign.core.errors import SelfalignError
from selfalign.training.config import Optimization
from selfalign.training.optimizers import MasterWeights, build_optimizer


def optimization(**options: Any) -> Optimization:
    return Optimization(**{"learning_rate": 1e-3, "dtype": "float32"} | options)


def weight(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=dtype))


def train(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Always the same gradient, so every step of Adam is the learning rate long."""
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, -0.5)
        optimizer.step()
        optimizer.zero_grad()
    return parameter.tolist()


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_small_steps_add_up_in_bfloat16_as_they_do_in_float32(name: str) -> None:
    """Near 1 bfloat16's spacing is 1/128; steps of 1/1000 are lost in it one by one, but not together."""
    settings = optimization(optimizer=name)
    low, full = weight(torch.bfloat16), weight(torch.float32)
    learnt = train(low, build_optimizer([low], settings), 20)
    assert learnt == torch.tensor(train(full, build_optimizer([full], settings), 20)).bfloat16().tolist()
    assert learnt[0] > 1.01
    lost = weight(torch.bfloat16)
    assert train(lost, torch.optim.AdamW([lost], lr=1e-3, weight_decay=0), 20) == [1.0] * 3


def test_float32_weights_need_no_copy() -> None:
    assert isinstance(build_optimizer([weight(torch.float32)], optimization()), torch.optim.AdamW)


def test_resumed_master_weights_go_on_as_if_never_stopped() -> None:
    settings = optimization()
    whole = weight(torch.bfloat16)
    optimizer = build_optimizer([whole], settings)
    train(whole, optimizer, 10)
    saved, weights = copy.deepcopy(optimizer.state_dict()), whole.detach().clone()
    expected = train(whole, optimizer, 13)

    again = nn.Parameter(weights)
    resumed = build_optimizer([again], settings)
    resumed.load_state_dict(saved)
    assert train(again, resumed, 13) == expected


def test_schedulers_set_the_rate_of_the_wrapped_optimiser_also_after_loading() -> None:
    parameter = weight(torch.bfloat16)
    optimizer = build_optimizer([parameter], optimization())
    assert isinstance(optimizer, MasterWeights)
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert scheduler.get_last_lr() == [0.0]
    assert train(parameter, optimizer, 20) == [1.0] * 3


def test_only_weights_that_take_gradients_are_optimised() -> None:
    frozen, trained = weight(torch.bfloat16), weight(torch.float32)
    frozen.requires_grad_(False)
    optimizer = build_optimizer([frozen, trained], optimization())
    assert [p for group in optimizer.param_groups for p in group["params"]] == [trained]


def test_eight_bit_optimiser_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(
        SelfalignError, match=r"optimizer=adamw_8bit needs bitsandbytes: pip install 'selfalign\[8bit\]'"
    ):
        build_optimizer([weight(torch.float32)], optimization(optimizer="adamw_8bit"))


def test_eight_bit_optimiser_follows_the_float32_one_with_a_quarter_of_its_state() -> None:
    """Adam's steps, but for the rounding of its two averages; tensors below 4096 elements keep them in float32."""
    learnt, sizes = [], []
    for name in ("adamw", "adamw_8bit"):
        parameter = nn.Parameter(torch.ones(8192))
        optimizer = build_optimizer([parameter], optimization(optimizer=name))
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            parameter.grad = torch.randn(8192, generator=generator) - 0.5
            optimizer.step()
        learnt.append(parameter.detach())
        state = optimizer.state[parameter]
        sizes.append(sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor)))
    assert learnt[0].mean() > 1.005
    torch.testing.assert_close(learnt[1], learnt[0], rtol=0, atol=3e-3)
    assert sizes[1] < 0.3 * sizes[0]
