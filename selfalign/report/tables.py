"""Tables of the report: each model's answers, rewards and judge quality."""

import re
from array import array
from dataclasses import replace
from html import escape

from selfalign.core.records import Judgement
from selfalign.metrics import catalog
from selfalign.metrics.summaries import score_histogram
from selfalign.report.charts import draw_heatmap, draw_histogram
from selfalign.report.html import Column, Row, decimals, explained, figure, grid, is_number, note, percent, strong
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished

MODEL = Column("model", "the model of this row", "model", decimals(0))

ANSWERS = (
    MODEL,
    *map(
        Column.of,
        (
            catalog.EVAL_WIN_RATE,
            catalog.EVAL_WIN_RATE_LENGTH_CONTROLLED,
            catalog.EVAL_WINS,
            catalog.EVAL_TIES,
            catalog.EVAL_LOSSES,
            catalog.EVAL_POSITION_BIAS,
            catalog.EVAL_SCORE_WIN_RATE,
            catalog.EVAL_MEAN_CHARACTERS,
            catalog.EVAL_LENGTH_GROWTH,
            catalog.EVAL_FINISHED_SHARE,
            catalog.EVAL_DISTINCT_2,
            catalog.EVAL_REPEATED_4,
            catalog.EVAL_KL_TO_M1,
        ),
    ),
)

REWARDS = (
    catalog.REWARDS_MARGINS,
    catalog.REWARDS_ACCURACIES,
    catalog.REWARDS_TIES,
    catalog.REWARDS_ACCURACIES_AUGMENTED,
    catalog.REFINEMENT_MEAN,
    catalog.REFINEMENT_STD,
)

PREFERENCES = (
    MODEL,
    Column.of(catalog.PREFERENCES_PAIRS),
    *(Column.of(metric, "preferences") for metric in REWARDS),
    *map(
        Column.of,
        (
            catalog.PREFERENCES_SCORED,
            catalog.PREFERENCES_MARGIN_SCORE_PEARSON,
            catalog.PREFERENCES_MARGIN_SCORE_SPEARMAN,
            catalog.PREFERENCES_DELTA_SCORE_PEARSON,
            catalog.PREFERENCES_DELTA_SCORE_SPEARMAN,
        ),
    ),
)

DRIFT = (
    MODEL,
    *map(
        Column.of,
        (
            catalog.LOGPS_CHOSEN_CHANGE,
            catalog.LOGPS_CHOSEN_CHANGE_PER_TOKEN,
            catalog.LOGPS_REJECTED_CHANGE,
            catalog.LOGPS_REJECTED_CHANGE_PER_TOKEN,
            catalog.SCORE_LENGTH_CORRELATION,
            catalog.EVAL_SCORE_LENGTH_CORRELATION,
            catalog.REWARDS_LENGTH_CORRELATION,
        ),
    ),
)

JUDGING = (
    MODEL,
    *map(
        Column.of,
        (
            catalog.JUDGE_QUALITY_QUESTIONS,
            catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY,
            catalog.JUDGE_QUALITY_FIVE_BEST,
            catalog.JUDGE_QUALITY_EXACT_MATCH,
            catalog.JUDGE_QUALITY_SPEARMAN,
            catalog.JUDGE_QUALITY_KENDALL,
            catalog.JUDGE_QUALITY_UNDEFINED,
            catalog.JUDGE_QUALITY_UNJUDGED,
        ),
    ),
)

OTHERS = (
    MODEL,
    *(Column.of(catalog.against(opponent, metric)) for opponent in catalog.OPPONENTS for metric in catalog.COMPARED),
)

COMPARISONS = (
    Column("model", "the model whose wins are counted", "model", decimals(0)),
    Column("opponent", "the model it is compared with", "opponent", decimals(0)),
    Column("instructions", "the instructions that both answered", "asked", decimals(0)),
    Column("judged", "comparisons with a verdict", "judged", decimals(0)),
    Column("won", catalog.WINS.meaning, "won", percent),
    Column("tied", catalog.TIES.meaning, "tied", percent),
    Column("lost", catalog.LOSSES.meaning, "lost", percent),
    Column.of(catalog.WIN_RATE),
    Column.of(catalog.WIN_RATE_LENGTH_CONTROLLED),
)

CALIBRATION = (
    MODEL,
    *map(
        Column.of,
        (
            catalog.CALIBRATION_PARSED,
            catalog.CALIBRATION_SPREAD,
            catalog.CALIBRATION_TIES,
            catalog.CALIBRATION_POSITION_BIAS,
            catalog.CALIBRATION_SELF_CONSISTENCY,
            catalog.CALIBRATION_LENGTH_CORRELATION,
            *(catalog.CALIBRATION_SCORE_OF_RANK.of(rank=rank) for rank in range(1, 6)),
        ),
    ),
)


def answers_table(run: Finished) -> str:
    """Return win rates, length and drift of each model's answers."""
    if not any(catalog.EVAL_ANSWERS.name in row for row in run.models):
        return ""
    others = [row for row in run.models if any(column.key in row for column in OTHERS[1:])]
    more = explained("other opponents", OTHERS, others) if others else ""
    return explained("answers", ANSWERS, run.models) + more


def preferences_table(run: Finished) -> str:
    """Return the rewards of each model on the held-out pairs."""
    if not any(catalog.PREFERENCES_PAIRS.name in row for row in run.models):
        return ""
    remark = note(
        "Rewards compare each model with its own reference. Brackets show 95 % intervals over pairs: Wilson's for "
        "shares, Student's t for the margin, bootstrap for all others. <code>preferences.jsonl</code> has every pair."
    )
    return explained("held-out pairs", PREFERENCES, run.models, remark)


def drift_table(run: Finished) -> str:
    """Return how far training moved each model, and how much scores and rewards correlate with length."""
    known = any(row.get(column.key) is not None for row in run.models for column in DRIFT[1:])
    return explained("drift", DRIFT, run.models) if known else ""


def judging_table(run: Finished) -> str:
    """Return judge quality and calibration of each model on the held-out ranked answers."""
    if not any(row.get(catalog.JUDGE_QUALITY_QUESTIONS.name) for row in run.models):
        return ""
    return explained("judging", JUDGING, run.models) + explained("calibration", CALIBRATION, run.models)


def benchmark_tables(run: Finished) -> str:
    """Return a table for each benchmark, with a row for each model and a column for each metric."""
    return "".join(_benchmark_table(run, name, set_up) for name, set_up in run.config.get("benchmark", {}).items())


def _benchmark_table(run: Finished, name: str, set_up: Row) -> str:
    keys = dict.fromkeys(key for row in run.models for key in row if key.startswith(f"{name}/"))
    metrics = [key.removeprefix(f"{name}/") for key in keys if not re.search("_(low|high)$", key)]
    columns = [
        Column.of(replace(catalog.of_benchmark(metric), name=f"{name}/{metric}", title=metric.replace("_", " ")))
        for metric in metrics
    ]
    judge = set_up.get("judge", {}) or (run.config["judge"] if "judge" in set_up else {})
    table = explained(name, [MODEL, *columns], run.models, judged_by(judge))
    return f"<h3>{escape(name)}</h3>\n{table}" if metrics else ""


def judged_by(judge: Row) -> str:
    """Return a note on the judge of a benchmark that has one."""
    if not judge:
        return ""
    server = judge.get("endpoint", {}).get("model")
    method = ", by its expected rating" if judge.get("method") == "logprobs" and not server else ""
    return note(f"Judged by {strong(server or judge['model'])}{method}.")


def matrix(run: Finished, title: str) -> str:
    """Return the chart of win rates between all models of a run; empty if none were compared."""
    found = run.summary.get("win_rate_matrix", {"models": [], "rates": []})
    if not any(is_number(rate) for row in found["rates"] for rate in row):
        return ""
    caption = "share of instructions that the row's model wins against the column's, a tie counting half"
    return figure(title, caption, draw_heatmap(found["models"], found["rates"], title, percent))


def comparisons_table(run: Finished) -> str:
    """Return wins, ties and losses that the models' own rows do not show: on benchmarks, and in a round robin."""
    rows: list[Row] = []
    for stage in run.summary["stages"]:
        label = Label.parse(stage["label"])
        if stage["stage"] == "head_to_head" and (label.benchmark or run.config["evaluate"]["round_robin"]):
            counts = stage["counts"]
            named = {"won": catalog.WINS, "tied": catalog.TIES, "lost": catalog.LOSSES}
            judged = sum(counts[metric.name] for metric in named.values())
            shares = {name: counts[metric.name] / judged for name, metric in named.items()}
            instructions = f"{label.benchmark}, every turn" if label.benchmark else "evaluation instructions"
            models = {"model": label.model_name, "opponent": label.opponent}
            rows.append({**counts, **shares, **models, "asked": instructions, "judged": judged})
    return explained("head to head", COMPARISONS, rows) if rows else ""


def histograms(run: Finished) -> str:
    """Return how often each score was given to candidates, for each iteration."""
    labels = {f"Scores, iteration {n}": Label.iteration(n, "judgements") for n in run.iterations}
    return _histograms(run, labels, "judgements of candidates")


def ranked_histograms(run: Finished) -> str:
    """Return how often each score was given to the human-ranked answers, for each model."""
    labels = {f"Scores by {row['model']}": Label.evaluation(row["model"], "ranked_scores") for row in run.models}
    return _histograms(run, labels, "judgements of held-out ranked answers")


def _histograms(run: Finished, labels: dict[str, Label], what: str) -> str:
    """Return histograms with one scale of heights, each from end to end of its judge's scale; none without a scale.

    Whole scores have a bar each; otherwise each point has four bars.
    """
    scales = {title: run.inputs(label).get("judge", {}) for title, label in labels.items()}
    ends = {title: (one["min_score"], one["max_score"]) for title, one in scales.items() if "min_score" in one}
    judged = {title: run.records(labels[title], Judgement) for title in ends}
    scores = {title: array("d", (j.score for j in found if j.score is not None)) for title, found in judged.items()}
    whole = all(score == int(score) for given in scores.values() for score in given)
    parts, resolution = (1, "") if whole else (4, ", to quarters of a point")
    counts = {title: score_histogram(given, *ends[title], parts) for title, given in scores.items() if given}
    peak = max((max(values) for values in counts.values()), default=0)
    return grid(
        figure(title, f"{what}{resolution}", draw_histogram(values, ends[title][0], peak, title, parts))
        for title, values in counts.items()
    )
