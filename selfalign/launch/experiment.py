"""One experiment from configuration to report: the run folder around the pipeline."""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from selfalign.config.checks import other_forms, other_scales, without_effect
from selfalign.config.experiment import ExperimentConfig
from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.failures import at_the_end, naming
from selfalign.core.files import read_json, write_json
from selfalign.engines.resident import workers_may_stay
from selfalign.launch.live import FINISHED, LiveReport
from selfalign.launch.preflight import preflight
from selfalign.launch.push_to_hub import check_login, publish_run
from selfalign.losses.protocol import Loss
from selfalign.metrics.power import what_a_plan_can_see
from selfalign.models.checkpoint import settle_imports
from selfalign.pipeline.dtypes import auto_dtypes, dtypes_text
from selfalign.pipeline.loop import plan, run_pipeline
from selfalign.report import write_report
from selfalign.report.model_card import write_card
from selfalign.runs.folder import open_folder, run_folder
from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger, open_ledger
from selfalign.runs.provenance import code_state, write_provenance
from selfalign.runs.runner import CacheLookup, NotMadeYet, Runner
from selfalign.runs.summary import closing_text, models_of, plan_text
from selfalign.runs.tracker import open_trackers
from selfalign.store.artifacts import Store, locked
from selfalign.tracking.tables import log_tables

logger = logging.getLogger(__name__)

RESOLVED = "resolved.json"
"""Values of the settings that are auto, on the machine that last worked on the run."""


def run_experiment(config: ExperimentConfig, config_yaml: str, plain: dict[str, Any]) -> Path:
    """Run or resume an experiment and return its run folder. Only rank 0 writes to the folder.

    Args:
        config: the experiment.
        config_yaml: the resolved configuration as text, kept in the run folder.
        plain: the same as plain dictionaries, for the tracker.
    """
    return _run(config, config_yaml, plain, lambda: None, again=True)[0]


def finish_experiment(
    config: ExperimentConfig, config_yaml: str, plain: dict[str, Any], on_start: Callable[[], None]
) -> bool | None:
    """Like `run_experiment`, but skip a completed run. `on_start` is called before any work starts.

    Returns:
        Whether the run was skipped; None on the other ranks.
    """
    return _run(config, config_yaml, plain, on_start, again=False)[1]


def _run(
    config: ExperimentConfig, config_yaml: str, plain: dict[str, Any], on_start: Callable[[], None], *, again: bool
) -> tuple[Path, bool | None]:
    """Return the run folder, and whether the run was complete before; None instead on the other ranks."""
    output = Path(config.output_dir).absolute()
    store = Store(output / "store")
    folder, namespace = distributed.on_main(lambda: run_folder(output, config.name, config, fresh=config.fresh))
    ledger = open_ledger(folder, log_tables)
    runner = Runner(store, namespace, ledger)
    with ExitStack() as stack:

        def claim() -> CacheLookup:
            if config.hub.push and (again or not was_done(config, folder)):
                check_login()
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock", f"this configuration is already running in {folder}"))
            return look_ahead(config, store, namespace)

        stored = distributed.on_main(claim)
        if distributed.on_main(lambda: not (again or config.fresh) and is_finished(config, folder, stored)):
            return folder, None if ledger is None else True
        on_start()
        if ledger is None:
            preflight(config, stored.found)
            settle_imports()
            with workers_may_stay():
                run_pipeline(config, runner)
            return folder, None
        open_folder(folder, config_yaml, stored.asked)
        live = LiveReport(folder, described(config, plain), models_of)
        with log_file(folder / "run.log"), live, ExitStack() as tracked:
            warn_of_settings(config, plain)
            preflight(config, stored.found)
            tell_resolved(folder, config)
            ledger.tracker = tracked.enter_context(open_trackers(config.tracker, folder, plain))
            ledger.planned, ledger.begun = plan(config), live.begin
            print(plan_text(ledger.planned, stored), *sight(config, config.evaluate.count), sep="\n", flush=True)
            settle_imports()
            with at_the_end(partial(write_provenance, ledger, config.seed, code_state())), workers_may_stay():
                run_pipeline(config, runner)
            conclude(ledger, live, models_of(ledger.artifacts), (write_report, write_card))
        if config.hub.push:
            for address in publish_run(folder, config.hub):
                print(f"published {address}", flush=True)
        write_json(folder / FINISHED, requested_outputs(config))
    return folder, False


def warn_of_settings(config: ExperimentConfig, plain: dict[str, Any]) -> None:
    """Warn of settings on the command line without effect, and of rubrics with another scale or form than is read."""
    for line in (*without_effect(config, plain.get("overrides", ())), *other_scales(config), *other_forms(config)):
        logger.warning("%s", line)


def tell_resolved(folder: Path, config: ExperimentConfig) -> None:
    """Save and log what dtype=auto means on this machine. Warn where it meant something else before.

    Args:
        folder: of the run.
        config: the experiment.

    Raises:
        SelfalignError: the saved file is damaged.
    """
    path, resolved = folder / RESOLVED, auto_dtypes(config)
    if resolved:
        logger.info("%s", dtypes_text(resolved))
    before = read_own(path) if path.exists() else {}
    for key, value in resolved.items():
        if (earlier := before.get(key, value)) != value:
            logger.warning(
                "%s=auto was %s on the machine where this run was before, and is %s on this one. Artifacts that depend "
                "on it are made again. Set %s=%s to reuse the earlier ones",
                *(key, earlier, value, key, earlier),
            )
    write_json(path, resolved)


def sight(config: ExperimentConfig, instructions: int) -> list[str]:
    """Return which win rate the evaluation can see, as a line; none if no model answers instructions.

    Args:
        config: the experiment.
        instructions: their number; 0 if it is not known.
    """
    return [f"sees    {what_a_plan_can_see(instructions)}", ""] if config.evaluate.instructions else []


def is_finished(config: ExperimentConfig, folder: Path, stored: CacheLookup) -> bool:
    """Return whether the run completed with the requested options and its summary lists the stored artifacts."""
    return was_done(config, folder) and (folder / "report.html").exists() and reported_keys(folder) == stored.found


def was_done(config: ExperimentConfig, folder: Path) -> bool:
    """Return whether the run completed with the requested options, on whatever data."""
    return (folder / FINISHED).exists() and read_own(folder / FINISHED) == requested_outputs(config)


def reported_keys(folder: Path) -> dict[Label, str]:
    """Return {label: key} of the artifacts that a run's summary lists, empty without a summary."""
    if not (folder / "summary.json").exists():
        return {}
    return {Label.parse(stage["label"]): stage["key"] for stage in read_own(folder / "summary.json")["stages"]}


def read_own(path: Path) -> Any:
    """Read a JSON file that a run has written about itself.

    Raises:
        SelfalignError: it is damaged.
    """
    try:
        return read_json(path)
    except ValueError as error:
        raise SelfalignError(f"{path} is damaged. Delete it and repeat the command, which writes it again") from error


def requested_outputs(config: ExperimentConfig) -> dict[str, Any]:
    """Return what the configuration requests of a run besides its artifacts."""
    push = [config.hub.repo_id, config.hub.private, config.hub.data] if config.hub.push else []
    return {"tracker": repr(config.tracker), "push": push, "sweep_metric": config.sweep_metric}


def described(config: ExperimentConfig, plain: dict[str, Any]) -> dict[str, Any]:
    """Return what a summary says of a run's settings; `plain` is the same as plain dictionaries."""
    later = {start: stated(changes["loss"]) for start, changes in config.at.items() if "loss" in changes}
    settings = {"name": config.name, "seed": config.seed, "loss": stated(config.loss), "config": plain}
    return settings | ({"later_losses": later} if later else {})


def conclude(ledger: Ledger, live: LiveReport, models: Sequence[str], pages: Sequence[Callable[[Path], None]]) -> None:
    """Write the summary and the pages of a run, attach them to the tracker, and print the results.

    Args:
        ledger: holds all artifacts.
        live: the report while the run goes, which ends here.
        models: names of the evaluated models, in their order.
        pages: functions that write a page, each given the run folder.
    """
    summary = live.summary(ledger, models)
    write_json(ledger.folder / "summary.json", summary)
    live.finish()
    ledger.tracker.summarise({k: v for k, v in summary["models"][-1].items() if not isinstance(v, str)})
    for write in pages:
        write(ledger.folder)
    ledger.tracker.attach([ledger.folder / "report.html", ledger.folder / "model_card.md"])
    print(closing_text(summary, ledger), flush=True)


def stated(loss: Loss) -> dict[str, str]:
    """Return a loss's title, its formula and what it is of, for readers of the run who do not have its code."""
    return {"title": loss.title, "formula": loss.formula, "of": "pair" if loss.pairwise else "response"}


def look_ahead(config: ExperimentConfig, store: Store, namespace: str) -> CacheLookup:
    """Walk the pipeline without running anything and collect finished artifacts, up to the first missing one.

    Errors are ignored here; the run itself will raise them.
    """
    look = CacheLookup(store, namespace)
    with suppress(NotMadeYet, SelfalignError, OSError):
        run_pipeline(config, look)
    return look


class log_file:
    """Also write log messages to a file of the run folder, and the traceback of an error that ends the block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.handler = LogHandler(self.path, encoding="utf-8", errors="backslashreplace")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(self.handler)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with suppress(OSError):  # A full disk has ended the run already, or is about to.
            if error is not None:
                self.handler.handle(
                    logging.LogRecord("selfalign", logging.ERROR, "", 0, "stopped", None, (kind, error, trace))
                )
        logging.getLogger().removeHandler(self.handler)
        with suppress(OSError):
            self.handler.close()


class LogHandler(logging.FileHandler):
    """A file handler that raises an error when it cannot write, instead of printing a traceback for every message."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the OSError that writing has caused, with the file's name."""
        if not isinstance(sys.exception(), OSError):
            return super().handleError(record)
        with naming(Path(self.baseFilename)):
            raise
