"""Labels of a run's artifacts: the one place that writes and reads them."""

import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

BASELINE = "SFT"
"""The SFT baseline; every other model of a run is M0, M1, M2, …"""

PLACE = re.compile(r"(iteration(?=_\d+$)|evaluation)_(.+)")
MODEL = re.compile(r"M(\d+)")
COMPARISON = re.compile(r"(?:(?P<benchmark>.+)_)?against_(?P<opponent>.+)")

JUDGED = ("judgements", "scores", "ranked_scores")
WRITTEN = ("instructions", "responses", "answers")
REPEATED = ("answers", "scores", "ranked_scores")
"""Parts of an evaluation whose metrics have the same names as an iteration's, or as one another's."""


class Kind(Enum):
    """What an artifact belongs to."""

    INPUT = "input"
    MODEL = "model"
    ITERATION = "iteration"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True)
class Label:
    """The name of an artifact in its run, as `str(label)` writes it and `Label.parse` reads it.

    Attributes:
        kind: what it belongs to.
        owner: the name of the input, of the model that it is or that is measured, or the number of the iteration.
        part: which of several artifacts of the owner; empty where there is one.
    """

    kind: Kind
    owner: str
    part: str = ""

    @classmethod
    def input(cls, name: str, part: str = "") -> "Label":
        """Label what a run is given, or makes once for all its models: "seeds", "preferences/pairs"."""
        return cls(Kind.INPUT, name, part)

    @classmethod
    def model(cls, name: str) -> "Label":
        """Label a model of the run: "SFT", "M0", "M1", …"""
        return cls(Kind.MODEL, name)

    @classmethod
    def iteration(cls, number: int, part: str) -> "Label":
        """Label what an iteration makes to train on: "iteration_2/pairs"."""
        return cls(Kind.ITERATION, str(number), part)

    @classmethod
    def evaluation(cls, model: str, part: str) -> "Label":
        """Label what a model is measured by: "evaluation_M3/numbers"."""
        return cls(Kind.EVALUATION, model, part)

    @classmethod
    def comparison(cls, model: str, opponent: str, benchmark: str = "") -> "Label":
        """Label a model's comparison with another: "evaluation_M3/against_M1", "evaluation_M3/mt_bench_against_M1"."""
        return cls.evaluation(model, f"{benchmark}_against_{opponent}" if benchmark else f"against_{opponent}")

    @classmethod
    def parse(cls, text: str) -> "Label":
        """Read a label as it stands in a run folder; one that says nothing else is an input's."""
        place, _, part = text.partition("/")
        if found := PLACE.fullmatch(place):
            return cls(Kind(found[1]), found[2], part)
        is_model = place == BASELINE or MODEL.fullmatch(place)
        return cls(Kind.MODEL if is_model else Kind.INPUT, place, part)

    def __str__(self) -> str:
        is_place = self.kind in (Kind.ITERATION, Kind.EVALUATION)
        place = f"{self.kind.value}_{self.owner}" if is_place else self.owner
        return f"{place}/{self.part}" if self.part else place

    def sibling(self, part: str) -> "Label":
        """Return the label of another part of the same owner."""
        return replace(self, part=part)

    def link_in(self, folder: Path) -> Path:
        """Return the link to the artifact in a run folder."""
        return folder / "artifacts" / str(self)

    @property
    def model_name(self) -> str:
        """Name of the model that it is or that is measured; empty for every other kind."""
        return self.owner if self.kind in (Kind.MODEL, Kind.EVALUATION) else ""

    @property
    def model_number(self) -> int:
        """n of the model M<n> that it is or that is measured; 0 for every other, the SFT baseline too."""
        found = MODEL.fullmatch(self.model_name)
        return int(found[1]) if found else 0

    @property
    def iteration_number(self) -> int:
        """The iteration it belongs to: M1 and what comes before it is 0, M2 and its making 1, …"""
        return int(self.owner) if self.kind is Kind.ITERATION else max(0, self.model_number - 1)

    @property
    def serves(self) -> str:
        """The model that it is, that it was made to train, or that it measures; its own name where there is none."""
        if self.kind is Kind.ITERATION:
            return model_after(self.iteration_number)
        return self.model_name or {"ift": BASELINE, "eft": "M1"}.get(self.owner, str(self))

    @property
    def of_trained_model(self) -> bool:
        """Whether it belongs to a model that a run trains: the SFT baseline, M1, M2, …"""
        return self.model_name == BASELINE or self.model_number > 0

    @property
    def is_trained(self) -> bool:
        """Whether it is a model that a run trains."""
        return self.kind is Kind.MODEL and not self.part and self.of_trained_model

    @property
    def is_aligned(self) -> bool:
        """Whether it is a model that a run aligns: M2, M3, …"""
        return self.is_trained and self.model_number > 1

    @property
    def is_written(self) -> bool:
        """Whether a model of the run writes it."""
        return self.part in WRITTEN

    @property
    def is_judged(self) -> bool:
        """Whether the run's judge scores it."""
        return self.part in JUDGED and self.owner != "preferences"

    @property
    def opponent(self) -> str:
        """The model that another is compared with; empty where nothing is compared."""
        found = COMPARISON.fullmatch(self.part)
        return found["opponent"] if found else ""

    @property
    def benchmark(self) -> str:
        """The benchmark on whose questions models are compared; empty for the evaluation instructions."""
        found = COMPARISON.fullmatch(self.part)
        return (found["benchmark"] or "") if found else ""

    @property
    def metric_prefix(self) -> str:
        """What sets metrics apart from those of the same name that another part of the same iteration has.

        The SFT baseline is of M1's iteration, and a model's evaluation of the one that made it.
        """
        if self.model_name == BASELINE:
            return f"{BASELINE}/"
        return f"evaluation/{self.part}/" if self.part in REPEATED or self.opponent else ""


def model_after(iteration: int) -> str:
    """Return the model that stands at the end of an iteration: M1 after none, M2 after the first."""
    return f"M{iteration + 1}"
