"""The command line, and the only hydra.main: compose, convert, run.

`selfalign --help` answers without importing torch; everything heavy is imported once a configuration is there.
"""

import io
import logging
import os
import select
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from selfalign.core import distributed
from selfalign.core.files import PACKAGE

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from selfalign.launch.sweep import Prepared

EXAMPLES = (
    ("selfalign experiment=smoke", "the whole loop on a tiny random model, under a minute"),
    ("selfalign experiment=demo", "SmolLM2-135M-Instruct → M1 → M2 → M3"),
    ("selfalign experiment=demo loss=sr_ipo loss.lam=0.3 iterations=1", "another loss, one iteration"),
    ("selfalign experiment=demo model=pretrained model.path=/models/mine", "your own model"),
    ("selfalign -m experiment=demo loss.lam=0.1,0.3,0.5,1", "a sweep over λ; shared stages are made once"),
)

EVALUATE = """selfalign-evaluate: measures the models of finished runs, and any others, without training

usage: selfalign-evaluate RUN_OR_MODEL [RUN_OR_MODEL ...] [group=option ...] [key=value ...]

A run folder stands for its models M1, M2, ... and the SFT baseline, a sweep folder for M1 and the last model of every
finished job, a model folder or hub id for itself. Settings are those the first run was started with, and what is given
here on top. Each model is compared with the first one and the one before it; evaluate.matrix=true compares all.

examples:
  selfalign-evaluate outputs/demo-1a2b3c4d evaluate.matrix=true
  selfalign-evaluate outputs/sweeps/demo-5e6f7a8b evaluate.matrix=true
  selfalign-evaluate outputs/demo-1a2b3c4d /models/other evaluate.count=100 evaluate.against=outputs.json
  selfalign-evaluate /models/one /models/other track=none evaluate.head_to_head.model=/models/judge"""


def main() -> None:
    """Runs the command line; exit code 0, 1 for what the user can mend, 130 for Ctrl-C."""
    set_streams()
    if any(flag in sys.argv[1:] for flag in ("--help", "-h")):
        with suppress(BrokenPipeError):  # as in `selfalign --help | head`
            print(help_text(), flush=True)
            return
        os._exit(0)
    set_environment()
    with one_line_errors("interrupted; the same command continues where it stopped"):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the one line is ours to print.
        _run_hydra()


@contextmanager
def one_line_errors(interrupted: str) -> Iterator[None]:
    """Ends a command that fails with one line, a bug's with its traceback too; HYDRA_FULL_ERROR=1 lets all through."""
    full_error = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    try:
        yield
        sys.stdout.flush()  # Here, where it is noticed if nobody reads it any more.
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if full_error:
            raise
        message = _nobody_reads() if isinstance(error, BrokenPipeError) else None
        message = message or explain(error)
        if message is None:
            traceback.print_exc()
            message = "this is a bug in selfalign; please report it with the traceback above"
        where = "" if distributed.is_main() else f" in process {distributed.rank()}"
        for line in message.splitlines():  # Where several things are missing, each has its own.
            print(f"error{where}: {line}", file=sys.stderr, flush=True)
        sys.exit(1)


def evaluate() -> None:
    """Runs `selfalign-evaluate`; exit codes as of `main`, 2 for nothing to evaluate."""
    set_streams()
    sources = [argument for argument in sys.argv[1:] if "=" not in argument or Path(argument).exists()]
    if not sources or any(source.startswith("-") for source in sources):
        print(EVALUATE, file=sys.stderr)
        sys.exit(0 if {"-h", "--help"} & set(sources) else 2)
    set_environment()
    with one_line_errors("interrupted; the same command continues where it stopped"):
        from selfalign.launch.evaluate import evaluate_models

        with distributed.joined():
            set_messages()
            evaluate_models(sources, [a for a in sys.argv[1:] if a not in sources], conf_folder())


def help_text() -> str:
    """Usage, groups with their options, and examples."""
    folder = conf_folder()
    groups = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    width = max(len(path.name) for path in groups)
    lines = ["selfalign: iterative self-rewarding alignment of language models", ""]
    lines += ["usage: selfalign [-m] [group=option ...] [key=value ...]", "", "groups and their options:"]
    lines += [f"  {p.name:<{width}}  {' '.join(sorted(o.stem for o in p.glob('*.yaml')))}" for p in groups]
    lines += ["", "examples:"]
    lines += [f"  {command}\n      {meaning}" for command, meaning in EXAMPLES]
    lines += ["", "also: --cfg job shows the composed configuration, --info where it comes from,"]
    lines += ["      --hydra-help Hydra's own flags. Full tracebacks: HYDRA_FULL_ERROR=1."]
    lines += ["      selfalign-report PATH... compares runs, or writes a run's report again."]
    lines += ['      Bash completion: eval "$(selfalign -sc install=bash)"']
    return "\n".join(lines)


def conf_folder() -> Path:
    """`conf/` of the checkout, or the copy that travels in the wheel."""
    checkout = PACKAGE.parent / "conf"
    return checkout if (checkout / "config.yaml").exists() else PACKAGE / "conf"


def explain(error: BaseException) -> str | None:
    """One line for an error the user can mend, or None for a bug."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from selfalign.config.overrides import explain_override
    from selfalign.core.errors import SelfalignError
    from selfalign.core.failures import explain_failure

    if isinstance(error, SelfalignError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain_override(error, conf_folder())
    return explain_failure(error)


def _nobody_reads() -> str | None:
    """The end of a command whose output has lost its reader, as in `selfalign … | head`; None if it is another pipe."""
    from selfalign.core.failures import KEPT

    output = select.poll()
    output.register(1, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again when it ends.
    return f"nobody reads the output any more; {KEPT}"


def set_environment() -> None:
    """What has to be set before torch is imported, and how quiet libraries are."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Of the processes that joblib starts, after Ctrl-C.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")


def set_streams() -> None:
    """What the terminal's encoding lacks is shown as "?", instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def set_messages() -> None:
    """What is logged and how, once a run begins: other libraries say little, and there is one progress bar.

    Of several processes the main one speaks; the others say what they fail with.
    """
    from transformers.utils.logging import disable_progress_bar

    set_streams()  # A launcher has its own.
    logging.basicConfig(
        level=logging.INFO if distributed.is_main() else logging.ERROR, format="%(message)s", force=True
    )
    noisy = ("httpx", "httpx2", "filelock", "transformers", "accelerate", "matplotlib", "hydra", "hydra_plugins")
    for name in noisy:
        logging.getLogger(name).setLevel(logging.WARNING)
    # peft 0.21 asks transformers 5.23 by an old name; nothing a user could mend.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if not distributed.is_main():
        warnings.simplefilter("ignore")
    disable_progress_bar()  # of transformers: there is one bar, and it is ours.


def _run_hydra() -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from selfalign.config.experiment import register
    from selfalign.launch.experiment import run_experiment, warn_of_idle_settings
    from selfalign.launch.hydra_sweep import closed_in_the_end, run_sweep_job

    register()

    errors: list[Exception] = []

    @hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")
    def job(config: DictConfig) -> float | None:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            with distributed.joined():
                set_messages()
                return run_sweep_job(lambda: _prepare(config), explain)
        try:
            with distributed.joined():
                set_messages()
                prepared = _prepare(config)
                if prepared[0].dry_run:
                    from selfalign.launch.dry_run import (
                        dry_run,  # It imports transformers' Trainer, which takes seconds.
                    )

                    warn_of_idle_settings(prepared[0], prepared[2])
                    dry_run(prepared[0])
                else:
                    run_experiment(*prepared)
        except Exception as error:  # noqa: BLE001 - raised outside Hydra, which would print a line of its own
            errors.append(error)

    with closed_in_the_end():
        job()
    if errors:
        raise errors[0]


def _prepare(config: "DictConfig") -> "Prepared":
    """The experiment, its settings as text, and as plain dictionaries with the overrides that ask for them."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from selfalign.config.experiment import describe
    from selfalign.core.errors import SelfalignError

    experiment, text, described = describe(config)
    if experiment.dry_run and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise SelfalignError(
            "dry_run=true rehearses one run, not a sweep: set hydra.mode=RUN and the values of one job"
        )
    return experiment, text, {**described, "overrides": list(HydraConfig.get().overrides.task)}
