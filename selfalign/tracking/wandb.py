"""tracker=wandb: Weights & Biases."""

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
from selfalign.runs.tracker import NoTracker, Tracker, tracked_id
from selfalign.tracking.rows import AXES, by_iteration, numbers_of

logger = logging.getLogger(__name__)
MODES = ("auto", "online", "offline")
WANDB_MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline"}
WANDB_MODES |= {"disabled": "disabled"}
"""{value of WANDB_MODE: mode}."""
SETTING = "setting"
"""Key of W&B's config by which runs that differ only in their seed are one group."""

NOT_THE_SETTING = ("seed=", "output_dir=", "fresh=", "tracker=", "tracker.")
"""Overrides that do not tell settings apart."""

MOST_ROWS = 1000
"""The most rows of a table. The run folder has all records."""


@dataclass(kw_only=True, slots=True)
class Wandb:
    """Weights & Biases.

    Attributes:
        project: the project of the runs.
        entity: user or team; empty takes the account's default.
        mode: "online", "offline", or "auto", which is online if there is an API key, else offline.
            WANDB_MODE=disabled or WANDB_DISABLED=true in the environment overrides it and switches it off.
        group: the group of the run; empty takes WANDB_RUN_GROUP of the environment, which a sweep sets to its name.
        tags: tags of the run, besides the names of its loss and its judge.
    """

    project: str = "selfalign"
    entity: str = ""
    mode: str = "auto"
    group: str = ""
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SelfalignError(f"tracker.wandb.mode must be one of {', '.join(MODES)}; got {self.mode!r}")

    def check_installed(self) -> None:
        """Do nothing: the package is always there."""

    @contextmanager
    def open(self, folder: Path, config: dict[str, Any]) -> Iterator[Tracker]:
        """Open a W&B run with the name of the run folder. The same folder continues the same W&B run.

        The W&B run is always finished; an exception marks it as failed. Its job type is the choice of `data`.

        Raises:
            SelfalignError: W&B cannot open the run.
        """
        if environment_mode() == "disabled":
            yield NoTracker("switched off by WANDB_MODE or WANDB_DISABLED")
            return
        import wandb

        try:
            run = self._begin(folder, config)
        except (wandb.Error, ValueError) as error:  # pydantic raises ValueError for wrong WANDB_… variables.
            raise SelfalignError(
                f"tracker: Weights & Biases cannot open a run ({one_line(error)}). Set tracker=none to run without it, "
                "or tracker.wandb.mode=offline to send nothing"
            ) from error
        try:
            run.define_metric("iteration")
            for name in by_iteration(config.get("benchmark", {})):
                run.define_metric(name, step_metric="iteration")
            yield WandbTracker(run)
        except BaseException:
            with suppress(OSError, wandb.Error):  # The user should see the first error.
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
            config={**config, SETTING: setting_of(config["overrides"])} if "overrides" in config else config,
            group=self.group or os.environ.get("WANDB_RUN_GROUP"),  # wandb itself reads it only once a process.
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


def setting_of(overrides: Iterable[str]) -> str:
    """Return the overrides of a run without its seed, equal for runs that are replicates of one setting."""
    return " ".join(sorted(override for override in overrides if not override.startswith(NOT_THE_SETTING)))


@dataclass(slots=True)
class WandbTracker:
    """An open W&B run.

    Attributes:
        run: the `wandb.Run`.
        step: the step of the last row.
    """

    run: Any
    step: int = 0

    def log(self, row: dict[str, Any]) -> None:
        """Log the numbers of a row, at the row's step."""
        self.step = row["step"]
        self.run.log({name: row[name] for name in AXES} | numbers_of(row), step=self.step)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Log a table of records at the step of the last row. An empty table is not logged."""
        import wandb

        data: list[Any] = [list(row) for row in islice(rows, MOST_ROWS)]
        if data:
            self.run.log({name: wandb.Table(columns=list(columns), data=data)}, step=self.step)

    def summarise(self, values: dict[str, Any]) -> None:
        """Write values into the W&B summary of the run."""
        self.run.summary.update(values)

    def attach(self, files: Sequence[Path]) -> None:
        """Log each existing file as a W&B artifact. Its type is the file's name without the suffix."""
        import wandb

        for path in files:
            if path.is_file():
                name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{path.stem}-{self.run.id}")
                artifact = wandb.Artifact(name, type=path.stem)
                artifact.add_file(str(path))
                self.run.log_artifact(artifact)

    @property
    def place(self) -> str:
        """The address of the run, or how to send an offline run."""
        if self.run.offline:
            return f"{Path(self.run.dir).parent} (offline; send it with: wandb sync {Path(self.run.dir).parent})"
        return str(self.run.url)


def is_online() -> bool:
    """Whether runs are sent to W&B: there is an API key, and the environment does not switch W&B off."""
    return environment_mode() == "online" and has_key()


def environment_mode() -> str:
    """Return the mode in the environment: "online", "offline" or "disabled".

    Raises:
        SelfalignError: WANDB_MODE has another value, with which wandb would fail.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in WANDB_MODES:
        raise SelfalignError(f"WANDB_MODE must be one of {', '.join(WANDB_MODES)}, or unset; got {mode!r}")
    return WANDB_MODES[mode]


def has_key() -> bool:
    """Whether there is a W&B API key, in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
