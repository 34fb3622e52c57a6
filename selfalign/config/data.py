"""Where demonstrations and preference pairs come from: the settings of `data`."""

from dataclasses import dataclass, field
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.data.mixtures import data_source
from selfalign.stages.instruct import InstructConfig
from selfalign.stages.respond import RespondConfig
from selfalign.stages.seed_data import SeedDataConfig


@dataclass(kw_only=True, slots=True)
class SelfRewarding:
    """Preference pairs come from the model itself.

    Attributes:
        seed_data: what M1 learns from.
        instruct: how new instructions are written.
        respond: how candidates are written.
        accumulate_pairs: aligns each iteration on the pairs of all iterations so far, instead of on its own alone.
        schema: says rows of the sources of `data` in a format that is known, where they are in one of the user's own.
    """

    seed_data: SeedDataConfig = field(default_factory=SeedDataConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    respond: RespondConfig = field(default_factory=RespondConfig)
    accumulate_pairs: bool = False
    schema: Any = None


@dataclass(kw_only=True, slots=True)
class Pairs:
    """Preference pairs are given.

    Attributes:
        path: a data source of preference pairs (docs/data.md lists the formats), or of ranked answers, whose best
            then stands against the worst.
        count: takes the first so many of them; 0 takes all.
        seed_data: what M1 learns from before; without demonstrations M1 is M0, which should then be an SFT model.
        schema: says rows of the sources of `data` in a format that is known, where they are in one of the user's own.
    """

    path: Any
    count: int = 0
    seed_data: SeedDataConfig = field(default_factory=SeedDataConfig)
    schema: Any = None

    def __post_init__(self) -> None:
        self.path = data_source(self.path, "data.path")
        if self.count < 0:
            raise SelfalignError(f"data.count must be 0 or more, got {self.count}")
