"""Parts of a text that can be counted: its sentences, list items, and phrases in it."""

import re
import unicodedata

from selfalign.data.text_filters import MARKER, UNSPACED

SENTENCE_END = re.compile(r"[.!?…।॥؟۔։]+[\"'”’»)\]*_]*(?=\s|$)|[。！？]+")
ABBREVIATION = re.compile(r"(?:^|[\s(\"'])(?:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|[A-Z])\.$", re.IGNORECASE)
"""End of a text that ends no sentence: a title, "e.g.", an initial. It has fewer than eight characters."""

BLANK_LINE = re.compile(r"\n\s*\n\s*")

EMPHASIS = re.compile(r"(?<!\w)[*_`~]+(?=\w)|(?<=[^\W_])[*_`~]+(?!\w)")
"""Marks of Markdown around words."""

TYPED = (
    dict.fromkeys(map(ord, "’‘ʼ＇"), "'")
    | dict.fromkeys(map(ord, "“”„＂"), '"')
    | dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF))
)
"""{curly quote: the one on a keyboard}; characters that cannot be seen are left out."""


def occurrences(phrase: str, text: str) -> int:
    """Return how often a phrase occurs as whole words, in any case, with or without marks of Markdown in it."""
    pattern, folded = phrase_pattern(_folded(phrase)), _folded(text)
    return max(len(re.findall(pattern, form)) for form in (folded, EMPHASIS.sub("", folded)))


def typed(text: str) -> str:
    """Return a text with the quotes of a keyboard, and without characters that cannot be seen."""
    return text.translate(TYPED)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", typed(text)).casefold().split())


def phrase_pattern(phrase: str) -> str:
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
        if not ABBREVIATION.search(sentence.rstrip()[-8:]):
            found.append(sentence)
            start = end.end()
    return [sentence for sentence in (*found, text[start:]) if has_word(sentence)]
