"""The answer that a response states: what stands in a box, behind "answer is", or is its last number."""

import re
from fractions import Fraction

from selfalign.data.text_parts import SENTENCE_END
from selfalign.data.turns import compared

EDGES = " \t\n\"'“”‘’«»*_`()[]{}<>"
"""Characters around a text that say nothing: spaces, quotes, brackets, marks of Markdown."""

ENDS = f"{EDGES}.,;:!?…。！？"
"""The same with punctuation."""

STATED = re.compile(r"(?:\banswer\s*(?:is|:|=)|^[ \t]*####)[\s:]*", re.IGNORECASE | re.MULTILINE)
"""An answer that is stated: "the answer is 4", "Answer: 4", "#### 4"."""

BRACES = re.compile(r"\\boxed\s*\{|[{}]")
NEGATED = re.compile(r"not\b", re.IGNORECASE)
MARKUP = re.compile(r"(?<!\w)[*`$]+|[*`$]+(?!\w)|\\[()\[\]]")
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:\d(?:[\d.,]*\d)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?(?:[ ]?/[ ]?\d+(?![\d.,]*\d))?"
)
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
LONGEST_NUMBER = 100
LETTER = re.compile(r"\W*?(?:(?:option|choice)\s+)?\(?(?P<letter>[A-Za-z])(?:[).:,]|\s+[-–—]|\s*$)", re.IGNORECASE)


def stated(text: str) -> list[str]:
    r"""Return what a response states as its answer, without markup: the contents of \boxed{…}, else of statements.

    A statement is what follows "answer is", "answer:" or "####", up to the end of its sentence. One that begins with
    "not" says nothing.
    """
    if boxes := boxed(text):
        return [plain(box) for box in boxes]
    text = plain(text)
    said = [SENTENCE_END.split(text[found.end() :].partition("\n")[0])[0] for found in STATED.finditer(text)]
    affirmed = [one for one in said if not NEGATED.match(one)]
    return affirmed or [""] * bool(said)


def boxed(text: str) -> list[str]:
    r"""Return the contents of every \boxed{…} whose braces are closed."""
    found: list[str] = []
    open_braces: list[int | None] = []
    for token in BRACES.finditer(text):
        if token[0] != "}":
            open_braces.append(token.end() if token[0] != "{" else None)
        elif open_braces and (start := open_braces.pop()) is not None:
            found.append(text[start : token.start()])
    return found


def plain(text: str) -> str:
    r"""Return a text without marks of Markdown and LaTeX: **4**, $4$, \text{4}, \frac{1}{2}."""
    return MARKUP.sub("", WRAPPED.sub(r"\1", FRACTION.sub(r"\1/\2", text)))


def numbers(text: str) -> list[Fraction | None]:
    """Return the numbers in a text: 1,234.5, -3, 3/4, 1e3. One that cannot be read, such as 1,5 or 1.2.3, is None."""
    return [_value(found[0]) for found in NUMBER.finditer(text)]


def _value(text: str) -> Fraction | None:
    top, _, bottom = text.replace("−", "-").replace(" ", "").partition("/")
    if len(text) > LONGEST_NUMBER or not PLAIN_NUMBER.fullmatch(top) or (bottom and not int(bottom)):
        return None
    return Fraction(top.replace(",", "")) / int(bottom or 1)


def bare(text: str) -> str:
    """Return a text in small letters, with single spaces, without what stands around it."""
    return " ".join(plain(compared(text)).casefold().split()).strip(ENDS)
