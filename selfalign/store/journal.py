"""Work in named batches that survives a kill, shared among the processes of a run."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from selfalign.core import distributed
from selfalign.core.failures import naming

Task = tuple[str, int, Callable[[], Any]]
"""A batch's name, how far it moves the progress bar, and the function that makes its JSON result."""

WINDOW = 8
"""Batches of a process between two exchanges with the others, so that long and short ones even out."""


class Journal:
    """The results of a stage, batch by batch. A resumed stage reads back the batches that a killed one had finished.

    Every process writes to a file of its own, `journal-<rank>.jsonl`, and all read all files, so a run can continue
    with another number of processes. Results lie on disk; only their positions are kept in memory.

    Attributes:
        advance: moves the progress bar.
    """

    def __init__(self, folder: Path, advance: Callable[[int], None]) -> None:
        self.advance = advance
        self._folder = folder
        self._places = distributed.on_main(lambda: read_all_places(folder))
        self._news: dict[str, tuple[int, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def batches(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """Yield the results of all batches in their order. A batch that is missing is made and saved.

        Batches are dealt out among the processes, which must all ask for the same ones. `tasks` is read only as far
        ahead as that needs: with one process, a batch is asked for when the result before it has been taken.
        """
        waiting = iter(tasks)
        many = distributed.count()
        while window := list(islice(waiting, 1 if many == 1 else WINDOW * many)):
            missing = [task for task in window if task[0] not in self]
            for name, _, work in missing[distributed.rank() :: many]:
                self.keep(name, work())
            if missing:
                self.share()
            for name, size, _ in window:
                self.advance(size)
                yield self.read(name)

    def keep(self, name: str, result: Any) -> None:
        """Save a result of this process. The others see it after the next `share`."""
        path = self._file(distributed.rank())
        with naming(path), path.open("ab") as file:
            place = (distributed.rank(), file.tell())
            file.write(json.dumps({"batch": name, "result": result}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._places[name] = self._news[name] = place

    def share(self) -> None:
        """Exchange the positions of new results with the other processes. All processes must call this."""
        for news in distributed.gather(self._news):
            self._places |= news
        self._news = {}

    def read(self, name: str) -> Any:
        """Return the result of a saved batch as JSON, so a tuple comes back as a list."""
        rank, start = self._places[name]
        with self._file(rank).open("rb") as file:
            file.seek(start)
            return json.loads(file.readline())["result"]

    def take(self, name: str) -> Any:
        """Return the result of a batch that is not needed again, and forget its position."""
        result = self.read(name)
        del self._places[name]
        return result

    def _file(self, rank: int) -> Path:
        return self._folder / f"journal-{rank}.jsonl"


def read_all_places(folder: Path) -> dict[str, tuple[int, int]]:
    """{batch: (whose file, where in it)} of the journals of all processes."""
    places: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.glob("journal-*.jsonl")):
        places |= read_places(path)
    return places


def read_places(path: Path) -> dict[str, tuple[int, int]]:
    """Return {batch: (rank, position)} of a journal file. A torn end is cut off."""
    rank, whole = int(path.stem.removeprefix("journal-")), 0
    places: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        for line in file:
            try:
                name = json.loads(line)["batch"] if line.endswith(b"\n") else None
            except ValueError:
                name = None
            if name is None:
                break
            places[name] = (rank, whole)
            whole += len(line)
    os.truncate(path, whole)
    return places
