"""What a stage declares beside itself: how much it makes, and what those who only walk the pipeline must know of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from selfalign.core.jsonl import count_records
from selfalign.store.artifacts import Artifact, Counts

MANY = math.inf
"""A number of records that nobody knows before they are read."""

StageFunction = Callable[..., Counts]

Function = TypeVar("Function", bound=StageFunction)


@dataclass(frozen=True, slots=True)
class Size:
    """How much a stage makes.

    Attributes:
        text: for the plan, such as "400 instructions, 4 responses each".
        counts: at most; records by the name of their file, and what of the manifest's counts the pipeline asks for.
    """

    text: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a stage says of itself.

    Attributes:
        size: called with the stage's inputs; where there is none, as many records are expected as the inputs have.
        given: whether it reads what the user gives, without a model.
        all_ranks: whether all processes of a run make it together; any other is left to the main one.
    """

    size: Callable[..., Size] | None = None
    given: bool = False
    all_ranks: bool = False


def stage(
    *, size: Callable[..., Size] | None = None, given: bool = False, all_ranks: bool = False
) -> Callable[[Function], Function]:
    """Declares a function to be a stage; one that needs to declare nothing is a stage without it."""

    def declare(function: Function) -> Function:
        function.__dict__["declared"] = Declaration(size, given, all_ranks)
        return function

    return declare


def declared(function: StageFunction) -> Declaration:
    """Return what a stage has declared."""
    return getattr(function, "declared", Declaration())


@dataclass(frozen=True, slots=True)
class PlannedArtifact(Artifact):
    """Stands for an artifact before it is made. Its counts are bounds, and its path leads nowhere."""


def plan_stage(label: str, function: StageFunction, inputs: dict[str, Any]) -> tuple[PlannedArtifact, str]:
    """Return what stands for the artifact of a stage, and the stage's size in words."""
    size_of = declared(function).size
    size = size_of(**inputs) if size_of else _size_of_inputs(inputs)
    nowhere = Path("/not/made/yet")
    planned = PlannedArtifact(function.__name__, label, nowhere, digest=label, counts=size.counts, seconds=0.0)
    return planned, size.text


def _size_of_inputs(inputs: dict[str, Any]) -> Size:
    """As many records of every kind as the input that has the most of them."""
    lists = [value if isinstance(value, list) else [value] for value in inputs.values()]
    counts: Counts = {}
    for artifact in (value for values in lists for value in values if isinstance(value, Artifact)):
        planned = isinstance(artifact, PlannedArtifact)
        for name in artifact.counts if planned else [file.stem for file in artifact.path.glob("*.jsonl")]:
            counts[name] = max(counts.get(name, 0), records_in(artifact, name))
    return Size("", counts)


def records_in(artifact: Artifact, name: str) -> int:
    """Return how many records `name`.jsonl of an artifact has, or will have at most; 0 where it has no such file."""
    if isinstance(artifact, PlannedArtifact):
        return artifact.counts.get(name, 0)
    file = artifact.path / f"{name}.jsonl"
    return count_records(file) if file.exists() else 0


def amount(count: float) -> str:
    """Return a number of records in words."""
    return "all" if math.isinf(count) else str(int(count))
