"""Scores from what the instruction says is right: an answer to find, constraints to keep. No model is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, Instruction, Judgement, JudgementStatus, Response
from selfalign.data.thinking import answer_given
from selfalign.data.verifiable import Outcome, verify
from selfalign.judges.protocol import NO_MODEL, DegeneracyThresholds, InstructionResponse, JudgeContext, JudgeOutput


@dataclass(kw_only=True, slots=True)
class Verifier:
    """The share of the weights of an instruction's checks that the response passes, from 0 to 1.

    The checks are those of `data/verifiable.py`. A response that gives no answer, or several that differ, has a wrong
    one. No judgement fails.

    Attributes:
        degeneracy: thresholds below which scores count as nearly constant.
    """

    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    model: ClassVar[str] = NO_MODEL
    verifies: ClassVar[bool] = True
    min_score: ClassVar[int] = 0
    max_score: ClassVar[int] = 1
    max_failure_rate: ClassVar[float] = 0.0
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[None] = None
    instructions_per_call: ClassVar[int] = 1024

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of scores."""
        return len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Check each response.

        Raises:
            SelfalignError: an instruction does not say what is right.
        """
        context.journal.advance(len(subjects))
        return JudgeOutput(judgements=[_judgement(subject) for subject in subjects])


def passed_checks(instruction: Instruction, response: Response) -> Outcome:
    """Check the answer of a response, without its thought.

    Raises:
        SelfalignError: the instruction does not say what is right.
    """
    cut = response.finish_reason is FinishReason.LENGTH
    outcome = verify(instruction, answer_given(response.text), cut=cut)
    if outcome is None:
        raise SelfalignError(
            f"judge=verifier: instruction {instruction.id} has neither an answer nor constraints to check"
        )
    return outcome


def _judgement(subject: InstructionResponse) -> Judgement:
    response, verdict = subject.response, passed_checks(subject.instruction, subject.response)
    return Judgement(
        id=f"{response.id}-1",
        response_id=response.id,
        status=JudgementStatus.OK,
        score=verdict.score,
        text="\n".join(verdict.lines),
        model="verifier",
    )
