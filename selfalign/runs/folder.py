"""A run's folder: its name by its settings, and what is prepared in it."""

import re
from itertools import count
from pathlib import Path
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_json, write_atomically
from selfalign.runs.tracker import forget_tracked
from selfalign.store.key import to_key_json


def run_folder(output: Path, name: str, config: Any, *, fresh: bool) -> tuple[Path, str]:
    """Return (run folder, artifact namespace).

    The same settings have the same folder, so the same command continues it. With `fresh`, the folder takes the next
    free number and the namespace is its name, so that nothing is shared with other runs. Else the namespace is empty.
    """
    folder = output / f"{name}-{digest_json(to_key_json(config))[:8]}"
    if not fresh:
        return folder, ""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(1))
    folder = next(path for path in numbered if not path.exists())
    return folder, folder.name


def check_name(name: str) -> None:
    """A name becomes part of a folder's name.

    Raises:
        SelfalignError: it has other characters than letters, digits, `.`, `_`, `-`.
    """
    if not re.fullmatch(r"[\w][\w.-]{0,79}", name):
        raise SelfalignError(f"name must be 1 to 80 letters, digits, '.', '_' or '-', got {name!r}")


def open_folder(folder: Path, config_yaml: str, *, anew: bool = False) -> None:
    """Prepares a run folder: the resolved configuration, and metrics that are written anew from the artifacts.

    Args:
        folder: made if it is not there.
        config_yaml: the resolved configuration.
        anew: whether what it tells of is no longer what the run is made of, because the data are others: then it goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if anew:
        for page in ("summary.json", "report.html", "model_card.md"):
            (folder / page).unlink(missing_ok=True)
        forget_tracked(folder)
    write_atomically(folder / "config.yaml", [config_yaml.encode()])
    write_atomically(folder / "metrics.jsonl", [])
