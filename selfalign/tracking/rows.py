"""What trackers take from the rows of metrics.jsonl: numbers by name, and the axis of each."""

from collections.abc import Iterable
from typing import Any

from selfalign.metrics.catalog import METRICS, PAIRS_OF
from selfalign.runs.labels import Label

AXES = ("step", "iteration")
"""Entries of a row that say where its numbers stand."""


def numbers_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return {name in a tracker: number} of a row. The label's prefix tells artifacts of one iteration apart."""
    prefix = Label.parse(row["label"]).metric_prefix
    return {prefix + name: value for name, value in row.items() if name not in AXES and not isinstance(value, str)}


def by_iteration(benchmarks: Iterable[str]) -> list[str]:
    """Return the names of the metrics whose axis is the iteration: single ones, and groups as `group/*`.

    The axis of all others is the row's step.
    """
    by_step = {group_of(metric.name) for metric in METRICS.values() if metric.axis == "step"}
    once = [name for name, metric in METRICS.items() if metric.axis == "iteration" and not name.startswith("{")]
    single = [name for name in once if "/" not in name or group_of(name) in by_step]
    groups = [*(group_of(name) for name in once if name not in single), *map(group_of, PAIRS_OF), *benchmarks]
    return [*single, *(f"{group}/*" for group in dict.fromkeys(groups))]


def group_of(name: str) -> str:
    """Return the part of a metric's name before the first slash."""
    return name.partition("/")[0]
