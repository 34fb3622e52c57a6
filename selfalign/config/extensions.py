"""Extensions of users: folders of options in installed packages, and classes that options name.

A class is imported only if a configuration file names it. The folder of a package is read without importing the
package, so that a broken package only affects runs that choose its options.
"""

import importlib.util
import logging
from collections.abc import Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from selfalign.core.errors import SelfalignError
from selfalign.store.source_code import import_code, source_code

logger = logging.getLogger(__name__)

ENTRY_POINTS = "selfalign.conf"
"""Group of entry points that name a folder of options each, as in `mine = "my_package.conf"`."""


@cache
def installed_folders() -> tuple[tuple[str, Path], ...]:
    """Return (distribution, its folder of options), sorted by name.

    An entry point without such a folder is left out with a warning.
    """
    found: list[tuple[str, Path]] = []
    for point in entry_points(group=ENTRY_POINTS):
        distribution, folder = point.dist.name if point.dist else point.name, _folder_at(point.value)
        if folder is not None:
            found.append((distribution, folder))
        else:
            logger.warning(
                "%s: its entry point %s = %s in %s is no folder of an installed package; its options are left out",
                distribution,
                point.name,
                point.value,
                ENTRY_POINTS,
            )
    return tuple(sorted(found))


def _folder_at(place: str) -> Path | None:
    """Return the folder of a dotted name, without importing its package."""
    package, *below = place.split(".")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [Path(root, *below) for root in (found.submodule_search_locations or () if found else ())]
    return next((folder for folder in folders if folder.is_dir()), None)


def taken(folder: Path, others: Iterable[Path]) -> list[str]:
    """Return the options of a folder, as `group/option`, that one of the others has too; those are not used."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))
    places = list(others)
    return [name.with_suffix("").as_posix() for name in names if any((place / name).is_file() for place in places)]


def check_options(folder: Path, conf: Path) -> None:
    """Check that a user's folder exists, and that all its options can be chosen.

    Args:
        folder: the folder that `--config-dir` names.
        conf: `conf/`.

    Raises:
        SelfalignError: there is no such folder, or an option has a name that exists already.
    """
    if not folder.is_dir():
        raise SelfalignError(f"--config-dir {folder}: no such folder")
    if names := taken(folder, [conf, *(place for _, place in installed_folders())]):
        raise SelfalignError(
            f"--config-dir {folder}: an option {names[0]} exists already and would be used: rename yours"
        )


def import_component(name: str) -> type:
    """Return the class of a dotted name; its fields are the settings of a component.

    Args:
        name: `module.Class`. The module is looked for as Python does, and last in the current folder.

    Raises:
        SelfalignError: it does not exist, its module cannot be imported, or it is no class that can hold settings.
    """
    place, _, kind = name.rpartition(".")
    module = import_code(place)
    found = getattr(module, kind, None)
    if not isinstance(found, type):
        near = get_close_matches(kind, [one for one, what in vars(module).items() if isinstance(what, type)], n=1)
        meant = f"; did you mean {place}.{near[0]}?" if near else ""
        raise SelfalignError(f"{place} ({module.__file__}) has no class {kind}{meant}")
    if not is_dataclass(found):
        raise SelfalignError(f"{name} must be a dataclass, because its fields are the settings")
    if found.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
        raise SelfalignError(f"{name} is a frozen dataclass, so its settings cannot be set: leave out frozen=True")
    if left := sorted(getattr(found, "__abstractmethods__", ())):
        raise SelfalignError(f"{name} does not define what its base requires: {', '.join(left)}")
    source_code(found)
    return found
