"""A panel of judges, whose scores of each response are combined."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.judges.protocol import (
    INSTRUCTIONS_PER_CALL,
    NO_MODEL,
    OWN_MODELS,
    DegeneracyThresholds,
    InstructionResponse,
    JudgeContext,
    JudgeOutput,
    asks_a_policy,
    by_instruction,
    check_share,
    only_compares,
    unjudged,
)
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Mean, Sums

Scores = Mapping[str, float]
"""{response id: score} of one judge, for the responses to one instruction."""


@dataclass(kw_only=True, slots=True)
class Panel:
    """Several judges judge every response, each by itself. A response that one of them gives no score has none.

    Attributes:
        members: {name: judge}, as in `+judge@judge.members.short=expected_score`.
        weights: {name: weight}; 1 for a judge that is not named.
        combine: "mean" is the weighted mean of the scores as they are, for judges on one scale. "votes" needs no scale:
            every judge compares each two responses to an instruction by its scores, and a response's score is the
            weighted share of these comparisons that it wins, from 0 to 1; a tie is half a win.
        max_failure_rate: the run stops when more than this share of the responses gets no score.
        degeneracy: thresholds below which the combined scores count as nearly constant.
    """

    members: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    combine: str = "votes"
    max_failure_rate: float = 0.5
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    model: ClassVar[str] = NO_MODEL
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[None] = None
    instructions_per_call: ClassVar[int] = INSTRUCTIONS_PER_CALL

    def __post_init__(self) -> None:
        check_share(self.max_failure_rate)
        if self.combine not in ("mean", "votes"):
            raise SelfalignError(f"judge.combine must be mean or votes, got {self.combine!r}")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise SelfalignError(f"judge.weights.{name} must be above 0 and finite, got {weight}")

    def check(self, key: str) -> None:
        """Check that there are several judges, each of its own, and that weights are of these.

        Args:
            key: the setting that holds the panel.

        Raises:
            SelfalignError: otherwise.
        """
        if len(self.members) < 2:
            raise SelfalignError(
                f"{key}.members: a panel needs two judges or more. Add one with +judge@{key}.members.NAME=OPTION"
            )
        if unknown := sorted(set(self.weights) - set(self.members)):
            named = ", ".join(self.members)
            raise SelfalignError(f"{key}.weights.{unknown[0]}: the judges of {key}.members are {named}")
        if nested := [name for name, member in self.members.items() if isinstance(member, Panel)]:
            raise SelfalignError(f"{key}.members.{nested[0]} is a panel itself: name its judges here")
        if self.combine == "mean" and len(scales := {scale_of(member) for member in self.members.values()}) > 1:
            raise SelfalignError(
                f"{key}.combine=mean needs judges on one scale, but they score {' and '.join(sorted(scales))}: set "
                f"{key}.combine=votes, or judges of the same scale"
            )

    @property
    def only_compares(self) -> bool:
        """Whether the scores only order the responses to one instruction: they are votes, or a member only compares."""
        return self.combine == "votes" or any(map(only_compares, self.members.values()))

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of scores, one for each response."""
        return len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Combine the scores of the members, which have judged before."""
        judgements: list[Judgement] = []
        opposed: list[bool] = []
        for candidates in by_instruction(subjects).values():
            names = [subject.response.id for subject in candidates]
            of_judges = {
                judge: {name: scores[name] for name in names if name in scores}
                for judge, scores in context.member_scores.items()
            }
            combined = self.scores(of_judges)
            opposed += disagreements(of_judges)
            judgements += [_judgement(subject, combined, of_judges) for subject in candidates]
        means: Sums = {}
        if opposed:
            means[catalog.JUDGE_DISAGREEMENT.name] = Mean(float(sum(opposed)), float(len(opposed)))
        context.journal.advance(len(subjects))
        return JudgeOutput(judgements=judgements, means=means)

    def weight(self, name: str) -> float:
        """Return the weight of a judge."""
        return self.weights.get(name, 1.0)

    def scores(self, of_judges: Mapping[str, Scores]) -> dict[str, float]:
        """Combine the scores of the responses to one instruction that every judge has scored."""
        shared = set.intersection(*(set(scores) for scores in of_judges.values()))
        ids = [name for name in next(iter(of_judges.values())) if name in shared]
        combined = self._votes(ids, of_judges) if self.combine == "votes" else self._means(ids, of_judges)
        return dict(zip(ids, combined, strict=True))

    def _means(self, ids: Sequence[str], of_judges: Mapping[str, Scores]) -> list[float]:
        total = math.fsum(map(self.weight, of_judges))
        return [
            math.fsum(self.weight(judge) * scores[name] for judge, scores in of_judges.items()) / total for name in ids
        ]

    def _votes(self, ids: Sequence[str], of_judges: Mapping[str, Scores]) -> list[float]:
        if len(ids) < 2:
            return [0.5] * len(ids)
        total = math.fsum(map(self.weight, of_judges)) * (len(ids) - 1)
        return [
            math.fsum(
                self.weight(judge) * won(scores[name], scores[other])
                for judge, scores in of_judges.items()
                for other in ids
                if other != name
            )
            / total
            for name in ids
        ]


def _judgement(
    subject: InstructionResponse, combined: Mapping[str, float], of_judges: Mapping[str, Scores]
) -> Judgement:
    name = subject.response.id
    if name in combined:
        told = ", ".join(f"{judge} {scores[name]:.3g}" for judge, scores in of_judges.items())
        return Judgement(
            id=f"{name}-1", response_id=name, status=JudgementStatus.OK, score=combined[name], text=told, model="panel"
        )
    silent = ", ".join(judge for judge, scores in of_judges.items() if name not in scores)
    return unjudged(subject, "panel", JudgementStatus.NO_SCORE, f"no score by {silent}")


def won(score: float, other: float) -> float:
    """Return 1 for the higher score, 0 for the lower, and a half for equal ones."""
    return 0.5 if score == other else float(score > other)


def disagreements(of_judges: Mapping[str, Scores]) -> Iterator[bool]:
    """For each two responses and each two judges that rank them, yield whether the ranks are opposite."""
    for one, other in combinations(of_judges.values(), 2):
        for first, second in combinations([name for name in one if name in other], 2):
            ranks = won(one[first], one[second]), won(other[first], other[second])
            if 0.5 not in ranks:
                yield ranks[0] != ranks[1]


def scale_of(judge: Any) -> str:
    """Return the scale of a judge in words."""
    low, high = getattr(judge, "min_score", None), getattr(judge, "max_score", None)
    return f"without a scale ({type(judge).__name__})" if low is None or high is None else f"from {low} to {high}"


def judges_in(key: str, judge: Any) -> dict[str, Any]:
    """Return {setting: judge} of a judge, or of the members of a panel."""
    if not isinstance(judge, Panel):
        return {key: judge}
    return {f"{key}.members.{name}": member for name, member in judge.members.items()}


def model_of(judge: Any, wanted: str) -> str:
    """Return the name of the model by which a judge judges, where a model of the run is wanted: a fixed one stays."""
    return judge.model if asks_a_policy(judge) and judge.model not in OWN_MODELS else wanted
