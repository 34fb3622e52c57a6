"""The `selfalign` command: compose the configuration, make the experiment, run it.

`selfalign --help` answers without importing torch. Heavy modules are imported once the configuration is composed.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfalign.cli.commands import COMMANDS, heading, last_sections
from selfalign.cli.environment import conf_folder, set_environment, set_messages, set_streams, take_config_dir
from selfalign.cli.errors import explain, report_errors
from selfalign.config.extensions import check_options, installed_folders
from selfalign.core import distributed
from selfalign.core.errors import SelfalignError

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXAMPLES = (
    ("selfalign experiment=smoke", "the whole loop on a tiny random model, in under a minute"),
    ("selfalign experiment=demo", "SmolLM2-135M-Instruct → M1 → M2 → M3"),
    ("selfalign experiment=demo loss=sr_ipo loss.lam=0.3 iterations=1", "another loss, one iteration"),
    ("selfalign experiment=demo model=pretrained model.path=/models/mine", "your own model"),
    ("selfalign -m experiment=demo loss.lam=0.1,0.3,0.5,1", "a sweep over λ; shared stages run once"),
)

OPTIONS = {
    "-m": "run a job for every combination of values, as in loss.lam=0.1,0.3",
    "--explain KEY": "explain a key, such as loss.lam, a group, loss, or an option, loss=dpo",
    "--schema FOLDER": "write JSON schemas for editors of YAML",
    "--config-dir DIR": "a folder with options of your own",
    "--cfg job": "show the composed configuration; --info says where it comes from",
    "--hydra-help": "Hydra's own flags",
    "-sc install=bash": 'Bash completion: eval "$(selfalign -sc install=bash)"',
    "HYDRA_FULL_ERROR=1": "in the environment: errors with full tracebacks",
}


def main() -> None:
    """Run the command line. Exit codes: 0; 1 for an error that the user can correct, or a bug; 130 for Ctrl-C."""
    set_streams()
    if any(flag in sys.argv[1:] for flag in ("--help", "-h")):
        with suppress(BrokenPipeError):  # As in `selfalign --help | head`.
            print(help_text(), flush=True)
            return
        os._exit(0)
    with report_errors("interrupted"):
        refuse_subcommand(sys.argv[1:])
        if answer := told(sys.argv[1:]):
            print(answer)
            return
    set_environment()
    with report_errors("interrupted; repeat the command to continue"):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, and report_errors prints one line.
        _run_hydra()


def help_text() -> str:
    """Return the usage, the groups with their options, and examples."""
    options = _options(
        [conf_folder(), *(folder for _, folder in installed_folders()), *filter(Path.is_dir, _own_folders())]
    )
    width = max(map(len, options))
    lines = [heading("selfalign"), "", "usage: selfalign [-m] [group=option ...] [key=value ...]", ""]
    lines += ["Trains a model on its own judgements in iterations: M0 → M1 → M2 → ... → report.html.", ""]
    lines += ["groups and their options:"]
    lines += [f"  {group:<{width}}  {' '.join(sorted(names))}" for group, names in sorted(options.items())]
    lines += ["", "options:"]
    lines += [f"  {option:<{width + 10}}  {meaning}" for option, meaning in OPTIONS.items()]
    return "\n".join([*lines, "", last_sections("selfalign", dict(EXAMPLES))])


def refuse_subcommand(arguments: Sequence[str]) -> None:
    """Check that the first argument is not another command of the family, as in `selfalign report`.

    Raises:
        SelfalignError: it is.
    """
    meant = f"selfalign-{arguments[0]}" if arguments else ""
    if meant in COMMANDS:
        raise SelfalignError(f"selfalign has no subcommands; did you mean {' '.join([meant, *arguments[1:]])}?")


def told(arguments: Sequence[str]) -> str:
    """Return what --explain or --schema asks for; empty without them. Nothing is run, and torch is not imported.

    Raises:
        SelfalignError: there is no such key, or the folder cannot be written.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--explain", nargs="*")
    parser.add_argument("--schema", type=Path)
    asked, _ = parser.parse_known_args(arguments)
    if asked.explain is None and asked.schema is None:
        return ""
    from selfalign.config.explain import explain as explain_key
    from selfalign.config.options import Options
    from selfalign.config.schema import write_schemas

    directory, _ = take_config_dir(arguments)
    own = [directory] if directory else []
    for folder in own:
        check_options(folder, conf_folder())
    options = Options([conf_folder(), *(folder for _, folder in installed_folders()), *own])
    if asked.schema is None:
        return "\n\n".join(explain_key(key, options) for key in asked.explain or [""])
    patterns = write_schemas(asked.schema, options, own[0].as_posix() if own else "conf")
    return json.dumps({"yaml.schemas": patterns}, indent=2)


def _own_folders() -> list[Path]:
    """Return the folder that --config-dir names, if any."""
    folder, _ = take_config_dir(sys.argv[1:])
    return [folder] if folder else []


def _options(folders: Iterable[Path]) -> dict[str, set[str]]:
    """Return {group: names of its options}."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in folder.glob("*/*.yaml")):
        found.setdefault(path.parent.name, set()).add(path.stem)
    return found


def _run_hydra() -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from selfalign.config.hydra import register
    from selfalign.launch.experiment import run_experiment, warn_of_settings
    from selfalign.launch.hydra_sweep import run_sweep_job, sweep_lifecycle

    register()
    for folder in _own_folders():
        check_options(folder, conf_folder())

    errors: list[Exception] = []

    @hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")
    def job(config: DictConfig) -> float | None:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            with distributed.process_group():
                set_messages()
                return run_sweep_job(lambda: _prepare(config), explain)
        try:
            with distributed.process_group():
                set_messages()
                prepared = _prepare(config)
                if prepared[0].dry_run:
                    # Importing it takes seconds, because it imports transformers' Trainer.
                    from selfalign.launch.dry_run import dry_run

                    warn_of_settings(prepared[0], prepared[2])
                    dry_run(prepared[0])
                else:
                    run_experiment(*prepared)
        except Exception as error:  # noqa: BLE001 - raised outside Hydra, which would print a line of its own
            errors.append(error)

    with sweep_lifecycle():
        job()
    if errors:
        raise errors[0]


def _prepare(config: "DictConfig") -> tuple[Any, str, dict[str, Any]]:
    """Return the experiment, its settings as text, and as plain dictionaries with the overrides."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from selfalign.config.hydra import describe

    experiment, text, described = describe(config)
    if experiment.dry_run and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise SelfalignError("dry_run=true measures one run, not a sweep: set hydra.mode=RUN and the values of one job")
    return experiment, text, {**described, "overrides": list(HydraConfig.get().overrides.task)}
