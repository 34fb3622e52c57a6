"""Environment variables before torch is imported, the folder `conf/`, and logging."""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from selfalign.core import distributed
from selfalign.core.files import PACKAGE


def conf_folder() -> Path:
    """Return the copy of `conf/` that the wheel has in the package, or `conf/` of the checkout."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parent / "conf"


def take_config_dir(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the folder that `--config-dir` names, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    known, others = parser.parse_known_args(arguments)
    return known.config_dir, others


def set_environment() -> None:
    """Set environment variables that must be set before torch is imported, and silence libraries."""
    set_waiting()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    set_bars()
    # Warnings of joblib's processes after Ctrl-C.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")


def set_waiting() -> None:
    """Let OpenMP's threads wait awake for some microseconds, then sleep, unless the environment says how they wait.

    The small operations of a small model follow each other so fast that threads which sleep at once gain next to
    nothing from a second core; threads that stay awake take it from whatever else runs there.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # For GNU's OpenMP, which PyTorch has on Linux.


def set_bars() -> None:
    """Switch off the progress bars of libraries where they would fill a log file. tqdm reads this on import.

    Bars of selfalign say themselves whether they are shown, which counts more.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def set_streams() -> None:
    """Print "?" for characters that the terminal's encoding lacks, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def set_messages() -> None:
    """Set up logging for a run, and hide the messages and progress bars of other libraries.

    Rank 0 logs everything; the other ranks only log errors.
    """
    set_bars()  # A launcher's process begins here.
    from transformers.utils.logging import disable_progress_bar

    set_streams()  # A launcher has replaced the streams.
    logging.basicConfig(
        level=logging.INFO if distributed.is_main() else logging.ERROR, format="%(message)s", force=True
    )
    noisy = ("httpx", "httpx2", "filelock", "transformers", "accelerate", "matplotlib", "hydra", "hydra_plugins")
    for name in noisy:
        logging.getLogger(name).setLevel(logging.WARNING)
    # peft 0.21 uses a deprecated name of transformers 5.23; users cannot change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # From transformers 5.24 on it is called `cache`, which 5.23 does not know yet.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    if not distributed.is_main():
        warnings.simplefilter("ignore")
    disable_progress_bar()  # The bar of transformers; selfalign shows its own.
