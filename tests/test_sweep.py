"""Sweeps, run for real on a tiny model: states, failures, kills, and work that is shared and done once."""

import importlib.util
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from builders import ROOT, TINY_RUN, Said, composed, record_files, run, write_tiny_data
from hydra.core.override_parser.overrides_parser import OverridesParser
from mutation import Check, assert_caught, home_of
from omegaconf import OmegaConf
from test_tracking import Read
from warm import Command

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.launch import experiment as experiment_module
from selfalign.launch import sweep as sweep_module
from selfalign.launch.hydra_sweep import BasicSweeper, refuse_search_over_seeds, search_upward
from selfalign.launch.sweep import Sweep, restore_global_state, run_job
from selfalign.report.jobs import find_jobs
from selfalign.runs import sweep_jobs
from selfalign.runs.sweep_jobs import Job, JobState, progress_text, time_left, varying_overrides
from selfalign.runs.tracker import tracked_id

LOOP = [*TINY_RUN, "iterations=1", "train.sft.epochs=1"]
"""The whole loop, once around."""


GIVEN = [
    "experiment=smoke",
    "data=pairs",
    "data.seed_data.demonstrations=''",
    "data.seed_data.ranked=''",
    "iterations=1",
]
GIVEN += ["evaluate=none", "train.align.dtype=float32", "train.align.batch_size=1"]
"""Alignment on given pairs and nothing else: quicker."""


def jobs(output: Path) -> list[dict[str, Any]]:
    """The only sweep's jobs.json."""
    (file,) = output.glob("sweeps/*/jobs.json")
    return read_json(file)


def write_pairs(file: Path, count: int = 3, chosen: str = "Say it.") -> str:
    """Preference pairs; returns the override that names them."""
    rows = [{"prompt": f"Is {n} more?", "chosen": chosen, "rejected": "No."} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data.path={file}"


def states(output: Path) -> list[str]:
    return [job["state"] for job in jobs(output)]


def run_folders(output: Path) -> list[Path]:
    """The run folders of a sweep's jobs that have one, in their order."""
    (folder,) = output.glob("sweeps/*/")
    return [(folder / job["folder"]).resolve() for job in jobs(output) if job["folder"]]


def artifacts(folder: Path) -> dict[str, Path]:
    """{label: where it really lies} of a run."""
    links = [path for path in (folder / "artifacts").rglob("*") if path.is_symlink()]
    return {link.relative_to(folder / "artifacts").as_posix(): link.resolve() for link in links}


def written(output: Path) -> dict[Path, int]:
    """When each artifact and each run's results were written."""
    files = [*output.glob("store/*/*/manifest.json"), *output.glob("*/summary.json"), *output.glob("*/report.html")]
    return {path: path.stat().st_mtime_ns for path in files}


# --- in another process ------------------------------------------------------------------------------------------

COUNTING = """
import os
from selfalign.store import artifacts

build = artifacts.Store._build

def counted(self, folder, *rest):
    build(self, folder, *rest)
    with open(os.environ["BUILDS"], "a") as file:
        file.write(f"{folder}\\n")

artifacts.Store._build = counted

if "DIES_BEHIND" in os.environ:
    import signal
    from selfalign.launch.sweep import Sweep
    from selfalign.runs.sweep_jobs import JobState

    update_job = Sweep.update_job

    def told(self, number, overrides, **changes):
        update_job(self, number, overrides, **changes)
        if (str(number), changes.get("state")) == (os.environ["DIES_BEHIND"], JobState.finished):
            os.kill(os.getpid(), signal.SIGKILL)

    Sweep.update_job = told
"""
"""Python imports this when it starts: what any process of a sweep makes is written down; it may die behind a job."""

START = """
import os, resource, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
if limit := int(os.environ["FILE_SIZE"]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from selfalign.cli.main import main
main()
"""
"""The command line; what runs in the background of a shell would ignore Ctrl-C."""


class Elsewhere:
    """The command line in processes of its own; counts what they make."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "out"
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text(COUNTING)
        self.overrides = [*GIVEN, write_pairs(folder / "pairs.jsonl", 40), f"output_dir={self.output}"]

    def start(self, *overrides: str, file_size: int = 0, **environment: str) -> Command:
        """A sweep, in a process group of its own; no file may have more than `file_size` bytes, as by `ulimit -f`."""
        known = {"PYTHONPATH": f"{self.folder / 'site'}:{ROOT}", "BUILDS": str(self.folder / "builds"), **environment}
        known["FILE_SIZE"] = str(file_size)
        return Command(
            [sys.executable, "-c", START, "-m", *self.overrides, *overrides],
            cwd=self.folder,
            env={**os.environ, **known},
            text=True,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
        )

    def built(self) -> Counter[str]:
        """How often each artifact was made."""
        file = self.folder / "builds"
        return Counter(file.read_text().splitlines() if file.exists() else [])

    def wait_for(self, state: str, number: int, process: Command) -> None:
        """Until a job is in this state, and has begun to train."""
        while process.poll() is None:
            listed = list(self.output.glob("sweeps/*/jobs.json"))
            trained = len(list(self.output.glob("store/align/*/")))
            if listed and trained >= number and states(self.output)[number - 1] == state:
                return
            time.sleep(0.01)
        pytest.fail(f"ended too early: {process.communicate()}")


def end(process: Command) -> Said:
    out, err = process.communicate(timeout=300)
    return Said(process.returncode, out, err)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Elsewhere:
    return Elsewhere(tmp_path)


LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": [],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2"],
}


def needs(launcher: str) -> None:
    """Skips a test whose launcher or sweeper is not installed."""
    plugin = f"hydra_plugins.hydra_{launcher}"
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: pip install 'selfalign[sweep]'")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_runs_jobs_side_by_side_that_share_their_work(elsewhere: Elsewhere, launcher: str) -> None:
    needs(f"{launcher.removesuffix('_local')}_launcher")
    if launcher == "joblib":
        elsewhere.overrides = [*LOOP, *write_tiny_data(elsewhere.folder / "data"), f"output_dir={elsewhere.output}"]
    said = end(elsewhere.start("loss.lam=0.1,-1,0.3", f"hydra/launcher={launcher}", *LAUNCHERS[launcher]))
    assert said.code == 1, said
    # Ray passes on what a job has said when it likes, behind the last line too.
    assert sum(line.startswith("error: 1 of 3 jobs failed") for line in said.err.splitlines()) == 1, said
    assert states(elsewhere.output) == ["finished", "failed", "finished"]
    assert set(elsewhere.built().values()) == {1}
    first, second = map(artifacts, run_folders(elsewhere.output))
    own = {label for label in first if first[label] != second[label]}
    assert "M2" in own
    assert all(label.startswith(("M2", "evaluation_M2")) for label in own)
    assert len(set(first.values()) | set(second.values())) == len(elsewhere.built())
    assert len(list(elsewhere.output.glob("sweeps/*/comparison.html"))) == 1


def test_interrupted_then_killed_sweep_goes_on_where_it_was(elsewhere: Elsewhere) -> None:
    sweep = "loss.lam=0.1,0.3,1"
    interrupted = elsewhere.start(sweep)
    elsewhere.wait_for("running", 2, interrupted)
    os.killpg(interrupted.pid, signal.SIGINT)
    said = end(interrupted)
    assert said.code == 130
    assert said.err.splitlines()[-1] == "interrupted; repeat the command to continue"
    assert "Traceback" not in said.err
    assert states(elsewhere.output) == ["finished", "interrupted", "waiting"]

    killed = elsewhere.start(sweep)
    elsewhere.wait_for("running", 3, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    end(killed)
    assert states(elsewhere.output) == ["finished", "finished", "running"]
    assert [job["there"] for job in jobs(elsewhere.output)] == [True, False, False]

    said = end(elsewhere.start(sweep))
    assert said.code == 0, said
    assert states(elsewhere.output) == ["finished"] * 3
    assert [job["there"] for job in jobs(elsewhere.output)] == [True, True, False]
    assert set(elsewhere.built().values()) == {1}
    assert len(list(elsewhere.output.glob("store/align/*/manifest.json"))) == 3


def test_sweep_killed_between_two_jobs_goes_on_with_the_second(elsewhere: Elsewhere) -> None:
    assert end(elsewhere.start("loss.lam=0.1,0.3", DIES_BEHIND="1")).code == -signal.SIGKILL
    assert states(elsewhere.output) == ["finished", "waiting"]
    said = end(elsewhere.start("loss.lam=0.1,0.3"))
    assert said.code == 0, said
    assert [(job["state"], job["there"]) for job in jobs(elsewhere.output)] == [("finished", True), ("finished", False)]
    assert set(elsewhere.built().values()) == {1}


def test_ctrl_c_ends_jobs_side_by_side_with_one_line(elsewhere: Elsewhere) -> None:
    needs("joblib_launcher")
    sweep = elsewhere.start("loss.lam=0.1,0.3,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    elsewhere.wait_for("running", 1, sweep)
    os.killpg(sweep.pid, signal.SIGINT)
    said = end(sweep)
    assert said.code == 130
    assert said.err.splitlines()[-1] == "interrupted; repeat the command to continue"
    assert "Traceback" not in said.err
    assert "interrupted" in states(elsewhere.output)
    assert not {"finished", "running"} & set(states(elsewhere.output))


def test_two_sweeps_at_once_make_what_both_need_once(elsewhere: Elsewhere) -> None:
    both = [elsewhere.start("loss.lam=0.1,0.3"), elsewhere.start("loss.lam=0.3,1")]
    assert [end(sweep).code for sweep in both] == [0, 0]
    assert set(elsewhere.built().values()) == {1}
    assert len(list(elsewhere.output.glob("store/align/*/manifest.json"))) == 3
    listed = [read_json(file) for file in elsewhere.output.glob("sweeps/*/jobs.json")]
    assert [len(jobs) for jobs in listed] == [2, 2]
    assert sum(job["there"] for jobs in listed for job in jobs) == 1, "the job of both, in the sweep that came later"


def test_search_goes_by_the_last_model_s_number_and_on_where_a_job_fails(elsewhere: Elsewhere) -> None:
    needs("optuna_sweeper")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_jobs=1"]
    search += ["hydra.sweeper.n_trials=3"]
    search += ["sweep_metric=rewards/margins", "loss.lam=choice(0.1,-1,1)"]
    said = end(elsewhere.start(*search))
    assert said.code == 1
    assert said.err.splitlines()[-1].startswith("error: 1 of 3 jobs failed"), said
    assert sorted(states(elsewhere.output)) == ["failed", "finished", "finished"]
    margins = [read_json(f / "summary.json")["models"][-1]["rewards/margins"] for f in run_folders(elsewhere.output)]
    (results,) = elsewhere.output.glob("sweeps/*/optimization_results.yaml")
    assert yaml.safe_load(results.read_text())["best_value"] == max(margins)


class Direction(Enum):
    """As Optuna's plugin spells it."""

    minimize = 1
    maximize = 2


@dataclass
class Searching:
    """What Optuna's sweeper is configured by, as its plugin has it."""

    _target_: str = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    direction: Any = Direction.minimize


@pytest.mark.parametrize(
    ("sweeper", "asked", "became"),
    [
        (Searching(), [], {"direction": "maximize"}),
        (Searching(direction="maximize"), ["hydra.sweeper.direction=maximize"], {"direction": "maximize"}),
        (Searching(direction="minimize"), ["hydra.sweeper.direction=minimize"], None),
        ({"optim": {"maximize": False}}, [], {"optim": {"maximize": True}}),
        ({"optim": {"maximize": False}}, ["hydra.sweeper.optim.maximize=false"], None),
        ({"ax_config": {"experiment": {"minimize": True}}}, [], {"ax_config": {"experiment": {"minimize": False}}}),
        ({"params": None}, [], {"params": None}),
    ],
)
def test_search_looks_for_the_highest_number_whatever_its_sweeper_does_by_itself(
    sweeper: Any, asked: list[str], became: dict[str, Any] | None
) -> None:
    """A comparison calls the job with the highest number the best; a search for the lowest would end at the worst."""
    hydra = OmegaConf.create({"sweeper": sweeper, "overrides": {"hydra": asked}})
    if became is None:
        with pytest.raises(SystemExit, match=r"error: hydra\.sweeper.*looks for the lowest number.*sweep_metric=-NAME"):
            search_upward(hydra)
    else:
        search_upward(hydra)
        found = OmegaConf.to_container(hydra.sweeper)
        assert {key: found[key] for key in became} == became


@pytest.mark.parametrize(
    ("params", "told", "refused"),
    [
        ({}, ["seed=1,2,3", "loss.lam=interval(0,1)"], True),
        ({"seed": "range(3)"}, ["loss.lam=interval(0,1)"], True),
        ({"loss.lam": "interval(0,1)"}, ["seed=3"], False),
        (None, ["loss.lam=interval(0,1)"], False),
    ],
)
def test_search_does_not_choose_the_seed(params: dict[str, str] | None, told: list[str], refused: bool) -> None:
    """Each of its jobs has one seed, so the highest number would be the luckiest's."""
    hydra = OmegaConf.create({"sweeper": {"params": params}, "overrides": {"task": told}})
    if refused:
        with pytest.raises(SystemExit, match=r"error: seed: .*luckiest.*seed=1,2,3"):
            refuse_search_over_seeds(hydra)
    else:
        refuse_search_over_seeds(hydra)


def test_checkpoint_that_cannot_be_written_fails_its_job_with_that_reason_and_the_others_go_on(
    elsewhere: Elsewhere,
) -> None:
    """Every job trains the same model; all its weights with their optimiser's state are too much, an adapter is not."""
    said = end(elsewhere.start("model.lora.rank=0,1", "seed=41,42", "data.count=2", file_size=700_000))
    assert said.code == 1
    assert "Traceback" not in said.out + said.err
    assert states(elsewhere.output) == ["failed", "failed", "finished", "finished"]
    for job in jobs(elsewhere.output)[:2]:
        place, _, reason = job["error"].partition(": ")
        assert Path(place).match("out/store/align/*/scratch/checkpoints/checkpoint-2")
        assert not Path(place).exists(), "what was half written is gone"
        assert reason == (
            "File too large; raise the limit on the size of a file (ulimit -f); what was finished is kept, the same "
            "command continues from it"
        )
    last = said.err.splitlines()[-1]
    assert last.startswith("error: 2 of 4 jobs failed; repeat the command to retry. job 1 (model.lora.rank=0 seed=41)")
    assert last.endswith(jobs(elsewhere.output)[0]["error"])
    assert "CheckpointException" in (run_folders(elsewhere.output)[0] / "run.log").read_text(encoding="utf-8")


# --- failures, and the same command again ------------------------------------------------------------------------


def test_failing_job_leaves_the_others_alone_and_is_the_only_one_tried_again(
    call: Callable[..., Said], tmp_path: Path
) -> None:
    overrides, output = [*GIVEN, "output_dir=out"], tmp_path / "out"
    there, late, other = (tmp_path / name for name in ("a.jsonl", "spät, aber da.jsonl", "b.jsonl"))
    write_pairs(there)
    write_pairs(other, chosen="Yes.")
    swept = f'data.path="{there}","{late}","{other}"'
    said = call("-m", *overrides, swept)
    assert said.code == 1
    last = said.err.splitlines()[-1]
    assert last.startswith("error: 1 of 3 jobs failed")
    assert str(late) in last
    assert "Traceback" not in said.err
    assert states(output) == ["finished", "failed", "finished"]
    assert [str(late) in job["error"] for job in jobs(output)] == [False, True, False]
    assert said.out.count("): running\n") == 3
    assert f'job 2 (data.path="{late}"): failed: data.path: ' in said.out
    failed = run_folders(output)[1]
    assert "Traceback" in (failed / "run.log").read_text()
    assert str(late) in (failed / "run.log").read_text()
    assert len(list(output.glob("sweeps/*/comparison.html"))) == 1

    write_pairs(late, chosen="Maybe.")
    before = written(output)
    del before[failed / "report.html"]  # It says why the run stopped, until it goes on.
    assert call("-m", *overrides, swept).code == 0
    assert states(output) == ["finished"] * 3
    assert [job["there"] for job in jobs(output)] == [True, False, True]
    after = written(output)
    assert after.items() > before.items()

    assert call("-m", *overrides, swept).code == 0
    assert [job["there"] for job in jobs(output)] == [True] * 3
    assert written(output) == after


def test_three_jobs_are_three_runs_of_wandb_though_the_middle_one_fails(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    paths = [tmp_path / name for name in ("a.jsonl", "broken.jsonl", "b.jsonl")]
    for path in (paths[0], paths[2]):
        write_pairs(path, chosen=f"Yes, {path.stem}.")
    paths[1].write_text("no JSON\n", encoding="utf-8")
    told = [*GIVEN, "output_dir=out", "tracker=wandb", "tracker.wandb.mode=offline"]
    said = call("-m", *told, f"data.path={','.join(map(str, paths))}")
    assert said.code == 1
    (sweep,) = tmp_path.glob("out/sweeps/*")
    assert (sweep / "comparison.html").exists()
    for folder, path in zip(run_folders(tmp_path / "out"), paths, strict=True):
        tracked = Read.of(folder)
        assert len(list(folder.glob("wandb/offline-run-*"))) == 1
        (run_record,) = tracked.of_type("run")
        assert (run_record["run_id"], run_record["run_group"]) == (tracked_id(folder), sweep.name)
        assert tracked.summary["config"]["data"]["path"] == str(path)
        failed = path == paths[1]
        assert (tracked.summary["state"], tracked.summary["exit_code"]) == (
            "failed" if failed else "finished",
            int(failed),
        )


def test_job_is_finished_when_all_that_was_asked_for_is_done(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that fails behind its report is tried again, and one that is asked for more does that."""
    told = ["-m", *GIVEN, write_pairs(tmp_path / "pairs.jsonl"), "output_dir=out"]
    with monkeypatch.context() as patch:

        def full(folder: Path) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(experiment_module, "write_card", full)
        assert call(*told).code == 1
        (folder,) = run_folders(tmp_path / "out")
        assert (folder / "report.html").exists()
        assert call(*told).code == 1
    assert call(*told).code == 0
    assert (folder / "model_card.md").exists()
    assert [(job["state"], job["there"]) for job in jobs(tmp_path / "out")] == [("finished", False)]
    before = written(tmp_path / "out")
    assert call(*told).code == 0
    assert [job["there"] for job in jobs(tmp_path / "out")] == [True]
    assert written(tmp_path / "out") == before

    published: list[Path] = []
    monkeypatch.setattr(experiment_module, "check_login", lambda: None)
    monkeypatch.setattr(experiment_module, "publish_run", lambda folder, *_, **__: published.append(folder) or [])
    more = [*told, "hub.push=true", "hub.repo_id=me/mine", "sweep_metric=-rewards/margins"]
    for _ in range(2):
        assert call(*more).code == 0
    assert [path.resolve() for path in published] == [folder]
    pages = [path.read_text() for path in tmp_path.glob("out/sweeps/*/comparison.html")]
    assert sum("</b> has the lowest " in page for page in pages) == 1


def test_run_that_goes_on_with_other_data_than_it_stopped_on_is_tracked_anew(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [*GIVEN, write_pairs(tmp_path / "pairs.jsonl"), "output_dir=out"]

    def broken(*arguments: Any, **inputs: Any) -> None:
        raise SelfalignError("not today")

    names: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("selfalign.stages.align.train", broken)
        for answer in ("One.", "One.", "Another.", "Another."):
            write_pairs(tmp_path / "pairs.jsonl", chosen=answer)
            assert call(*told).code == 1
            (folder,) = tmp_path.glob("out/smoke-*")
            names.append(tracked_id(folder))
    assert names[0] == names[1] != names[2] == names[3]
    assert call(*told).code == 0
    assert tracked_id(folder) == names[3]


def test_run_that_fails_on_other_data_shows_nothing_of_the_old(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [*GIVEN, write_pairs(tmp_path / "pairs.jsonl"), "output_dir=out"]
    assert call(*told).code == 0
    (folder,) = tmp_path.glob("out/smoke-*")
    (before,) = find_jobs([folder])
    name = tracked_id(folder)
    assert call(*told).code == 0
    assert (find_jobs([folder])[0].last, tracked_id(folder)) == (before.last, name)
    write_pairs(tmp_path / "pairs.jsonl", chosen="Another.")

    def broken(*arguments: Any, **inputs: Any) -> None:
        raise SelfalignError("not today")

    with monkeypatch.context() as patch:
        patch.setattr("selfalign.stages.align.train", broken)
        assert call(*told).code == 1
    (job,) = find_jobs([folder])
    assert (job.state, job.error, job.last) == ("failed", "not today", {})
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Stopped in M2, stage " in page
    assert "win rate" not in page.lower()
    assert tracked_id(folder) != name
    assert call(*told).code == 0
    assert find_jobs([folder])[0].last["rewards/margins"] != before.last["rewards/margins"]


def test_refused_jobs_with_quotes_leave_the_comparison_whole(call: Callable[..., Said], tmp_path: Path) -> None:
    told = [*GIVEN, write_pairs(tmp_path / "pairs.jsonl"), "output_dir=out", "loss=sr_dpo", "data.count=-1,2"]
    said = call("-m", *told, r"loss.refinement.prompt='It\'s you','Be: kind, @all'")
    assert said.code == 1
    assert "2 of 4 jobs failed" in said.err.splitlines()[-1]
    (page,) = tmp_path.glob("out/sweeps/*/comparison.html")
    assert "Be: kind, @all" in page.read_text()
    assert (page.parent / "job_2.log").stat().st_size > 0, "what a job says lies in its log"


def test_sweep_without_jobs_is_refused(call: Callable[..., Said], tmp_path: Path) -> None:
    said = call("-m", *GIVEN, write_pairs(tmp_path / "pairs.jsonl"), "output_dir=out", "seed=range(5,5)")
    assert said.code != 0
    assert not list(tmp_path.glob("out/sweeps/*/jobs.json"))


def test_job_is_listed_with_its_interpolations_as_they_were_given(call: Callable[..., Said], tmp_path: Path) -> None:
    told = [*GIVEN, write_pairs(tmp_path / "pairs.jsonl"), "output_dir=out", "loss.lam=0.1,0.3"]
    assert call("-m", *told, "hub.repo_id='me/lam-${loss.lam}-${hydra:job.num}'").code == 0
    assert all(
        "hub.repo_id='me/lam-${loss.lam}-${hydra:job.num}'" in job["overrides"] for job in jobs(tmp_path / "out")
    )
    settings = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in run_folders(tmp_path / "out")]
    assert [one["hub"]["repo_id"] for one in settings] == ["me/lam-0.1-0", "me/lam-0.3-1"]


def test_changed_data_is_not_taken_for_finished(call: Callable[..., Said], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    for chosen, there in (("Yes.", False), ("No!", False), ("Yes.", False), ("Yes.", True)):
        assert call("-m", *GIVEN, write_pairs(pairs, chosen=chosen), "output_dir=out").code == 0
        assert [job["there"] for job in jobs(tmp_path / "out")] == [there]


def test_job_is_the_same_alone_and_behind_one_that_leaves_a_mess(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*GIVEN, write_pairs(tmp_path / "pairs.jsonl")]
    alone = record_files(run(tmp_path / "alone", *overrides, "seed=2"))
    original = sweep_module.finish_experiment

    def messy(*arguments: Any) -> bool:
        there = original(*arguments)
        torch.set_default_dtype(torch.float64)
        os.environ["SELFALIGN_MESS"] = "1"
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if arguments[0].seed == 1:
            raise RuntimeError("oh no")
        return there

    monkeypatch.setattr(sweep_module, "finish_experiment", messy)
    said = call("-m", *overrides, f"output_dir={tmp_path / 'swept'}", "seed=1,2")
    assert states(tmp_path / "swept") == ["failed", "finished"]
    assert jobs(tmp_path / "swept")[0]["error"] == "RuntimeError: oh no"
    assert "RuntimeError: oh no" in said.err
    assert "Traceback" in said.err
    assert record_files(run_folders(tmp_path / "swept")[1]) == alone
    assert "SELFALIGN_MESS" not in os.environ


def test_what_a_job_changes_in_its_process_is_put_back() -> None:
    def state() -> list[Any]:
        numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return [*numbers, torch.get_default_dtype(), "SELFALIGN_MESS" in os.environ]

    with restore_global_state():
        before = state()
        torch.set_default_dtype(torch.float64)
        os.environ["SELFALIGN_MESS"] = "1"
    with restore_global_state():
        assert state() == before


def test_jobs_are_one_group_in_wandb_if_the_environment_names_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, groups = open_sweep(tmp_path / "study-12345678", ["seed=1"], ["seed=2"]), []

    def prepare() -> Any:
        groups.append(os.environ["WANDB_RUN_GROUP"])
        raise SelfalignError("that is enough")

    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    for number in (1, 2):
        run_job(sweep, number, [f"seed={number}"], prepare, str, searched=False)
        assert "WANDB_RUN_GROUP" not in os.environ
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    run_job(sweep, 2, ["seed=2"], prepare, str, searched=False)
    sweep.held.close()
    assert groups == ["study-12345678", "study-12345678", "mine"]


def test_settings_that_are_refused_fail_their_job_alone(call: Callable[..., Said], tmp_path: Path) -> None:
    said = call("-m", *GIVEN, write_pairs(tmp_path / "pairs.jsonl"), "data.count=-1,2,3", "output_dir=out")
    assert said.code == 1
    assert states(tmp_path / "out") == ["failed", "finished", "finished"]
    assert jobs(tmp_path / "out")[0]["error"] == "data.count must be 0 or more, got -1"
    assert jobs(tmp_path / "out")[0]["folder"] is None
    found = [read_json(f / "summary.json")["models"][-1]["pairs"] for f in run_folders(tmp_path / "out")]
    assert found == [2, 3]


def test_study_may_be_a_whole_sweep(call: Callable[..., Said], tmp_path: Path) -> None:
    pairs, conf = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "conf/experiment"
    conf.mkdir(parents=True)
    (conf / "losses.yaml").write_text(STUDY)
    for form in ([], ["-m"]):
        said = call(*form, "--config-dir", str(conf.parent), "experiment=losses", pairs, "output_dir=out")
        assert said.code == 0, said.err
        assert [job["overrides"][:2] for job in jobs(tmp_path / "out")] == [
            ["loss=dpo", "seed=1"],
            ["loss=ipo", "seed=1"],
        ]
        assert [job["there"] for job in jobs(tmp_path / "out")] == [bool(form)] * 2
    assert [read_json(f / "summary.json")["config"]["choices"]["loss"] for f in run_folders(tmp_path / "out")] == [
        "DPO",
        "IPO",
    ]


def test_command_line_takes_the_place_of_what_a_study_sweeps(call: Callable[..., Said], tmp_path: Path) -> None:
    pairs, conf = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "conf/experiment"
    conf.mkdir(parents=True)
    (conf / "losses.yaml").write_text(STUDY)
    said = call("--config-dir", str(conf.parent), "experiment=losses", pairs, "loss=sr_ipo", "output_dir=out")
    assert said.code == 0, said.err
    [job] = jobs(tmp_path / "out")
    assert [override for override in job["overrides"] if override.startswith(("loss", "seed"))] == [
        "seed=1",
        "loss=sr_ipo",
    ]


STUDY = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: pairs
  - override /tracker: none
  - override /evaluate: none
name: losses
iterations: 1
data:
  seed_data:
    demonstrations: ''
    ranked: ''
train:
  align:
    dtype: float32
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      loss: dpo,ipo
      seed: '1'
"""


# --- what the file of jobs says ----------------------------------------------------------------------------------


def open_sweep(folder: Path, *overrides: Sequence[str]) -> Sweep:
    sweep = Sweep(folder)
    sweep.open(overrides)
    return sweep


def test_same_sweep_waits_for_its_turn(tmp_path: Path) -> None:
    first = open_sweep(tmp_path, ["seed=1"])
    first.update_job(1, ["seed=1"], state=JobState.finished)
    second = Sweep(tmp_path)
    waiting = threading.Thread(target=lambda: (second.open([["seed=1"]]), second.held.close()))
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    assert first.jobs()[0].state is JobState.finished
    first.held.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert first.jobs()[0].state is JobState.finished, "until it is looked at"


def test_what_was_finished_stays_so_when_the_same_sweep_is_interrupted(tmp_path: Path) -> None:
    first = open_sweep(tmp_path, ["seed=1"], ["seed=2"], ["seed=3"])
    for number, state in enumerate((JobState.finished, JobState.failed, JobState.running), start=1):
        first.update_job(number, [f"seed={number}"], state=state, seconds=5.0, error="oh" * (state is JobState.failed))
    first.held.close()
    again = open_sweep(tmp_path, ["seed=1"], ["seed=2"], ["seed=3"])

    def interrupted() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(again, 1, ["seed=1"], interrupted, str, searched=False)
    again.interrupt()
    again.held.close()
    assert [(job.state.value, job.seconds, job.error) for job in again.jobs()] == [
        ("finished", 5.0, ""), ("waiting", None, ""), ("waiting", None, ""),
    ]  # fmt: skip
    other = open_sweep(tmp_path, ["seed=9"])
    other.held.close()
    assert [job.state for job in other.jobs()] == [JobState.waiting]


def test_job_whose_process_died_has_failed(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, ["seed=1"], ["seed=2"])
    sweep.update_job(1, ["seed=1"], state=JobState.running)
    with pytest.raises(SelfalignError, match=r"1 of 2 jobs failed.*job 1 \(seed=1\): its process was killed"):
        sweep.close()
    sweep.held.close()
    assert [job.state for job in sweep.jobs()] == [JobState.failed, JobState.waiting]


def test_jobs_of_a_search_are_added_as_they_come(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    assert sweep.jobs() == []
    for number in (2, 1):
        sweep.update_job(number, [f"loss.lam={number}"], state=JobState.running)
    assert [(job.number, job.overrides) for job in sweep.jobs()] == [(1, ["loss.lam=1"]), (2, ["loss.lam=2"])]
    sweep.held.close()


def test_job_is_told_by_what_sets_it_apart() -> None:
    both = [Job(number=n, overrides=["loss=ipo", f"seed={n}"]) for n in (1, 2)]
    assert varying_overrides(both[0], both) == "seed=1"
    assert varying_overrides(both[0], both[:1]) == "loss=ipo seed=1"


def test_time_left_of_a_sweep_is_the_median_of_its_finished_jobs_for_each_job_left() -> None:
    def job(number: int, state: JobState, took: float | None = None, *, there: bool = False) -> Job:
        return Job(number=number, overrides=[f"seed={number}"], state=state, seconds=took, there=there)

    finished = [job(1, JobState.finished, 1800.0), job(2, JobState.finished, 600.0), job(3, JobState.finished, 660.0)]
    others = [job(4, JobState.failed, 5.0), job(5, JobState.finished, 9000.0, there=True)]
    left = [job(6, JobState.running), job(7, JobState.waiting), job(8, JobState.waiting), job(9, JobState.waiting)]
    assert time_left([*finished, *others, *left], 1) == "about 44 min left, from the median of 3 finished jobs"
    assert time_left([*finished, *others, *left], 2) == "about 22 min left, from the median of 3 finished jobs"
    assert progress_text([*finished, *others, *left]).startswith("5 of 9 jobs ended, about 44 min left")
    assert time_left([*others, *left], 1) == ""
    assert time_left(finished, 1) == ""
    assert progress_text(finished) == "3 of 3 jobs ended"


def test_job_that_finishes_says_how_long_the_sweep_still_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = open_sweep(tmp_path, *([f"seed={number}"] for number in (1, 2, 3, 4, 5)))
    sweep.update_job(2, ["seed=2"], state=JobState.running)
    assert "left" not in capsys.readouterr().out
    sweep.update_job(1, ["seed=1"], state=JobState.finished, seconds=600.0)
    assert "sweep: about 20 min left, from the median of 1 finished job\n" in capsys.readouterr().out
    sweep.held.close()


def test_many_processes_may_tell_at_once(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, *([f"seed={n}"] for n in range(8)))
    telling = [
        threading.Thread(
            target=Sweep(tmp_path).update_job, args=(n + 1, [f"seed={n}"]), kwargs={"state": JobState.finished}
        )
        for n in range(8)
    ]
    for thread in telling:
        thread.start()
    for thread in telling:
        thread.join()
    assert {job.state for job in sweep.jobs()} == {JobState.finished}
    sweep.held.close()


MUTANTS = [
    ("        torch.set_default_dtype(dtype)\n", "", test_what_a_job_changes_in_its_process_is_put_back),
    ("        random.setstate(python)\n", "", test_what_a_job_changes_in_its_process_is_put_back),
    ("        np.random.set_state(numpy)\n", "", test_what_a_job_changes_in_its_process_is_put_back),
    ("        torch.set_rng_state(pytorch)\n", "", test_what_a_job_changes_in_its_process_is_put_back),
    ("        os.environ.clear()\n", "", test_what_a_job_changes_in_its_process_is_put_back),
    ('self.folder / ".lock"', 'self.folder / f".lock{id(self)}"', test_same_sweep_waits_for_its_turn),
    ("        if failed:\n", "        if len(failed) == len(jobs):\n", test_job_whose_process_died_has_failed),
    (
        '        self._settle(JobState.failed, error="its process was killed")\n',
        "",
        test_job_whose_process_died_has_failed,
    ),
    ("for index in sorted(known)", "for index in known", test_jobs_of_a_search_are_added_as_they_come),
    (" if others else set()", " if others else set(job.overrides)", test_job_is_told_by_what_sets_it_apart),
]


@pytest.fixture
def cleaned_up() -> Iterator[None]:
    """Puts back what a mutant leaves behind in this process."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    os.environ.pop("SELFALIGN_MESS", None)


@pytest.mark.usefixtures("cleaned_up")
@pytest.mark.parametrize(("old", "new", "check"), MUTANTS)
def test_broken_account_of_a_sweep_is_noticed(old: str, new: str, check: Check, given: dict[str, Any]) -> None:
    assert_caught(home_of(old, sweep_module, sweep_jobs), sys.modules[__name__], old, new, check, given)


# --- sweeps that compose -----------------------------------------------------------------------------------------

SWEEPS: Mapping[str, tuple[list[str], int]] = {
    "λ": (["loss=sr_dpo", "loss.lam=0.1,0.3,0.5,1"], 4),
    "losses": (["loss=dpo,ipo,sr_dpo,sr_ipo,odpo"], 5),
    "losses over β": (["loss=dpo,ipo", "loss.beta=0.05,0.1"], 4),
    "sources of Δ": (["loss=sr_dpo", "loss.refinement.source=prompted,naive,shuffled,random_prompt"], 4),
    "judges": (["judge=expected_score,expected_score_justified,additive,multiple_choice"], 4),
    "who judges": (["judge.model=self,sft,base"], 3),
    "iterations": (["iterations=range(1,4)"], 3),
    "models": (["model=tiny,smollm2_135m"], 2),
    "models by path": (["model=pretrained", 'model.path="/models/ä b","owner/name"'], 2),
    "training pairs, self": (["data.instruct.count=50,100", "data.respond.candidates=2,4"], 4),
    "training pairs, given": (["data=pairs", "data.path=p.jsonl", "iterations=1", "data.count=1000,5000,0"], 3),
    "pair rules": (["pair=best_worst,random,all_ordered,best_vs_k"], 4),
    "references": (["train.reference_policy=previous,sft,base"], 3),
    "seeds": (["seed=range(5)"], 5),
}


@pytest.mark.parametrize("case", SWEEPS)
def test_sweep_composes(case: str) -> None:
    overrides, count = SWEEPS[case]
    parsed = OverridesParser.create().parse_overrides(["experiment=smoke", *overrides])
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    configs = [composed(*job)[2] for job in batch]
    assert len(configs) == count
    assert len({str(config) for config in configs}) == count


def test_wandb_s_agent_runs_selfalign_with_overrides() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "conf/wandb_sweep.yaml").read_text(encoding="utf-8"))
    assert sweep["method"] == "grid"
    assert sweep["metric"]["name"] == composed("experiment=smoke")[0].sweep_metric
    values = {name: given.get("values", [given.get("value")]) for name, given in sweep["parameters"].items()}
    assert values["loss.lam"] == [0.1, 0.3, 0.5, 1]
    told = create_sweep_command_args({"args": {name: {"value": of[-1]} for name, of in values.items()}})
    command: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        command += told[word[2:-1]] if word == "${args_no_hyphens}" else [word]
    assert command[:2] == ["${env}", "selfalign"]
    config, _, plain = composed(*command[2:])
    assert (config.name, plain["loss"]["lam"], plain["tracker"]["wandb"]["mode"]) == ("demo", 1.0, "online")
