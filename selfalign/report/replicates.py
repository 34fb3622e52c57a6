"""The mean of runs that differ only in their seed, with intervals that count both seeds and instructions."""

import math
from collections.abc import Sequence
from typing import Any

from selfalign.metrics.catalog import declared
from selfalign.metrics.intervals import Estimate, wilson
from selfalign.metrics.replicates import Mean, mean_of_estimates, over_seeds
from selfalign.report.html import is_number
from selfalign.report.instruction_values import instruction_values
from selfalign.runs.reader import Finished

Row = dict[str, Any]

PLAIN = {"count", "flag", "tokens", "tokens/s", "s", "GiB", "currency"}
"""Units of the metrics whose means over seeds need no interval."""

BOUNDS = {"share": (0.0, 1.0), "share difference": (-1.0, 1.0), "correlation": (-1.0, 1.0)}
"""{unit: least and most possible value}."""

ENDS = ("_low", "_high")


def pooled_models(runs: Sequence[Finished]) -> list[Row]:
    """Return a row for each model that all runs have: the means of its metrics over the runs, with 95 % intervals.

    A metric that not all runs have is left out.
    """
    rows = [{row["model"]: row for row in run.models} for run in runs]
    names = [name for name in rows[0] if all(name in others for others in rows)]
    return [_pooled(runs, name, [of_run[name] for of_run in rows]) for name in names]


def _pooled(runs: Sequence[Finished], model: str, rows: Sequence[Row]) -> Row:
    pooled: Row = {"model": model}
    for key in rows[0]:
        values = [row[key] for row in rows if is_number(row.get(key))]
        if len(values) < len(rows) or (key.endswith(ENDS) and key.rpartition("_")[0] in rows[0]):
            continue
        if len({*values}) == 1:
            pooled[key] = values[0]
        else:
            pooled[key] = math.fsum(values) / len(values)
        unit = _unit(key)
        if unit not in PLAIN and key != "iteration":
            found, (least, most) = _interval(runs, model, key, rows), BOUNDS.get(unit, (-math.inf, math.inf))
            ends = {name: min(most, max(least, end)) for name, end in found.known(key).items() if name != key}
            pooled |= ends
    return pooled


def _unit(metric: str) -> str:
    """Return the unit of a metric; empty if it is not known."""
    known = declared(metric)
    return known.unit if known else ""


def _interval(runs: Sequence[Finished], model: str, metric: str, rows: Sequence[Row]) -> Estimate:
    """Return the interval of a metric's mean over runs: around the mean of their values, and as wide as `over_seeds`.

    A share of which all records of all runs agree has Wilson's interval over its instructions.
    """
    value = math.fsum(row[metric] for row in rows) / len(rows)
    seeds = [instruction_values(run, model, metric) for run in runs]
    if all(seeds):
        mean = over_seeds(seeds)
        if _unit(metric) == "share" and not mean.variance > 0:
            fewest = min(map(len, seeds))
            same = wilson(value * fewest, fewest)
            return Estimate(value, same.low, same.high)
    else:
        ends = [[row.get(f"{metric}{end}", math.nan) for end in ENDS] for row in rows]
        mean = mean_of_estimates([Estimate(row[metric], *end) for row, end in zip(rows, ends, strict=True)])
    return Mean(value, mean.variance, mean.freedom).interval()
