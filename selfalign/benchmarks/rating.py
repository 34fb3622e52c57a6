"""A rating from 1 to 10: read from a judge's text, or the mean of a judge's distribution over ratings."""

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
    """A judge's grade of an answer. It has a score exactly when `status` is ok."""

    status: JudgementStatus
    score: float | None
    text: str


TOO_LONG = Grade(JudgementStatus.PROMPT_TOO_LONG, None, "")


@dataclass(frozen=True, slots=True)
class RatingTokens:
    """How a tokenizer encodes 1 to 10 after `Rating: [[`: one token each, or 10 as 1 followed by 0.

    Attributes:
        alternatives: the tokens of 1 to 9, then that of 10; or, for two tokens, those of 0 and of the end of the rating
            after a 1.
        one: the token of 1 if 10 begins with it; else empty.
    """

    alternatives: list[int]
    one: list[int]

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "RatingTokens":
        """Return the rating tokens of a tokenizer.

        Raises:
            SelfalignError: the tokenizer encodes ratings in another way.
        """
        whole = tokens_behind(tokenizer, OPENING, [str(rating) for rating in range(LOW, HIGH + 1)])
        if whole is not None:
            return cls(whole, [])
        digits = tokens_behind(tokenizer, OPENING, [str(rating) for rating in range(LOW, HIGH)])
        for end in ("]]", "]"):
            behind = tokens_behind(tokenizer, f"{OPENING}1", ["0", end])
            if digits is not None and behind is not None:
                return cls([*digits, *behind], digits[:1])
        raise SelfalignError(
            "the judge's tokenizer does not encode ratings digit by digit; set judge.method=generate or another model"
        )

    def shares(self, logps: Sequence[Sequence[float]]) -> list[float]:
        """Return the probabilities of 1 to 10, which sum to 1.

        If 10 is encoded as 1 and 0, the probability of a first 1 is divided between 1 and 10, in the ratio of the end
        of the rating and 0.

        Args:
            logps: log p of the alternatives after the opening and, for two tokens, after a 1 there.
        """
        if not self.one:
            return distribution(logps[0])
        shares = distribution(logps[0][: HIGH - LOW])
        ten, one = distribution(logps[1][HIGH - LOW :])
        return [shares[0] * one, *shares[1:], shares[0] * ten]


def expected_rating(shares: Sequence[float], thought: str = "") -> Grade:
    """Return the mean of a distribution over the ratings as a grade, after a thought."""
    mean = math.fsum(share * rating for rating, share in enumerate(shares, start=LOW))
    return Grade(JudgementStatus.OK, mean, f"{thought}{OPENING}{mean:.2f}]]")


def parse_rating(text: str, finish_reason: FinishReason = FinishReason.EOS, shown: Sequence[str] = ()) -> Grade:
    """Read `[[n]]`, 1 to 10, from the judge's own lines of newly generated text; nothing is clipped.

    Two different ratings are ambiguous, and so is one that is followed by another total. Without a rating the status
    says why, for which `finish_reason` counts too.

    Args:
        text: the judge's text.
        finish_reason: why it ended.
        shown: the answers; their own words are no rating.
    """
    found = read_bracketed(text, RATING, finish_reason, shown)
    if isinstance(found, JudgementStatus):
        return Grade(found, None, text)
    ratings, behind = found
    score = float(ratings[0])
    if {float(one) for one in ratings} != {score} or other_totals(behind, score, HIGH):
        return Grade(JudgementStatus.AMBIGUOUS, None, text)
    if not LOW <= score <= HIGH:
        return Grade(JudgementStatus.OUT_OF_RANGE, None, text)
    return Grade(JudgementStatus.OK, score, text)
