"""Reading a score from what a judge wrote."""

import re
from dataclasses import dataclass

from selfalign.records import FinishReason, JudgementStatus

PREFIX = "Score: "


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a judgement's text says: `score` is a number exactly when `status` is ok."""

    status: JudgementStatus
    score: float | None = None


def parse_score(text: str, low: float, high: float, finish_reason: FinishReason = FinishReason.EOS) -> Parsed:
    """Reads the score from newly generated judgement text.

    A score stands behind the word "Score" and a colon at the beginning of a line, whatever markup surrounds it, and
    nothing but its scale follows it there; `4/5` counts as 4 where 5 is the highest score. The last one counts.

    Returns:
        ok with the score; no_score (truncated if the text was cut); ambiguous if two different scores stand there;
        out_of_range if it is not between `low` and `high`. A score is never clipped.
    """
    lines = text.splitlines()
    found = [match for match in map(SCORE_LINE.fullmatch, lines) if match]
    cut = finish_reason is FinishReason.LENGTH
    if cut and found and text.endswith(found[-1].string):
        found.pop()  # "Score: 1" at the cut may have been going to be "Score: 10".
    if not found:
        return Parsed(JudgementStatus.TRUNCATED if cut else JudgementStatus.NO_SCORE)
    if len({float(match["score"]) for match in map(SCORE_START.match, lines) if match}) > 1:
        return Parsed(JudgementStatus.AMBIGUOUS)
    score, scale = float(found[-1]["score"]), found[-1]["of"]
    if not low <= score <= high or (scale is not None and float(scale) != high):
        return Parsed(JudgementStatus.OUT_OF_RANGE)
    return Parsed(JudgementStatus.OK, score)


def of_silence(finish: str) -> JudgementStatus:
    """The status of a text without a verdict or rating, by why it ended."""
    silent = {"length": JudgementStatus.TRUNCATED, "too_long": JudgementStatus.PROMPT_TOO_LONG}
    return silent.get(finish, JudgementStatus.NO_SCORE)


def before_score(text: str) -> str:
    """A written judgement up to the first line that begins with a score."""
    lines = text.splitlines()
    end = next((at for at, line in enumerate(lines) if SCORE_WORD.match(line)), len(lines))
    return "\n".join(lines[:end]).rstrip()


SCORE_WORD = re.compile(r"[\s>*_#`\-]*(?:(?:final|total|overall)\s+)?score[\s*_`]*[:=]", re.IGNORECASE)
"""A line that begins to give a score."""

SCORE_START = re.compile(SCORE_WORD.pattern + r"[\s*_`]*[<\[(]?(?P<score>[+-]?[0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
"""A line that begins with a score, whatever follows."""

SCORE_LINE = re.compile(
    SCORE_START.pattern + r"(?:\s*\(?(?:/|out of)\s*(?P<of>[0-9]+(?:\.[0-9]+)?))?(?:\s*points?)?[\s*_`.!)>\]]*",
    re.IGNORECASE,
)
"""A line that is a score and nothing else."""
