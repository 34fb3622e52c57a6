"""The time that a run still takes, from what its earlier stages took."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from selfalign.core.formatting import about
from selfalign.runs.labels import Kind, Label
from selfalign.runs.planner import PlannedStage
from selfalign.store.artifacts import Artifact


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """An estimate.

    Attributes:
        seconds: the time of the stages together.
        sources: whose times it is made from, such as "M1" and "iteration 1", in their order.
    """

    seconds: float
    sources: tuple[str, ...]

    def text(self) -> str:
        """Return it as "about 12 min left, from M1's and iteration 1's times"; empty if it is from nobody's."""
        if not self.sources:
            return ""
        *others, last = [f"{source}'s" for source in self.sources]
        return f"{about(self.seconds)} left, from {', '.join(others)}{' and ' * bool(others)}{last} times"


def time_left(
    stages: Sequence[PlannedStage], planned: Sequence[PlannedStage], made: Mapping[Label, Artifact]
) -> TimeLeft | None:
    """Estimate the time of stages that are not made yet; None if nothing is known of one that runs a model.

    A stage takes as long as the last one of its kind took, such as the same part of the iteration before, times the
    ratio of their planned sizes. A stage that runs no model and has no such predecessor counts as nothing.

    Args:
        stages: those to be made.
        planned: all stages of the run, in order.
        made: the artifacts so far.
    """
    seconds, used = 0.0, set[Label]()
    last = {kind_of(one): one for one in planned if one.label in made}
    for stage in stages:
        if before := last.get(kind_of(stage)):
            seconds += made[before.label].seconds * ratio(stage.records, before.records)
            used.add(before.label)
        elif stage.runs_model:
            return None
    return TimeLeft(seconds, tuple(dict.fromkeys(owner(one.label) for one in planned if one.label in used)))


def kind_of(stage: PlannedStage) -> tuple[str, Kind, str]:
    """Return what a stage does, which is equal for stages that do the same for different iterations or models."""
    return stage.stage, stage.label.kind, stage.label.recurring


def ratio(records: float, before: float) -> float:
    """Return how much more records one stage has than another; 1 if that is not known."""
    return records / before if 0 < records < math.inf and 0 < before < math.inf else 1.0


def owner(label: Label) -> str:
    """Return whose stage a label names, in words."""
    return f"iteration {label.owner}" if label.kind is Kind.ITERATION else label.model_name or label.owner
