"""Labels of a run's artifacts. Only this module writes and parses them."""

import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

BASELINE = "SFT"
"""Name of the SFT baseline. The other models of a run are M0, M1, M2, …"""

PREFIX = re.compile(r"(iteration(?=_\d+$)|evaluation)_(.+)")
MODEL = re.compile(r"M(\d+)")
COMPARISON = re.compile(r"(?:(?P<benchmark>.+)_)?against_(?P<opponent>.+)")

JUDGED = ("judgements", "scores", "ranked_scores")
INPUTS = {"seeds", "questions", "given_outputs", "validation", "instructions", "ranked", "ift", "eft", "preferences"}
INPUTS |= {"replay", "writer", "judge", "judges", "comparator", "checkpoint_judge"}
"""Names of a run's inputs."""

AHEAD = "ahead_"
"""Prefix of the parts of an iteration that a model is made from which only writes in it."""

SECOND = "second_"
"""Prefix of the judgements by a second judge of the same responses."""

CRITERIA = {"judgements": "criteria", "scores": "answer_criteria", "ranked_scores": "ranked_criteria"}
"""{part that the run's judge makes: the criteria that are written for it}."""

JUDGE_PAIRS = "judge_pairs"
"""The part of an iteration that has its pairs of judgements."""

WRITTEN = ("instructions", "responses", "answers", *CRITERIA.values())
REPEATED = ("answers", "scores", "ranked_scores", "ranked_comparisons", "answer_criteria", "ranked_criteria")
"""Parts of an evaluation whose metric names also occur in an iteration or in another part."""


class Kind(Enum):
    """The kind of an artifact's owner."""

    INPUT = "input"
    MODEL = "model"
    ITERATION = "iteration"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True)
class Label:
    """The name of an artifact in its run, as `str(label)` writes it and `Label.parse` reads it.

    Attributes:
        kind: the kind of the owner.
        owner: the name of the input, of the model, or of the evaluated model, or the number of the iteration.
        part: the name of the artifact among those of its owner; empty if the owner has only one.
    """

    kind: Kind
    owner: str
    part: str = ""

    @classmethod
    def input(cls, name: str, part: str = "") -> "Label":
        """Label an input of the run, or data made once for all its models: "seeds", "preferences/pairs"."""
        return cls(Kind.INPUT, name, part)

    @classmethod
    def model(cls, name: str) -> "Label":
        """Label a model of the run: "SFT", "M0", "M1", …"""
        return cls(Kind.MODEL, name)

    @classmethod
    def iteration(cls, number: int, part: str) -> "Label":
        """Label training data of an iteration: "iteration_2/pairs"."""
        return cls(Kind.ITERATION, str(number), part)

    @classmethod
    def evaluation(cls, model: str, part: str) -> "Label":
        """Label an artifact of a model's evaluation: "evaluation_M3/numbers"."""
        return cls(Kind.EVALUATION, model, part)

    @classmethod
    def comparison(cls, model: str, opponent: str, benchmark: str = "") -> "Label":
        """Label a comparison of two models: "evaluation_M3/against_M1", "evaluation_M3/mt_bench_against_M1"."""
        return cls.evaluation(model, f"{benchmark}_against_{opponent}" if benchmark else f"against_{opponent}")

    @classmethod
    def parse(cls, text: str) -> "Label":
        """Parse a label. A label of no other kind is an input's."""
        prefix, _, part = text.partition("/")
        if found := PREFIX.fullmatch(prefix):
            return cls(Kind(found[1]), found[2], part)
        is_model = prefix == BASELINE or MODEL.fullmatch(prefix)
        return cls(Kind.MODEL if is_model else Kind.INPUT, prefix, part)

    @classmethod
    def names_model(cls, name: str) -> bool:
        """Whether a model may have this name: no other artifact of a run has it, or begins with it."""
        label = cls.parse(name)
        return label.kind is Kind.MODEL or (label.kind is Kind.INPUT and label.owner not in INPUTS)

    def __str__(self) -> str:
        names_kind = self.kind in (Kind.ITERATION, Kind.EVALUATION)
        prefix = f"{self.kind.value}_{self.owner}" if names_kind else self.owner
        return f"{prefix}/{self.part}" if self.part else prefix

    def sibling(self, part: str) -> "Label":
        """Return the label of another part of the same owner."""
        return replace(self, part=part)

    @property
    def criteria(self) -> "Label":
        """The label of the criteria that are written for judgements with this label."""
        part, by, name = self.part.partition("_by_")
        begun = next((prefix for prefix in (AHEAD, SECOND) if part.startswith(prefix)), "")
        return self.sibling(f"{begun}{CRITERIA[part.removeprefix(begun)]}{by}{name}")

    def link_in(self, folder: Path) -> Path:
        """Return the link to the artifact in a run folder."""
        return folder / "artifacts" / str(self)

    @property
    def model_name(self) -> str:
        """Name of the model or of the evaluated model; empty for other kinds."""
        return self.owner if self.kind in (Kind.MODEL, Kind.EVALUATION) else ""

    @property
    def model_number(self) -> int:
        """n if the model or the evaluated model is M<n>; 0 otherwise, also for the SFT baseline."""
        found = MODEL.fullmatch(self.model_name)
        return int(found[1]) if found else 0

    @property
    def iteration_number(self) -> int:
        """The iteration of the artifact: 0 until M1, 1 for M2 and its training data, …"""
        return int(self.owner) if self.kind is Kind.ITERATION else max(0, self.model_number - 1)

    @property
    def serves(self) -> str:
        """The model that the artifact is, trains or evaluates; the label itself if there is no such model."""
        if self.kind is Kind.ITERATION:
            return model_after(self.iteration_number)
        return self.model_name or {"ift": BASELINE, "eft": "M1"}.get(self.owner, str(self))

    @property
    def of_trained_model(self) -> bool:
        """Whether the model, or the evaluated model, is one that a run trains: the SFT baseline, M1, M2, …"""
        return self.model_name == BASELINE or self.model_number > 0

    @property
    def is_trained(self) -> bool:
        """Whether the artifact is a model that a run trains."""
        return self.kind is Kind.MODEL and not self.part and self.of_trained_model

    @property
    def is_aligned(self) -> bool:
        """Whether the artifact is a model that a run aligns: M2, M3, …"""
        return self.is_trained and self.model_number > 1

    @property
    def is_written(self) -> bool:
        """Whether a model of the run generates the artifact."""
        return self._role in WRITTEN

    @property
    def is_judged(self) -> bool:
        """Whether the run's judge makes the artifact."""
        return self._role in JUDGED and self.owner != "preferences"

    @property
    def of_several(self) -> bool:
        """Whether the artifact is one of several that are put together: one writer's, or one judge's of a panel."""
        return "_by_" in self.part

    @property
    def _role(self) -> str:
        """The part without what tells it from others of its kind."""
        return self.part.removeprefix(AHEAD).removeprefix(SECOND).partition("_by_")[0]

    @property
    def is_meta_judged(self) -> bool:
        """Whether the artifact has pairs of judgements."""
        return self.part.removeprefix(AHEAD) == JUDGE_PAIRS

    @property
    def recurring(self) -> str:
        """What the artifact is among those of its owner, whichever models it compares; equal in every iteration."""
        return f"{self.benchmark}_against" if self.opponent else self.part

    @property
    def opponent(self) -> str:
        """The opponent in a comparison of two models; empty for other artifacts."""
        found = COMPARISON.fullmatch(self.part)
        return found["opponent"] if found else ""

    @property
    def benchmark(self) -> str:
        """The benchmark on whose questions two models are compared; empty for the evaluation instructions."""
        found = COMPARISON.fullmatch(self.part)
        return (found["benchmark"] or "") if found else ""

    @property
    def metric_prefix(self) -> str:
        """Prefix that keeps metrics of the same name apart if several artifacts of one iteration log them.

        The SFT baseline has M1's iteration. A model's evaluation has the iteration that made the model.
        """
        if self.model_name == BASELINE:
            return f"{BASELINE}/"
        if self.owner in ("preferences", "replay"):  # Of all models, not of iteration 0.
            return f"{self}/"
        if self.part.startswith((AHEAD, SECOND, JUDGE_PAIRS)) or self.of_several:
            return f"{self.part}/" if self.kind is Kind.ITERATION else f"{self.kind.value}/{self.part}/"
        return f"evaluation/{self.part}/" if self.part in REPEATED or self.opponent else ""


def model_after(iteration: int) -> str:
    """Return the name of the model after an iteration: M1 for iteration 0, M2 for iteration 1."""
    return f"M{iteration + 1}"
