"""Scores read from a judge's text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from selfalign.core.records import FinishReason, JudgementStatus
from selfalign.data.thinking import answer_behind
from selfalign.judges.verdict_text import NUMBER, find_bracketed, other_totals, own_lines, own_places

PREFIX = "Score: "

REFUSALS = {
    FinishReason.PROMPT_TOO_LONG: JudgementStatus.PROMPT_TOO_LONG,
    FinishReason.CONTENT_FILTER: JudgementStatus.CONTENT_FILTER,
    FinishReason.REFUSED: JudgementStatus.REFUSED,
}
"""The status of a judgement whose request was refused."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """Outcome of reading a judgement's text: `score` is a number exactly when `status` is ok."""

    status: JudgementStatus
    score: float | None = None


def parse_score(
    text: str, low: float, high: float, finish_reason: FinishReason = FinishReason.EOS, response: str = ""
) -> Parsed:
    """Read the score from newly generated judgement text.

    A score stands behind the word "Score" and a colon at the beginning of one of the judge's own lines
    (`selfalign.judges.verdict_text`), or on the next line. Markup may surround it, and only its scale may follow:
    `Score (0-5): 4` and `4/5` count as 4 if 5 is the highest score. The last score counts. What could be misread is not
    read: another word for the score (`Total: 4`, `评分:4`, `Note : 4/5`), JSON, `\\boxed{4}`, and `Score: 4 - reason`,
    which begins like `Score: 4 - 5`.

    In a text that was cut, a score counts only at its beginning. Elsewhere it may belong to one of several criteria, or
    to thinking that began in the prompt.

    Args:
        text: what the judge wrote.
        low: the lowest score.
        high: the highest.
        finish_reason: why the text ended.
        response: the judged response; a line that repeats it is not the judge's own.

    Returns:
        ok with the score; the status of the refusal if the request was refused; truncated if the text was cut or the
        thinking never ended; no_score if there is none; ambiguous if two scores differ, if another total follows, or
        if equal scores may be points of criteria that add up to another score; out_of_range if the score is not
        between `low` and `high`. A score is never clipped.
    """
    if finish_reason in REFUSALS:
        return Parsed(REFUSALS[finish_reason])
    lines = own_lines(text, [response])
    if lines is None:
        return Parsed(JudgementStatus.TRUNCATED)
    cut = finish_reason.is_cut
    lines = [line for line in join_headings(lines) if not _is_scale(line, low, high)]
    found = {index: match for index, line in enumerate(lines) if (match := SCORE_LINE.fullmatch(line))}
    if cut and (0 not in found or len(lines) == 1):  # "Score: 1" at the cut may have been going to be "Score: 10".
        return Parsed(JudgementStatus.TRUNCATED)
    if not found:
        return Parsed(JudgementStatus.NO_SCORE)
    last = found[max(found)]
    score = float(last["score"])
    if _is_contradicted(lines, score, high):
        return Parsed(JudgementStatus.AMBIGUOUS)
    scale = [(last["from"], low), (last["to"], high), (last["of"], high)]
    if not low <= score <= high or any(told is not None and float(told) != end for told, end in scale):
        return Parsed(JudgementStatus.OUT_OF_RANGE)
    return Parsed(JudgementStatus.OK, score)


def join_headings(lines: Sequence[str]) -> list[str]:
    """Join a line that is only `Score:` with a number alone on the next line."""
    joined: list[str] = []
    for line in lines:
        if joined and HEADING.fullmatch(joined[-1]) and ALONE.fullmatch(line):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return joined


def read_bracketed(
    text: str, pattern: re.Pattern[str], finish_reason: FinishReason, shown: Sequence[str]
) -> tuple[list[str], list[str]] | JudgementStatus:
    """Return the contents of `[[…]]` in a judge's own lines, and the lines from the first one on without them.

    In a text that was cut, brackets count only at its beginning, as a score does.

    Args:
        text: what the judge wrote.
        pattern: the brackets, with a group for their content.
        finish_reason: why the text ended.
        shown: the judged texts; a line that repeats one is not the judge's own.

    Returns:
        The status of the text instead, if there are no brackets.
    """
    if finish_reason in REFUSALS:
        return REFUSALS[finish_reason]
    lines = own_lines(text, shown)
    if lines is None:
        return JudgementStatus.TRUNCATED
    found = find_bracketed(lines, pattern)
    cut = finish_reason.is_cut
    if cut and not (found and found[0][0] == 0 and NAME.fullmatch(lines[0].partition("[[")[0])):
        return JudgementStatus.TRUNCATED
    if not found:
        return JudgementStatus.NO_SCORE
    return [said for _, said in found], [pattern.sub("", line) for line in lines[found[0][0] :]]


def before_score(text: str) -> str | None:
    """Return a judgement up to the first line after its thinking that begins with a score; None if it thinks on."""
    answer = answer_behind(text)
    if answer is None:
        return None
    lines = answer.splitlines()
    own = own_places(lines)
    end = next((at for at, line in enumerate(lines) if own[at] and SCORE_WORD.match(line)), len(lines))
    return (text.removesuffix(answer) + "\n".join(lines[:end])).rstrip()


def _is_contradicted(lines: Sequence[str], score: float, high: float) -> bool:
    """Whether lines hold another score, or something that may be meant as another score."""
    begun = {index: float(match["score"]) for index, line in enumerate(lines) if (match := SCORE_START.match(line))}
    if set(begun.values()) != {score}:
        return True
    apart = sum(index - 1 not in begun for index in begun)
    if score < apart * score <= high and not TOTAL_SCORE.match(lines[max(begun)]):
        return True
    behind = [line for index, line in enumerate(lines) if index > min(begun) and index not in begun]
    return other_totals(behind, score, high)


def _is_scale(line: str, low: float, high: float) -> bool:
    """Whether a line only shows the form of a score, with the scale in its place: `Score: 0-5`."""
    shown = None if SCORE_LINE.fullmatch(line) else SCALE_LINE.match(line)
    return shown is not None and (float(shown["first"]), float(shown["last"])) == (low, high)


NAME = re.compile(r"[\W_]*(?:(?:(?:my|the|final|overall)\s+)*(?:rating|verdict|score|answer)[\W_]*)?", re.IGNORECASE)
"""Words allowed before brackets that begin a text."""

TOTAL_SCORE = re.compile(r"[\s*_#`\-]*(?:final|total|overall)\s", re.IGNORECASE)

SCORE_WORD = re.compile(
    r"[\s*_#`\-]*(?:(?:final|total|overall)\s+)?score"
    rf"(?:[\s*_`]*[(\[](?:(?:from\s+)?(?P<from>{NUMBER})\s*(?:-|–|—|to)\s*|(?:out\s+of|/)\s*)(?P<to>{NUMBER})[)\]])?"
    r"[\s*_`]*[:=]",
    re.IGNORECASE,
)
"""Beginning of a line with a score, with or without its scale."""

SCORE_START = re.compile(SCORE_WORD.pattern + rf"[\s*_`<\[({{$\\]*(?:boxed{{)?(?P<score>[+-]?{NUMBER})", re.IGNORECASE)
"""A line that begins with a score, whatever follows."""

SCORE_LINE = re.compile(
    SCORE_WORD.pattern
    + rf"[\s*_`]*[<\[(]?(?P<score>[+-]?{NUMBER})[*_`]*(?:\s*\(?(?:/|out of)\s*(?P<of>{NUMBER}))?"
    + r"(?:\s*points?)?[\s*_`.!)>\]]*",
    re.IGNORECASE,
)
"""A line that is a score and nothing else."""

SCALE_LINE = re.compile(
    SCORE_WORD.pattern
    + rf"[\s*_`<\[({{]*(?P<first>{NUMBER})(?:\s*(?:[-–—,|/]|\.\.+|to|or|through)\s*(?:or\s+)?(?P<last>{NUMBER}))+",
    re.IGNORECASE,
)
"""A line that begins with several scores."""

HEADING = re.compile(SCORE_WORD.pattern + r"[\s*_`]*", re.IGNORECASE)

ALONE = re.compile(rf"[\s*_`]*{NUMBER}(?:\s*(?:/|out of)\s*{NUMBER})?[\s*_`]*")
"""A line that is a number; with a full stop it would begin a list."""
