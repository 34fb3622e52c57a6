"""What is set before torch is imported, where `conf/` lies, and what is logged."""

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
    """`conf/` of the checkout, or the copy that travels in the wheel."""
    checkout = PACKAGE.parent / "conf"
    return checkout if (checkout / "config.yaml").exists() else PACKAGE / "conf"


def take_config_dir(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder that `--config-dir` names among the arguments, as Hydra takes it, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    known, others = parser.parse_known_args(arguments)
    return known.config_dir, others


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
