"""What a run comes down to: a row a model, and what was dropped on the way."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from selfalign.core.formatting import table
from selfalign.runs.labels import iteration_of
from selfalign.runs.runner import Look, Run, flat_numbers
from selfalign.store.artifacts import Artefact

COLUMNS = (
    ("model", "model"),
    ("pairs", "pairs"),
    ("margin", "rewards/margins"),
    ("accuracy", "rewards/accuracies"),
    ("win rate vs M1", "eval/win_rate"),
    ("held-out accuracy", "preferences/rewards/accuracies"),
    ("judge pairwise", "judge_quality/pairwise_accuracy"),
    ("judge ρ", "judge_quality/spearman"),
    ("characters", "eval/mean_characters"),
    ("seconds", "seconds"),
)
"""The closing table: heading, and the key in summary.json; what no model has is left out."""


def models_of(artefacts: Iterable[str]) -> list[str]:
    """The models a run made, in their order, from the labels of its artefacts."""
    names = {label.split("/")[0].removeprefix("evaluation_") for label in artefacts}
    return sorted((name for name in names if re.fullmatch(r"SFT|M[1-9]\d*", name)), key=_place)


def summarise(artefacts: dict[str, Artefact], labels: Sequence[str]) -> dict[str, Any]:
    """summary.json: every model's numbers, drops by reason, and each stage with its size and time."""
    return {
        "models": [_model_row(label, artefacts) for label in labels],
        "win_rate_matrix": win_rate_matrix(labels, artefacts),
        "drops": {
            label: artefact.counts["dropped"]
            for label, artefact in artefacts.items()
            if any(artefact.counts.get("dropped", {}).values())
        },
        "stages": [
            {"label": label, "stage": a.stage, "seconds": a.seconds, "counts": a.counts, "key": a.key}
            for label, a in artefacts.items()
        ],
    }


def win_rate_matrix(models: Sequence[str], artefacts: dict[str, Artefact]) -> dict[str, Any]:
    """Head to head, how often the model of a row beats that of a column; null where the two were not compared."""
    rates: dict[tuple[str, str], float] = {}
    for label, artefact in artefacts.items():
        if found := re.fullmatch(r"evaluation_([^/]+)/against_([^/]+)", label):
            rates[found[1], found[2]] = artefact.counts["win_rate"]
            rates[found[2], found[1]] = 1 - artefact.counts["win_rate"]
    return {"models": list(models), "rates": [[rates.get((row, column)) for column in models] for row in models]}


def _place(label: str) -> int:
    """A model's place in the order they are made: the SFT baseline, M1, M2, …"""
    return 0 if label == "SFT" else int(label[1:])


def _model_row(label: str, artefacts: dict[str, Artefact]) -> dict[str, Any]:
    """A model's numbers: of its training, of its evaluation, and the seconds both and its training data took."""
    iteration = iteration_of(label)
    data = {"SFT": "ift", "M1": "eft/"}.get(label, f"iteration_{iteration}/")
    parts = {
        name: artefact
        for name, artefact in artefacts.items()
        if name == label or name.startswith((f"evaluation_{label}/", data))
    }
    numbers, rewards = (artefacts.get(f"evaluation_{label}/{part}") for part in ("numbers", "preferences"))
    return {
        "model": label,
        "iteration": iteration,
        **(flat_numbers(artefacts[label].counts) if label in artefacts else {}),
        **(flat_numbers(numbers.counts) if numbers else {}),
        **({k: v for k, v in flat_numbers(rewards.counts).items() if k.startswith("preferences/")} if rewards else {}),
        **_benchmarked(parts.values()),
        "seconds": round(sum(artefact.seconds for artefact in parts.values()), 1),
    }


def _benchmarked(parts: Iterable[Artefact]) -> dict[str, float]:
    """What benchmarks measured; drops stand elsewhere, by stage."""
    counts = [part.counts for part in parts if part.stage == "benchmark"]
    return {name: value for one in counts for name, value in flat_numbers(one).items() if name[:8] != "dropped/"}


def closing_text(summary: dict[str, Any], run: Run) -> str:
    """What the terminal shows at the end: the table, the drops, and where everything lies."""
    models = summary["models"]
    columns = [(heading, key) for heading, key in COLUMNS if any(row.get(key) is not None for row in models)]
    rows = [[_cell(row, key) for _, key in columns] for row in models]
    first = models[0]["model"] if "evaluated" in summary else "M1"
    lines = ["", *table([heading.replace("M1", first) for heading, _ in columns], rows), ""]
    for label, reasons in summary["drops"].items():
        lines.append(f"dropped in {label}: {drops_text(reasons)}")
    lines += [
        "",
        f"report    {run.folder / 'report.html'}",
        f"run       {run.folder}",
        f"W&B       {run.tracker.place}",
    ]
    if len(run.reused) == len(run.artefacts):
        lines.append("Everything was there already; nothing had to be made.")
    return "\n".join(lines)


def drops_text(reasons: dict[str, int]) -> str:
    """What was dropped, by reason."""
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.items() if count)


def plan_text(stages: Sequence[tuple[str, str]], look: Look) -> str:
    """What the terminal shows at the start: every stage, its size, and whether it is there."""
    rows = [[label, size, "there" if label in look.there else "to do"] for label, size in stages]
    return "\n".join(["", *table(["stage", "size", "state"], rows), ""])


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    if key == "eval/win_rate":
        return f"{value:.1%} [{row['eval/win_rate_low']:.0%}, {row['eval/win_rate_high']:.0%}]"
    if key in ("rewards/accuracies", "preferences/rewards/accuracies", "judge_quality/pairwise_accuracy"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.0f}" if key in ("seconds", "eval/mean_characters") else f"{value:.3f}"
    return str(value)
