"""ROUGE-L of a text against all known texts, fast enough for thousands of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

from selfalign.data.text_filters import words_of


def rouge_l(words: Sequence[str], other: Sequence[str]) -> float:
    """Return ROUGE-L F1 (Lin 2004): 2·LCS / (length + length), with the longest common subsequence LCS in words."""
    return 2 * LCSseq.similarity(words, other) / (len(words) + len(other))


@dataclass(slots=True)
class RougeIndex:
    """Texts that a new one is compared with.

    A text is kept as a string with one character for each word, so that comparing texts is comparing strings. It is
    exact for up to 1,114,110 different words.
    """

    _characters: dict[str, str] = field(default_factory=dict)
    _texts: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Iterable[str]) -> "RougeIndex":
        """Return the set of these texts."""
        known = cls()
        for text in texts:
            known.add(words_of(text))
        return known

    def __contains__(self, words: Sequence[str]) -> bool:
        """Return whether a text of exactly these words is known."""
        return self._encode(words) in self._texts

    def add(self, words: Sequence[str]) -> None:
        """Add a text."""
        for word in words:
            # The first character is for words that no known text has.
            self._characters.setdefault(word, chr(len(self._characters) + 1))
        self._texts[self._encode(words)] = None

    def highest(self, words: Sequence[str]) -> float:
        """Return the highest ROUGE-L F1 of this text with any known text; 0 if none is known."""
        encoded = self._encode(words)
        found = process.extractOne(encoded, self._texts.keys(), scorer=Indel.normalized_similarity)
        return rouge_l(encoded, found[0]) if found else 0.0

    def _encode(self, words: Sequence[str]) -> str:
        return "".join(self._characters.get(word, "\0") for word in words)
