"""Every architecture through the whole loop: SFT, two iterations, and evaluation."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, as_policy
from builders import TINY_RUN, metrics, record_files, run, write_tiny_data

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Of other people's models.

IN_THE_GATE = ("gpt-oss", "Qwen3.5-MoE")
"""Sinks, experts and packed rows; a recurrence, experts and padded ones. The others wait for the night."""

SHORT = [
    "model=pretrained",
    "judge.prompt='Grade {instruction} of {response}'",
    "data.instruct.prompt=Tasks",
    "data.instruct.seed_examples=1",
    "evaluate.head_to_head=null",
    "train.sft.max_length=120",
    "train.align.max_length=120",
]
"""For contexts of 128 tokens and a tokenizer of bytes."""


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore")


def as_folder(name: str, folder: Path) -> Path:
    """The architecture's tiny model as a user has it: weights and tokenizer in one folder."""
    files = as_policy(ARCHITECTURES[name].build(), folder / "M0")
    shutil.copytree(files.path / "weights", folder / "mine")
    shutil.copytree(files.path / "tokenizer", folder / "mine", dirs_exist_ok=True)
    return folder / "mine"


def night(name: str) -> Any:
    return name if name in IN_THE_GATE else pytest.param(name, marks=pytest.mark.nightly)


@pytest.mark.parametrize("name", [night(name) for name in ARCHITECTURES])
def test_architecture_goes_through_the_whole_loop(name: str, tmp_path: Path) -> None:
    told = [*TINY_RUN, *write_tiny_data(tmp_path / "data"), *SHORT, f"model.path={as_folder(name, tmp_path)}"]
    folder = run(tmp_path / "out", *told)
    made = record_files(folder)
    for iteration in (1, 2):
        assert made[f"artifacts/iteration_{iteration}/pairs/pairs.jsonl"]
    weights = [made[f"artifacts/M{number}/weights/model.safetensors"] for number in (1, 2, 3)]
    assert len(set(weights)) == 3
    rows = metrics(folder)
    first = [row for row in rows if row.get("step") is not None and "rewards/margins" in row and "loss" in row]
    assert first
    assert any("router_loss" in row for row in rows) == ARCHITECTURES[name].routes
