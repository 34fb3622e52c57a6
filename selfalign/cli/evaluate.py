"""`selfalign-evaluate`: evaluate finished runs and other models without training."""

import argparse
import sys
from pathlib import Path

from selfalign.cli.commands import command_parser
from selfalign.cli.environment import conf_folder, set_environment, set_messages, set_streams, take_config_dir
from selfalign.cli.errors import report_errors
from selfalign.core import distributed

ABOUT = """A run folder stands for its models M1, M2, ... and the SFT baseline. A sweep folder stands for M1 and the
last model of each finished job. A model folder or hub id stands for itself. Settings are those of the
first run, with the settings given here on top. A run that was started with --config-dir needs it here
too. Each model is compared with the first one and the one before it."""

EXAMPLES = {
    "selfalign-evaluate outputs/demo-1a2b3c4d evaluate.round_robin=true": "all models of a run, each against each",
    "selfalign-evaluate outputs/sweeps/demo-5e6f7a8b evaluate.round_robin=true": "the last models of a sweep",
    "selfalign-evaluate outputs/demo-1a2b3c4d /models/other evaluate.count=100": "a run beside another model",
    "selfalign-evaluate /models/one /models/other tracker=none": "models of no run",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser whose help is printed. Arguments are told apart by `evaluate`."""
    found = command_parser("selfalign-evaluate", ABOUT, EXAMPLES)
    found.add_argument("sources", metavar="RUN_OR_MODEL", nargs="+", help="run, sweep or model folder, or hub id")
    found.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="settings, as of selfalign")
    found.add_argument("--config-dir", metavar="DIR", help="folder with options of your own")
    return found


def evaluate() -> None:
    """Run `selfalign-evaluate`. Exit codes are those of `main`, and 2 if no model is given."""
    set_streams()
    config_dir, arguments = take_config_dir(sys.argv[1:])
    sources = [argument for argument in arguments if "=" not in argument or Path(argument).exists()]
    if not sources or any(source.startswith("-") for source in sources):
        asked = bool({"-h", "--help"} & set(sources))
        print(parser().format_help(), end="", file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    set_environment()
    with report_errors("interrupted; repeat the command to continue"):
        from selfalign.launch.evaluate import evaluate_models

        with distributed.process_group():
            set_messages()
            evaluate_models(sources, [a for a in arguments if a not in sources], conf_folder(), config_dir)
