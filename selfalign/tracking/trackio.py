"""tracker=trackio: Hugging Face's tracker, on this machine or in a Space."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError, one_line
from selfalign.runs.tracker import Tracker, tracked_id
from selfalign.tracking.rows import numbers_of

MOST_ROWS = 1000
"""The most rows of a table. The run folder has all records."""


@dataclass(kw_only=True, slots=True)
class Trackio:
    """Trackio. `trackio show --project selfalign` shows the runs of this machine.

    Attributes:
        project: the project of the runs.
        space_id: a Space of the Hugging Face hub that receives the runs; empty takes TRACKIO_SPACE_ID of the
            environment, and without it they stay on this machine.
        group: the group of the run; empty takes WANDB_RUN_GROUP of the environment, which a sweep sets to its name.
    """

    project: str = "selfalign"
    space_id: str = ""
    group: str = ""

    def check_installed(self) -> None:
        """Check that the package is there.

        Raises:
            SelfalignError: it is not.
        """
        if find_spec("trackio") is None:
            raise SelfalignError("tracker=trackio needs its package: pip install 'selfalign[trackio]'")

    @contextmanager
    def open(self, folder: Path, config: dict[str, Any]) -> Iterator[Tracker]:
        """Open a Trackio run. A run of this machine that is continued is written anew, as metrics.jsonl is.

        Raises:
            SelfalignError: Trackio cannot open the run.
        """
        import trackio

        space, name = self.space_id or os.environ.get("TRACKIO_SPACE_ID") or None, tracked_id(folder)
        try:
            with redirect_stdout(StringIO()):  # It tells the reader how to call it.
                if space is None:
                    _delete(self.project, name)
                run = trackio.init(
                    self.project,
                    name=name,
                    group=self.group or os.environ.get("WANDB_RUN_GROUP"),
                    space_id=space,
                    config=config,
                    embed=False,
                    auto_log_cpu=False,
                    auto_log_gpu=False,
                )
        except Exception as error:
            raise SelfalignError(f"tracker: Trackio cannot open a run ({one_line(error)})") from error
        try:
            yield TrackioTracker(run, self.project, space)
        finally:
            with redirect_stdout(StringIO()):
                trackio.finish()


def _delete(project: str, name: str) -> None:
    """Delete the runs of a name from this machine."""
    import trackio

    with suppress(ValueError):  # The project has no run yet.
        for run in [run for run in trackio.Api().runs(project) if run.name == name]:
            run.delete()


@dataclass(slots=True)
class TrackioTracker:
    """An open Trackio run. Each row is at its step, and carries its iteration, which a chart can take as axis.

    Attributes:
        run: the `trackio.Run`.
        project: its project.
        space: the Space that receives it, or None.
        step: the step of the last row.
    """

    run: Any
    project: str
    space: str | None = None
    step: int = 0

    def log(self, row: dict[str, Any]) -> None:
        """Log the numbers of a row."""
        self.step = row["step"]
        self.run.log({"iteration": row["iteration"]} | numbers_of(row), step=self.step)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Log a table of records at the step of the last row. An empty table is not logged."""
        import trackio

        data = [list(row) for row in islice(rows, MOST_ROWS)]
        if data:
            self.run.log({name: trackio.Table(columns=list(columns), data=data)}, step=self.step)

    def summarise(self, values: dict[str, Any]) -> None:
        """Do nothing: Trackio has no summary, and each value is in the last row of its metric."""

    def attach(self, files: Sequence[Path]) -> None:
        """Do nothing: the files are in the run folder."""

    @property
    def place(self) -> str:
        """The Space of the run, or how to see it on this machine."""
        if self.space:
            return f"https://huggingface.co/spaces/{self.space}"
        return f"Trackio {self.run.name} (see it with: trackio show --project {self.project})"
