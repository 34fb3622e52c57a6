"""The settings of `data`: the sources of demonstrations and preference pairs."""

from dataclasses import dataclass, field
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.data.mixtures import data_source
from selfalign.stages.instruct import InstructConfig
from selfalign.stages.respond import RespondConfig
from selfalign.stages.seed_data import SeedDataConfig


@dataclass(kw_only=True, slots=True)
class SelfRewarding:
    """The model generates its own preference pairs.

    Attributes:
        seed_data: the training data of M1.
        instruct: how new instructions are generated.
        respond: how candidates are generated.
        meta_judge: compares judgements, so that the model is aligned on pairs of them too; null makes none
            (`data/meta_judge=pairwise`).
        accumulate_pairs: align each iteration on the pairs of all iterations so far, instead of its own pairs only.
        schema: converts rows of the sources in `data` that are in a format of your own; null for known formats.
    """

    seed_data: SeedDataConfig = field(default_factory=SeedDataConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    respond: RespondConfig = field(default_factory=RespondConfig)
    meta_judge: Any = field(default=None, metadata={"keyed": "if set"})
    accumulate_pairs: bool = False
    schema: Any = None


@dataclass(kw_only=True, slots=True)
class Pairs:
    """Preference pairs are given.

    Attributes:
        path: a data source of preference pairs (docs/data.md lists the formats), or of ranked answers, of which the
            best is paired with the worst.
        count: the number of pairs, taken from the beginning; 0 takes all.
        seed_data: the training data of M1. Without demonstrations M1 is M0, which should then be an SFT model.
        schema: converts rows of the sources in `data` that are in a format of your own; null for known formats.
    """

    path: Any
    count: int = 0
    seed_data: SeedDataConfig = field(default_factory=SeedDataConfig)
    schema: Any = None

    def __post_init__(self) -> None:
        self.path = data_source(self.path, "data.path")
        if self.count < 0:
            raise SelfalignError(f"data.count must be 0 or more, got {self.count}")
