"""Controls of the whole machine: runs whose outcome is known before they are made."""

from pathlib import Path
from typing import Any

from builders import TINY_RUN, metrics, run, write_tiny_data

from selfalign.core.files import read_json

OWN = ("refinement/", "rewards/accuracies_augmented", "rewards/ties_augmented")
"""What only a loss with Δ reports."""

TIMES = ("seconds", "tokens_per_second", "peak_memory_gb")


def reported(folder: Path) -> list[dict[str, Any]]:
    """Every number of a run in its order, but for times, memory and what only a loss with Δ reports."""
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMES) and not any(own in name for own in OWN)}
        for row in metrics(folder)
    ]


def test_sr_dpo_without_refinement_reports_every_number_of_dpo(tmp_path: Path) -> None:
    told = [*TINY_RUN, *write_tiny_data(tmp_path / "data"), "train.validation_pairs=1", "judge=expected_score"]
    dpo, other = (run(tmp_path / "runs", *told, *loss) for loss in (["loss=dpo"], ["loss=sr_dpo", "loss.lam=0"]))
    assert reported(dpo) == reported(other)
    models = read_json(dpo / "summary.json")["models"]
    assert [row["model"] for row in models] == ["M1", "M2", "M3"]
    assert {"rewards/margins", "held_out/rewards/margins", "eval/kl_to_m1", "eval/mean_score"} <= models[-1].keys()
