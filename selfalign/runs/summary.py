"""The summary of a run: one row for each model, the drops, and the stages."""

from collections.abc import Iterable, Sequence
from typing import Any

from selfalign.core.formatting import duration, table
from selfalign.metrics import catalog
from selfalign.metrics.catalog import INSTRUMENT_ACCURACY, INSTRUMENT_PASSED, Metric
from selfalign.metrics.instruments import HEAD_TO_HEAD, SCORES
from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger, flat_numbers
from selfalign.runs.planner import PlannedStage
from selfalign.runs.runner import CacheLookup
from selfalign.store.artifacts import Artifact

COLUMNS = (
    catalog.PAIRS,
    catalog.LABELLED,
    catalog.REWARDS_MARGINS,
    catalog.REWARDS_ACCURACIES,
    catalog.EVAL_WIN_RATE,
    catalog.over(catalog.PREFERENCES, catalog.REWARDS_ACCURACIES),
    catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY,
    catalog.JUDGE_QUALITY_SPEARMAN,
    catalog.EVAL_MEAN_CHARACTERS,
    catalog.SECONDS,
)
"""Columns of the closing table after the model. A column without any value is left out."""

FORMATS = {"share": ".1%", "count": "d", "characters": ".0f"}
"""{unit: number format} of the closing table; other units have three decimals."""


def models_of(artifacts: Iterable[Label]) -> list[str]:
    """Return the names of the models that a run made, in order, from the labels of its artifacts: SFT, M1, M2, …"""
    numbers = {label.model_name: label.model_number for label in artifacts if label.of_trained_model}
    return sorted(numbers, key=numbers.__getitem__)


def summarise(artifacts: dict[Label, Artifact], models: Sequence[str]) -> dict[str, Any]:
    """Return summary.json: the metrics of every model, the drops by reason, and counts and time of each stage."""
    return {
        "models": [_model_row(model, artifacts) for model in models],
        "win_rate_matrix": win_rate_matrix(models, artifacts),
        "drops": {
            str(label): artifact.counts["dropped"]
            for label, artifact in artifacts.items()
            if any(artifact.counts.get("dropped", {}).values())
        },
        "stages": [
            {"label": str(label), "stage": a.stage, "seconds": a.seconds, "counts": a.counts, "key": a.key}
            for label, a in artifacts.items()
        ],
    }


def win_rate_matrix(models: Sequence[str], artifacts: dict[Label, Artifact]) -> dict[str, Any]:
    """Return the head-to-head win rates of the row's model against the column's; None for pairs not compared."""
    rates: dict[tuple[str, str], float] = {}
    for label, artifact in artifacts.items():
        if label.opponent and not label.benchmark:
            rates[label.owner, label.opponent] = artifact.counts[catalog.WIN_RATE.name]
            rates[label.opponent, label.owner] = 1 - artifact.counts[catalog.WIN_RATE.name]
    return {"models": list(models), "rates": [[rates.get((row, column)) for column in models] for row in models]}


def _model_row(model: str, artifacts: dict[Label, Artifact]) -> dict[str, Any]:
    """Return a model's metrics: of its training and its evaluation, and the seconds of both and of its data."""
    label = Label.parse(model)
    parts = [artifact for one, artifact in artifacts.items() if one.serves == model]
    measured = ("numbers", "truth", "instruments", "preferences")
    numbers, true, instruments, rewards = (artifacts.get(Label.evaluation(model, part)) for part in measured)
    return {
        "model": model,
        "iteration": label.iteration_number,
        **(flat_numbers(artifacts[label].counts) if label in artifacts else {}),
        **(flat_numbers(numbers.counts) if numbers else {}),
        **(flat_numbers(true.counts) if true else {}),
        **(flat_numbers(instruments.counts) if instruments else {}),
        **(_rewards(rewards) if rewards else {}),
        **_benchmarked(parts),
        catalog.SECONDS.name: round(sum(one.seconds for one in {part.path: part for part in parts}.values()), 1),
    }


def _rewards(part: Artifact) -> dict[str, float]:
    """Return the metrics over the pairs of `evaluate.preference_pairs`."""
    return {name: value for name, value in flat_numbers(part.counts).items() if name.startswith(catalog.PREFERENCES)}


def _benchmarked(parts: Iterable[Artifact]) -> dict[str, float]:
    """Return the metrics of benchmarks, without their drops, which the summary has by stage."""
    counts = [part.counts for part in parts if part.stage == "benchmark"]
    numbers = [number for one in counts for number in flat_numbers(one).items()]
    return {name: value for name, value in numbers if not catalog.DROPPED.matches(name)}


def closing_text(summary: dict[str, Any], ledger: Ledger) -> str:
    """Return the closing text of the terminal: the table, the drops, and the locations of the results."""
    models = summary["models"]
    columns = [metric for metric in COLUMNS if any(row.get(metric.name) is not None for row in models)]
    rows = [[row["model"], *(_cell(row, metric) for metric in columns)] for row in models]
    first = models[0]["model"] if "evaluated" in summary else "M1"
    lines = ["", *table(["model", *(metric.heading.replace("M1", first) for metric in columns)], rows), ""]
    lines += blind_judges(models[-1])
    for label, reasons in summary["drops"].items():
        lines.append(f"dropped in {label}: {drops_text(reasons)}")
    lines += [
        "",
        f"report    {ledger.folder / 'report.html'}",
        f"run       {ledger.folder}",
        f"tracked   {ledger.tracker.place}",
    ]
    if len(ledger.reused) == len(ledger.artifacts):
        lines.append("Everything was made before; nothing had to be made again.")
    return "\n".join(lines)


def blind_judges(row: dict[str, Any]) -> list[str]:
    """Return a line for each judge of the last model's win rates that did not pass its measurement."""
    lines: list[str] = []
    for name, metric in ((HEAD_TO_HEAD, catalog.EVAL_WIN_RATE), (SCORES, catalog.EVAL_SCORE_WIN_RATE)):
        passed, accuracy = (one.of(instrument=name).name for one in (INSTRUMENT_PASSED, INSTRUMENT_ACCURACY))
        if row.get(passed) == 0 and metric.name in row:
            lines.append(
                f"blind: the judge of {metric.name} is right on {row[accuracy]:.0%} of ranked pairs, a tie counting "
                "half; the report has its figures"
            )
    return lines


def drops_text(reasons: dict[str, int]) -> str:
    """Return the drops as text: "3 too long, 1 empty response"."""
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.items() if count)


def plan_text(stages: Sequence[PlannedStage], look: CacheLookup) -> str:
    """Return the opening text of the terminal: every stage, its size, and whether it is done."""
    rows = [[str(one.label), one.size, "done" if one.label in look.found else "to do"] for one in stages]
    return "\n".join(["", *table(["stage", "size", "state"], rows), ""])


def _cell(row: dict[str, Any], metric: Metric) -> str:
    value = row.get(metric.name)
    if value is None:
        return "–"
    if metric is catalog.EVAL_WIN_RATE:
        low, high = (row[f"{metric.name}{end}"] for end in ("_low", "_high"))
        return f"{value:.1%} [{low:.0%}, {high:.0%}]"
    return duration(value) if metric.unit == "s" else format(value, FORMATS.get(metric.unit, ".3f"))
