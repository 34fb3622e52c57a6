"""tracker=tensorboard: event files in the run folder."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.runs.tracker import Tracker
from selfalign.tracking.rows import AXES, by_iteration, numbers_of

EVENTS = "tensorboard"
"""Folder of the event files in a run folder."""
MOST_ROWS = 50
"""The most rows of a table, which TensorBoard shows as text. The run folder has all records."""


@dataclass(kw_only=True, slots=True)
class TensorBoard:
    """TensorBoard. `tensorboard --logdir outputs` shows all runs below outputs/."""

    def check_installed(self) -> None:
        """Check that the package is there.

        Raises:
            SelfalignError: it is not.
        """
        if find_spec("tensorboard") is None:
            raise SelfalignError("tracker=tensorboard needs its package: pip install 'selfalign[tensorboard]'")

    @contextmanager
    def open(self, folder: Path, config: dict[str, Any]) -> Iterator[Tracker]:
        """Open event files in the run folder. They are written anew each time, as metrics.jsonl is."""
        from torch.utils.tensorboard.writer import SummaryWriter

        place = folder / EVENTS
        shutil.rmtree(place, ignore_errors=True)
        with SummaryWriter(str(place)) as writer:
            writer.add_text("config", _as_code(json.dumps(config, indent=2, ensure_ascii=False, default=str)))
            yield TensorBoardTracker(writer, place, by_iteration(config.get("benchmark", {})))


@dataclass(slots=True)
class TensorBoardTracker:
    """Open event files. The axis of a metric is the row's step, or the iteration where a model has one value.

    Attributes:
        writer: the `SummaryWriter`.
        folder: the folder of the files.
        by_iteration: names of the metrics over the iteration, and groups as `group/*`.
        axes: step and iteration of the last row.
    """

    writer: Any
    folder: Path
    by_iteration: Sequence[str] = ()
    axes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 0))

    def log(self, row: dict[str, Any]) -> None:
        """Write the numbers of a row."""
        self.axes = {name: row[name] for name in AXES}
        for name, value in numbers_of(row).items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, self._at(name))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write the first rows of a table of records as text. An empty table is not written."""
        cells = [[_as_cell(value) for value in row] for row in islice(rows, MOST_ROWS)]
        if cells:
            lines = [columns, ["---"] * len(columns), *cells]
            text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            self.writer.add_text(name, text, self.axes["iteration"])
        self.writer.flush()

    def summarise(self, values: dict[str, Any]) -> None:
        """Write the values of the last model as text; each is also a curve."""
        text = _as_code(json.dumps(values, indent=2, ensure_ascii=False, default=str))
        self.writer.add_text("summary", text, self.axes["iteration"])

    def attach(self, files: Sequence[Path]) -> None:
        """Do nothing: the files are in the run folder already."""

    @property
    def place(self) -> str:
        """The folder of the event files, and how to see them."""
        return f"{self.folder} (see it with: tensorboard --logdir {self.folder.parent})"

    def _at(self, name: str) -> int:
        over_iterations = any(fnmatchcase(name, pattern) for pattern in self.by_iteration)
        return self.axes["iteration" if over_iterations else "step"]


def _as_code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _as_cell(value: Any) -> str:
    """Return a value as the text of a cell of Markdown, in which no markup is left."""
    text = "" if value is None else str(value)
    for sign, name in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;"), ("*", "&#42;"), ("_", "&#95;")):
        text = text.replace(sign, name)
    return text.replace("[", "&#91;").replace("\r", "").replace("\n", "<br>")
