"""The judges and comparators of a run, by the settings that hold them."""

from typing import Any

from selfalign.config.experiment import ExperimentConfig
from selfalign.judges.panel import judges_in

PAIR_JUDGE = "evaluate.preference_pairs.judge"
"""The setting that holds the judge of held-out pairs."""


def judges_of(config: ExperimentConfig) -> dict[str, Any]:
    """Return {setting: judge} of all judges and comparators of a run, except those of benchmarks."""
    evaluation, selection = config.evaluate, config.train.checkpoint_selection
    named = {
        "judge": config.judge,
        "data.meta_judge": config.meta_judge,
        "evaluate.head_to_head": evaluation.head_to_head,
        PAIR_JUDGE: evaluation.preference_pairs.judge,
        "train.checkpoint_selection.head_to_head": selection.head_to_head if selection.interval_steps else None,
    }
    named |= {f"at.{iteration}.judge": changes.get("judge") for iteration, changes in config.at.items()}
    named = {key: judge for key, judge in named.items() if judge is not None}
    return {place: member for key, judge in named.items() for place, member in judges_in(key, judge).items()}


def all_judges_of(config: ExperimentConfig) -> dict[str, Any]:
    """Return the same with the judges of benchmarks."""
    benchmarks = {f"benchmark.{name}.judge": getattr(one, "judge", None) for name, one in config.benchmark.items()}
    return judges_of(config) | {key: judge for key, judge in benchmarks.items() if judge is not None}
