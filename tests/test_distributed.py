"""A run of several processes makes what one process makes, ends when one of them does, and goes on with any number."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from builders import TINY_RUN, metrics, run, write_tiny_data
from mutation import Check, assert_caught
from team import Team, dying_in, launch

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_json
from selfalign.engines.server import _free_port
from selfalign.launch.hydra_sweep import ListJobs
from selfalign.store import artifacts as store_module
from selfalign.store.artifacts import Artifact, StageOutput, Store

ANSWERS_OF_M2 = "evaluation_M2/answers"
SETTINGS = [*TINY_RUN, "iterations=1", "engine.max_batch_tokens=40"]
"""Every prompt is a batch of its own, so that both processes have some."""


def given(folder: Path) -> list[str]:
    """Every checkpoint is compared, too."""
    data, validation = write_tiny_data(folder / "data"), folder / "data/validation.jsonl"
    validation.write_text(
        '{"id": "v1", "instruction": "Tell me of mills."}\n{"id": "v2", "instruction": "And of geese."}\n'
    )
    choose = {"interval_steps": 1, "instructions": validation, "sampling.max_new_tokens": 8}
    return [*SETTINGS, *data, *(f"train.checkpoint_selection.{name}={value}" for name, value in choose.items())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder / "out", *given(folder))


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{file: records} of all that a run has made, without the digests of weights, which float errors change."""
    return {
        path.relative_to(folder).as_posix(): [
            {name: value for name, value in json.loads(line).items() if name not in ("model", "judge")}
            for line in path.read_text().splitlines()
        ]
        for link in sorted((folder / "artifacts").rglob("*"))
        if link.is_symlink()
        for path in sorted(link.glob("*.jsonl"))
        if path.name != "log.jsonl"
    }


def settled(row: dict[str, Any]) -> dict[str, Any]:
    """A row without times, and without the signs of rewards and Δ where these are nothing but float error."""
    left_out = ["seconds", "per_second", "memory_gb"]
    for value, names in (("rewards/margins", ["accuracies", "ties"]), ("refinement/mean", ["_augmented"])):
        left_out += names if abs(row.get(value, 1.0)) < 1e-5 else []
    return {name: value for name, value in row.items() if not name.endswith(tuple(left_out))}


def assert_same(folder: Path, whole: Path) -> None:
    """The same ids, texts and pairs, and the same numbers up to float error."""
    made, expected = records(folder), records(whole)
    assert made.keys() == expected.keys()
    for file, rows in expected.items():
        assert len(made[file]) == len(rows), file
        for row, other in zip(rows, made[file], strict=True):
            assert row.keys() == other.keys(), file
            for name, value in row.items():
                same = pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
                assert name == "text" or other[name] == same, (file, name)
    for file in ("instructions/instructions", "responses/responses"):
        texts, others = ([r["text"] for r in rows[f"artifacts/iteration_1/{file}.jsonl"]] for rows in (made, expected))
        assert texts == others
    numbers, others = ([settled(row) for row in metrics(f)] for f in (folder, whole))
    assert [row.keys() for row in numbers] == [row.keys() for row in others]
    assert sum(row.get("chosen_step", 0) > 0 for row in numbers) == 1, "checkpoints were compared"
    assert [(row["step"], row["label"]) for row in numbers] == [(row["step"], row["label"]) for row in others]
    for row, other in zip(numbers, others, strict=True):
        assert row == pytest.approx(other, abs=1e-3)


def test_killed_process_ends_the_others_and_one_process_goes_on(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes up to M2's answers, of which the killed one leaves a batch; one process does the rest."""
    overrides = [*given(tmp_path), f"output_dir={tmp_path / 'out'}"]
    said = launch(tmp_path, "torchrun", *overrides, dies_in=ANSWERS_OF_M2)
    assert said.code != 0
    (kept,) = (tmp_path / "out/store/respond").glob("*/scratch/journal-1.jsonl")
    assert time.time() - kept.stat().st_mtime < 60
    (ended,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "another process of this run has ended; see its message" in ended
    assert "the same command continues" in ended
    written: list[int] = []
    from selfalign.engines.transformers import TransformersGenerator

    write = TransformersGenerator.generate
    monkeypatch.setattr(TransformersGenerator, "generate", lambda *call: written.append(1) or write(*call))
    folder = run(tmp_path / "out", *given(tmp_path))
    assert len(written) < 3, "M2's answers were written anew"
    assert_same(folder, whole)


def test_process_killed_while_it_trains_ends_the_others_which_say_so(tmp_path: Path) -> None:
    said = launch(tmp_path, "torchrun", *given(tmp_path), f"output_dir={tmp_path / 'out'}", dies_in="M1")
    assert said.code != 0
    assert "another process of this run has ended; see its message" in said.err
    assert "bug in selfalign" not in said.err


HANGS = """
import sys, time
import torch.distributed as dist
from selfalign.core import distributed
distributed.TERMINATE_TIMEOUT = 0.5
with distributed.process_group():
    if distributed.rank() == 1:
        print("here", flush=True)
        time.sleep(60)
    dist.barrier()
"""
"""The first process waits for the second, deep in a library, where no signal is heard."""


def test_process_that_cannot_hear_that_it_is_to_stop_is_ended(tmp_path: Path) -> None:
    known = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", HANGS],
            env={**known, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    try:
        assert second.stdout
        assert second.stdout.readline() == "here\n"
        time.sleep(1)
        first.terminate()
        _, said = first.communicate(timeout=30)
    finally:
        first.kill()
        second.kill()
        second.communicate()
    assert first.returncode == 1
    assert said.splitlines()[-1].startswith("error in process 0: told to stop (SIGTERM): another process of this run")


def test_two_processes_finish_what_one_began_in_one_folder_with_one_tracked_run(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = ["tracker=wandb", "tracker.wandb.mode=offline"]
    with dying_in("iteration_1/responses", monkeypatch):
        run(tmp_path / "out", *given(tmp_path), *tracked)
    (kept,) = (tmp_path / "out/store/respond").glob("*/scratch/journal-0.jsonl")
    before = kept.read_bytes()
    said = launch(tmp_path, "accelerate", *given(tmp_path), *tracked, f"output_dir={tmp_path / 'out'}")
    assert said.code == 0, said
    (folder,) = (tmp_path / "out").glob("tiny-*")
    assert_same(folder, whole)
    assert len(before.splitlines()) == 1
    assert not list((tmp_path / "out").rglob("scratch"))
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2, "one a command"
    assert said.out.count("tracked   ") == said.out.count("stage  ") == 1
    assert "Traceback" not in said.err
    assert said.err.count("M2: align") == 1


# --- the store, among threads ------------------------------------------------------------------------------------


def write_shares(out: StageOutput) -> dict[str, Any]:
    """A stage of five batches that says which process made which, and how many it was told there are."""
    with out.journal(5, "things") as journal:
        made = list(journal.batches((str(n), 1, distributed.rank) for n in range(5)))
    (out.path / "made.txt").write_text("made")
    out.log({"step": 1})
    return {"made": made, "count": distributed.count()}


def make_in_store(root: Path, rank: int, *, all_ranks: bool = True, **inputs: Any) -> Artifact:
    return Store(root).make("stage", inputs, write_shares, all_ranks=all_ranks)


def test_stage_made_together_is_one_artifact_of_the_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = Team(3, monkeypatch).run(lambda rank: make_in_store(tmp_path, rank))
    assert others == [first] * 2
    assert first.counts == {"made": [0, 1, 2, 0, 1], "count": 3}
    assert sorted(path.name for path in first.path.iterdir()) == ["log.jsonl", "made.txt", "manifest.json"]
    assert len(first.rows()) == 1
    monkeypatch.undo()
    assert first == make_in_store(tmp_path, 0)
    alone = Store(tmp_path / "alone").make("stage", {}, lambda out: write_shares(out), all_ranks=True)
    assert alone.digest == first.digest


def test_any_other_stage_is_left_to_the_main_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is fetched once, and not by each of eight processes."""
    first, *others = Team(3, monkeypatch).run(lambda rank: make_in_store(tmp_path, rank, all_ranks=False))
    assert others == [first] * 2
    assert first.counts == {"made": [0] * 5, "count": 1}


def test_processes_that_read_different_data_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Team(2, monkeypatch).run(lambda rank: make_in_store(tmp_path, rank, data=digest_json(rank)))
    assert all("stage: the processes of this run read different data" in str(ended) for ended in ends)
    assert all(isinstance(ended, SelfalignError) for ended in ends)


def test_sweep_is_not_started_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match=r"^error: .*hydra\.launcher\.tasks_per_node"):
        ListJobs().on_multirun_start(None)  # pyright: ignore[reportArgumentType]


TOGETHER = test_stage_made_together_is_one_artifact_of_the_main_process
ALONE = test_any_other_stage_is_left_to_the_main_process
# (what, old text, new text, the test that notices)
MUTANTS: list[tuple[str, str, str, Check]] = [
    ("everybody writes into the artifact", 'self.scratch / f"process_', 'folder / f"process_', TOGETHER),
    ("what one made is not given to the others", "cast(Artifact, distributed.broadcast(made))", "cast(Artifact, made)",
     TOGETHER),
    ("every process writes the manifest", "        if not distributed.is_main():\n            return\n", "", TOGETHER),
    ("every stage is made by all", "elif all_ranks:", "elif True:", ALONE),
    ("the main process waits for the others alone", "with distributed.single_process():", "if True:", ALONE),
    ("different data go unnoticed", "if len(set(distributed.gather(folder.name))) > 1:", "if False:",
     test_processes_that_read_different_data_are_stopped),
]  # fmt: skip


@pytest.mark.parametrize(("what", "old", "new", "check"), MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_broken_store_is_noticed(
    what: str, old: str, new: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    assert_caught(store_module, sys.modules[__name__], old, new, check, given)
