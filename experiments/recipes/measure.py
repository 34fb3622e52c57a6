"""What a run of a recipe came to: its models in the rows of a table, each difference from M1 with its 95 % interval.

`python experiments/recipes/measure.py outputs/iterative_rpo_small-…` reads the run. Scores of the same
instructions are compared, so the interval is that of the mean difference (percentile bootstrap over instructions).
"""

import sys
from pathlib import Path
from typing import Any

from selfalign.core.files import read_json
from selfalign.core.jsonl import read_scores
from selfalign.metrics.intervals import bootstrap_mean
from selfalign.runs.summary import table

COLUMNS = [
    ("pairs", "pairs", 1, 0),
    ("reward margin", "rewards/margins", 1, 3),
    ("mean score", "eval/mean_score", 1, 3),
    ("win rate by score", "eval/score_win_rate", 100, 1),
    ("win rate", "eval/win_rate", 100, 1),
    ("test pairs right", "preferences/rewards/accuracies", 100, 1),
    ("test margin", "preferences/rewards/margins", 1, 3),
    ("judge right", "judge_quality/pairwise_accuracy", 100, 1),
    ("characters", "eval/mean_characters", 1, 0),
    ("ended, %", "eval/finished_share", 100, 0),
    ("KL to M1, nats", "eval/kl_to_m1", 1, 2),
]
"""(title, metric, factor, decimals); a column that no model has is left out."""


def main() -> None:
    """Prints the table of a run."""
    run = Path(sys.argv[1])
    models = read_json(run / "summary.json")["models"]
    columns = [column for column in COLUMNS if any(column[1] in model for model in models)]
    header = ["model", *(title for title, *_ in columns)]
    rows = [[model["model"], *(cell(model, *column[1:]) for column in columns)] for model in models]
    folders = [run / f"artifacts/evaluation_{model['model']}/scores" for model in models]
    if all(folder.exists() for folder in folders):  # A pairwise judge scores no single answer.
        first, *others = map(read_scores, folders)
        header.append("score − M1's")
        for row, changed in zip(rows, ["–", *(difference(scores, first) for scores in others)], strict=True):
            row.append(changed)
    print(*table(header, rows), sep="\n")


def cell(model: dict[str, Any], metric: str, factor: float, decimals: int) -> str:
    """A number and, where it has one, its interval."""
    if metric not in model:
        return "–"
    value, *ends = (f"{model[name] * factor:.{decimals}f}" for name in (metric, *ends_of(model, metric)))
    return f"{value} [{', '.join(ends)}]" if ends else value


def ends_of(model: dict[str, Any], metric: str) -> list[str]:
    """The names of the ends of a metric's interval."""
    return [name for name in (f"{metric}_low", f"{metric}_high") if name in model]


def difference(scores: dict[str, float], others: dict[str, float]) -> str:
    """The mean difference of scores on the instructions that both have scores of."""
    both = [scores[name] - others[name] for name in scores if name in others]
    mean = bootstrap_mean(both)
    return f"{mean.value:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}]"


if __name__ == "__main__":
    main()
