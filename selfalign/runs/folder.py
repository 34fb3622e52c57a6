"""The run folder: its name, which follows from the settings, and its preparation."""

import re
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_json, write_atomically
from selfalign.runs.labels import Label
from selfalign.runs.progress import PROGRESS
from selfalign.runs.tracker import forget_tracked
from selfalign.store.key import to_key_json


def run_folder(output: Path, name: str, config: Any, *, fresh: bool) -> tuple[Path, str]:
    """Return (run folder, artifact namespace).

    The folder follows from the settings, so the same command continues the same run. With `fresh`, the folder has the
    next free number and the namespace is its name, so the run shares no artifacts. Otherwise the namespace is empty.
    """
    folder = output / f"{name}-{digest_json(to_key_json(config))[:8]}"
    if not fresh:
        return folder, ""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(1))
    folder = next(path for path in numbered if not path.exists())
    return folder, folder.name


def check_name(name: str) -> None:
    """Check that a name can be part of a folder's name.

    Raises:
        SelfalignError: the name is empty, too long, or has characters other than letters, digits, `.`, `_` and `-`.
    """
    if not re.fullmatch(r"[\w][\w.-]{0,79}", name):
        raise SelfalignError(f"name must be 1 to 80 letters, digits, '.', '_' or '-', got {name!r}")


def open_folder(folder: Path, config_yaml: str, keys: Mapping[Label, str] | None = None) -> None:
    """Prepare a run folder: write the resolved configuration and empty metrics, which are filled from the artifacts.

    If the folder links an artifact of another key, the data have changed since it was last open. Then links, summary,
    report and model card of the old data are removed, and the tracker starts a new run.

    Args:
        folder: the run folder; it is made if it is missing.
        config_yaml: the resolved configuration.
        keys: {label: key} of the run's artifacts, as far as they are known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    links = {label.link_in(folder): key for label, key in (keys or {}).items()}
    if any(link.is_symlink() and link.readlink().name != key for link, key in links.items()):
        shutil.rmtree(folder / "artifacts")
        for page in ("summary.json", "report.html", "model_card.md", PROGRESS):
            (folder / page).unlink(missing_ok=True)
        forget_tracked(folder)
    write_atomically(folder / "config.yaml", [config_yaml.encode()])
    write_atomically(folder / "metrics.jsonl", [])
