"""A judge of one's own that asks no model: short answers score high."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.judges.protocol import DegeneracyThresholds, JudgeContext, Judged, Subject


@dataclass(kw_only=True, slots=True)
class Brevity:
    """`high` points, less one for every so many words, and none below `low`.

    Attributes:
        words_per_point: how many words cost a point.
        low: the lowest score.
        high: the highest, of an empty answer.
        max_failure_rate: no judgement of this judge fails.
        alarm: when the judge says nearly the same of everything.
    """

    words_per_point: float = 20.0
    low: int = 0
    high: int = 5
    max_failure_rate: float = 0.0
    alarm: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    model: ClassVar[str] = "base"
    """Whom the run lends to the judge; this one does not ask it anything."""
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[str] = ""
    together: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        if self.words_per_point <= 0:
            raise SelfalignError(f"judge.words_per_point must be above 0, got {self.words_per_point}")

    def wanted(self, subjects: Sequence[Subject]) -> int:
        """One judgement a response."""
        return len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[Subject]) -> Judged:
        """Counts words."""
        return Judged(judgements=[self._judgement(subject) for subject in subjects])

    def _judgement(self, subject: Subject) -> Judgement:
        name, words = subject.response.id, len(subject.response.text.split())
        return Judgement(
            id=f"{name}-1",
            response_id=name,
            status=JudgementStatus.OK,
            score=max(self.low, self.high - words / self.words_per_point),
            text=f"{words} words",
            model="brevity",
        )
