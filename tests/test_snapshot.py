"""What a killed training goes on from: every number of every optimiser's state, and the schedule."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from selfalign import snapshot
from selfalign.optimizers import MasterWeights, build_optimizer
from selfalign.training import Optimization

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
    snapshot.save(tmp_path / "three", *Training(name, dtype).go(range(3)).parts())
    again = Training(name, dtype)
    snapshot.load(tmp_path / "three", *again.parts())
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
    snapshot.save(tmp_path / "one", *Training("adamw", torch.float32).parts())
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["schedule.json", "shard-00001-model-00001-of-00001.safetensors"]
