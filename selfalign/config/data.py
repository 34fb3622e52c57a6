"""The settings of `data`: the sources of demonstrations and preference pairs."""

from dataclasses import dataclass, field
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.iterations import check_iterations, is_below_one, value_at, values_of
from selfalign.data.mixtures import data_source
from selfalign.stages.distorted_instructions import DistortionConfig
from selfalign.stages.instruct import InstructConfig
from selfalign.stages.respond import RespondConfig
from selfalign.stages.seed_data import SeedDataConfig


@dataclass(kw_only=True, slots=True)
class ReplayConfig:
    """Given preference pairs that are trained on beside the generated ones, against forgetting (arXiv 2406.09760).

    Attributes:
        source: a data source of preference pairs, as `data.path` of data=pairs; empty replays none.
        share: γ, the share of given pairs among all that an iteration trains on, at least 0 and below 1, or a list with
            one for each iteration. They are drawn anew in each iteration, none twice. A model that is aligned ahead
            sees none.
    """

    source: Any = ""
    share: Any = 0.5

    def __post_init__(self) -> None:
        self.source = data_source(self.source, "data.replay.source")
        shares = values_of(self.share)
        if not (shares and all(map(is_below_one, shares))):
            raise SelfalignError(
                f"data.replay.share must be a number from 0 to below 1, or a list of them, got {self.share!r}"
            )

    def check_iterations(self, iterations: int) -> None:
        """Check that every iteration has its share.

        Raises:
            SelfalignError: there is a list of another length.
        """
        check_iterations("data.replay.share", self.share, iterations)

    def at(self, iteration: int) -> float:
        """Return γ of an iteration, counted from 1; 0 without a source."""
        return value_at(self.share, iteration) if self.source else 0

    @property
    def largest_share(self) -> float:
        """The largest γ of any iteration; 0 without a source."""
        return max(values_of(self.share)) if self.source else 0


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
        replay: given pairs that each iteration trains on beside its own.
        distortion: how worse answers than the demonstrations are made, for `seed_data.eft_source=synthetic`.
        schema: converts rows of the sources in `data` that are in a format of your own; null for known formats.
    """

    seed_data: SeedDataConfig = field(default_factory=SeedDataConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    respond: RespondConfig = field(default_factory=RespondConfig)
    meta_judge: Any = field(default=None, metadata={"keyed": "if set"})
    accumulate_pairs: bool = False
    replay: ReplayConfig = field(default_factory=ReplayConfig, metadata={"keyed": "if set"})
    distortion: DistortionConfig = field(default_factory=DistortionConfig, metadata={"keyed": "if set"})
    schema: Any = None


@dataclass(kw_only=True, slots=True)
class Pairs:
    """Preference pairs are given.

    Attributes:
        path: a data source of preference pairs (docs/data.md lists the formats), or of ranked answers, of which the
            best is paired with the worst.
        count: the number of pairs, taken from the beginning; 0 takes all.
        seed_data: the training data of M1. Without demonstrations M1 is M0, which should then be an SFT model.
        distortion: how worse answers than the demonstrations are made, for `seed_data.eft_source=synthetic`.
        schema: converts rows of the sources in `data` that are in a format of your own; null for known formats.
    """

    path: Any
    count: int = 0
    seed_data: SeedDataConfig = field(default_factory=SeedDataConfig)
    distortion: DistortionConfig = field(default_factory=DistortionConfig, metadata={"keyed": "if set"})
    schema: Any = None

    def __post_init__(self) -> None:
        self.path = data_source(self.path, "data.path")
        if self.count < 0:
            raise SelfalignError(f"data.count must be 0 or more, got {self.count}")
