"""The Hydra side of a sweep: its folder, the list of its jobs, and the number of each job."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from selfalign.core import distributed
from selfalign.core.files import digest_json, path_of
from selfalign.launch.sweep import Prepared, Sweep, run_job
from selfalign.metrics.power import what_a_plan_can_see
from selfalign.runs.folder import check_name

NOT_HERE = (
    "error: a sweep cannot run under torchrun, because it starts the processes of its jobs itself. Leave out torchrun "
    "and set hydra/launcher=submitit_local (or submitit_slurm) hydra.launcher.tasks_per_node=N"
)
UPWARD: dict[str, object] = {
    "direction": "maximize",
    "optim.maximize": True,
    "ax_config.experiment.minimize": False,
}
"""What makes the sweepers of Optuna, Nevergrad and Ax look for the highest number; each looks for the lowest unless it
is told to."""

NOT_THE_STUDY = ("output_dir=", "fresh=")
"""Overrides that do not tell sweeps apart."""


def as_given(overrides: Any) -> list[str]:
    """Return the overrides as they were typed; each job resolves the interpolations in them."""
    return cast(list[str], OmegaConf.to_container(overrides, resolve=False))


def sweep_folder(output_dir: str, name: str, overrides: ListConfig, space: DictConfig | None) -> str:
    """Return `<output_dir>/sweeps/<name>-<digest of overrides and search space>`, equal for equal commands."""
    check_name(name)
    asked = sorted(override for override in as_given(overrides) if not override.startswith(NOT_THE_STUDY))
    digest = digest_json([asked, OmegaConf.to_container(space) if space else {}])[:8]
    return str(path_of(output_dir).absolute() / "sweeps" / f"{name}-{digest}")


# Registered on import, which a job in another process does first. The folder is computed once a sweep. It then travels
# with the configuration, so that all jobs agree on it, whatever their own overrides are.
OmegaConf.register_new_resolver("sweep_folder", sweep_folder, use_cache=True, replace=True)


class ListJobs(Callback):
    """Hydra callback that opens a sweep before the first of its jobs.

    Attributes:
        sweep: the sweep that this process has opened.
    """

    sweep: ClassVar[Sweep | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Wait until no other process runs this sweep, then list its jobs if they are known beforehand."""
        if distributed.are_named():
            # Hydra turns any other exception into a warning.
            sys.exit(NOT_HERE if os.environ.get("RANK", "0") == "0" else 1)
        # Hydra would print a warning here, and raises the same error right afterwards.
        with suppress(OSError, HydraException, OmegaConfBaseException):
            prefer_command_line(config.hydra)
            search_upward(config.hydra)
            if not is_grid(config.hydra):
                refuse_search_over_seeds(config.hydra)
            sweep = Sweep(Path(config.hydra.sweep.dir))
            jobs = jobs_of(config) if is_grid(config.hydra) else []
            if is_grid(config.hydra) and not jobs:
                sys.exit("error: the sweep has no jobs, because a range or choice in its overrides is empty")
            sweep.open(jobs)
            ListJobs.sweep = sweep
            seeds = len({override for told in jobs for override in told if override.startswith("seed=")})
            if seeds > 1 and OmegaConf.select(config, "evaluate.instructions"):
                count = OmegaConf.select(config, "evaluate.count")
                print(
                    f"a setting with all its seeds, if these are independent, sees: {what_a_plan_can_see(count, seeds)}"
                )


@contextmanager
def sweep_lifecycle() -> Iterator[None]:
    """Finish the sweep opened inside the block, even after an error: record job states, write the comparison.

    Raises:
        SelfalignError: a job has failed. It replaces the error that a sweeper may raise because of that.
    """
    account = Sweep.close
    try:
        yield
    except KeyboardInterrupt:
        account = Sweep.interrupt
        raise
    finally:
        sweep, ListJobs.sweep = ListJobs.sweep, None
        if sweep:
            with sweep.held:
                account(sweep)


def prefer_command_line(hydra: DictConfig) -> None:
    """Remove from a study's search space what the command line sets or sweeps itself."""
    given = {override.lstrip("+~").partition("=")[0] for override in as_given(hydra.overrides.task)}
    with open_dict(hydra):
        for key in given & set(hydra.sweeper.params or {}):
            del hydra.sweeper.params[key]


def search_upward(hydra: DictConfig) -> None:
    """Makes a search look for what `sweep_metric` calls the best, the highest number or that of a negative."""
    asked = {override.lstrip("+").partition("=")[0] for override in as_given(hydra.overrides.hydra)}
    for name, wanted in UPWARD.items():
        key, value = f"hydra.sweeper.{name}", OmegaConf.select(hydra.sweeper, name)
        if value is None or getattr(value, "name", value) == wanted:
            continue
        if key in asked or isinstance(value, str):
            sys.exit(
                f"error: {key}={value} looks for the lowest number, but sweep_metric says which job is the best: leave "
                f"it out, and set sweep_metric=-NAME where the lowest is"
            )
        OmegaConf.update(hydra.sweeper, name, wanted, force_add=True)


def refuse_search_over_seeds(hydra: DictConfig) -> None:
    """End a search whose space has the seed: each of its jobs has one seed, so that it would find the luckiest."""
    space = [f"{key}={values}" for key, values in (hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*space, *as_given(hydra.overrides.task)])
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    if "seed" in swept | set(OmegaConf.select(hydra.sweeper, "search_space") or {}):
        sys.exit(
            "error: seed: a search that chooses the seed too ends at the luckiest one. Search with one seed, then "
            "compare the best settings over several without hydra/sweeper, such as seed=1,2,3 loss.lam=0.2,0.4"
        )


def is_grid(hydra: Any) -> bool:
    """Return whether all jobs are known beforehand."""
    return hydra.sweeper._target_.endswith(f".{BasicSweeper.__name__}")


def jobs_of(config: DictConfig) -> list[list[str]]:
    """Return the overrides of every job, in Hydra's order."""
    space = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*space, *as_given(config.hydra.overrides.task)])
    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def run_sweep_job(prepare: Callable[[], Prepared], explain: Callable[[BaseException], str | None]) -> float | None:
    """Run one job of a sweep, in the process where the launcher starts it. A failed job does not stop the others.

    Args:
        prepare: returns the experiment.
        explain: returns the message of an error that the user can correct, in one line; None for any other error.

    Returns:
        The metric that a search optimises; None for a failed job.
    """
    config = HydraConfig.get()
    sweep, number = Sweep(Path(config.sweep.dir)), config.job.num + 1
    return run_job(sweep, number, as_given(config.overrides.task), prepare, explain, searched=not is_grid(config))
