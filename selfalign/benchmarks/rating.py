"""A rating from 1 to 10: read from what a judge wrote, or the mean of what it might write."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, JudgementStatus
from selfalign.judges.expected import distribution, tokens_behind
from selfalign.judges.parsing import read_bracketed
from selfalign.judges.verdict_text import other_totals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LOW, HIGH = 1, 10
OPENING = "Rating: [["
RATING = re.compile(r"\[\[([0-9]+(?:\.[0-9]+)?)\]\]")


@dataclass(frozen=True, slots=True)
class Grade:
    """What a judge said of an answer: a score exactly when `status` is ok."""

    status: JudgementStatus
    score: float | None
    text: str


TOO_LONG = Grade(JudgementStatus.PROMPT_TOO_LONG, None, "")


@dataclass(frozen=True, slots=True)
class RatingTokens:
    """How a tokenizer writes 1 to 10 behind `Rating: [[`: as a token each, or 10 as 1 followed by 0.

    Attributes:
        alternatives: the tokens of 1 to 9, then that of 10; or, behind a 1, those of 0 and of the end of the rating.
        one: the token of 1 where 10 begins with it, else nothing.
    """

    alternatives: list[int]
    one: list[int]

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "RatingTokens":
        """Finds them.

        Raises:
            SelfalignError: this tokenizer writes them in another way.
        """
        whole = tokens_behind(tokenizer, OPENING, [str(rating) for rating in range(LOW, HIGH + 1)])
        if whole is not None:
            return cls(whole, [])
        digits = tokens_behind(tokenizer, OPENING, [str(rating) for rating in range(LOW, HIGH)])
        for end in ("]]", "]"):
            behind = tokens_behind(tokenizer, f"{OPENING}1", ["0", end])
            if digits is not None and behind is not None:
                return cls([*digits, *behind], digits[:1])
        raise SelfalignError("this model's tokenizer does not write ratings digit by digit; set judge.method=generate")

    def shares(self, logps: Sequence[Sequence[float]]) -> list[float]:
        """The shares of 1 to 10, given log p of the alternatives behind the opening and, if need be, behind a 1 there.

        Where 10 is written as 1 and 0, the share of what begins with 1 is divided by how likely 0 and the end are.
        """
        if not self.one:
            return distribution(logps[0])
        shares = distribution(logps[0][: HIGH - LOW])
        ten, one = distribution(logps[1][HIGH - LOW :])
        return [shares[0] * one, *shares[1:], shares[0] * ten]


def expected_rating(shares: Sequence[float], thought: str = "") -> Grade:
    """The mean of a distribution over the ratings, behind a thought."""
    mean = math.fsum(share * rating for rating, share in enumerate(shares, start=LOW))
    return Grade(JudgementStatus.OK, mean, f"{thought}{OPENING}{mean:.2f}]]")


def parse_rating(text: str, finish_reason: FinishReason = FinishReason.EOS, shown: Sequence[str] = ()) -> Grade:
    """Reads `[[n]]`, 1 to 10, from the judge's own lines of newly generated text; nothing is clipped.

    Two different ones are ambiguous, and so is one that another total follows; none is no score, for which
    `finish_reason` may give the reason.

    Args:
        text: what the judge wrote.
        finish_reason: why it ended.
        shown: the answers; their own words are no rating.
    """
    found = read_bracketed(text, RATING, finish_reason, shown)
    if isinstance(found, JudgementStatus):
        return Grade(found, None, text)
    said, behind = found
    score = float(said[0])
    if {float(one) for one in said} != {score} or other_totals(behind, score, HIGH):
        return Grade(JudgementStatus.AMBIGUOUS, None, text)
    if not LOW <= score <= HIGH:
        return Grade(JudgementStatus.OUT_OF_RANGE, None, text)
    return Grade(JudgementStatus.OK, score, text)
