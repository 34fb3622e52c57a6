"""A runner that makes nothing: it walks the pipeline and notes every stage with its size."""

from dataclasses import dataclass, field
from typing import Any

from selfalign.runs.labels import Label
from selfalign.store.artifacts import Artifact
from selfalign.store.stage import StageFunction, plan_stage


@dataclass(slots=True)
class Planner:
    """Answers every stage with what stands for its artifact; reads and makes nothing.

    Attributes:
        stages: (label, size) of every stage, in the order the pipeline asks for them.
    """

    stages: list[tuple[Label, str]] = field(default_factory=list)

    def make(self, label: Label, stage: StageFunction, **inputs: Any) -> Artifact:
        """Return what stands for the artifact."""
        planned, size = plan_stage(str(label), stage, inputs)
        self.stages.append((label, size))
        return planned
