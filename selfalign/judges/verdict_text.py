"""Which lines of a judge's text may hold its verdict, decided here alone for scores, ratings and verdicts.

Everything before the end of the judge's thinking is dropped. Of the rest, a line is not the judge's own if it is quoted
(`>`), indented as code or in a fence, if it repeats the judged response, or if the line before announces an example. A
verdict that a later line contradicts does not count.
"""

import re
import textwrap
from collections.abc import Sequence

from selfalign.data.thinking import answer_behind

NUMBER = r"[0-9]+(?:\.[0-9]+)?"

OUT_OF = r"\b(?:out of|von|sur|de|di|su|van|av|sobre|из)\b"
"""Words between a score and the highest score, in several languages."""

POINTS = r"points?|marks?|punkte?n?|puntos?|pontos?|punti|punten|баллов|балла?|分|点|점"
"""Units after a score, in several languages."""

MARKUP = " \t*_`#"
"""Markup around a verdict on its line."""

QUOTED = re.compile(r" {0,3}>|\t| {1,3}\t| {4}")
"""Beginning of a quoted line, or of a line indented as code."""

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[^`]*")

CONTROL = re.compile(r"(?:<\|[^|<>\n]{1,40}\|>|</s>|\[END FINAL RESPONSE\])\Z")
"""A control token at the end of a text, where some servers leave it."""

EXAMPLE = re.compile(r"(?:\be\.g\.|\b(?:for example|for instance|such as)\b)[^.!?\n]{0,24}\Z", re.IGNORECASE)
"""Words before an example on its line."""

ANNOUNCEMENT = re.compile(r"(?:\be\.g\.|\b(?:for instance|such as|examples?)\b)[^.!?\n]{0,24}[:：]\Z", re.IGNORECASE)
"""The end of a line before an example."""

QUOTATION = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|«[^»\n]*»|`[^`\n]*`")

SHORTEST_REPETITION = 5
"""Characters; a shorter line stands in many a response by chance."""

TOTAL_WORDS = r"\b(?:total|overall|sum|final|scores?|grade|rating|verdict|marks?|points)\b"

TOTALS = (
    rf"{TOTAL_WORDS}[^\d\n]{{0,24}}(?P<total>{NUMBER})(?:\s*(?:points?|marks?)\b|[,;}}]|[\W_]*$)",
    rf"{TOTAL_WORDS}.*?(?P<total>{NUMBER})\s*(?:points?|marks?)?[\W_]*$",
    rf"(?<![\d./])(?P<total>{NUMBER})\s*(?:points?|marks?)?\s*(?:in total|in all|overall|altogether)\b",
    rf"\b(?:give|award|assign|deserve|merit|earn|rate)[sd]?\b[^\d\n]{{0,24}}(?P<total>{NUMBER})\s*(?:points?)?"
    r"(?:[.;!]\s|[\W_]*$)",
    r"\b(?:lower|reduce|raise|increase|change|revise|correct|adjust|downgrade|upgrade|bring)\w*\b[^\d\n.]{0,32}"
    rf"\b(?:to|as|at)\s+(?:an?\s+)?(?P<total>{NUMBER})\b",
    r"\b(?:score|grade|rating|it|this|that)\s+(?:should|ought to|must)\s+(?:rather\s+)?be\s+(?:an?\s+)?"
    rf"(?P<total>{NUMBER})\b",
)
"""How a line tells a total: "overall 4 points", "Total: 1 + 1 + 1 = 3", "3 points in total", "I give it a 4", "I would
lower this to 3", "it should be a 3"."""

STATEMENT = re.compile(
    rf"[\W_]*(?:(?:\\boxed{{)|[^\d\n:：=]{{1,40}}(?:[:：=]|是|为)[\W_]*)?(?P<total>{NUMBER})"
    rf"(?:\s*(?:/|{OUT_OF})\s*{NUMBER})?\s*(?:{POINTS})?[\W_]*",
    re.IGNORECASE,
)
"""A line that is a number, with a name, a highest number and a unit or without, and nothing else, in any language:
"Gesamt: 4 von 5 Punkten", "总分：4分"."""

CHOICE = re.compile(
    r"[\W_]*(?:[^\n:：=]{1,40}[:：=][\W_]*)?(?:boxed\{)?(?:(?:assistant|response|answer|model|option)\s+)?(?-i:(?P<choice>[ABC]))[\W_]*",
    re.IGNORECASE,
)
"""A line that is one of the letters, with a name or without, and nothing else."""

BETTER = re.compile(
    r"\b(?P<choice>[ABC]) (?:is (?:clearly |slightly |much )?(?:the )?(?:better|best|winner|superior)|wins"
    r"|should (?:win|be chosen|be preferred))\b"
)


def own_lines(text: str, shown: Sequence[str] = ()) -> list[str] | None:
    """Return the lines of a judge's text that may hold its verdict, without blank lines.

    Args:
        text: what the judge wrote.
        shown: the judged texts, such as the response.

    Returns:
        None if the judge began to think and never ended.
    """
    answer = answer_behind(text)
    if answer is None:
        return None
    while control := CONTROL.search(answer := answer.rstrip()):
        answer = answer[: control.start()]
    lines = textwrap.dedent(answer.lstrip("\r\n")).splitlines()
    own = own_places(lines, shown)
    return [line for line, is_own in zip(lines, own, strict=True) if is_own and line.strip()]


def own_places(lines: Sequence[str], shown: Sequence[str] = ()) -> list[bool]:
    """For each line after the thinking, return whether it is the judge's own."""
    said = [plain(text) for text in shown]
    own: list[bool] = []
    fence, before = "", ""
    for line in lines:
        mark = FENCE.fullmatch(line)
        if fence:
            own.append(False)
            fence = "" if mark and mark[1].startswith(fence) and line.strip() == mark[1] else fence
        else:
            fence = mark[1] if mark else ""
            own.append(not (fence or QUOTED.match(line) or ANNOUNCEMENT.search(before) or repeats(line, said)))
        before = line.strip(MARKUP) or before
    return own


def repeats(line: str, said: Sequence[str]) -> bool:
    """Whether a line repeats a part of one of the texts, which are `plain`. Markup does not count."""
    words = plain(line)
    if len(words) < SHORTEST_REPETITION or not any(words in text for text in said):
        return False
    whole = re.compile(rf"(?<!\w){re.escape(words)}(?!\w|[.,]\d)")
    return any(whole.search(text) for text in said)


def plain(text: str) -> str:
    """Return a text without markup, in lower case, on one line."""
    return re.sub(r"[\s*_`#>|~]+", " ", text.casefold()).strip(" .,:;!?\"'“”")


def find_bracketed(lines: Sequence[str], pattern: re.Pattern[str]) -> list[tuple[int, str]]:
    """Return (line, content) of every `[[…]]` that is neither in quotation marks nor an example."""
    found: list[tuple[int, str]] = []
    for index, line in enumerate(lines):
        bare = QUOTATION.sub(" ", line.strip(MARKUP))
        for one in pattern.finditer(bare):
            if not EXAMPLE.search(bare[max(0, one.start() - 60) : one.start()]):
                found.append((index, one[1]))
    return found


def other_totals(lines: Sequence[str], score: float, high: float) -> bool:
    """Whether lines state a total other than the score: in words, out of the highest score, or as the last line."""
    scale = rf"(?<![\d./-])(?P<total>{NUMBER})\s*(?:/|{OUT_OF})\s*{re.escape(f'{high:g}')}(?![\d/]|\.\d)"
    ways = [re.compile(way, re.IGNORECASE) for way in (scale, *TOTALS)]
    told = [float(found["total"]) for line in lines for way in ways for found in way.finditer(line[-300:])]
    last = STATEMENT.fullmatch(lines[-1]) if lines else None
    return any(total != score for total in [*told, *([float(last["total"])] if last else [])])


def other_choices(lines: Sequence[str], choice: str) -> bool:
    """Whether lines choose another of the letters A, B and C."""
    whole = [found["choice"] for line in lines if (found := CHOICE.fullmatch(line))]
    spoken = [found["choice"] for line in lines for found in BETTER.finditer(line)]
    return bool({*whole, *spoken} - {choice})
