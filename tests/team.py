"""Several processes, as tests have them: threads that take themselves for processes, and real ones that die."""

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import warm
from builders import ROOT, Killed, Said

from selfalign.core import distributed
from selfalign.store.artifacts import StageOutput
from selfalign.store.journal import Journal


class Team:
    """Threads that take themselves for the processes of a run."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = count
        self._me = threading.local()
        self._all_here = threading.Barrier(count, timeout=5)
        self._all_read = threading.Barrier(count)
        self._values: list[Any] = [None] * count
        monkeypatch.setattr(distributed, "_here", self._me)
        monkeypatch.setattr(distributed, "gather", self._gather)
        monkeypatch.setattr(distributed, "broadcast", lambda value: self._gather(value)[0])

    def _gather(self, value: Any) -> list[Any]:
        """What all have brought, as if it had been sent from process to process."""
        if distributed.count() == 1:
            return [value]
        self._values[self._me.rank] = value
        self._all_here.wait()
        values = copy.deepcopy(self._values)
        self._all_read.wait()
        return values

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each process makes of the work, or what ends it: itself killed, or another one gone."""
        results: list[Any] = [None] * self.count

        def go(rank: int) -> None:
            self._me.rank, self._me.count = rank, self.count
            try:
                results[rank] = work(rank)
            except BaseException as error:  # noqa: BLE001 - a process's end is what is looked at
                results[rank] = error
                self._all_here.abort()

        threads = [threading.Thread(target=go, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def die_in(label: str, death: Callable[[], None], patch: Callable[[Any, str, Any], None]) -> None:
    """Lets this process die as soon as it has finished a batch of its own, or a step, in the stage of this label."""
    begin, keep, log = StageOutput.__init__, Journal.keep, StageOutput.log
    now: list[str] = []

    def begun(self: StageOutput, folder: Path, label: str, *rest: Any) -> None:
        now.append(label)
        begin(self, folder, label, *rest)

    def kept(self: Journal, name: str, result: Any) -> None:
        keep(self, name, result)
        if now[-1] == label:
            death()

    def logged(self: StageOutput, row: dict[str, Any]) -> None:
        log(self, row)
        if self.label == label:
            death()

    patch(StageOutput, "__init__", begun)
    patch(StageOutput, "log", logged)
    patch(Journal, "keep", kept)


@contextmanager
def dying_in(label: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a run in this very process dies in the stage of this label."""

    def death() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        die_in(label, death, patch.setattr)
        with pytest.raises(Killed):
            yield


SITE = """
import os, signal
if os.environ.get("RANK") == "1":
    import team
    team.die_in(os.environ["DIES_IN"], lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
"""
"""Python imports this when it starts."""

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip


def launch(folder: Path, launcher: str, *arguments: str, module: str = "selfalign", dies_in: str = "") -> Said:
    """The command line in two processes, of which the second is killed in the stage of this label."""
    paths = [ROOT, ROOT / "tests"]
    known = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
    if dies_in:
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text(SITE)
        paths, known = [folder / "site", *paths], {**known, "DIES_IN": dies_in}
    known["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", module, *arguments]
    environment = {**os.environ, **known, **warm.interpreter()}
    ended = warm.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=540)
    return Said(ended.returncode, ended.stdout, ended.stderr)
