"""The code a component is made of or calls, where that is not selfalign's own: part of the key of what it makes."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.abc import SourceLoader
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any

from selfalign.core.errors import SelfalignError, one_line
from selfalign.core.files import digest_file, digest_json, path_of

KNOWN = {"selfalign", *sys.stdlib_module_names}
"""Packages whose code is told by other means: a store's FORMAT, and the version of Python."""

SOURCE = "source code"
"""Stands among a component's settings in a key; no setting can have this name."""


def import_code(place: str) -> ModuleType:
    """Import a module. The current folder is searched if the module is nowhere else.

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


class FileLoader(SourceLoader):
    """Imports a file as it was read, so that what runs is what its digest is of."""

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, path.read_bytes()

    def get_filename(self, fullname: str) -> str:
        """Return the file's path, for tracebacks."""
        return str(self.path)

    def get_data(self, path: str | bytes) -> bytes:
        """Return the bytes that were read; nothing is looked for in a cache of compiled files."""
        return self.source


@cache
def function_at(place: str) -> tuple[Callable[..., Any], dict[str, str]]:
    """Return what "FILE.py:NAME" or "package.module:NAME" names, and {file or package: digest of its code}.

    It is imported once a process, so that a file that is edited during a run changes neither keys nor results.

    Raises:
        SelfalignError: there is no such file, module or function, or the import fails.
    """
    where, _, name = place.rpartition(":")
    code: dict[str, str] = {}
    if where.endswith(".py"):
        path = path_of(where).absolute()
        if not path.is_file():
            raise SelfalignError(f"{where}: no such file in {Path.cwd()}")
        loader = FileLoader(path)
        module, code = _import_file(loader), {path.name: hashlib.sha256(loader.source).hexdigest()[:16]}
    else:
        module = import_code(where)
    found = getattr(module, name, None)
    if not callable(found):
        raise SelfalignError(f"{where} has no function {name}; it has {', '.join(_functions(module)) or 'none'}")
    packages = {module.__name__, getattr(found, "__module__", None) or module.__name__}
    tops = {package.partition(".")[0] for package in packages if package != _name_of(where)} - KNOWN
    return found, code | {package: _digest(package) for package in sorted(tops)}


def _import_file(loader: FileLoader) -> ModuleType:
    """Import a file under a name that no package has.

    Raises:
        SelfalignError: it fails.
    """
    name = _name_of(loader.path.name)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise SelfalignError(f"cannot import {loader.path}: {type(error).__name__}: {one_line(error)}") from error
    return module


def _name_of(where: str) -> str:
    """Return the name under which a file is imported."""
    return f"file:{Path(where).name}"


def _functions(module: ModuleType) -> list[str]:
    """Return the names of what a module defines and can be called."""
    return [name for name, what in vars(module).items() if callable(what) and not name.startswith("_")]


@cache
def source_code(kind: type) -> dict[str, str]:
    """{package: digest of its code} of a class and its bases; nothing of selfalign's own classes.

    Computed once a process, so that a file that is edited during a run does not change the keys of what follows.

    Raises:
        SelfalignError: a package has no files that can be read.
    """
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__} - KNOWN
    return {package: _digest(package) for package in sorted(packages)}


@cache
def _digest(package: str) -> str:
    """16 hexadecimal digits over every module of a package, whichever of them a class needs."""
    files = dict(sorted(_modules(package)))
    if not files:
        raise SelfalignError(f"{package}: no source files, so that what it makes could not be told from what others do")
    return digest_json({name: digest_file(path) for name, path in files.items()})[:16]


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    """(name below the package, file) of each."""
    module = sys.modules[package]
    if not hasattr(module, "__path__"):
        file = Path(getattr(module, "__file__", None) or "")
        yield from [(file.name, file)] if file.is_file() else []
    for root in map(Path, getattr(module, "__path__", ())):
        for path in root.rglob("*"):
            if path.name.endswith((*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)) and path.is_file():
                yield path.relative_to(root).as_posix(), path


def packages_in(inputs: Any) -> dict[str, str]:
    """{package: digest of its code} of all components among the inputs of an artifact, as its manifest has them."""
    found: dict[str, str] = {}
    items = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, list) else ()
    for item in items:
        found |= packages_in(item)
    return found | (inputs.get(SOURCE, {}) if isinstance(inputs, Mapping) else {})


def version_of(package: str) -> str:
    """The version of the distribution that a package is of; empty where it was not installed."""
    distributions = packages_distributions().get(package)
    return version(distributions[0]) if distributions else ""
