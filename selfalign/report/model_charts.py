"""Charts over the models of a run."""

from collections.abc import Iterable, Sequence

from selfalign.metrics.catalog import Metric
from selfalign.report.charts import Series, draw_models, series_of
from selfalign.report.html import Format, figure, grid
from selfalign.runs.reader import Finished

Chart = tuple[str, str, Sequence[Series], Format, float | None]
"""Title, caption, series, form of the values, and a value to compare with."""


def charts_over_models(run: Finished, charts: Iterable[Chart]) -> str:
    """Return a grid of charts over the models of a run; one without points is left out."""
    names = [row["model"] for row in run.models]
    return grid(
        figure(title, caption, draw_models(names, series, title, form, reference=reference), named(series))
        for title, caption, series, form, reference in charts
        if any(one.points for one in series)
    )


def named(series: Sequence[Series]) -> list[str]:
    """Return the names of several series; a single one is named by the title."""
    return [one.name for one in series if one.points] if len(series) > 1 else []


def of_models(run: Finished, metric: Metric, name: str = "", colour: int = 0) -> Series:
    """Return the series of a metric over the models of a run."""
    return series_of(enumerate(run.models), metric.name, name, colour)
