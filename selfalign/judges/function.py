"""Scores from a function of the user's, which may be anything: a rule, a model of their own, a program."""

import math
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any, ClassVar

from selfalign.core.errors import SelfalignError, one_line
from selfalign.core.records import Judgement, JudgementStatus
from selfalign.data.rows import is_blank, shown
from selfalign.data.thinking import answer_given
from selfalign.judges.protocol import (
    NO_MODEL,
    DegeneracyThresholds,
    InstructionResponse,
    JudgeContext,
    JudgeOutput,
    check_share,
    unjudged,
)
from selfalign.store.source_code import function_at

PLACE = re.compile(r"(.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")


@dataclass(kw_only=True, slots=True)
class FunctionScore:
    """A function scores the responses; no model is asked.

    It gets a list of `InstructionResponse`, whose `response.text` is the answer alone, and returns a list as long: for
    each response a finite number, or why it has none: a text, or None. It should return the same for the same batch,
    because a run that continues calls it for the missing ones only. It is imported when a run starts, and its code is
    part of the key of what it makes.

    Attributes:
        function: the function, as FILE.py:NAME or package.module:NAME.
        instructions_per_call: the number of instructions whose responses it gets at a time. Finished calls survive a
            kill.
        max_failure_rate: the run stops when more than this share of the responses gets no score.
        degeneracy: thresholds below which scores count as nearly constant.
    """

    function: str
    instructions_per_call: int = 64
    max_failure_rate: float = 0.5
    degeneracy: DegeneracyThresholds = field(default_factory=DegeneracyThresholds)
    model: ClassVar[str] = NO_MODEL
    min_valid_samples: ClassVar[int] = 1
    token_setting: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_share(self.max_failure_rate)
        if not PLACE.fullmatch(self.function):
            raise SelfalignError(f"judge.function must be FILE.py:NAME or package.module:NAME, got {self.function!r}")
        if self.instructions_per_call < 1:
            raise SelfalignError(f"judge.instructions_per_call must be 1 or more, got {self.instructions_per_call}")

    def called_code(self) -> dict[str, str]:
        """Return {file or package: digest of its code} of the function, which is imported for that."""
        return self._found()[1]

    def wanted(self, subjects: Sequence[InstructionResponse]) -> int:
        """Return the number of scores."""
        return len(subjects)

    def judge(self, context: JudgeContext, subjects: Sequence[InstructionResponse]) -> JudgeOutput:
        """Call the function once, and keep what it returned.

        Raises:
            SelfalignError: it raised an error, or returned anything else than a list of scores and reasons.
        """
        call = (f"function-{subjects[0].response.id}", len(subjects), partial(self._call, subjects))
        [returned] = context.journal.batches([call])
        return JudgeOutput(
            judgements=[self._judgement(subject, one) for subject, one in zip(subjects, returned, strict=True)]
        )

    def _found(self) -> tuple[Callable[..., Any], dict[str, str]]:
        """Return the function and its code.

        Raises:
            SelfalignError: it cannot be imported.
        """
        try:
            return function_at(self.function)
        except SelfalignError as error:
            raise SelfalignError(f"judge.function={self.function}: {error}") from error

    def _call(self, subjects: Sequence[InstructionResponse]) -> list[float | str]:
        """Return a score or a reason for each response."""
        function, _ = self._found()
        answers = [replace(s, response=replace(s.response, text=answer_given(s.response.text))) for s in subjects]
        try:
            returned = function(answers)
            listed = [*returned] if _is_list(returned) else None
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename}:{last.lineno}"
            raise SelfalignError(
                f"judge.function={self.function}: {type(error).__name__}: {one_line(error)} ({place})"
            ) from error
        if listed is None or len(listed) != len(subjects):
            came = shown(returned) if listed is None else f"{len(listed)} values"
            raise SelfalignError(
                f"judge.function={self.function}: expected a list with a score for each of {len(subjects)} responses, "
                f"got {came}"
            )
        return [self._checked(one, subject) for one, subject in zip(listed, subjects, strict=True)]

    def _checked(self, one: Any, subject: InstructionResponse) -> float | str:
        """Return a score as a number, or the reason why there is none."""
        if one is None:
            return "no score"
        if isinstance(one, str) and not is_blank(one):
            return one.encode("utf-8", "replace").decode()
        with suppress(OverflowError):
            if isinstance(one, Real) and not isinstance(one, bool) and math.isfinite(one):
                return float(one)
        raise SelfalignError(
            f"judge.function={self.function}: expected a finite number for response {subject.response.id}, or why it "
            f"has none (a text, or None), got {shown(one)}"
        )

    def _judgement(self, subject: InstructionResponse, one: float | str) -> Judgement:
        if isinstance(one, str):
            return unjudged(subject, self.function, JudgementStatus.NO_SCORE, one)
        return Judgement(
            id=f"{subject.response.id}-1",
            response_id=subject.response.id,
            status=JudgementStatus.OK,
            score=one,
            text="",
            model=self.function,
        )


def _is_list(value: Any) -> bool:
    """Whether a value holds others, each by itself and in an order of its own; a set has none."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | AbstractSet)
