"""Properties of a text on its own: its words, whether it is complete, and its language."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MARKER = re.compile(r"(?:[-*+•‣◦–—]|\(?\d{1,3}[.)]|\(?[A-Za-z]\))(?:\s|$)")
"""Beginning of a list item: "- ", "2. ", "b) "."""

RESIDUE = re.compile(r"^\W*Task(?:\s+\d+\b|\W*$)", re.MULTILINE)
"""A line that announces the next task, left over if a completion was not split there."""

SCRIPT_SHARE = 0.02
"""A script belongs to a language when this share of the letters in its texts is written in it."""

COMMON_WORDS = 100
WORDS_TO_TELL = 6
"""From this length on, a text without any common word is in another language."""

TEXTS_TO_LEARN = 20
"""Fewer texts do not tell which words of a language are common."""

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
"""Scripts without spaces between words, where each character is one: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""

MARKS = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c).startswith("M")) + "\u200c\u200d"
"""Characters that belong to the letter before them: accents, vowel signs, joiners."""

UNLIKE_LATIN = re.compile(f"[{UNSPACED}{MARKS}]")
SIMPLE_WORD = re.compile(r"\w+")
WORD = re.compile(rf"[^\W{UNSPACED}]+(?:[{MARKS}]+[^\W{UNSPACED}]*)*|(?=\w)[{UNSPACED}][{MARKS}]*")
PIECE = re.compile(rf"[{UNSPACED}][{MARKS}]*|[^\s{UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation, and the same however its accents are encoded."""
    text = unicodedata.normalize("NFC", text).lower()
    # Faster, and the same where there is neither.
    return (WORD if not text.isascii() and UNLIKE_LATIN.search(text) else SIMPLE_WORD).findall(text)


def pieces_of(text: str) -> list[str]:
    """Return the parts of a text between spaces, in lower case; each character in scripts without spaces."""
    return PIECE.findall(unicodedata.normalize("NFC", text).casefold())


def is_fragment(text: str) -> bool:
    """Return whether a text is a piece of something.

    It has no letter, begins as an item of a list or with punctuation that continues something, ends with a comma,
    colon, semicolon or opening bracket, or one of its lines announces another task.
    """
    text = text.strip()
    return (
        not any(character.isalpha() for character in text)
        or text[0] in ",;:)]}，；：、）،؛"
        or text[-1] in ",;:([{，；：、（،؛"
        or bool(MARKER.match(text) or RESIDUE.search(text))
    )


@dataclass(frozen=True, slots=True)
class Language:
    """The language of some texts, as far as their letters and commonest words tell it.

    Another language that is written in the same script and shares a common word ("a", "in") is not noticed, nor is
    one in a text of fewer than `WORDS_TO_TELL` words.

    Attributes:
        scripts: those of the texts' letters, such as LATIN; empty accepts every script.
        common: words that most of the texts share; empty where they have none in common, which accepts every word.
    """

    scripts: frozenset[str]
    common: frozenset[str]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Language":
        """Learn the language: the scripts, and the `COMMON_WORDS` words that occur in most of the texts.

        The words count only where there are `TEXTS_TO_LEARN` texts and nine in ten of them have one.
        """
        letters = scripts_of("".join(texts))
        scripts = frozenset(s for s, count in letters.items() if count >= SCRIPT_SHARE * letters.total())
        worded = [dict.fromkeys(_telling(text)) for text in texts]
        counted = Counter(word for words in worded for word in words).most_common(COMMON_WORDS)
        common = frozenset(word for word, count in counted if count > 1)
        covered = sum(not common.isdisjoint(words) for words in worded)
        learnt = len(texts) >= TEXTS_TO_LEARN and covered >= 0.9 * len(texts)
        return cls(scripts, common if learnt else frozenset())

    def differs(self, text: str) -> bool:
        """Return whether most letters of a text are of another script, or it is long and has no common word."""
        letters, words = scripts_of(text), _telling(text)
        foreign = sum(count for script, count in letters.items() if script not in self.scripts)
        other_script = bool(self.scripts) and foreign > letters.total() / 2
        unknown = bool(self.common) and len(words) >= WORDS_TO_TELL and self.common.isdisjoint(words)
        return other_script or unknown


def _telling(text: str) -> list[str]:
    """Return the words that tell a language: single characters of a script without spaces do not."""
    return [word for word in words_of(text) if not re.match(f"[{UNSPACED}]", word)]


def scripts_of(characters: Iterable[str]) -> Counter[str]:
    """Return the number of letters of each script, by the first word of their Unicode names: LATIN, CYRILLIC, CJK."""
    return Counter(unicodedata.name(c, "UNNAMED").split()[0] for c in characters if c.isalpha())
