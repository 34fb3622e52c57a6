"""Several processes train as one does: in DDP and in FSDP2, with shares that are uneven or empty, killed or not."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from builders import ROOT, optimization, weights, workspace
from mutation import assert_caught
from safetensors.torch import load_file
from training_jobs import Job, as_file, moved, task, train_here

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.training import parallelism
from selfalign.training import trainer as trainer_module
from selfalign.training.config import Optimization, TrainConfig
from selfalign.training.parallelism import Parallelism, assign_microbatches
from selfalign.training.preference import Preference
from selfalign.training.prepare import prepare
from selfalign.training.trainer import StepTrainer

KINDS = [
    *(Job(f"{kind}-{rank}", kind=kind, rank=rank) for kind in ("sft", "sr_dpo") for rank in (0, 4)),
    Job("live-4", kind="live", rank=4),
    Job("kto-0", kind="kto"),
    Job("experts-0", kind="sr_dpo", architecture="Mixtral", options=(("router_loss_coefficient", 0.0),)),
    Job("experts-qwen3-0", architecture="Qwen3-MoE", options=(("router_loss_coefficient", 0.0),)),
    Job(
        "experts-4",
        rank=4,
        targets="all-linear,experts.gate_up_proj,experts.down_proj",
        architecture="gpt-oss",
        options=(("router_loss_coefficient", 0.0),),
    ),
    Job("hybrid-0", kind="sr_dpo", architecture="Qwen3.5"),
    Job("low", dtype="bfloat16", options=(("dtype", "bfloat16"), ("gradient_checkpointing", True))),
]
RESUMED = [KINDS[1], KINDS[2], KINDS[5]]
"""Of each kind, and of both sorts of weights."""

KILLED = 2
SPEED = ("tokens_per_second", "step_seconds", "peak_memory_gb")
BY_PASS = "router_loss"
"""Of each pass alone, and a process's passes are others than those of one process."""


@dataclass
class Done:
    """What trainings in two processes left behind: one folder a job."""

    folder: Path
    code: int
    said: str
    seconds: float


@pytest.fixture(scope="module")
def alone(tiny_policy: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of training by one process, and some killed after two steps."""
    folder = tmp_path_factory.mktemp("alone")
    for job in KINDS:
        train_here(moved(job, folder / job.folder), tiny_policy)
    for job in RESUMED:
        train_here(moved(job, folder / f"{job.folder}-killed", killed_after=KILLED), tiny_policy)
    return folder


def in_two_processes(folder: Path, jobs: list[Job], policy: PolicyCheckpoint, *, shard: bool) -> Done:
    listed = as_file(folder / "jobs.json", jobs, policy, shard=shard)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **warm.interpreter()}
    started = time.monotonic()
    command += [str(ROOT / "tests" / "training_jobs.py"), str(listed)]
    done = warm.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return Done(folder, done.returncode, done.stderr, time.monotonic() - started)


def in_layout(layout: str, last: Job, alone: Path, folder: Path, policy: PolicyCheckpoint) -> Done:
    """Every kind of training, those that one process was killed in, some that are killed, and one job more."""
    for job in RESUMED:
        shutil.copytree(alone / f"{job.folder}-killed", folder / f"{job.folder}-resumed")
    jobs = [
        *(moved(job, folder / job.folder) for job in KINDS),
        *(moved(job, folder / f"{job.folder}-resumed") for job in RESUMED),
        *(moved(job, folder / f"{job.folder}-killed", killed_after=KILLED) for job in RESUMED),
        moved(KINDS[0], folder / "broken-loss", breaks="d4"),
    ]
    jobs = [moved(job, Path(job.folder), layout=layout) for job in jobs] + [moved(last, folder / last.folder)]
    return in_two_processes(folder, jobs, policy, shard=layout == "fsdp2")


@pytest.fixture(scope="module")
def ddp(alone: Path, tiny_policy: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The last job asks for shards that accelerate does not make on a CPU."""
    return in_layout("ddp", Job("no-effect", layout="fsdp2"), alone, tmp_path_factory.mktemp("ddp"), tiny_policy)


@pytest.fixture(scope="module")
def fsdp2(alone: Path, tiny_policy: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """In the last job one process breaks."""
    last = Job("one-breaks", layout="fsdp2", breaks="raise")
    return in_layout("fsdp2", last, alone, tmp_path_factory.mktemp("fsdp2"), tiny_policy)


@pytest.fixture(params=["ddp", "fsdp2"])
def done(request: pytest.FixtureRequest) -> Done:
    return request.getfixturevalue(request.param)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    left_out = (*SPEED, BY_PASS)
    return [{name: value for name, value in json.loads(line).items() if name not in left_out} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "weights" / "model.safetensors")


def assert_same(folder: Path, other: Path) -> None:
    """Losses, norms, metrics and the final weights are the same but for rounding: float32's, or bfloat16's."""
    low = other.name == "low"
    rows, others = rows_of(folder), rows_of(other)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=1e-2 if low else 2e-4, abs=1e-5)
    found, expected = weights_of(folder), weights_of(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=0, atol=8e-3 if low else 3e-5)
    for path in [*other.glob("adapter/*.json"), *other.glob("weights/*.json")]:
        assert (folder / path.relative_to(other)).read_text() == path.read_text()


@pytest.mark.parametrize("job", KINDS, ids=lambda job: job.folder)
def test_two_processes_train_as_one_does(done: Done, alone: Path, job: Job) -> None:
    assert (done.folder / job.folder).exists(), done.said
    assert_same(done.folder / job.folder, alone / job.folder)


def test_router_loss_of_two_processes_is_about_that_of_one(done: Done, alone: Path) -> None:
    found, expected = (
        [json.loads(line)[BY_PASS] for line in (folder / "experts-0" / "log.jsonl").read_text().splitlines()]
        for folder in (done.folder, alone)
    )
    assert found == pytest.approx(expected, rel=0.1)
    assert min(found) > 1


@pytest.mark.parametrize("job", ["sr_dpo-0", "sr_dpo-4", "kto-0"], ids=["all_weights", "adapter", "kto"])
def test_two_processes_measure_as_one_does(done: Done, alone: Path, job: str) -> None:
    found, expected = (json.loads((folder / job / "measured.json").read_text()) for folder in (done.folder, alone))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("job", RESUMED, ids=lambda job: job.folder)
def test_two_processes_go_on_where_one_was_killed(done: Done, alone: Path, job: Job) -> None:
    assert_same(done.folder / f"{job.folder}-resumed", alone / job.folder)


@pytest.mark.parametrize("job", RESUMED, ids=lambda job: job.folder)
def test_one_process_goes_on_where_two_were_killed(
    done: Done, alone: Path, tmp_path: Path, tiny_policy: PolicyCheckpoint, job: Job
) -> None:
    shutil.copytree(done.folder / f"{job.folder}-killed", folder := tmp_path / "resumed")
    assert [row["step"] for row in rows_of(folder)] == [1, 2]
    train_here(moved(job, folder), tiny_policy)
    assert_same(folder, alone / job.folder)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_the_record(done: Done) -> None:
    said = [(done.folder / "broken-loss" / f"error-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "the loss is not finite at step 1 (records " in said[0]
    assert "d4" in said[0]


def test_a_layout_that_did_not_take_effect_is_an_error(ddp: Done) -> None:
    for rank in (0, 1):
        said = (ddp.folder / "no-effect" / f"error-{rank}").read_text()
        assert said.startswith("train.parallelism.strategy=fsdp2 did not take effect: accelerate runs ")
    assert ddp.code == 0


def test_a_process_that_breaks_ends_the_other_one(fsdp2: Done) -> None:
    assert fsdp2.code != 0
    assert "this process is broken" in fsdp2.said
    assert not (fsdp2.folder / "one-breaks" / "weights").exists()


# --- shares ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sized:
    """Something of a length."""

    id: int
    length: int

    def __len__(self) -> int:
        return self.length


LENGTHS = [5, 40, 7, 7, 21, 3, 90, 12, 12, 2, 33]


def check_shares(tmp_path: Path) -> None:
    """Everything is dealt once, evenly, in as many passes everywhere, and the rest is repetitions."""
    given = [Sized(i, length) for i, length in enumerate(LENGTHS)]
    for examples in (given, given[:2], given[:1]):
        for count in (1, 2, 3, 5):
            dealt = [assign_microbatches(examples, 50, rank, count) for rank in range(count)]
            own = [[part for part in passes if not part.repeated] for passes in dealt]
            assert sorted(e.id for passes in own for part in passes for e in part.examples) == [e.id for e in examples]
            assert len({len(passes) for passes in dealt}) == 1
            assert all(passes for passes in dealt)
            assert all(sum(map(len, part.examples)) <= 50 or len(part.examples) == 1 for p in own for part in p)
            lengths = [[len(e) for part in passes for e in part.examples] for passes in own]
            # No share would be the smaller one without its shortest example.
            assert max(sum(share) - min(share, default=0) for share in lengths) <= min(map(sum, lengths))
            assert {len(part.examples) for p in dealt for part in p if part.repeated} <= {1}


def test_every_example_is_dealt_once_and_evenly(tmp_path: Path) -> None:
    check_shares(tmp_path)


def test_the_only_process_takes_all_shortest_first() -> None:
    examples = [Sized(i, length) for i, length in enumerate(LENGTHS)]
    ids = [example.id for part in assign_microbatches(examples, 30, 0, 1) for example in part.examples]
    assert ids == [example.id for example in sorted(examples, key=len)]


def average_gradients(
    monkeypatch: pytest.MonkeyPatch, policy: PolicyCheckpoint, folder: Path, kind: str, size: int, count: int
) -> dict[str, torch.Tensor]:
    """What DDP makes of the gradients that each of so many processes has after a step, were they there."""
    loaded = policy.load("float32", trainable=True)
    prepare(loaded, policy, weights(), 0.0)
    examples, objective = task(kind, loaded.tokenizer)
    if isinstance(objective, Preference):  # Of a normalised Δ each process would need the others', who are not there.
        loss = objective.loss
        objective.loss = replace(loss, refinement=replace(loss.refinement, normalise="none"))
    examples = examples[:size]
    settings = optimization(batch_size=size, microbatch_tokens=60)
    trainer = StepTrainer(loaded, examples, objective, settings, workspace(folder), weights())
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "count", lambda: count)
        patch.setattr(distributed, "gather", lambda value: [value])
        for rank in range(count):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            trainer.training_step(loaded.model, examples)
    return {name: p.grad / count for name, p in loaded.model.named_parameters() if p.grad is not None}


def check_gradients(monkeypatch: pytest.MonkeyPatch, tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    """One process's gradient is the average of what several have, some of them nothing."""
    for kind, size in (("sft", 9), ("sr_dpo", 2)):
        expected = average_gradients(monkeypatch, tiny_policy, tmp_path / f"{kind}-1", kind, size, 1)
        for count in (2, 3):
            found = average_gradients(monkeypatch, tiny_policy, tmp_path / f"{kind}-{count}", kind, size, count)
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_average_of_all_gradients_is_that_of_one_process(
    monkeypatch: pytest.MonkeyPatch, tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    check_gradients(monkeypatch, tiny_policy, tmp_path)


SCALE = "0.0 if microbatch.repeated else distributed.count() / weight"
MISSING = "missing = max(map(len, runs)) - len(runs[rank])"
MUTANTS: list[tuple[Any, str, str, Callable[..., None]]] = [
    (trainer_module, SCALE, SCALE.replace("distributed.count()", "1"), check_gradients),
    (trainer_module, SCALE, "distributed.count() / weight", check_gradients),
    (trainer_module, SCALE, SCALE.replace("/ weight", "/ len(microbatches)"), check_gradients),
    (parallelism, MISSING, "missing = 0", check_shares),
    (parallelism, "(load + len(example), process)", "(load + 1, process)", check_shares),
    (parallelism, "heapq.heapreplace(loads, (load + len(example), process))", "pass", check_shares),
    (parallelism, "for share in shares]", "for share in shares[:1] * count]", check_shares),
    (
        parallelism,
        "split_by_tokens(sorted(share, key=order), budget, packed=packed)",
        "[share] if share else []",
        check_shares,
    ),
    (parallelism, "], repeated=True)", "])", check_shares),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTANTS, ids=[new for _, _, new, _ in MUTANTS])
def test_mutant_is_caught(given: dict[str, Any], module: Any, old: str, new: str, check: Callable[..., None]) -> None:
    assert_caught(module, sys.modules[__name__], old, new, check, given)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_shares_among_one_process_are_refused(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    job = Job(str(tmp_path / "M1"), layout="fsdp2")
    train_here(job, tiny_policy)
    said = (tmp_path / "M1" / "error-0").read_text()
    assert said.startswith(
        "train.parallelism.strategy=fsdp2 needs several processes, but there is one: start the run with"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fsdp"}, "train.parallelism.strategy must be one of ddp, fsdp2; got 'fsdp'"),
        (
            {"reshard_after_forward": False},
            "train.parallelism.reshard_after_forward=false needs train.parallelism.strategy=fsdp2; got strategy=ddp",
        ),
    ],
)
def test_bad_layouts_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        Parallelism(**options)


def test_eight_bit_state_is_not_shared_out() -> None:
    eight = Optimization(learning_rate=1e-3, optimizer="adamw_8bit")
    with pytest.raises(SelfalignError, match="fsdp2 cannot shard the state of optimizer=adamw_8bit"):
        TrainConfig(sft=eight, align=eight, parallelism=Parallelism(strategy="fsdp2"))
