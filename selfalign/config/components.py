"""The kinds of component that each group accepts, for selfalign's own classes and those of users."""

import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from selfalign.benchmarks.judge_test import JudgeTest
from selfalign.benchmarks.protocol import Benchmark
from selfalign.config.data import Pairs, SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.judges import PAIR_JUDGE
from selfalign.core.errors import SelfalignError
from selfalign.data.pair_rules import PairRule
from selfalign.data.schemas import Schema
from selfalign.engines.protocol import Engine
from selfalign.judges.panel import Panel, judges_in
from selfalign.judges.protocol import Judge
from selfalign.losses.protocol import FineTuningLoss, PreferenceLoss
from selfalign.runs.tracker import Tracking
from selfalign.stages.meta_judge import MetaJudge
from selfalign.stages.pair import Labels, PositivesOnly

COMPONENTS: dict[str, tuple[type, ...]] = {
    "data": (SelfRewarding, Pairs),
    "engine": (Engine,),
    "judge": (Judge,),
    "pair": (PairRule, PositivesOnly, Labels),
    "loss": (PreferenceLoss, FineTuningLoss),
}
"""{group: accepted kinds}. A kind is a protocol, whose members the component must have, or a base class."""


def check_components(config: ExperimentConfig) -> None:
    """Check that every component is of a kind that its group accepts.

    Raises:
        SelfalignError: one is not; the message names its class and what it lacks.
    """
    for group in ("tracker", "benchmark"):
        if is_dataclass(getattr(config, group)):
            raise SelfalignError(f"{group}: begin its option's defaults with /schema/MODULE.CLASS@NAME, not @_here_")
    for key, component, kinds in _chosen(config):
        if not is_dataclass(component):
            raise SelfalignError(
                f"{key}: its option names no class. Begin the option's defaults with /schema/MODULE.CLASS@_here_"
            )
        faults = [fault_of(component, kind) for kind in kinds]
        if all(faults):
            raise SelfalignError(f"{key}: {name_of(type(component))} {faults[0]}")


def _chosen(config: ExperimentConfig) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """Yield (key, component, accepted kinds)."""
    for group, kinds in COMPONENTS.items():
        yield group, getattr(config, group), kinds
    if (of_pairs := config.evaluate.preference_pairs.judge) is not None:
        yield PAIR_JUDGE, of_pairs, COMPONENTS["judge"]
    for key, judge in {"judge": config.judge, PAIR_JUDGE: of_pairs}.items():
        if isinstance(judge, Panel):
            yield from ((place, member, COMPONENTS["judge"]) for place, member in judges_in(key, judge).items())
    if (meta := config.meta_judge) is not None:
        yield "data.meta_judge", meta, (MetaJudge,)
    if (schema := config.data.schema) is not None:
        yield "data.schema", schema, (Schema,)
    chosen = {f"tracker.{name}": tracking for name, tracking in config.tracker.items()}
    yield from ((key, tracking, (Tracking,)) for key, tracking in chosen.items() if is_dataclass(tracking))
    for name, benchmark in config.benchmark.items():
        if is_dataclass(benchmark):
            yield f"benchmark.{name}", benchmark, (Benchmark,)
        if isinstance(benchmark, JudgeTest) and benchmark.judge is not None:
            yield f"benchmark.{name}.judge", benchmark.judge, COMPONENTS["judge"]


def fault_of(component: object, kind: type) -> str:
    """Return why a component is not of a kind; empty if it is."""
    if not getattr(kind, "_is_protocol", False):
        return "" if isinstance(component, kind) else f"must be a {name_of(kind)}"
    absent = [name for name in members(kind) if inspect.getattr_static(component, name, kind) is kind]
    return f"lacks {', '.join(absent)}, which {name_of(kind)} requires" if absent else ""


def members(protocol: type) -> list[str]:
    """Return the names that a protocol requires."""
    names = [name for base in protocol.__mro__ for name in (*getattr(base, "__annotations__", ()), *vars(base))]
    return [name for name in dict.fromkeys(names) if not name.startswith("_") or name == "__call__"]


def name_of(kind: type) -> str:
    """Return a class with its module, as an option names it."""
    return f"{kind.__module__}.{kind.__qualname__}"
