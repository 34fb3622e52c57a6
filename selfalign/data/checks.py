"""Checks of a response: the right answer, and constraints on its form.

The constraints are a subset of those of IFEval (arXiv 2311.07911), counted in our own way, which docs/judges.md states.
Nothing here depends on a model, a seed or the machine.
"""

import json
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction

from selfalign.core.errors import SelfalignError
from selfalign.data.answers import LETTER, bare, numbers, plain, stated, statements
from selfalign.data.rows import is_blank, shown
from selfalign.data.text_filters import pieces_of, scripts_of
from selfalign.data.text_parts import BLANK_LINE, has_word, is_item, items, occurrences, phrase_pattern, sentences

SCRIPT_SHARE = 0.9
"""The least share of an answer's letters that must be of the scripts it is asked in."""

SCRIPTS = (
    "ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "GEORGIAN", "GREEK", "GUJARATI", "HANGUL",
    "HEBREW", "HIRAGANA", "KATAKANA", "LATIN", "TAMIL", "TELUGU", "THAI",
)  # fmt: skip

FENCE = re.compile(r"```(?:json)?\s*\n(?P<inside>.*)\n\s*```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response to check: its text, and whether it was cut at the token limit."""

    text: str
    cut: bool = False

    @property
    def whole_words(self) -> str:
        """The text without the word at which it was cut, which may be the beginning of another."""
        last = self.text.split()[-1] if self.cut and not self.text[-1:].isspace() else ""
        return self.text.removesuffix(last)


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
        right = {bare(text) for text in self.values}
        found = statements(answer.whole_words) or ([] if answer.cut else [[answer.text]])
        readings = [[bare(text) for text in one] for one in found]
        said = {next((reading for reading in one if reading in right), one[0]) for one in readings}
        if len(said) != 1:
            return "no answer before it was cut" if not said else "several different answers"
        return "" if said <= right else f"another answer than {self.values[0]!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Number(Check):
    """The stated answer, or else the last number, is the value, give or take the tolerance.

    A statement must have one number, behind its last "=" if it has one.
    """

    value: int | float
    tolerance: int | float = 0.0

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        if isinstance(self.value, float) and not math.isfinite(self.value):
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
        return "" if right else f"another number than {self.value}"


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
        found = re.match(phrase_pattern(bare(self.text)), bare(answer.text))
        return "" if found else f"it does not begin with {self.text!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EndsWith(Check):
    """The response ends with the text. Capitals and what stands around both do not count."""

    text: str

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        check_text("text", bare(self.text))

    def fault(self, answer: Answer) -> str:
        found = re.search(rf"(?:{phrase_pattern(bare(self.text))})\Z", bare(answer.text))
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

    Wide and narrow letters are those of their scripts, and marks such as ー and 々, which several share, do not count.

    Attributes:
        scripts: the first words of the letters' names in Unicode, such as LATIN, CYRILLIC or CJK.
    """

    scripts: list[str]

    def __post_init__(self) -> None:
        Check.__post_init__(self)
        if not self.scripts or any(script not in SCRIPTS for script in self.scripts):
            raise SelfalignError(f"scripts must be some of {', '.join(SCRIPTS)}; got {self.scripts}")

    def fault(self, answer: Answer) -> str:
        letters = scripts_of(c for c in unicodedata.normalize("NFKC", answer.text) if unicodedata.category(c) != "Lm")
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


def check_text(name: str, text: str) -> None:
    """Check that a text has a visible character."""
    if is_blank(text):
        raise SelfalignError(f"{name} must be a text, got {shown(text)}")


def check_phrases(phrases: list[str]) -> None:
    """Check that there are phrases, and that none is blank."""
    if not phrases or any(map(is_blank, phrases)):
        raise SelfalignError(f"phrases must be a list of words or phrases, got {phrases}")


def _no_constant(name: str) -> None:
    raise ValueError(name)
