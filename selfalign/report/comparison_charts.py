"""Charts across jobs: over the settings in which they differ, from model to model, and step by step."""

from collections.abc import Mapping, Sequence
from html import escape
from operator import itemgetter
from typing import Any

from selfalign.metrics import catalog
from selfalign.metrics.catalog import Metric
from selfalign.report.charts import SMOOTHED, Series, draw_curves, draw_models, series_of, smoothing
from selfalign.report.html import CHART_FORMS, figure, grid, is_number, note
from selfalign.report.jobs import FEW, LEADING, JobComparison, JobResult, as_text, shortened

Row = dict[str, Any]

BAR = "bar: 95 % interval"
MEASURED = (
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
"""Number of a model's row, caption, and a reference line."""

CURVES = ((catalog.REWARDS_MARGINS, 0.0), (catalog.REWARDS_ACCURACIES, 0.5))
"""What is drawn step by step, and a reference line."""

Points = Sequence[tuple[int, Row]]
"""A place on the x axis and the row of a model whose number stands there."""


def over_settings(comparison: JobComparison) -> str:
    """The last models' numbers over each setting that is a number, or job by job where there is none."""
    axes = axes_of(comparison)
    if not axes:
        names = [comparison.mark(job) for job in comparison.jobs]
        lines = {"": list(enumerate(job.last for job in comparison.jobs))}
        return note("Each job's last model.") + _charts(names, lines, joined=False)
    return "".join(_over(comparison, key) for key in axes)


def axes_of(comparison: JobComparison) -> list[str]:
    """The differing settings to draw over: numbers, and few, or such as differ alone between some of the jobs.

    Only what finished jobs differ in counts, and the seed only if it is the only one.
    """
    axes = [key for key in comparison.keys if len(_sizes(comparison.finished, key)) > 1]
    if len(comparison.keys) > FEW:
        axes = [key for key in axes if any(len(line) > 1 for line in _lines(comparison, key).values())]
    return [key for key in axes if key != "seed"] or axes


def _sizes(jobs: Sequence[JobResult], key: str) -> list[float]:
    """The values of a setting in their order; none where one of them is no number."""
    values = [job.settings[key] for job in jobs if key in job.settings]
    return sorted(set(values)) if all(is_number(v) and not isinstance(v, bool) for v in values) else []


def _lines(comparison: JobComparison, key: str) -> dict[str, list[JobResult]]:
    """{the other settings that differ: the jobs with them}, of the finished jobs that have the key."""
    lines: dict[str, list[JobResult]] = {}
    for job in comparison.finished:
        if key in job.settings:
            others = [other for other in comparison.keys if other != key and other in job.settings]
            told = ", ".join(f"{other} = {shortened(as_text(job.settings[other]))}" for other in others)
            lines.setdefault(told, []).append(job)
    return lines


def _over(comparison: JobComparison, key: str) -> str:
    """The charts over one setting, a line for each combination of the others."""
    values = _sizes(comparison.jobs, key) or _sizes(comparison.finished, key)
    lines = {
        name: sorted(((values.index(job.settings[key]), job.last) for job in jobs), key=itemgetter(0))
        for name, jobs in _lines(comparison, key).items()
    }
    joined = len(lines) <= LEADING
    points = lines if joined else {"": [point for line in lines.values() for point in line]}
    said = note(f"Each job's last model; the values of {escape(key)} in their order, not to scale.")
    return f"<h3>Over {escape(key)}</h3>\n{said}{_charts([as_text(v) for v in values], points, joined=joined)}"


def over_iterations(comparison: JobComparison) -> str:
    """The leading jobs' numbers from model to model."""
    names = list(dict.fromkeys(row["model"] for job in comparison.finished for row in job.models))
    names.sort(key=lambda name: (name != "SFT", len(name), name))
    lines = {
        comparison.mark(job): [(names.index(row["model"]), row) for row in job.models] for job in comparison.leading
    }
    return who(comparison) + _charts(names, lines) if len(names) > 1 else ""


def curves(comparison: JobComparison) -> str:
    """Margin and accuracy of the leading jobs while each model was trained."""
    models = dict.fromkeys(row["model"] for job in comparison.leading for row in job.models)
    drawn = [_curve(comparison, model, *kind) for model in models for kind in CURVES]
    return who(comparison) + grid(drawn) if any(drawn) else ""


def _curve(comparison: JobComparison, model: str, metric: Metric, reference: float) -> str:
    series = [
        Series(name=comparison.mark(job), points=points, colour=colour)
        for colour, job in enumerate(comparison.leading)
        if job.run and (points := job.run.curves("align", metric.name).get(model))
    ]
    if not series:
        return ""
    longest = max(len(one.points) for one in series)
    mean = f"; strong line: moving mean over {smoothing(longest)} steps" if longest >= SMOOTHED else ""
    name = f"{metric.panel}, {model}"
    drawn = draw_curves(series, name, CHART_FORMS[metric.unit], reference=reference)
    return figure(name, f"mean over the pairs of a step{mean}", drawn)


def which(comparison: JobComparison) -> str:
    """Which jobs are shown, where there are too many to show all."""
    some = len(comparison.leading) < len(comparison.finished)
    return f"Of the {len(comparison.leading)} jobs with the {comparison.extreme} {comparison.metric}. " if some else ""


def who(comparison: JobComparison) -> str:
    """Which jobs are drawn, and what stands at their lines."""
    jobs = comparison.leading
    if all(comparison.mark(job) == f"{job.number}" for job in jobs):
        said = "; ".join(f"{job.number}: {comparison.told(job)}" for job in jobs) + "."
    else:
        said = f"Lines are named by {comparison.keys[0]}."
    return note(escape(which(comparison) + said))


def _charts(names: Sequence[str], lines: Mapping[str, Points], *, joined: bool = True) -> str:
    """Every number that is there, drawn over these names; lines by their name."""
    figures: list[str] = []
    for metric, caption, reference in MEASURED:
        series = [
            series_of(points, metric.name, name, colour, joined=joined)
            for colour, (name, points) in enumerate(lines.items())
        ]
        if any(one.points for one in series):
            title = metric.panel
            drawn = draw_models(names, series, title, CHART_FORMS[metric.unit], reference=reference)
            figures.append(figure(title, caption, drawn, list(lines) if len(lines) > 1 else []))
    return grid(figures)
