"""`selfalign-store` on real runs: what it lists, explains and removes, and what it says to those who err."""

import builtins
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from builders import ROOT, TINY_RUN, run, write_tiny_data

from selfalign.cli.store import main
from selfalign.core.files import read_json
from selfalign.store import inventory
from selfalign.store.artifacts import Store


class Said(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Said]


@dataclass(frozen=True)
class Study:
    """Three LoRA runs: one, one with another λ, one with another learning rate of SFT."""

    output: Path
    overrides: tuple[str, ...]
    base: Path
    lam: Path
    rate: Path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    quick = ("iterations=1", "evaluate=none", "data.instruct.source=shipped:evaluation", "train.sft.epochs=1")
    overrides = (*TINY_RUN, *write_tiny_data(root / "data"), "model.lora.rank=2", *quick)

    def made(*changes: str) -> Path:
        return run(root / "outputs", *overrides, *changes)

    return Study(
        root / "outputs", overrides, made(), made("loss.lam=0.9", "name=lam"), made("train.sft.learning_rate=0.02")
    )


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """The command line, called in this process from an empty folder, with no terminal to ask at."""
    monkeypatch.chdir(tmp_path)

    def said(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["selfalign-store", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Said(int(stop.value.code or 0), *capsys.readouterr())

    return said


def stages_of(folder: Path) -> dict[str, str]:
    """{label: key} of a finished run."""
    return {stage["label"]: stage["key"] for stage in read_json(folder / "summary.json")["stages"]}


def files_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# --- list --------------------------------------------------------------------------------------------------------


def test_list_shows_every_artifact_with_its_runs_largest_first(study: Study, call: Call) -> None:
    said = call("list", "--output", study.output)
    assert (said.code, said.err) == (0, "")
    listed, totals, remarks = said.out.split("\n\n")
    rows = {line.split()[1]: line for line in listed.splitlines()[2:]}
    runs = [study.base, study.lam, study.rate]
    keys = {key: label for folder in runs for label, key in stages_of(folder).items()}
    assert rows.keys() == keys.keys()
    for key, row in rows.items():
        assert keys[key] in row
        users = {folder.name for folder in runs if key in stages_of(folder).values()}
        assert {name for name in re.findall(r"(?:tiny|lam)-\w{8}", row)} == set(sorted(users)[:2])
        assert ("and 1 more" in row) is (len(users) == 3)
    sizes = [files_of(next(study.output.glob(f"store/*/{key}"))) for key in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert keys[next(iter(rows))] == "M0"
    made = dict(line.split(maxsplit=1) for line in totals.splitlines()[2:])
    assert made["align"].startswith("3 ")
    assert made["all"].startswith(f"{len(rows)} ")
    assert remarks.strip() == "all artifacts are used"


def test_list_needs_no_torch_and_ends_quietly_in_front_of_head(study: Study) -> None:
    code = "import sys; from selfalign.cli.store import main; sys.argv = ['x', 'list', '--output', sys.argv[1]]\n"
    code += "try: main()\nexcept SystemExit: assert not {'torch', 'numpy', 'hydra'} & sys.modules.keys()"
    command = [sys.executable, "-c", code, str(study.output)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (said.returncode, said.stderr) == (0, "")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as listing:
        assert listing.stdout is not None
        listing.stdout.close()
        assert listing.stderr is not None
        assert listing.stderr.read() == b""
    assert listing.returncode == 141


def test_no_store_is_one_line_and_leaves_nothing(call: Call, tmp_path: Path) -> None:
    for arguments in (["list"], ["clean"], ["clean", "--yes"], ["why", "a", "b"]):
        said = call(*arguments)
        assert (said.code, said.out) == (1, "")
        assert re.fullmatch(r"error: .*outputs.*\n", said.err)
    assert list(tmp_path.iterdir()) == []


def test_bad_usage_is_refused(call: Call) -> None:
    for arguments in ([], ["remove"], ["why", "a"], ["list", "--yes"]):
        assert call(*arguments).code == 2


# --- why ---------------------------------------------------------------------------------------------------------


def test_why_names_the_setting_and_the_stages_that_follow(study: Study, call: Call) -> None:
    said = call("why", study.base, study.lam.name, "--output", study.output)
    assert (said.code, said.err) == (0, "")
    first, setting, follow, same = said.out.splitlines()
    ours, theirs = stages_of(study.base), stages_of(study.lam)
    assert first == f"M2 is the first stage that differs: align/{ours['M2']} and align/{theirs['M2']}"
    assert re.fullmatch(r"  loss\.lam: 0\.\d+ → 0\.9", setting)
    assert follow.split(": ")[1].split(", ") == [n for n in ours if n.startswith("evaluation_M2/")]
    assert same.removeprefix("the same: ").split(", ") == [n for n in ours if ours[n] == theirs[n]]


def test_why_leads_back_to_the_stage_that_made_a_differing_input(study: Study, call: Call) -> None:
    said = call("why", study.base, study.rate)
    first, setting, follow, *_ = said.out.splitlines()
    assert first.startswith("M1 is the first stage that differs: sft/")
    assert setting == "  optimization.learning_rate: 0.01 → 0.02"
    assert "M2" in follow.split(": ")[1].split(", ")
    assert "differs in itself" not in said.out
    said = call("why", study.base, study.rate, "iteration_1/judgements")
    assert said.out.splitlines()[:2] == [first, setting]
    assert said.out.splitlines()[2:] == ["differ as a result: iteration_1/responses, iteration_1/judgements"]


def test_why_says_so_when_all_is_the_same(study: Study, call: Call) -> None:
    said = call("why", study.base, study.base)
    assert re.fullmatch(r"all the same: .*M2.*\n", said.out)
    assert call("why", study.base, study.lam, "M1").out == "all the same: M1\n"


def test_why_refuses_what_it_does_not_know(study: Study, call: Call) -> None:
    for arguments, words in (
        (["why", study.base, "no-such-run"], "'no-such-run' is neither a run folder nor the name of a run in"),
        (["why", study.base, study.lam, "M9"], "neither run has a stage M9; they have seeds, "),
        (["why", study.base, study.output / "store"], "store' is neither a run folder"),
    ):
        said = call(*arguments, "--output", study.output)
        assert (said.code, said.out) == (1, "")
        assert said.err.startswith("error: ")
        assert words in said.err
        assert said.err.count("\n") == 1


# --- clean -------------------------------------------------------------------------------------------------------


@pytest.fixture
def left(study: Study, tmp_path: Path) -> Path:
    """A copy of the output folder with its own bases, after one run was deleted and another lost its link to M0."""
    output = tmp_path / "outputs"
    shutil.copytree(study.output, output, symlinks=True)
    for link in (output / "store").glob("*/*/weights"):
        if link.is_symlink():
            target = output / link.resolve().relative_to(study.output)
            link.unlink()
            link.symlink_to(target)
    shutil.rmtree(output / study.lam.name)
    for folder in (study.base, study.rate):
        (output / folder.name / "artifacts" / "M0").unlink()
    return output


def test_clean_removes_what_only_a_deleted_run_used(
    study: Study, left: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = set(stages_of(study.lam).values()) - set(stages_of(study.base).values())
    before = {path.name for path in left.glob("store/*/*") if path.is_dir()}
    said = call("list")
    assert re.search(r" M0 *$|linked from (sft|align)/\w{20}", said.out, re.MULTILINE)
    assert f"used by no run: {len(gone)} artifacts, " in said.out
    said = call("clean", "--yes")
    assert (said.code, said.err) == (0, "")
    assert f"removed: {len(gone)} artifacts" in said.out
    assert {path.name for path in left.glob("store/*/*") if path.is_dir()} == before - gone
    assert call("clean").out == "all artifacts are used; there is nothing to remove\n"
    monkeypatch.setattr(Store, "_build", lambda *_: pytest.fail("something had to be made again"))
    run(left, *study.overrides)
    run(left, *study.overrides, "train.sft.learning_rate=0.02")


def test_clean_without_a_terminal_removes_nothing_unless_told_to(left: Path, call: Call) -> None:
    before = sorted(left.rglob("*"))
    said = call("clean")
    assert said.code == 1
    assert "used by no run: " in said.out
    assert re.fullmatch(r"error: .*--yes.*\n", said.err)
    assert sorted(left.rglob("*")) == before


@pytest.mark.parametrize("answer", ["", "n", "no", "yess", None, "y", " YES "])
def test_clean_asks_at_a_terminal(left: Path, call: Call, monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
    before = sorted(left.rglob("*"))

    def reply(question: str) -> str:
        assert question.endswith("[y/N] ")
        assert sorted(left.rglob("*")) == before
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "input", reply)
    said = call("clean")
    agreed = answer in ("y", " YES ")
    assert said.code == (0 if agreed else 1)
    assert ("nothing was removed" in said.out) is not agreed
    assert (len(list(left.glob("store/align/*/"))) == 2) is agreed


def test_interrupted_question_removes_nothing(left: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(question: str) -> str:
        raise KeyboardInterrupt

    before = sorted(left.rglob("*"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "input", interrupt)
    said = call("clean")
    assert said.code == 130
    assert "Traceback" not in said.err
    assert sorted(left.rglob("*")) == before


def test_clean_asks_at_a_real_terminal(left: Path) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n")
    code = "from selfalign.cli.store import main; main()"
    command = [sys.executable, "-c", code, "clean", "--output", str(left)]
    said = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    os.close(ours)
    os.close(theirs)
    assert said.returncode == 0, said.stderr
    assert "Remove them? [y/N] " in said.stdout
    assert len(list(left.glob("store/align/*/"))) == 2


def test_what_is_in_use_by_then_is_said_to_be_left(left: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_lock_now", lambda stack, path: False)
    said = call("clean", "--yes")
    assert said.code == 0
    assert "removed: 0 artifacts, 0 locks" in said.out
    assert "a process now uses them: " in said.out
    assert len(list(left.glob("store/align/*/"))) == 3
