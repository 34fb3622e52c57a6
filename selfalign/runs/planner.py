"""A runner that makes nothing: it walks the pipeline and records every stage with its size."""

from dataclasses import dataclass, field
from typing import Any

from selfalign.runs.labels import Label
from selfalign.store.artifacts import Artifact, Counts
from selfalign.store.stage import PlannedArtifact, StageFunction, declared, plan_stage


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage before it is made.

    Attributes:
        label: of its artifact.
        stage: its name.
        size: its size in words.
        records: the number of records that it makes or, if it makes none, reads at most; infinite if nobody knows.
        runs_model: whether it trains a model or asks one.
    """

    label: Label
    stage: str
    size: str
    records: float
    runs_model: bool


@dataclass(slots=True)
class Planner:
    """Gives the pipeline a placeholder for every artifact, without reading or making anything.

    Attributes:
        stages: every stage, in the order of the pipeline.
    """

    stages: list[PlannedStage] = field(default_factory=list)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """Return a placeholder for the artifact."""
        planned, size = plan_stage(str(label), stage, inputs)
        records = most(planned.counts) or max((most(one.counts) for one in planned_in(inputs)), default=0)
        self.stages.append(PlannedStage(label, stage.__name__, size, records, declared(stage).all_ranks))
        return planned


def planned_in(inputs: dict[str, Any]) -> list[PlannedArtifact]:
    """Return the artifacts among the inputs of a stage."""
    values = [one for value in inputs.values() for one in (value if isinstance(value, list) else [value])]
    return [value for value in values if isinstance(value, PlannedArtifact)]


def most(counts: Counts) -> float:
    """Return the highest number of counts; 0 without any."""
    return max((value for value in counts.values() if isinstance(value, int | float) and value > 0), default=0.0)
