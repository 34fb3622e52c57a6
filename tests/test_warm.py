"""A fork stands for a command: what a process has when it starts, how it ends, and where it is started anew instead."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, CompletedProcess, TimeoutExpired
from typing import Any

import pytest
import warm
from builders import ROOT

TELLS = """
import json, os, random, sys
told = {
    "argv": sys.argv, "cwd": os.getcwd(), "main": __name__, "path": sys.path[:2], "variables": dict(os.environ),
    "leads": os.getsid(0) == os.getpid(), "parent": os.getppid(), "torch": "torch" in sys.modules,
    "input": sys.stdin.read(), "draw": random.random(), "mark": getattr(sys, "mark", ""), "pid": os.getpid(),
}
print("error", file=sys.stderr)
print(json.dumps(told))
"""


@pytest.fixture(autouse=True)
def _with_forks() -> None:
    if not warm.forks():
        pytest.skip("no forks here: not Linux, or other threads are there behind the imports")


def told_by(arguments: list[str], **options: Any) -> dict[str, Any]:
    options = {"env": warm.STARTED_WITH} | options
    done = warm.run([sys.executable, *arguments], check=True, capture_output=True, text=True, stdin=PIPE, **options)
    assert done.stderr.endswith("error\n")
    return json.loads(done.stdout.splitlines()[-1])


def test_fork_has_arguments_folder_environment_path_streams_and_session(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.mark = 'here'")
    known = {**warm.STARTED_WITH, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "BUILDS": "b"}
    first, second = (
        told_by(["-c", TELLS, "a", "b c"], cwd=tmp_path, env=known, start_new_session=True) for _ in range(2)
    )
    assert first["torch"], "it is a fork"
    assert first["parent"] == warm.PROCESSES[0].pid
    assert (first["argv"], first["main"], first["input"]) == (["-c", "a", "b c"], "__main__", "")
    assert Path(first["cwd"]) == tmp_path
    assert first["path"] == ["", str(tmp_path)]
    assert first["variables"] == known
    assert first["leads"]
    assert first["mark"] == "here"
    assert first["draw"] != second["draw"]
    assert first["pid"] != second["pid"]


def test_module_and_file_are_run_as_python_runs_them(tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text(TELLS)
    module = told_by(["-m", "telling", "x"], cwd=tmp_path)
    file = told_by([str(tmp_path / "telling.py"), "x"])
    assert module["torch"]
    assert file["torch"]
    assert module["path"][0] == file["path"][0] == str(tmp_path)
    assert module["argv"] == file["argv"] == [str(tmp_path / "telling.py"), "x"]


@pytest.mark.parametrize(
    ("program", "code", "err"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'late')", 0, "late"),
    ],
)
def test_fork_ends_as_a_process_ends(program: str, code: int, err: str) -> None:
    done: CompletedProcess[str] = warm.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.endswith(err)
    assert bool(done.stderr) == bool(err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_fork_is_ended_by_its_pid(number: signal.Signals) -> None:
    program = (
        "import signal, time; signal.signal(2, signal.default_int_handler); print('on', flush=True); time.sleep(60)"
    )
    with warm.Command([sys.executable, "-c", program], stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "on\n"
        assert process.poll() is None
        with pytest.raises(TimeoutExpired):
            process.wait(0.01)
        os.kill(process.pid, number)
        assert process.wait(30) == -number


@pytest.mark.parametrize(
    ("options", "variables"), [([], {"OMP_NUM_THREADS": "3"}), ([], {"HF_HUB_OFFLINE": "0"}), (["-I"], {})]
)
def test_command_that_imports_otherwise_is_started_anew(options: list[str], variables: dict[str, str]) -> None:
    told = told_by([*options, "-c", TELLS], env={**warm.STARTED_WITH, **variables})
    assert not told["torch"]
    assert told["parent"] == os.getpid()


def test_interpreter_for_other_programs_passes_its_fork_s_end_on() -> None:
    known = {**warm.STARTED_WITH, **warm.interpreter()}
    for program, code in (
        ("import os, sys; sys.exit('torch' in sys.modules)", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ):
        done = subprocess.run([known["PYTHON_EXEC"], "-u", "-c", program], env=known, check=False)
        assert done.returncode == code
    with subprocess.Popen(
        [known["PYTHON_EXEC"], "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
        env=known, stdout=PIPE, text=True,
    ) as stand_in:  # fmt: skip
        assert stand_in.stdout
        fork = os.pidfd_open(int(stand_in.stdout.readline()))
        stand_in.kill()
        assert select.select([fork], [], [], 30)[0], "the fork ends with it"
        os.close(fork)
