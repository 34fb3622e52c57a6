"""The report of a run while it goes, and who follows it from another process."""

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from builders import TINY_RUN, composed, planned, run, write_tiny_data

from selfalign.cli import report as command
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.launch import live as live_module
from selfalign.launch.live import FINISHED, LiveReport
from selfalign.report import watch as watch_module
from selfalign.report.watch import watch
from selfalign.runs.ledger import Ledger
from selfalign.runs.progress import PROGRESS, Progress, is_held, read_progress
from selfalign.runs.reader import Finished
from selfalign.runs.summary import models_of
from selfalign.store.artifacts import locked

RELOADS = '<meta http-equiv="refresh"'


@dataclass(frozen=True)
class Live:
    """A finished tiny run of one iteration, with each page that it wrote on its way."""

    folder: Path
    pages: list[str]
    overrides: tuple[str, ...]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    root, pages = tmp_path_factory.mktemp("live"), list[str]()
    overrides = (*TINY_RUN, *write_tiny_data(root / "data"), "iterations=1", "tracker=none")
    original = live_module.write_report

    def write(folder: Path) -> None:
        original(folder)
        pages.append((folder / "report.html").read_text(encoding="utf-8"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_module, "SHARE", float("inf"))
        patch.setattr(live_module, "write_report", write)
        folder = run(root / "outputs", *overrides)
    return Live(folder, pages, overrides)


def stopped_at(live: Live, count: int, folder: Path, error: str = "") -> Path:
    """The folder of the run as it was after so many stages."""
    copytree(live.folder, folder, symlinks=True)
    summary, stages = read_json(folder / "summary.json"), read_json(folder / "summary.json")["stages"]
    names = [stage["label"] for stage in stages[:count]]
    models = [row for row in summary["models"] if row["model"] in names]
    so_far = {**summary, "stages": stages[:count], "models": models, "drops": {}}
    label = stages[count]["label"]
    Progress(label=label, number=count + 1, total=len(stages), error=error, summary=so_far).write(folder)
    for path in (folder / "artifacts").rglob("*"):
        if path.is_symlink():
            real = (live.folder / path.relative_to(folder)).resolve()
            path.unlink()
            if path.relative_to(folder / "artifacts").as_posix() in names:
                path.symlink_to(real)
    for name in ("summary.json", "provenance.json", "report.html", FINISHED):
        (folder / name).unlink()
    return folder


# --- a run -------------------------------------------------------------------------------------------------------


def test_every_stage_begins_with_a_page_that_says_where_the_run_is(live: Live) -> None:
    stages = planned(composed(*live.overrides)[0])
    said = [re.findall(r"<b>Running: (.+?)\.</b>", page) for page in live.pages]
    expected = [f"{label}, stage {number} of {len(stages)}" for number, label in enumerate(stages, start=1)]
    assert said == [["checks before the first stage"], *([one] for one in expected)]
    assert all(RELOADS in page for page in live.pages)


def test_page_grows_with_what_is_made(live: Live) -> None:
    stages = planned(composed(*live.overrides)[0])
    before = dict(zip(stages, live.pages[1:], strict=True))
    assert "SFT loss" not in before["M1"]
    assert "SFT loss" in before["evaluation_M1/answers"]
    assert '<section id="candidates">' not in before["iteration_1/responses"]
    assert '<section id="candidates">' in before["iteration_1/judgements"]
    assert "Alignment loss" in before["evaluation_M2/answers"]
    assert "serves as M1" not in "".join(live.pages)  # Said of a finished run whose M1 is M0.


def test_finished_run_has_a_page_that_says_nothing_of_progress(live: Live) -> None:
    page = (live.folder / "report.html").read_text(encoding="utf-8")
    assert RELOADS not in page
    assert "Running" not in page
    assert not (live.folder / PROGRESS).exists()
    assert (live.folder / FINISHED).exists()


def test_run_that_fails_says_so_on_its_page_and_goes_on_later(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*live.overrides, "seed=9"]

    def broken(*arguments: Any, **inputs: Any) -> None:
        raise SelfalignError("not today")

    output = live.folder.parent
    before = set(output.glob("tiny-*"))
    with monkeypatch.context() as patch:
        patch.setattr("selfalign.stages.sft.train", broken)
        with pytest.raises(SelfalignError, match="not today"):
            run(output, *overrides)
    (folder,) = set(output.glob("tiny-*")) - before
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<b>Stopped in M1, stage " in page
    assert "not today. The same command continues the run." in page
    assert RELOADS not in page
    said: list[str] = []
    assert watch(folder, said.append) == folder / "report.html"
    assert len(said) == 1
    assert re.fullmatch(r"stopped in M1, stage \d+ of \d+: not today", said[0])


def report_of(folder: Path, **changes: Any) -> LiveReport:
    """The live report of a run folder made by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "metrics.jsonl").write_text("")
    described = {
        "name": "x",
        "seed": 1,
        "loss": {"title": "DPO", "formula": "f"},
        "config": {"choices": {"loss": "DPO"}},
    }
    return LiveReport(folder, described, models_of, **changes)


def test_page_is_written_again_only_if_that_is_a_small_share_of_the_time_since(tmp_path: Path) -> None:
    ledger, folder = Ledger(tmp_path / "run"), tmp_path / "run"
    with report_of(folder) as live:
        live.cost = 0.0
        live.begin(ledger, Progress(label="M1", number=3))
        assert "Stopped in M1, stage 3" in (folder / "report.html").read_text()  # No process holds the folder.
        live.cost = 1000.0
        live.begin(ledger, Progress(label="M2", number=9))
        assert "Stopped in M1, stage 3" in (folder / "report.html").read_text()
        assert read_json(folder / PROGRESS)["label"] == "M2"
        live.written = time.monotonic() - 1.01 * live.cost / live_module.SHARE
        live.begin(ledger, Progress(label="M3", number=15))
        assert "Stopped in M3, stage 15" in (folder / "report.html").read_text()


def test_page_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger, live = Ledger(tmp_path / "run"), report_of(tmp_path / "run")
    (tmp_path / "run/config.yaml").unlink()
    with caplog.at_level(logging.WARNING), live:
        for number in (1, 2, 3):
            live.begin(ledger, Progress(label=f"M{number}", number=number))
    (record,) = caplog.records
    assert record.getMessage().startswith("the report is not written before the run ends: ")
    assert "config.yaml" in record.getMessage()


def test_finished_run_keeps_its_page_until_something_is_made_again(live: Live, tmp_path: Path) -> None:
    folder = copytree(live.folder, tmp_path / "run", symlinks=True)
    before = (folder / "report.html").read_bytes()
    with pytest.raises(SelfalignError), report_of(folder):
        raise SelfalignError("the data are gone")
    assert (folder / "report.html").read_bytes() == before
    assert not (folder / PROGRESS).exists()
    assert (folder / FINISHED).exists()
    with report_of(folder) as again:
        again.begin(Ledger(folder), Progress(label="M1", number=1))
        assert not (folder / FINISHED).exists()
        assert (folder / PROGRESS).exists()


# --- who follows -------------------------------------------------------------------------------------------------


def test_every_stop_of_a_run_has_a_page(live: Live, tmp_path: Path) -> None:
    """Of a process that was killed, which left no message, and whose last row is half written."""
    for count in (0, 3, 8, 13):
        folder = stopped_at(live, count, live.folder.parent / f"stopped-{count}")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"label": "M')
        assert command.report([folder]) == folder / "report.html"
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert f", stage {count + 1} of " in page
        assert "its process has ended without a message" in page


def test_followed_run_is_said_stage_by_stage_until_it_ends(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch_module, "SECONDS", 0.05)
    folder = stopped_at(live, 3, live.folder.parent / "followed")
    halfway = read_progress(folder)
    assert halfway is not None
    (folder / PROGRESS).unlink()
    holding, pages = threading.Event(), list[str]()

    def page_says(text: str) -> None:
        until = time.monotonic() + 60
        while text not in (pages[-1] if pages else "") and time.monotonic() < until:
            if (folder / "report.html").exists():
                pages.append((folder / "report.html").read_text(encoding="utf-8"))
            time.sleep(0.02)

    def work() -> None:
        with locked(folder / ".lock", "held"):
            holding.set()
            time.sleep(0.3)  # Starting: there is no progress yet.
            halfway.write(folder)
            page_says("Running: M1, stage 4 of ")
            for name in ("summary.json", "provenance.json"):
                (folder / name).write_bytes((live.folder / name).read_bytes())
            for link in (path for path in (live.folder / "artifacts").rglob("*") if path.is_symlink()):
                own = folder / link.relative_to(live.folder)
                own.parent.mkdir(parents=True, exist_ok=True)
                own.is_symlink() or own.symlink_to(link.resolve())
            (folder / PROGRESS).unlink()

    worker = threading.Thread(target=work)
    worker.start()
    assert holding.wait(30)
    monkeypatch.setattr(sys, "argv", ["selfalign-report", "--watch", str(folder)])
    command.main()
    worker.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "starting"
    assert lines[1].startswith("M1, stage 4 of ")
    assert lines[-2:] == ["finished", f"report    {folder / 'report.html'}"]
    assert any(RELOADS in page for page in pages)
    assert RELOADS not in (folder / "report.html").read_text(encoding="utf-8")


def test_step_of_the_training_that_goes_on_is_said_with_its_loss(tmp_path: Path) -> None:
    row = {"step": 9, "label": "M2", "stage": "align", "align/step": 4, "loss": 0.51234, "rewards/margins": 0.2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 10, "lab')
    assert watch_module.step_text(tmp_path, "M2") == "step 4, loss 0.512, margin 0.2"
    assert watch_module.step_text(tmp_path, "evaluation_M2/answers") == ""


def test_sweep_is_followed_with_the_stages_of_its_running_jobs(
    live: Live, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(watch_module, "SECONDS", 0.05)
    going = stopped_at(live, 3, live.folder.parent / "going")
    sweep = tmp_path / "sweep"
    sweep.mkdir()

    def job(number: int, state: str, folder: Path | None, seconds: float | None) -> dict[str, Any]:
        place = os.path.relpath(folder, sweep) if folder else None
        told = ["experiment=smoke", f"seed={number}"]
        entry = {"number": number, "overrides": told, "state": state, "folder": place}
        return {**entry, "there": False, "seconds": seconds, "error": ""}

    write_json(sweep / "jobs.json", [job(1, "finished", live.folder, 600), job(2, "running", going, None),
                                     job(3, "waiting", None, None)])  # fmt: skip
    said: list[str] = []
    with locked(sweep / ".lock", "held"):
        assert is_held(sweep)

        def stop(text: str) -> None:
            said.append(text)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            watch(sweep, stop)
        assert RELOADS in (sweep / "comparison.html").read_text(encoding="utf-8")
    assert said[0].startswith(
        "1 of 3 jobs ended, about 20 min left, from the median of 1 finished job · job 2: M1, stage "
    )
    assert not is_held(sweep)
    assert watch(sweep, said.append) == sweep / "comparison.html"
    assert RELOADS not in (sweep / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_folder_without_a_run_is_not_followed(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(SelfalignError, match="x: not a run folder"):
        watch(tmp_path / "x", lambda text: None)


def test_one_thing_is_followed(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match="--watch follows one run or sweep"):
        command.follow([tmp_path, tmp_path])


def test_damaged_progress_names_its_file(tmp_path: Path) -> None:
    (tmp_path / PROGRESS).write_text("{")
    with pytest.raises(SelfalignError, match=r"progress\.json is damaged"):
        Finished.load(tmp_path)
