"""A runner that makes nothing: it walks the pipeline and records every stage with its size."""

from dataclasses import dataclass, field
from typing import Any

from selfalign.runs.labels import Label
from selfalign.store.artifacts import Artifact
from selfalign.store.stage import StageFunction, plan_stage


@dataclass(slots=True)
class Planner:
    """Gives the pipeline a placeholder for every artifact, without reading or making anything.

    Attributes:
        stages: (label, size) of every stage, in the order of the pipeline.
    """

    stages: list[tuple[Label, str]] = field(default_factory=list)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """Return a placeholder for the artifact."""
        planned, size = plan_stage(str(label), stage, inputs)
        self.stages.append((label, size))
        return planned
