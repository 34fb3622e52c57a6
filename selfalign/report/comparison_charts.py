"""Charts of a comparison: over the settings in which the jobs differ, from model to model, and step by step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from operator import itemgetter
from typing import Any

from selfalign.metrics import catalog
from selfalign.metrics.catalog import Metric
from selfalign.report.charts import SMOOTHED, Series, draw_curves, draw_models, series_of, smoothing
from selfalign.report.html import CHART_FORMS, figure, grid, is_number, note
from selfalign.report.jobs import FEW, LEADING, SEED, JobComparison, JobResult, as_text

Row = dict[str, Any]

BAR = "bar: 95 % interval"
MEASURED = (
    (catalog.EVAL_TRUE_GAIN, f"share of checks passed, on the same instructions; {BAR}; dashed: M1", 0.0),
    (catalog.EVAL_TRUE_RATE, f"share of checks that the evaluation answers pass; {BAR}", None),
    (catalog.EVAL_WIN_RATE, f"{BAR}; dashed: as good as M1", 0.5),
    (catalog.EVAL_WIN_RATE_LENGTH_CONTROLLED, f"{BAR}; dashed: as good as M1", 0.5),
    (catalog.over(catalog.HELD_OUT, catalog.REWARDS_ACCURACIES), f"pairs set aside with a margin above 0; {BAR}", 0.5),
    (catalog.over(catalog.PREFERENCES, catalog.REWARDS_ACCURACIES), f"test pairs with a margin above 0; {BAR}", 0.5),
    (catalog.REWARDS_ACCURACIES, "pairs trained on with a margin above 0", 0.5),
    (catalog.REWARDS_MARGINS, "chosen minus rejected, pairs trained on", 0.0),
    (catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY, f"answer pairs ordered as humans did; {BAR}; dashed: chance", 0.5),
    (catalog.JUDGE_QUALITY_SPEARMAN, f"with the human order; {BAR}; dashed: chance", 0.0),
    (catalog.EVAL_MEAN_CHARACTERS, f"mean over the evaluation answers; {BAR}", None),
)
"""(metric, caption, y of the reference line)."""

CURVES = ((catalog.REWARDS_MARGINS, 0.0), (catalog.REWARDS_ACCURACIES, 0.5))
"""(metric drawn step by step, y of the reference line)."""

Points = Sequence[tuple[int, JobResult, str]]
"""(x, job or mean of jobs, name of the model)."""


def over_settings(comparison: JobComparison) -> str:
    """Return charts of the last models' metrics over each numeric setting; job by job where no setting is numeric."""
    axes = axes_of(comparison)
    if not axes:
        names = [comparison.mark(job) for job in comparison.groups]
        lines = {"": [(x, job, job.last.get("model", "")) for x, job in enumerate(comparison.groups)]}
        told = " ".join(filter(None, ["The charts show each job's last model.", replicates(comparison)]))
        return note(told) + _charts(names, lines, joined=False)
    return "".join(_over(comparison, key) for key in axes)


def axes_of(comparison: JobComparison) -> list[str]:
    """Return the differing settings that become x axes: numeric ones.

    If many settings differ, only those that differ alone between some of the jobs are taken. Only finished jobs count.
    The seed is no axis: jobs that differ only in it are replicates.
    """
    axes = [key for key in comparison.keys if key != SEED and len(_sizes(comparison.measured, key)) > 1]
    if len(comparison.keys) > FEW:
        axes = [key for key in axes if any(len(line) > 1 for line in _lines(comparison, key).values())]
    return axes


def _sizes(jobs: Sequence[JobResult], key: str) -> list[float]:
    """Return the sorted values of a setting; nothing if one of them is no number."""
    values = [job.settings[key] for job in jobs if key in job.settings]
    return sorted(set(values)) if all(is_number(v) and not isinstance(v, bool) for v in values) else []


def _lines(comparison: JobComparison, key: str) -> dict[str, list[JobResult]]:
    """Return {the other differing settings as text: the finished jobs with them} of the jobs that have the key."""
    lines: dict[str, list[JobResult]] = {}
    for job in comparison.measured:
        if key in job.settings:
            others = [other for other in comparison.keys if other != key and other in job.settings]
            name = ", ".join(f"{other} = {comparison.text(job, other)}" for other in others)
            lines.setdefault(name, []).append(job)
    return lines


def _over(comparison: JobComparison, key: str) -> str:
    """Return the charts over one setting, with a line for each combination of the others."""
    values = _sizes(comparison.groups, key) or _sizes(comparison.measured, key)
    lines = {
        name: sorted(((values.index(job.settings[key]), job, job.last["model"]) for job in jobs), key=itemgetter(0))
        for name, jobs in _lines(comparison, key).items()
    }
    joined = len(lines) <= LEADING
    points = lines if joined else {"": [point for line in lines.values() for point in line]}
    told = f"The charts show each job's last model. Values of {escape(key)} are sorted, not to scale."
    axis = note(" ".join(filter(None, [told, replicates(comparison)])))
    return f"<h3>Over {escape(key)}</h3>\n{axis}{_charts([as_text(v) for v in values], points, joined=joined)}"


def over_iterations(comparison: JobComparison) -> str:
    """Return charts of the leading jobs' metrics from model to model."""
    names = list(dict.fromkeys(row["model"] for job in comparison.measured for row in job.models))
    names.sort(key=lambda name: (name != "SFT", len(name), name))
    lines = {
        comparison.mark(job): [(names.index(row["model"]), job, row["model"]) for row in job.models]
        for job in comparison.leading
    }
    return who(comparison) + _charts(names, lines) if len(names) > 1 else ""


def curves(comparison: JobComparison) -> str:
    """Return charts of margin and accuracy in the training of the leading jobs' models."""
    models = dict.fromkeys(row["model"] for job in comparison.leading for row in job.models)
    drawn = [_curve(comparison, model, *kind) for model in models for kind in CURVES]
    return who(comparison) + grid(drawn) if any(drawn) else ""


def _curve(comparison: JobComparison, model: str, metric: Metric, reference: float) -> str:
    series = [
        Series(name=comparison.mark(job), points=points, colour=colour)
        for colour, job in enumerate(comparison.leading)
        if (points := _mean_curve(job, model, metric))
    ]
    if not series:
        return ""
    longest = max(len(one.points) for one in series)
    mean = f"; strong line: moving mean over {smoothing(longest)} steps" if longest >= SMOOTHED else ""
    name = f"{metric.panel}, {model}"
    drawn = draw_curves(series, name, CHART_FORMS[metric.unit], reference=reference)
    return figure(name, f"mean over the pairs of a step{mean}", drawn)


def _mean_curve(job: JobResult, model: str, metric: Metric) -> list[tuple[float, float]]:
    """Return a model's training curve: the mean over the seeds at the steps that all of them have."""
    curves = [dict(one.run.curves("align", metric.name).get(model, [])) for one in job.each if one.run]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
    return [(step, math.fsum(curve[step] for curve in curves) / len(curves)) for step in steps]


def replicates(comparison: JobComparison) -> str:
    """Return a sentence about jobs that differ only in their seed, if there are any; as HTML."""
    return "Pale points: single seeds; strong ones: their mean." if comparison.has_replicates else ""


def which(comparison: JobComparison) -> str:
    """Return a sentence about which jobs are shown, if not all are."""
    some = len(comparison.leading) < len(comparison.measured)
    if not some:
        return ""
    return f"Only the {len(comparison.leading)} jobs with the {comparison.extreme} {comparison.metric} are shown. "


def who(comparison: JobComparison) -> str:
    """Return a note about which jobs are drawn and how their lines are named."""
    jobs = comparison.leading
    if comparison.marked_by:
        names = f"Lines are named by {comparison.marked_by}."
    else:
        names = "; ".join(f"{job.number}: {comparison.description(job)}" for job in jobs) + "."
    return note(escape(which(comparison) + names))


def _charts(names: Sequence[str], lines: Mapping[str, Points], *, joined: bool = True) -> str:
    """Return a chart of every metric with values, over these names and with these named lines."""
    figures: list[str] = []
    for metric, caption, reference in MEASURED:
        series = [
            _series(points, metric, name, colour, joined=joined) for colour, (name, points) in enumerate(lines.items())
        ]
        if any(one.points for one in series):
            title = metric.panel
            drawn = draw_models(names, series, title, CHART_FORMS[metric.unit], reference=reference)
            figures.append(figure(title, caption, drawn, list(lines) if len(lines) > 1 else []))
    return grid(figures)


def _series(points: Points, metric: Metric, name: str, colour: int, *, joined: bool) -> Series:
    """Return the series of a metric, with a faint point for each seed of a mean."""
    rows = [(x, _row(job, model)) for x, job, model in points]
    single = [(x, _row(one, model).get(metric.name)) for x, job, model in points for one in job.seeds]
    series = series_of(rows, metric.name, name, colour, joined=joined)
    return replace(series, faint=[(x, value) for x, value in single if is_number(value)])


def _row(job: JobResult, model: str) -> Row:
    return next((row for row in job.models if row["model"] == model), {})
