"""Commands in forks of a process that has their imports behind it, which are most of what a tiny run takes.

`Command` and `run` are `subprocess.Popen` and `subprocess.run`. A fork has the command's arguments, folder,
environment, streams, session, path and sitecustomize; it is killed by its pid, and ends as a process ends. A command
is started in the ordinary way where a fork would be another thing: with another interpreter, or with other values of
variables that are read at import. Tests of how a command starts use `subprocess` itself.

This file is also the process that forks, `python tests/warm.py SOCKET`, and an interpreter for programs that start
others, as torchrun does: the file that `interpreter` returns takes Python's arguments.
"""

import atexit
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
STARTED_WITH = dict(os.environ)
"""What commands have unless a test changes it; the process that forks has it too."""

LATE = {
    *("PYTHONPATH", "PWD", "PYTEST_CURRENT_TEST", "HYDRA_FULL_ERROR", "PYTHON_EXEC", "WARM"),
    *("BUILDS", "TORCHINDUCTOR_CACHE_DIR", "DIES_BEHIND", "DIES_IN", "FILE_SIZE", "WANDB_SERVICE"),
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
}
"""Variables that nothing reads at import."""
ANYWAY = {
    *("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"),
    "PYTHONWARNINGS",
}
"""Variables that a command sets where they are not set, as the process that forks has done."""
LATE_PREFIXES = ("TORCHELASTIC_", "TORCH_NCCL_", "ACCELERATE_")

IMPORTED = (
    *("selfalign.cli.main", "selfalign.cli.evaluate", "selfalign.config.hydra", "selfalign.launch.experiment"),
    *("selfalign.launch.dry_run", "selfalign.launch.evaluate", "selfalign.launch.hydra_sweep"),
    *("selfalign.training.trainer", "transformers.models.llama.modeling_llama", "peft", "matplotlib.figure"),
    *("matplotlib.backends.backend_svg", "torch.distributed.elastic.agent.server.local_elastic_agent"),
)


class Command(subprocess.Popen[Any]):
    """`subprocess.Popen`, of a fork where that is the same."""

    _fork: socket.socket | None = None

    def _execute_child(self, *given: Any) -> None:
        start: Any = super()._execute_child  # pyright: ignore[reportAttributeAccessIssue]
        told = inspect.signature(start).bind(*given).arguments
        streams = [
            0 if told["p2cread"] == -1 else told["p2cread"],
            1 if told["c2pwrite"] == -1 else told["c2pwrite"],
            2 if told["errwrite"] == -1 else told["errwrite"],
        ]
        environment = dict(os.environ if told["env"] is None else told["env"])
        words = list(map(str, told["args"]))
        asked = None
        if told["preexec_fn"] is None:
            asked = ask(words, told["cwd"], environment, streams, session=told["start_new_session"])
        if asked is None:
            return start(*given)
        self._fork, self.pid = asked
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(told[end] for end in ends))  # pyright: ignore[reportAttributeAccessIssue]
        return None

    def _internal_poll(self, *given: Any, **options: Any) -> int | None:
        if self._fork is None:
            return super()._internal_poll(*given, **options)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return self._wait(0)
        except subprocess.TimeoutExpired:
            return None

    def _wait(self, timeout: float | None) -> int:
        if self._fork is None:
            return super()._wait(timeout)  # pyright: ignore[reportAttributeAccessIssue]
        if self.returncode is None:
            if not select.select([self._fork], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._fork.recv(64))
            self._fork.close()
        return self.returncode


def run(
    command: list[str],
    *,
    timeout: float | None = None,
    check: bool = False,
    capture_output: bool = False,
    **more: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, of a fork where that is the same."""
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Command(command, **more) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def interpreter() -> dict[str, str]:
    """The variables that let torchrun start its processes as forks."""
    place = forks()
    if not place:
        return {}
    program = Path(place).with_name("python")
    if not program.exists():
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {Path(__file__)} "$@"\n')
        program.chmod(0o700)
    return {"PYTHON_EXEC": str(program), "WARM": place}


# --- asking for a fork -------------------------------------------------------------------------------------------


@cache
def forks() -> str:
    """Where forks are to be had; started when the first is asked for. It ends with this process."""
    if sys.platform != "linux":
        return ""  # Elsewhere a fork behind these imports is not safe.
    place = Path(mkdtemp(prefix="selfalign-warm-")) / "socket"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, "--forks", str(place)],
        env={**STARTED_WITH, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    PROCESSES.append(process)
    return str(place) if process.stdout.readline() == b"ready\n" else ""


PROCESSES: list[subprocess.Popen[bytes]] = []
"""The one that forks; it ends when its input is closed."""


def end() -> None:
    """End the process that forks, so that what its forks took is counted among this process's children."""
    for process in PROCESSES:
        process.communicate()
        rmtree(Path(process.args[-1]).parent)  # pyright: ignore[reportArgumentType, reportIndexIssue]


def ask(
    command: list[str], cwd: Any, environment: dict[str, str], streams: list[int], *, session: bool, place: str = ""
) -> tuple[socket.socket, int] | None:
    """A command's fork: where its exit code is told, and its pid; None where it has to be started in the ordinary way.

    With `place` it is killed as soon as nobody listens any more.
    """
    if command[0] != sys.executable or parsed(command[1:]) is None or not (place or forks()):
        return None
    request = {"arguments": command[1:], "cwd": str(cwd or Path.cwd()), "environment": environment}
    request |= {"session": session, "tied": bool(place)}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(place or forks())
    socket.send_fds(connection, [json.dumps(request).encode()], streams)
    pid = int(connection.recv(64))
    if pid:
        return connection, pid
    connection.close()
    return None


def parsed(arguments: list[str]) -> tuple[set[str], str, str, list[str]] | None:
    """Python's arguments: flags, whether a program, a module or a file is named and which, and what it is given."""
    flags: set[str] = set()
    for position, word in enumerate(arguments):
        if word in ("-c", "-m"):
            return flags, word, arguments[position + 1], arguments[position + 2 :]
        if word not in ("-u", "-P"):
            return None if word.startswith("-") else (flags, "", word, arguments[position + 1 :])
        flags.add(word)
    return None


def stand_in() -> NoReturn:
    """Be the interpreter that a program has started: its fork's exit code, and whatever ends one ends the other."""
    command = [sys.executable, *sys.argv[1:]]
    asked = ask(command, "", dict(os.environ), [0, 1, 2], session=False, place=os.environ["WARM"])
    if asked is None:
        os.execv(sys.executable, command)
    connection, pid = asked
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    end_with(int(connection.recv(64)))


# --- the process that forks --------------------------------------------------------------------------------------


class Forks:
    """What is running: {its pidfd: its pid and where its exit code is told}, and {that place: pid} of what is tied."""

    def __init__(self, place: str) -> None:
        self.given = dict(os.environ)
        self.running: dict[int, tuple[int, socket.socket]] = {}
        self.tied: dict[socket.socket, int] = {}
        from selfalign.cli.environment import set_environment

        set_environment()
        with redirect_stdout(sys.stderr):
            for name in IMPORTED:
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # Else every fork would look for garbage among a million objects, thirty times.
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(place)
        self.listening.listen()
        print("ready" if is_alone() else "not alone", flush=True)

    def serve(self) -> dict[str, Any]:
        """Fork for whoever asks, until the input is closed; returns in each fork, with what was asked for."""
        while True:
            for ready in select.select([0, self.listening, *self.running, *self.tied], [], [])[0]:
                if ready == 0:
                    os._exit(0)
                elif ready is self.listening:
                    if request := self.accept():
                        return request
                elif isinstance(ready, int):
                    self.tell(ready)
                elif ready in self.tied:
                    os.kill(self.tied.pop(ready), signal.SIGKILL)

    def accept(self) -> dict[str, Any] | None:
        """Fork, unless the command is another one here; returns the request in the fork."""
        connection, _ = self.listening.accept()
        message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
        request = json.loads(message)
        if not suits(request["environment"], self.given):
            connection.send(b"0")
        elif pid := os.fork():
            self.running[os.pidfd_open(pid)] = pid, connection
            if request["tied"]:
                self.tied[connection] = pid
        else:
            for other in [self.listening, *(known for _, known in self.running.values())]:
                other.close()
            for other in self.running:
                os.close(other)
            return request | {"streams": streams, "connection": connection}
        for stream in streams:
            os.close(stream)
        return None

    def tell(self, ended: int) -> None:
        """Tell the exit code of a fork."""
        pid, connection = self.running.pop(ended)
        self.tied.pop(connection, None)
        os.close(ended)
        _, status = os.waitpid(pid, 0)
        with suppress(BrokenPipeError):
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        connection.close()


def is_alone() -> bool:
    """Whether a fork has all there is: a fork has one thread. That of jemalloc is known to it."""
    names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    return threading.active_count() == 1 and len(names - {"jemalloc_bg_thd"}) == 1


def suits(environment: dict[str, str], given: dict[str, str]) -> bool:
    """Whether what was imported here would have read the same at import."""
    names = environment.keys() | given.keys()
    return all(
        environment.get(name) in (given.get(name), os.environ.get(name))
        for name in names
        if name not in LATE and not name.startswith(LATE_PREFIXES)
    )


def become(request: dict[str, Any]) -> None:
    """Take a command's session, streams, folder, environment and path, as a process has them when it starts."""
    if request["session"]:
        os.setsid()
    for number, (name, stream) in enumerate(zip(("stdin", "stdout", "stderr"), request["streams"], strict=True)):
        os.dup2(stream, number)
        os.close(stream)
        old = getattr(sys, name)
        lines = name == "stderr" or (name == "stdout" and os.isatty(number))
        new = open(number, old.mode, 1 if lines else -1, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    os.chdir(request["cwd"])
    own = [str(ROOT), str(ROOT / "tests")]
    os.environ.clear()
    os.environ.update(request["environment"])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in own)]
    importlib.invalidate_caches()
    sys.modules["numpy"].random.seed()  # Python's own is anew in every fork.
    request["connection"].send(str(os.getpid()).encode())
    request["connection"].close()
    if paths:
        sys.modules.pop("sitecustomize", None)
        with suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")


def execute(arguments: list[str]) -> None:
    """Do what Python does with these arguments."""
    understood = parsed(arguments)
    assert understood
    flags, kind, name, given = understood
    if "-u" in flags:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # pyright: ignore[reportAttributeAccessIssue]
    if "-P" not in flags:
        sys.path.insert(0, {"-c": "", "-m": str(Path.cwd())}.get(kind, str(Path(name).resolve().parent)))
    sys.argv = [kind or name, *given]
    if kind == "-m":
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        if not kind:
            main.__file__ = name
        program = name if kind else Path(name).read_text(encoding="utf-8")
        exec(compile(program, "<string>" if kind else name, "exec"), main.__dict__)


def finish(arguments: list[str]) -> None:
    """Execute, and end as a process does, but for taking the interpreter apart: multiprocessing's forks end so, too."""
    code = 0
    try:
        execute(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001 - it is shown
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout!r}\n{error!r}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    end_with(code)


def end_with(code: int) -> NoReturn:
    """End this process with an exit code, or by the signal of a negative one."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] != "--forks":
        stand_in()
    request = Forks(sys.argv[2]).serve()
    become(request)
    finish(request["arguments"])
