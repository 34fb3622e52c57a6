"""What users bring from outside: folders of options that installed packages name, and classes that options name.

A class is imported because a file of a configuration names it, and only then. What a package's folder holds is read
without importing the package, so that one that is broken harms those alone who choose its options.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from selfalign.core.errors import SelfalignError, one_line
from selfalign.store.source_code import source_code

logger = logging.getLogger(__name__)

ENTRY_POINTS = "selfalign.conf"
"""The group of entry points: each names a folder of options, as in `mine = "my_package.conf"`."""


@cache
def installed_folders() -> tuple[tuple[str, Path], ...]:
    """(distribution, its folder of options), by name; an entry point without such a folder is told of, and left out."""
    found: list[tuple[str, Path]] = []
    for point in entry_points(group=ENTRY_POINTS):
        distribution, folder = point.dist.name if point.dist else point.name, _folder_at(point.value)
        if folder is not None:
            found.append((distribution, folder))
        else:
            logger.warning(
                "%s: its entry point %s = %s in %s names no folder of an installed package; its options are left out",
                distribution,
                point.name,
                point.value,
                ENTRY_POINTS,
            )
    return tuple(sorted(found))


def _folder_at(place: str) -> Path | None:
    """The folder of a dotted name; the package is looked for, not imported."""
    package, *below = place.split(".")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [Path(root, *below) for root in (found.submodule_search_locations or () if found else ())]
    return next((folder for folder in folders if folder.is_dir()), None)


def taken(folder: Path, others: Iterable[Path]) -> list[str]:
    """The options of a folder that one of the others has too, as `group/option`; those of the others are used."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))
    places = list(others)
    return [name.with_suffix("").as_posix() for name in names if any((place / name).is_file() for place in places)]


def check_options(folder: Path, conf: Path) -> None:
    """Checks that a user's folder is one, and that all its options can be chosen.

    Args:
        folder: what `--config-dir` names.
        conf: `conf/`.

    Raises:
        SelfalignError: there is no such folder, or an option has a name that is taken.
    """
    if not folder.is_dir():
        raise SelfalignError(f"--config-dir {folder}: no such folder")
    if names := taken(folder, [conf, *(place for _, place in installed_folders())]):
        raise SelfalignError(
            f"--config-dir {folder}: there is a {names[0]} already, which would be used: give yours another name"
        )


def import_component(name: str) -> type:
    """The class of a dotted name, whose fields are the settings of its component.

    Args:
        name: `module.Class`; the module is looked for as Python does, and last in the current folder.

    Raises:
        SelfalignError: there is none, its module cannot be imported, or it is no class that can hold settings.
    """
    place, _, kind = name.rpartition(".")
    module = _import(place)
    found = getattr(module, kind, None)
    if not isinstance(found, type):
        near = get_close_matches(kind, [one for one, what in vars(module).items() if isinstance(what, type)], n=1)
        meant = f"; did you mean {place}.{near[0]}?" if near else ""
        raise SelfalignError(f"{place} ({module.__file__}) has no class {kind}{meant}")
    if not is_dataclass(found):
        raise SelfalignError(f"{name} must be a dataclass: its fields are the settings")
    if found.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
        raise SelfalignError(f"{name} is a frozen dataclass, whose settings cannot be set: leave out frozen=True")
    if left := sorted(getattr(found, "__abstractmethods__", ())):
        raise SelfalignError(f"{name} leaves undefined what its base asks for: {', '.join(left)}")
    source_code(found)
    return found


def _import(place: str) -> ModuleType:
    """A module; the current folder is looked into where the module is nowhere else.

    Raises:
        SelfalignError: there is no such module, or it fails.
    """
    package = place.partition(".")[0]
    if (
        package.isidentifier()
        and importlib.util.find_spec(package) is None
        and (here := str(Path.cwd())) not in sys.path
    ):
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise SelfalignError(f"cannot import {place}: {one_line(error)}") from error
        raise SelfalignError(
            f"no module {error.name}; it is looked for among installed packages, on PYTHONPATH and in {Path.cwd()}"
        ) from error
    except Exception as error:
        raise SelfalignError(f"cannot import {place}: {type(error).__name__}: {one_line(error)}") from error
