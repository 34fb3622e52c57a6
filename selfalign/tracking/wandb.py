"""Where metrics go besides the run folder: Weights & Biases, or nowhere."""

import logging
import netrc
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selfalign.core.errors import SelfalignError, one_line
from selfalign.metrics.catalog import METRICS, PAIRS_OF
from selfalign.runs.labels import Label
from selfalign.runs.tracker import NoTracker, Tracker, tracked_id

logger = logging.getLogger(__name__)
MODES = ("auto", "online", "offline")
SAID = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline"}
SAID |= {"disabled": "disabled"}
"""What WANDB_MODE may say, and what that comes to."""
MOST_ROWS = 1000
"""Of a table; what is beyond them lies in the run folder."""


@dataclass(kw_only=True, slots=True)
class Wandb:
    """Weights & Biases.

    Attributes:
        project: the project runs go to.
        entity: user or team; empty takes the account's default.
        mode: "online", "offline", or "auto": online when there is an API key, else offline. WANDB_MODE=disabled in the
            environment, or WANDB_DISABLED=true, is as tracker=none, whatever stands here.
        group: what the run is one of; empty takes the environment's WANDB_RUN_GROUP, which a sweep sets to its name.
        tags: labels of the run, besides the classes of its loss and its judge.
    """

    project: str = "selfalign"
    entity: str = ""
    mode: str = "auto"
    group: str = ""
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SelfalignError(f"tracker.mode must be one of {', '.join(MODES)}; got {self.mode!r}")

    @contextmanager
    def open(self, folder: Path, config: dict[str, Any]) -> Iterator[Tracker]:
        """A W&B run named like the run folder; a second run of the same folder continues it.

        It is finished whatever happens, and marked as failed when an exception ends it. Its job type is the kind of
        data, by the name of the class.

        Raises:
            SelfalignError: W&B does not open it.
        """
        if said_mode() == "disabled":
            yield NoTracker("switched off by WANDB_MODE or WANDB_DISABLED")
            return
        import wandb

        try:
            run = self._begin(folder, config)
        except (wandb.Error, ValueError) as error:  # ValueError: pydantic's, of what WANDB_… in the environment says
            raise SelfalignError(
                f"track: Weights & Biases opens no run ({one_line(error)}); tracker=none does without, and "
                "tracker.mode=offline sends nothing"
            ) from error
        try:
            run.define_metric("iteration")
            for name in by_iteration(config.get("benchmark", {})):
                run.define_metric(name, step_metric="iteration")
            yield WandbTracker(run)
        except BaseException:
            with suppress(OSError, wandb.Error):  # What has failed first is what the user should read.
                run.finish(exit_code=1)
            raise
        run.finish()

    def _begin(self, folder: Path, config: dict[str, Any]) -> Any:
        import wandb

        choices = config.get("choices", {})
        return wandb.init(
            project=self.project,
            entity=self.entity or None,
            name=folder.name,
            id=tracked_id(folder),
            dir=folder,
            config=config,
            group=self.group or os.environ.get("WANDB_RUN_GROUP"),  # wandb itself reads it once a process.
            job_type=choices.get("data"),
            tags=[*self.tags, *(choices[group] for group in ("loss", "judge") if group in choices)],
            mode=self._mode(),
            resume="allow" if self._mode() == "online" else None,
            reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True),
        )

    def _mode(self) -> Any:
        if self.mode != "auto":
            return self.mode
        return "online" if is_online() else "offline"


@dataclass(slots=True)
class WandbTracker:
    """An open W&B run.

    Attributes:
        run: as wandb gives it.
        step: of the row logged last.
    """

    run: Any
    step: int = 0

    def log(self, row: dict[str, Any]) -> None:
        """The numbers of one row, at its own step."""
        self.step, prefix = row["step"], Label.parse(row["label"]).metric_prefix
        axes = {name: row[name] for name in ("step", "iteration")}
        numbers = {prefix + name: v for name, v in row.items() if name not in axes and not isinstance(v, str)}
        self.run.log(axes | numbers, step=self.step)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table of records, at the step of the row before it; nothing where there are none."""
        import wandb

        data: list[Any] = [list(row) for row in islice(rows, MOST_ROWS)]
        if data:
            self.run.log({name: wandb.Table(columns=list(columns), data=data)}, step=self.step)

    def summarise(self, values: dict[str, Any]) -> None:
        """Values to sort runs by."""
        self.run.summary.update(values)

    def attach(self, files: Sequence[Path]) -> None:
        """Each file that is there as an artifact of the run, whose type is the file's name without its ending."""
        import wandb

        for path in files:
            if path.is_file():
                name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{path.stem}-{self.run.id}")
                artifact = wandb.Artifact(name, type=path.stem)
                artifact.add_file(str(path))
                self.run.log_artifact(artifact)

    @property
    def place(self) -> str:
        """Where to look at the run, or how to send it."""
        if self.run.offline:
            return f"{Path(self.run.dir).parent} (offline; send it with: wandb sync {Path(self.run.dir).parent})"
        return str(self.run.url)


@dataclass(kw_only=True, slots=True)
class NoTracking:
    """Metrics stay in the run folder."""

    @contextmanager
    def open(self, folder: Path, config: dict[str, Any]) -> Iterator[Tracker]:
        """A tracker that does nothing."""
        yield NoTracker()


def by_iteration(benchmarks: Iterable[str]) -> list[str]:
    """Return what a model or its data has once: single metrics, and groups as `group/*`.

    Their axis is the iteration, that of all others W&B's step, which is the row's.
    """
    by_step = {group_of(metric.name) for metric in METRICS.values() if metric.axis == "step"}
    once = [name for name, metric in METRICS.items() if metric.axis == "iteration" and not name.startswith("{")]
    single = [name for name in once if "/" not in name or group_of(name) in by_step]
    groups = [*(group_of(name) for name in once if name not in single), *map(group_of, PAIRS_OF), *benchmarks]
    return [*single, *(f"{group}/*" for group in dict.fromkeys(groups))]


def group_of(name: str) -> str:
    """Return what stands before the first slash of a metric's name."""
    return name.partition("/")[0]


def is_online() -> bool:
    """Whether W&B is to be reached: there is a key, and the environment does not say otherwise."""
    return said_mode() == "online" and has_key()


def said_mode() -> str:
    """What the environment says of W&B: "online", "offline" or "disabled".

    Raises:
        SelfalignError: WANDB_MODE says something else, which wandb would stumble over.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    said = os.environ.get("WANDB_MODE", "online")
    if said not in SAID:
        raise SelfalignError(f"WANDB_MODE must be one of {', '.join(SAID)}, or not set at all; got {said!r}")
    return SAID[said]


def has_key() -> bool:
    """Whether W&B could log in: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
