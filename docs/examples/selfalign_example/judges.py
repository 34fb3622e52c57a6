"""A judge of one's own that asks no model: short answers score high."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.judges.protocol import DegeneracyThresholds, InstructionResponse, JudgeContext, JudgeOutput


@dataclass(kw_only=True, slots=True)
class Brevity:
    """`max_score` points, less one for every so many words, and none below `min_score`.

    Attributes:
        words_per_point: how many words cost a point.
        min_score: the lowest score.
        max_score: the highest, of an empty answer.
        max_failure_rate: no judgement of this judge fails.
        degeneracy: thresholds below which scores count as nearly constant.
    """

    words_per_point: float = 20.0
    min_score: int = 0
    max_score: int = 5
    max_failure_rate: float = 0.0
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    model: ClassVar[str] = "base"
    """Whom the run lends to the judge; this one does not ask it anything."""
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[str] = ""
    instructions_per_call: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        if self.words_per_point <= 0:
            raise SelfalignError(f"judge.words_per_point must be above 0, got {self.words_per_point}")

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """One judgement a response."""
        return len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Counts words."""
        return JudgeOutput(judgements=[self._judgement(subject) for subject in subjects])

    def _judgement(self, subject: InstructionResponse) -> Judgement:
        name, words = subject.response.id, len(subject.response.text.split())
        return Judgement(
            id=f"{name}-1",
            response_id=name,
            status=JudgementStatus.OK,
            score=max(self.min_score, self.max_score - words / self.words_per_point),
            text=f"{words} words",
            model="brevity",
        )
