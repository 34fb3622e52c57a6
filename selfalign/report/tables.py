"""What was measured of each model: its answers, its rewards, and how it judges."""

import re
from array import array
from html import escape

from selfalign.core.records import Judgement
from selfalign.metrics.catalog import METRICS, meaning_in_benchmark
from selfalign.metrics.summaries import score_histogram
from selfalign.report.charts import draw_heatmap, draw_histogram
from selfalign.report.html import Column, Row, decimals, explained, figure, grid, is_number, note, percent, strong
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished

MODEL = Column("model", "whose numbers these are", "model", decimals(0))

ANSWERS = (
    MODEL,
    *(
        Column(heading, METRICS[key], key, form)
        for heading, key, form in (
            ("win rate vs\u00a0M1", "eval/win_rate", percent),
            ("at equal length", "eval/win_rate_length_controlled", percent),
            ("wins", "eval/wins", decimals(0)),
            ("ties", "eval/ties", decimals(0)),
            ("losses", "eval/losses", decimals(0)),
            ("position bias", "eval/position_bias", percent),
            ("win rate by score", "eval/score_win_rate", percent),
            ("characters", "eval/mean_characters", decimals(0)),
            ("× M1's", "eval/length_growth", decimals(2)),
            ("finished", "eval/finished_share", percent),
            ("distinct-2", "eval/distinct_2", decimals(2)),
            ("repeated 4-grams", "eval/repeated_4", percent),
            ("KL to M1, nats", "eval/kl_to_m1", decimals(2)),
        )
    ),
)

PREFERENCES = (
    MODEL,
    *(
        Column(heading, METRICS.get(key) or METRICS[key.removeprefix("preferences/")], key, form)
        for heading, key, form in (
            ("pairs", "preferences/pairs", decimals(0)),
            ("margin", "preferences/rewards/margins", decimals(3)),
            ("accuracy", "preferences/rewards/accuracies", percent),
            ("ties", "preferences/rewards/ties", percent),
            ("augmented accuracy", "preferences/rewards/accuracies_augmented", percent),
            ("mean\u00a0Δ", "preferences/refinement/mean", decimals(3)),
            ("std of\u00a0Δ", "preferences/refinement/std", decimals(3)),
            ("scored pairs", "preferences/scored", decimals(0)),
            ("margin and score, Pearson", "preferences/margin_score_pearson", decimals(2)),
            ("margin and score, Spearman", "preferences/margin_score_spearman", decimals(2)),
            ("Δ and score, Pearson", "preferences/delta_score_pearson", decimals(2)),
            ("Δ and score, Spearman", "preferences/delta_score_spearman", decimals(2)),
        )
    ),
)

DRIFT = (
    MODEL,
    *(
        Column(heading, METRICS[key], key, form)
        for heading, key, form in (
            ("log\u00a0π of chosen, change", "logps/chosen_change", decimals(2)),
            ("a token", "logps/chosen_change_per_token", decimals(4)),
            ("of rejected, change", "logps/rejected_change", decimals(2)),
            ("of rejected, a token", "logps/rejected_change_per_token", decimals(4)),
            ("candidates: score and length", "score_length_correlation", decimals(2)),
            ("answers: score and length", "eval/score_length_correlation", decimals(2)),
            ("reward and length", "rewards/length_correlation", decimals(2)),
        )
    ),
)

JUDGING = (
    MODEL,
    *(
        Column(heading, METRICS[f"judge_quality/{key}"], f"judge_quality/{key}", form)
        for heading, key, form in (
            ("questions", "questions", decimals(0)),
            ("pairwise accuracy", "pairwise_accuracy", percent),
            ("5-best", "five_best", percent),
            ("exact match", "exact_match", percent),
            ("Spearman's\u00a0ρ", "spearman", decimals(2)),
            ("Kendall's\u00a0τ", "kendall", decimals(2)),
            ("constant", "undefined", decimals(0)),
            ("unjudged", "unjudged", decimals(0)),
        )
    ),
)

OTHERS = (
    MODEL,
    *(
        Column(heading, f"{METRICS[f'eval/{key}']}, against {whom}", f"eval/{key}_vs_{other}", form)
        for other, short, whom in (
            ("previous", "model before", "the model before it"),
            ("given", "given outputs", "the given outputs"),
        )
        for heading, key, form in (
            (f"win rate vs\u00a0{short}", "win_rate", percent),
            ("at equal length", "win_rate_length_controlled", percent),
            ("wins", "wins", decimals(0)),
            ("ties", "ties", decimals(0)),
            ("losses", "losses", decimals(0)),
            ("position bias", "position_bias", percent),
        )
    ),
)

COMPARISONS = (
    Column("model", "whose wins these are", "model", decimals(0)),
    Column("opponent", "against whom", "opponent", decimals(0)),
    Column("asked", "what both have answered", "asked", decimals(0)),
    *(
        Column(heading, METRICS.get(key, "comparisons with a verdict"), key, form)
        for heading, key, form in (
            ("judged", "judged", decimals(0)),
            ("won", "wins", percent),
            ("tied", "ties", percent),
            ("lost", "losses", percent),
            ("win rate", "win_rate", percent),
            ("at equal length", "win_rate_length_controlled", percent),
        )
    ),
)

CALIBRATION = (
    MODEL,
    *(
        Column(heading, METRICS[f"calibration/{key}"], f"calibration/{key}", form)
        for heading, key, form in (
            ("parsed", "parsed", percent),
            ("spread, nats", "spread", decimals(2)),
            ("ties", "ties", percent),
            ("position bias", "position_bias", percent),
            ("self-consistency", "self_consistency", percent),
            ("score and length", "length_correlation", decimals(2)),
        )
    ),
    *(
        Column(f"score of rank {rank}", f"mean score of the answers that humans ranked {rank}.", key, decimals(2))
        for rank in range(1, 6)
        for key in (f"calibration/score_of_rank/{rank}",)
    ),
)


def answers_table(run: Finished) -> str:
    """Win rates and drift of each model's answers."""
    if not any("eval/answers" in row for row in run.models):
        return ""
    others = [row for row in run.models if "eval/win_rate_vs_previous" in row or "eval/win_rate_vs_given" in row]
    more = explained("other opponents", OTHERS, others) if others else ""
    return explained("answers", ANSWERS, run.models) + more


def preferences_table(run: Finished) -> str:
    """Rewards of each model on the held-out pairs."""
    if not any("preferences/pairs" in row for row in run.models):
        return ""
    said = note(
        "Each model against its own reference. In brackets: 95 % intervals over pairs, Wilson's for shares, Student's "
        "t for the margin, by bootstrap elsewhere. Every pair lies in <code>preferences.jsonl</code>."
    )
    return explained("held-out pairs", PREFERENCES, run.models, said)


def drift_table(run: Finished) -> str:
    """How far training moved each model, and how much scores and rewards go with length."""
    there = any(row.get(column.key) is not None for row in run.models for column in DRIFT[1:])
    return explained("drift", DRIFT, run.models) if there else ""


def judging_table(run: Finished) -> str:
    """Judge quality and calibration of each model on the held-out ranked answers."""
    if not any(row.get("judge_quality/questions") for row in run.models):
        return ""
    return explained("judging", JUDGING, run.models) + explained("calibration", CALIBRATION, run.models)


def benchmark_tables(run: Finished) -> str:
    """A table for each benchmark: a row a model, a column a metric."""
    return "".join(_benchmark_table(run, name, set_up) for name, set_up in run.config.get("benchmark", {}).items())


def _benchmark_table(run: Finished, name: str, set_up: Row) -> str:
    keys = dict.fromkeys(key for row in run.models for key in row if key.startswith(f"{name}/"))
    metrics = [key.removeprefix(f"{name}/") for key in keys if not re.search("_(low|high)$", key)]
    columns = [
        Column(metric.replace("_", " "), meaning_in_benchmark(metric), f"{name}/{metric}", measured)
        for metric in metrics
    ]
    table = explained(name, [MODEL, *columns], run.models, judged_by(set_up.get("judge", {})))
    return f"<h3>{escape(name)}</h3>\n{table}" if metrics else ""


def judged_by(judge: Row) -> str:
    """Who judges a benchmark, if somebody does."""
    if not judge:
        return ""
    server = judge["endpoint"]["model"]
    how = ", by its expected rating" if judge.get("reading") == "expected" and not server else ""
    return note(f"Judged by {strong(server or judge['model'])}{how}.")


def measured(value: float) -> str:
    """A count as it is, all else with two decimals."""
    return decimals(0 if isinstance(value, int) else 2)(value)


def matrix(run: Finished, title: str) -> str:
    """Win rates of all models of a run against one another, as far as they were compared; nothing where none were."""
    found = run.summary.get("win_rate_matrix", {"models": [], "rates": []})
    if not any(is_number(rate) for row in found["rates"] for rate in row):
        return ""
    caption = "share of instructions that the row's model wins against the column's, a tie counting half"
    return figure(title, caption, draw_heatmap(found["models"], found["rates"], title, percent))


def comparisons_table(run: Finished) -> str:
    """Wins, ties and losses of comparisons that the models' own numbers do not tell: on benchmarks, and of a matrix."""
    rows: list[Row] = []
    for stage in run.summary["stages"]:
        label = Label.parse(stage["label"])
        if stage["stage"] == "compare" and (label.benchmark or run.config["evaluate"]["matrix"]):
            counts = stage["counts"]
            judged = counts["wins"] + counts["ties"] + counts["losses"]
            shares = {name: counts[name] / judged for name in ("wins", "ties", "losses")}
            asked = f"{label.benchmark}, every turn" if label.benchmark else "evaluation instructions"
            who = {"model": label.model_name, "opponent": label.opponent}
            rows.append({**counts, **shares, **who, "asked": asked, "judged": judged})
    return explained("head to head", COMPARISONS, rows) if rows else ""


def histograms(run: Finished) -> str:
    """How often each score was given to candidates, iteration by iteration."""
    labels = {f"Scores, iteration {n}": Label.iteration(n, "judgements") for n in run.iterations}
    return _histograms(run, labels, "judgements of candidates")


def ranked_histograms(run: Finished) -> str:
    """How often each score was given to the answers that humans ranked, model by model."""
    labels = {f"Scores by {row['model']}": Label.evaluation(row["model"], "ranked_scores") for row in run.models}
    return _histograms(run, labels, "judgements of held-out ranked answers")


def _histograms(run: Finished, labels: dict[str, Label], what: str) -> str:
    """With one scale of heights; whole scores have a bar each, others four a point."""
    scale = run.config["judge"]
    if "low" not in scale:
        return ""
    judged = {title: run.records(label, Judgement) for title, label in labels.items()}
    scores = {title: array("d", (j.score for j in found if j.score is not None)) for title, found in judged.items()}
    whole = all(score == int(score) for given in scores.values() for score in given)
    parts, how = (1, "") if whole else (4, ", to quarters of a point")
    counts = {title: score_histogram(s, scale["low"], scale["high"], parts) for title, s in scores.items() if s}
    peak = max((max(values) for values in counts.values()), default=0)
    return grid(
        figure(title, f"{what}{how}", draw_histogram(values, scale["low"], peak, title, parts))
        for title, values in counts.items()
    )
