"""Modules broken on purpose, and the tests that must notice."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from selfalign.core.errors import SelfalignError

Check = Callable[..., None]


@contextmanager
def mutated(module: ModuleType, old: str, new: str) -> Iterator[ModuleType]:
    """The module with one text replaced, executed anew under another name.

    Inside the block its functions take the place of the original's wherever selfalign has imported them.
    """
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"the mutant's text occurs {source.count(old)} times in {module.__name__}: {old!r}"
    copy = ModuleType("mutant")
    copy.__file__ = module.__file__
    # Dataclasses look their module up by name.
    sys.modules["mutant"] = copy
    try:
        exec(compile(source.replace(old, new), "mutant", "exec"), copy.__dict__)
        with pytest.MonkeyPatch.context() as patch:
            for name, other in list(sys.modules.items()):
                if name.startswith("selfalign.") and other is not module:
                    for function in functions_of(module) & vars(other).keys():
                        if vars(other)[function] is vars(module)[function]:
                            patch.setattr(other, function, vars(copy)[function])
            yield copy
    finally:
        del sys.modules["mutant"]


def home_of(text: str, *modules: ModuleType) -> ModuleType:
    """The module among these in which a mutant's text stands."""
    [home] = [module for module in modules if text in inspect.getsource(module)]
    return home


def functions_of(module: ModuleType) -> set[str]:
    """The functions that a module defines."""
    return {
        name for name, value in inspect.getmembers(module, inspect.isfunction) if value.__module__ == module.__name__
    }


def assert_caught(
    module: ModuleType,
    tested_in: ModuleType,
    old: str,
    new: str,
    check: Check,
    fixtures: dict[str, Any],
    **more: Any,
) -> None:
    """Runs a test against a broken copy of a module; it must fail.

    Args:
        module: what is broken.
        tested_in: the test's module, where the copy takes the place of what was imported.
        old: a text that occurs once in the module.
        new: what stands there instead.
        check: the test.
        fixtures: what it may ask for.
        more: names that the copy may use.
    """
    # Undone before what `mutated` does: the other way round the copy would stay in a module that both have changed.
    with mutated(module, old, new) as copy, pytest.MonkeyPatch.context() as patch:
        vars(copy).update(more)
        for name, value in vars(copy).items():
            if getattr(value, "__module__", "") == copy.__name__ and name in vars(tested_in):
                patch.setattr(tested_in, name, value)
        with pytest.raises((AssertionError, pytest.fail.Exception, SelfalignError)):
            check(**{name: fixtures[name] for name in inspect.signature(check).parameters if name in fixtures})
