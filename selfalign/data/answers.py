"""The answer that a response states: what stands in a box, behind "answer is", or is its last number."""

import re
from fractions import Fraction
from itertools import islice

from selfalign.data.text_parts import SENTENCE_END, typed
from selfalign.data.turns import compared

EDGES = " \t\n\"'“”‘’«»*_`()[]{}<>"
"""Characters around a text that say nothing: spaces, quotes, brackets, marks of Markdown."""

ENDS = f"{EDGES}.,;:!?…。！？"
"""The same with punctuation."""

STATED = re.compile(
    r"(?:\banswer\s*(?:is(?P<no>n['’]t)?(?![a-z])|:|=)|^[ \t]*####)[\s:]*", re.IGNORECASE | re.MULTILINE
)
"""An answer that is stated: "the answer is 4", "Answer: 4", "#### 4"."""

BRACES = re.compile(r"\\boxed\s*\{|[{}]")
NEGATED = re.compile(r"(?:not|never)\b", re.IGNORECASE)
MARKUP = re.compile(r"(?<!\w)[*`$]+|[*`$]+(?!\w)|\\[()\[\]]")
FRACTION = re.compile(r"\\[dt]?frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
NUMBER = re.compile(
    r"(?<![\w.^])(?<!\^\{)[-+−–]?"
    r"(?:\d{1,3}(?:[ \u00a0\u2009\u202f'’]\d{3})+(?:\.\d+)?(?!\d)|\d(?:[\d.,]*\d)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d)|[ ]\d{1,9}/\d+(?![\d.,]*\d))?(?:[ ]?/[ ]?\d+(?![\d.,]*\d))?"
)
"""A number, or what looks like one: 1,234.5, -3, 3/4, 1 1/2, 1e3. An exponent is none."""

PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
MIXED = re.compile(r"([-+]?)(\d+) (\d+)")
GROUPED = re.compile(r"(?<=\d)[\u00a0\u2009\u202f'’](?=\d{3})")
"""What parts the thousands of a number besides the comma."""

FUNCTION = re.compile(r"(?:√|\\(?:sqrt(?:\[\d+\])?|log|ln|exp|sin|cos|tan|[dt]?frac(?:\{.*\})?)[\s{]*)\Z", re.DOTALL)
r"""What stands before a number that is an argument of something else: \sqrt{2}, \frac{\pi}{2}."""

FACTOR = re.compile(r"\s*(?:[\^√π⁰¹²³⁴-⁹]|\\(?:sqrt|pi)(?![a-z])|(?:hundred|thousand|[mbtr]+illion)\b)", re.IGNORECASE)
"""What stands behind a number that is part of a larger one: 2^10, 2π, 2√3, 5 million."""

NEAR = 60
"""The number of characters before a number that tell of what it is an argument."""

LONGEST_NUMBER = 100
MOST_PERIODS = 8
"""Periods inside one answer that are read as such at most, as in J. R. R. Tolkien."""

LETTER = re.compile(
    r"\W*?(?:(?:option|choice)\s+)?\(?(?P<letter>[A-Za-z])(?:[).:,，、。]|\s+[-–—]|\s*$)"
    r"(?!,?\s*(?:(?:and|or|&)\s+)?\(?[A-Za-z]\)?\s*(?:$|[,.;&/]|(?:and|or)\b))",
    re.IGNORECASE,
)
"""A letter as options have it, but not the first of several: A, B and C."""

NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F) if chr(wide) != "，"} | {0x066B: ".", 0x066C: ","}
"""{wide form of a character in East Asian texts, or Arabic sign in a number: the common one}."""


def stated(text: str) -> list[str]:
    r"""Return what a response states as its answer, without markup: the contents of \boxed{…}, else of statements.

    A statement is what follows "answer is", "answer:" or "####", up to the end of its sentence. One that begins with
    "not" says nothing.
    """
    return [readings[0] for readings in statements(text)]


def statements(text: str) -> list[list[str]]:
    """Return the same, each with its readings: it ends with its first sentence, or with a later one of its line.

    The period of "St. Louis" or "J. K. Rowling" ends none.
    """
    if boxes := boxed(text):
        return [[plain(box)] for box in boxes]
    text = plain(text)
    found = [*STATED.finditer(text)]
    said = [text[one.end() :].partition("\n")[0] for one in found if not one["no"]]
    affirmed = [
        [line[: end.start()] for end in islice(SENTENCE_END.finditer(line), MOST_PERIODS)] + [line]
        for line in said
        if not NEGATED.match(line)
    ]
    return affirmed or [[""]] * bool(found)


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
    r"""Return a text without marks of Markdown and LaTeX, and without wide characters: **4**, $4$, \text{4}, ４.

    Fractions are 1/2 for \frac{1}{2}, and 3 1/2 for 3\frac{1}{2}.
    """
    return MARKUP.sub("", WRAPPED.sub(r"\1", FRACTION.sub(_fraction, text.translate(NARROW))))


def _fraction(found: re.Match[str]) -> str:
    top, digit, bottom, other = found.groups()
    is_mixed = found.string[found.start() - 1 : found.start()].isdecimal()
    return f"{' ' * is_mixed}{top or digit}/{bottom or other}"


def numbers(text: str) -> list[Fraction | None]:
    """Return the numbers in a text: 1,234.5, -3, 3/4, 1 1/2, 1e3.

    One that cannot be read, such as 1,5, 1 234 or 1.2.3, is None, and so is one that is part of something else, as in
    2^10, 2π and 5 million.
    """
    return [
        None
        if FACTOR.match(text, found.end()) or FUNCTION.search(text[max(0, found.start() - NEAR) : found.start()])
        else _value(found[0])
        for found in NUMBER.finditer(text)
    ]


def _value(text: str) -> Fraction | None:
    text = GROUPED.sub("", text.replace("−", "-").replace("–", "-"))
    top, _, bottom = text.replace(" /", "/").replace("/ ", "/").partition("/")
    if len(text) > LONGEST_NUMBER or (bottom and not int(bottom)):
        return None
    if mixed := MIXED.fullmatch(top):
        sign, whole, part = mixed.groups()
        value = int(whole) + Fraction(int(part), int(bottom or 1))
        return (-value if sign == "-" else value) if int(part) < int(bottom or 1) else None
    if not PLAIN_NUMBER.fullmatch(top):
        return None
    return Fraction(top.replace(",", "")) / int(bottom or 1)


def bare(text: str) -> str:
    """Return a text in small letters, with single spaces, without what stands around it."""
    return " ".join(plain(compared(typed(text))).casefold().split()).strip(ENDS)
