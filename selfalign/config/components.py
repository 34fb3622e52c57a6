"""What the component of each group has to be, whoever has written its class."""

import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from selfalign.benchmarks.protocol import Benchmark
from selfalign.config.data import Pairs, SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.errors import SelfalignError
from selfalign.data.pair_rules import PairRule
from selfalign.data.schemas import Schema
from selfalign.engines.protocol import Engine
from selfalign.judges.protocol import Judge
from selfalign.losses.protocol import FineTuningLoss, PreferenceLoss
from selfalign.runs.tracker import Tracking
from selfalign.stages.pair import PositivesOnly

COMPONENTS: dict[str, tuple[type, ...]] = {
    "data": (SelfRewarding, Pairs),
    "engine": (Engine,),
    "judge": (Judge,),
    "pair": (PairRule, PositivesOnly),
    "loss": (PreferenceLoss, FineTuningLoss),
    "tracker": (Tracking,),
}
"""Group → what its component is one of: a protocol, whose members it has, or a base class."""


def check_components(config: ExperimentConfig) -> None:
    """Checks that every component is what its group asks for.

    Raises:
        SelfalignError: one is not; its class and what it lacks are named.
    """
    for key, component, kinds in _chosen(config):
        if not is_dataclass(component):
            raise SelfalignError(
                f"{key}: its option names no class; its defaults begin with /schema/MODULE.CLASS@_here_"
            )
        faults = [fault_of(component, kind) for kind in kinds]
        if all(faults):
            raise SelfalignError(f"{key}: {name_of(type(component))} {faults[0]}")


def _chosen(config: ExperimentConfig) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """(key, component, what it is one of)."""
    for group, kinds in COMPONENTS.items():
        yield group, getattr(config, group), kinds
    if (judge := config.evaluate.preference_pairs.judge) is not None:
        yield "evaluate.preference_pairs.judge", judge, COMPONENTS["judge"]
    if (schema := config.data.schema) is not None:
        yield "data.schema", schema, (Schema,)
    for name, benchmark in config.benchmark.items():
        if is_dataclass(benchmark):
            yield f"benchmark.{name}", benchmark, (Benchmark,)


def fault_of(component: object, kind: type) -> str:
    """Why a component is none of a kind; empty where it is one."""
    if not getattr(kind, "_is_protocol", False):
        return "" if isinstance(component, kind) else f"must be a {name_of(kind)}"
    absent = [name for name in members(kind) if inspect.getattr_static(component, name, kind) is kind]
    return f"lacks {', '.join(absent)}, which {name_of(kind)} asks for" if absent else ""


def members(protocol: type) -> list[str]:
    """The names that a protocol asks for."""
    asked = [name for base in protocol.__mro__ for name in (*getattr(base, "__annotations__", ()), *vars(base))]
    return [name for name in dict.fromkeys(asked) if not name.startswith("_") or name == "__call__"]


def name_of(kind: type) -> str:
    """A class with its module, as an option names it."""
    return f"{kind.__module__}.{kind.__qualname__}"
