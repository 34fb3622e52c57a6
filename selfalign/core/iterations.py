"""Settings that have one value for all iterations, or a list with one for each."""

from typing import Any

from selfalign.core.errors import SelfalignError


def value_at(setting: Any, iteration: int) -> Any:
    """Return the value of a setting in an iteration, counted from 1."""
    return setting[iteration - 1] if isinstance(setting, list) else setting


def values_of(setting: Any) -> list[Any]:
    """Return all values of a setting."""
    return setting if isinstance(setting, list) else [setting]


def check_iterations(key: str, setting: Any, iterations: int) -> None:
    """Check that a list has a value for each iteration.

    Raises:
        SelfalignError: it has another length.
    """
    if isinstance(setting, list) and len(setting) != iterations:
        raise SelfalignError(
            f"{key} has {len(setting)} values for iterations={iterations}: give one for each iteration, or a single "
            "number"
        )


def is_below_one(value: Any) -> bool:
    """Return whether a value is a number from 0 to below 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
