"""The report's section on the truth beside the judge, for runs whose instructions say what is right."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from selfalign.metrics import catalog
from selfalign.metrics.catalog import Metric
from selfalign.report.charts import Series, series_of
from selfalign.report.html import Column, compact, decimals, explained, is_number, percent
from selfalign.report.model_charts import Chart, charts_over_models, of_models
from selfalign.runs.labels import BASELINE, Label
from selfalign.runs.reader import Finished

MODELS = (
    Column("model", "the model of this row", "model", decimals(0)),
    *map(
        Column.of,
        (
            catalog.EVAL_TRUE_RATE,
            catalog.EVAL_TRUE_GAIN,
            catalog.EVAL_TRUE_WIN_RATE,
            catalog.EVAL_SCORE_WIN_RATE,
            catalog.EVAL_MEAN_SCORE,
        ),
    ),
)

ITERATIONS = (
    Column("iteration", "in which the candidates were written", "iteration", decimals(0)),
    *(
        Column.of(metric, "truth")
        for metric in (
            catalog.TRUTH_RATE,
            catalog.TRUTH_JUDGE_ACCURACY,
            catalog.TRUTH_PAIRS_RIGHT,
            catalog.TRUTH_PAIRS_WRONG,
            catalog.TRUTH_PAIR_GAP,
        )
    ),
    Column.of(catalog.MEAN_SCORE_MARGIN, "pairs"),
)


SHARES = ("Verifier", "RubricScore")
"""Judges whose scores are shares, by their class."""


def truth_section(run: Finished) -> str:
    """Return charts and tables of the true rate beside the judge's scores; empty without checks."""
    if not any(catalog.EVAL_TRUE_RATE.name in row for row in run.models):
        return ""
    rows = [row for row in run.iteration_rows() if f"truth/{catalog.TRUTH_RATE.name}" in row]
    return (
        _charts(run)
        + explained("truth beside the judge", MODELS, run.models)
        + (explained("judge and pairs against the truth", ITERATIONS, rows) if rows else "")
    )


def _charts(run: Finished) -> str:
    bar = "bar: 95 % interval"
    charts: tuple[Chart, ...] = (
        (
            "Truth and judge's score",
            f"evaluation answers: share of checks passed, and mean score as a share of the scale; {bar}",
            [of_models(run, catalog.EVAL_TRUE_RATE, "truth"), replace(_scores(run), colour=1)],
            percent,
            None,
        ),
        (
            "Wins against M1, by truth and by the judge",
            f"evaluation answers; a tie counts half; {bar}; dashed: as good as M1",
            [
                of_models(run, catalog.EVAL_TRUE_WIN_RATE, "truth"),
                of_models(run, catalog.EVAL_SCORE_WIN_RATE, "judge", colour=1),
            ],
            percent,
            0.5,
        ),
        (
            "Judge against the truth",
            f"candidates that differ in truth, ordered alike; at the model that wrote them; {bar}; dashed: chance",
            [_of_candidates(run, "truth", catalog.TRUTH_JUDGE_ACCURACY)],
            percent,
            0.5,
        ),
        (
            "Score gap of pairs",
            "chosen minus rejected, mean; at the model that wrote them",
            [_of_candidates(run, "pairs", catalog.MEAN_SCORE_MARGIN)],
            compact,
            None,
        ),
        (
            "True gap of pairs",
            f"share of checks passed, chosen minus rejected; {bar}",
            [_of_candidates(run, "truth", catalog.TRUTH_PAIR_GAP)],
            percent,
            0.0,
        ),
    )
    return charts_over_models(run, charts)


def _of_candidates(run: Finished, part: str, metric: Metric) -> Series:
    """Return a metric of an iteration's data at the model that wrote it."""
    wrote = [(x, row["iteration"] + 1) for x, row in enumerate(run.models) if row["model"] != BASELINE]
    return series_of([(x, run.counts.get(Label.iteration(n, part), {})) for x, n in wrote], metric.name)


def _scores(run: Finished) -> Series:
    """Return the mean score of each model's answers as a share of the judge's scale, if it has one."""
    name, scale = catalog.EVAL_MEAN_SCORE.name, _scale_of(run.judging)
    if scale is None:
        return series_of([], name, "judge")
    low, high = scale
    shares = [
        (x, {name: (row[name] - low) / (high - low)}) for x, row in enumerate(run.models) if is_number(row.get(name))
    ]
    return series_of(shares, name, "judge")


def _scale_of(judge: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the ends of a judge's scale, or of that of all judges of a panel; None where there is none."""
    if "members" in judge:
        scales = {_scale_of(member) for member in judge["members"].values()}
        return scales.pop() if len(scales) == 1 else None
    if judge.get("class") in SHARES:
        return 0, 1
    return (judge["min_score"], judge["max_score"]) if "min_score" in judge else None
