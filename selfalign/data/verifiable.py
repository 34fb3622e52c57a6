"""What can be checked about a response: the right answer, and constraints on its form. Rows carry both as plain JSON.

The constraints are a subset of those of IFEval (arXiv 2311.07911), counted in our own way, which docs/judges.md states.
Nothing here depends on a model, a seed or the machine.
"""

import json
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

import msgspec

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Instruction
from selfalign.data.rows import Row, is_blank, shown
from selfalign.data.text_filters import MARKER, UNSPACED, pieces_of, scripts_of
from selfalign.data.turns import compared

SCRIPT_SHARE = 0.9
"""The least share of an answer's letters that must be of the scripts it is asked in."""

SCRIPTS = (
    "ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "GEORGIAN", "GREEK", "GUJARATI", "HANGUL",
    "HEBREW", "HIRAGANA", "KATAKANA", "LATIN", "TAMIL", "TELUGU", "THAI",
)  # fmt: skip

EDGES = " \t\n\"'“”‘’«»*_`()[]{}<>"
"""Characters around a text that say nothing: spaces, quotes, brackets, marks of Markdown."""

ENDS = f"{EDGES}.,;:!?…。！？"
"""The same with punctuation."""

SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]*_]*(?=\s|$)|[。！？]+")
ABBREVIATION = re.compile(r"(?:^|[\s(\"'])(?:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|[A-Z])\.$", re.IGNORECASE)
BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
FENCE = re.compile(r"```(?:json)?\s*\n(?P<inside>.*)\n\s*```", re.DOTALL | re.IGNORECASE)

STATED = re.compile(r"(?:\banswer\s*(?:is|:|=)|^[ \t]*####)[\s:]*", re.IGNORECASE | re.MULTILINE)
"""An answer that is stated: "the answer is 4", "Answer: 4", "#### 4"."""

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


# --- checks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """A response to check: its text, and whether it was cut at the token limit."""

    text: str
    cut: bool = False

    @property
    def whole_words(self) -> str:
        """The text without the word at which it was cut, which may be the beginning of another."""
        return re.sub(r"\S+\Z", "", self.text) if self.cut else self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Check(ABC):
    """Something to check about an answer.

    Attributes:
        weight: its share of the score, relative to the weights of the other checks of the instruction.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise SelfalignError(f"weight must be a finite number above 0, got {self.weight}")

    @abstractmethod
    def fault(self, answer: Answer) -> str:
        """Return why an answer that is not empty fails; "" if it passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exact(Check):
    """The stated answer, or else the whole response, is the value or one of several.

    Capitals, spaces, and quotes, brackets and punctuation around it do not count.
    """

    value: str | list[str]

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        for text in self.values:
            check_text("value", text)

    @property
    def values(self) -> list[str]:
        """The texts that are right."""
        return [self.value] if isinstance(self.value, str) else self.value

    def fault(self, answer: Answer) -> str:
        found = stated(answer.whole_words) or ([] if answer.cut else [answer.text])
        said = {bare(text) for text in found}
        if len(said) != 1:
            return "no answer before it was cut" if not said else "several different answers"
        return "" if said <= {bare(text) for text in self.values} else f"another answer than {self.values[0]!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Number(Check):
    """The stated answer, or else the last number, is the value, give or take the tolerance.

    A statement must have one number, behind its last "=" if it has one.
    """

    value: float
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        if not math.isfinite(self.value):
            raise SelfalignError(f"value must be a finite number, got {self.value}")
        if not 0 <= self.tolerance < math.inf:
            raise SelfalignError(f"tolerance must be 0 or more, got {self.tolerance}")

    def fault(self, answer: Answer) -> str:
        text = answer.whole_words
        found = [numbers(said.rpartition("=")[2]) for said in stated(text)] or [numbers(plain(text))[-1:]]
        said = {tuple(dict.fromkeys(several)) for several in found}
        if len(said) != 1 or len(one := next(iter(said))) > 1:
            return "several different numbers"
        if not one:
            return "no number"
        if (number := one[0]) is None:
            return "a number that cannot be read"
        right = abs(number - Fraction(str(self.value))) <= Fraction(str(self.tolerance))
        return "" if right else f"another number than {self.value:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice(Check):
    """The stated answer, or else the only letter that a line begins with as options do, is the letter."""

    value: str

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        if not re.fullmatch("[A-Z]", self.value):
            raise SelfalignError(f"value must be a capital letter, got {self.value!r}")

    def fault(self, answer: Answer) -> str:
        text = answer.whole_words
        lines = stated(text) or plain(text).splitlines()
        letters = {found["letter"].upper() for line in lines if (found := LETTER.match(line.strip()))}
        if len(letters) != 1:
            return "several letters" if letters else "no letter of an option"
        return "" if letters == {self.value} else f"another letter than {self.value}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Regex(Check):
    """A regular expression of Python's is found in the response."""

    pattern: str

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        check_text("pattern", self.pattern)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise SelfalignError(f"pattern is no regular expression: {error}") from error

    def fault(self, answer: Answer) -> str:
        return "" if re.search(self.pattern, answer.whole_words) else f"nothing like {self.pattern!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounded(Check):
    """The number of something lies within bounds, which count.

    Attributes:
        at_least: the least number.
        at_most: the greatest.
    """

    at_least: int | None = None
    at_most: int | None = None

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if not bounds or min(bounds) < 0 or bounds != sorted(bounds):
            raise SelfalignError(
                f"give at_least, at_most or both, from 0 up and in this order; got {self.at_least} and {self.at_most}"
            )

    @abstractmethod
    def count(self, text: str) -> int:
        """Return the number of what is counted."""

    def fault(self, answer: Answer) -> str:
        count = self.count(answer.text)
        low, high = self.at_least or 0, math.inf if self.at_most is None else self.at_most
        return "" if low <= count <= high else f"{count}, wanted {low} to {'any number' if high == math.inf else high}"


class Words(Bounded):
    """Parts between spaces with a letter or a digit; in scripts without spaces, characters."""

    __slots__ = ()

    def count(self, text: str) -> int:
        return sum(map(has_word, pieces_of(text)))


class Sentences(Bounded):
    """What ends with . ! ? or …, or with its paragraph or list item, and has a letter or a digit."""

    __slots__ = ()

    def count(self, text: str) -> int:
        return sum(len(sentences(part)) for block in BLANK_LINE.split(text) for part in items(block))


class Paragraphs(Bounded):
    """What blank lines part, and has a letter or a digit."""

    __slots__ = ()

    def count(self, text: str) -> int:
        return sum(map(has_word, BLANK_LINE.split(text)))


class ListItems(Bounded):
    """Lines that begin with a mark of lists: "- ", "* ", "2. ", "b) "."""

    __slots__ = ()

    def count(self, text: str) -> int:
        return sum(is_item(line) for line in text.splitlines())


@dataclass(frozen=True, kw_only=True, slots=True)
class Contains(Check):
    """Each phrase occurs, as whole words, in any case.

    Attributes:
        phrases: the words or phrases.
        at_least: how often each occurs.
    """

    phrases: list[str]
    at_least: int = 1

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        check_phrases(self.phrases)
        if self.at_least < 1:
            raise SelfalignError(f"at_least must be 1 or more, got {self.at_least}")

    def fault(self, answer: Answer) -> str:
        counts = {phrase: occurrences(phrase, answer.text) for phrase in self.phrases}
        rare = [phrase for phrase, count in counts.items() if count < self.at_least]
        return f"{rare[0]!r} occurs {counts[rare[0]]} times, wanted {self.at_least}" if rare else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Excludes(Check):
    """No phrase occurs as whole words, in any case. What has no letter, such as a comma, occurs wherever it stands."""

    phrases: list[str]

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        check_phrases(self.phrases)

    def fault(self, answer: Answer) -> str:
        found = [phrase for phrase in self.phrases if occurrences(phrase, answer.text)]
        return f"{found[0]!r} occurs" if found else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartsWith(Check):
    """The response begins with the text. Capitals and what stands around both do not count."""

    text: str

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        check_text("text", bare(self.text))

    def fault(self, answer: Answer) -> str:
        found = re.match(_pattern(bare(self.text)), bare(answer.text))
        return "" if found else f"it does not begin with {self.text!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EndsWith(Check):
    """The response ends with the text. Capitals and what stands around both do not count."""

    text: str

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        check_text("text", bare(self.text))

    def fault(self, answer: Answer) -> str:
        found = re.search(rf"(?:{_pattern(bare(self.text))})\Z", bare(answer.text))
        return "" if found else f"it does not end with {self.text!r}"


class LowerCase(Check):
    """There are letters, and none is a capital."""

    __slots__ = ()

    def fault(self, answer: Answer) -> str:
        return "" if answer.text.islower() else "it is not in small letters"


class UpperCase(Check):
    """There are letters, and all are capitals."""

    __slots__ = ()

    def fault(self, answer: Answer) -> str:
        return "" if answer.text.isupper() else "it is not in capitals"


@dataclass(frozen=True, kw_only=True, slots=True)
class Json(Check):
    """The response is JSON, which may stand between fences of Markdown.

    Attributes:
        keys: it is an object that has these keys.
    """

    keys: list[str] = field(default_factory=list)

    def fault(self, answer: Answer) -> str:
        text = answer.text.strip()
        if fenced := FENCE.fullmatch(text):
            text = fenced["inside"]
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return "it is no JSON"
        if self.keys and not isinstance(value, dict):
            return "it is no JSON object"
        absent = [key for key in self.keys if key not in value]
        return f"the key {absent[0]!r} is missing" if absent else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Script(Check):
    """Nine in ten letters are of the scripts: a plain check of the language.

    Attributes:
        scripts: the first words of the letters' names in Unicode, such as LATIN, CYRILLIC or CJK.
    """

    scripts: list[str]

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        if not self.scripts or any(script not in SCRIPTS for script in self.scripts):
            raise SelfalignError(f"scripts must be some of {', '.join(SCRIPTS)}; got {self.scripts}")

    def fault(self, answer: Answer) -> str:
        letters = scripts_of(answer.text)
        wanted = sum(letters[script] for script in self.scripts)
        return (
            "" if letters and wanted >= SCRIPT_SHARE * letters.total() else f"it is not in {' or '.join(self.scripts)}"
        )


ANSWERS: dict[str, type[Check]] = {"exact": Exact, "number": Number, "choice": Choice, "regex": Regex}
"""{kind of right answer: its check}."""

CONSTRAINTS: dict[str, type[Check]] = {
    "words": Words,
    "sentences": Sentences,
    "paragraphs": Paragraphs,
    "list_items": ListItems,
    "contains": Contains,
    "excludes": Excludes,
    "starts_with": StartsWith,
    "ends_with": EndsWith,
    "lower_case": LowerCase,
    "upper_case": UpperCase,
    "json": Json,
    "script": Script,
}
"""{kind of constraint: its check}."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of all checks of a response: the share of their weights that passed, and a line for each."""

    score: float
    lines: list[str]


def verify(instruction: Instruction, text: str, *, cut: bool = False) -> Verdict | None:
    """Check a response to an instruction; None if the instruction does not say what is right.

    An empty response fails every check.

    Args:
        instruction: with `answer`, `constraints` or both.
        text: the response, without a thought.
        cut: whether it was cut at the token limit.
    """
    checks = checks_of(instruction)
    if not checks:
        return None
    answer = Answer(text, cut)
    faults = ["it is empty" if is_blank(text) else check.fault(answer) for _, check in checks]
    passed = math.fsum(check.weight for (_, check), fault in zip(checks, faults, strict=True) if not fault)
    lines = [f"{kind}: {fault or 'passed'}" for (kind, _), fault in zip(checks, faults, strict=True)]
    return Verdict(passed / math.fsum(check.weight for _, check in checks), lines)


# --- rows --------------------------------------------------------------------------------------------------------


def checks_of(instruction: Instruction) -> list[tuple[str, Check]]:
    """Return (kind, check) of all that an instruction says is right.

    Raises:
        SelfalignError: a check is of no known kind, or its settings are wrong.
    """
    made = [check_from(ANSWERS, instruction.answer, "answer")] if instruction.answer else []
    constraints = enumerate(instruction.constraints or [])
    return made + [check_from(CONSTRAINTS, item, f"constraints[{index}]") for index, item in constraints]


def read_checks(row: Row) -> dict[str, Any]:
    """Return what a row says is right: `answer` and `constraints` where it has them, as fields of an instruction.

    A field `answer` that is no object is another's answer, and `constraints` of another form are another's too: both
    are passed over.

    Raises:
        SelfalignError: a check is of no known kind, or its settings are wrong; the place is named.
    """
    found: dict[str, Any] = {}
    if isinstance(answer := _unspelled(row.fields.get("answer")), dict):
        found["answer"] = _whole_numbers(answer)
    constraints = _unspelled(row.fields.get("constraints"))
    listed = [constraints] if isinstance(constraints, dict) else constraints
    if isinstance(listed, list) and listed and all(isinstance(item, dict) for item in listed):
        found["constraints"] = [_whole_numbers(item) for item in listed]
    try:
        checks_of(Instruction(id="", text="", source="", **found))
    except SelfalignError as error:
        row.refuse(str(error))
    return found


def check_from(kinds: Mapping[str, type[Check]], item: Mapping[str, Any], place: str) -> tuple[str, Check]:
    """Return (kind, check) of what an object describes.

    Raises:
        SelfalignError: its kind is unknown, or a setting is missing, unknown or out of range.
    """
    kind, settings = item.get("kind"), {name: value for name, value in item.items() if name != "kind"}
    if not isinstance(kind, str) or kind not in kinds:
        raise SelfalignError(f"{place}.kind: {_unknown(str(kind), kinds) if kind else _there_are(kinds)}")
    known = [one.name for one in fields(kinds[kind])]
    for name in settings:
        if name not in known:
            raise SelfalignError(f"{place}.{name}: {_unknown(name, known)}")
    try:
        return kind, msgspec.convert(settings, kinds[kind])
    except (msgspec.ValidationError, SelfalignError) as error:
        raise SelfalignError(f"{place} ({kind}): {error}") from error


def _unknown(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"{name!r} is unknown; {f'did you mean {near[0]}?' if near else _there_are(known)}"


def _there_are(known: Iterable[str]) -> str:
    return f"there are {', '.join(known)}"


def _unspelled(value: Any) -> Any:
    """Return the object or list that a JSON text spells, as tables hold them; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _whole_numbers(item: dict[str, Any]) -> dict[str, Any]:
    """Return settings with 3.0 as 3, because tables turn whole numbers with gaps into the former."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in item.items()
    }


def check_text(name: str, text: str) -> None:
    """Check that a text has a visible character."""
    if is_blank(text):
        raise SelfalignError(f"{name} must be a text, got {shown(text)}")


def check_phrases(phrases: list[str]) -> None:
    """Check that there are phrases, and that none is blank."""
    if not phrases or any(map(is_blank, phrases)):
        raise SelfalignError(f"phrases must be a list of words or phrases, got {phrases}")


# --- texts -------------------------------------------------------------------------------------------------------


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
    for start in (box.end() for box in re.finditer(r"\\boxed\s*\{", text)):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                found.append(text[start:at])
                break
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


def occurrences(phrase: str, text: str) -> int:
    """Return how often a phrase occurs as whole words, in any case."""
    return len(re.findall(_pattern(_folded(phrase)), _folded(text)))


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _pattern(phrase: str) -> str:
    """Return a regular expression for a phrase, between the ends of words where it begins or ends with one."""
    before, after = (r"(?<!\w)" if _ends_word(phrase[0]) else ""), (r"(?!\w)" if _ends_word(phrase[-1]) else "")
    return f"{before}{re.escape(phrase)}{after}"


def _ends_word(character: str) -> bool:
    return bool(re.match(rf"(?![{UNSPACED}])\w", character))


def has_word(text: str) -> bool:
    """Whether a text has a letter or a digit."""
    return any(character.isalnum() for character in text)


def is_item(line: str) -> bool:
    """Whether a line is an item of a list, and says something."""
    marker = MARKER.match(line.strip())
    return bool(marker) and has_word(line.strip()[marker.end() :])


def items(block: str) -> list[str]:
    """Return a block of lines as one text, or its list items, without their marks, and what stands before them."""
    found = [""]
    for line in map(str.strip, block.splitlines()):
        marker = MARKER.match(line)
        if marker:
            found.append(line[marker.end() :])
        else:
            found[-1] += f" {line}"
    return found


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph."""
    found, start = list[str](), 0
    for end in SENTENCE_END.finditer(text):
        sentence = text[start : end.end()]
        if not ABBREVIATION.search(sentence.rstrip()):
            found.append(sentence)
            start = end.end()
    return [sentence for sentence in (*found, text[start:]) if has_word(sentence)]


def _no_constant(name: str) -> None:
    raise ValueError(name)
