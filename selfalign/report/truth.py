"""The report's section on the truth beside the judge, for runs whose instructions say what is right."""

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
    scale = run.config["judge"]
    low, high = scale.get("min_score", 0), scale.get("max_score", 1)
    name = catalog.EVAL_MEAN_SCORE.name
    shares: list[tuple[int, dict[str, Any]]] = [
        (x, {name: (row[name] - low) / (high - low)}) for x, row in enumerate(run.models) if is_number(row.get(name))
    ]
    on_scale = all(0 <= row[name] <= 1 for _, row in shares)
    return series_of(shares if on_scale else [], name, "judge")
