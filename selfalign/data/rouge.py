"""How much of a text stands in others: ROUGE-L against all that is known, at thousands of texts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

from selfalign.data.text_filters import words_of


def rouge_l(words: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin 2004): 2·LCS / (length + length), LCS being the longest common subsequence, in words."""
    return 2 * LCSseq.similarity(words, other) / (len(words) + len(other))


@dataclass(slots=True)
class Known:
    """Texts that a new one is compared with.

    A text is held as a string with one character for each word, the same for the same word, so that a comparison
    is one of strings; it is exact for up to 1,114,110 different words.
    """

    _characters: dict[str, str] = field(default_factory=dict)
    _texts: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Known":
        """All of these."""
        known = cls()
        for text in texts:
            known.add(words_of(text))
        return known

    def __contains__(self, words: Sequence[str]) -> bool:
        """Whether a text of just these words is known."""
        return self._encode(words) in self._texts

    def add(self, words: Sequence[str]) -> None:
        """Takes a text in."""
        for word in words:
            # The first character is for words that no known text has.
            self._characters.setdefault(word, chr(len(self._characters) + 1))
        self._texts[self._encode(words)] = None

    def highest(self, words: Sequence[str]) -> float:
        """The highest ROUGE-L F1 that any known text has with this one; 0 where none is known."""
        encoded = self._encode(words)
        found = process.extractOne(encoded, self._texts.keys(), scorer=Indel.normalized_similarity)
        return rouge_l(encoded, found[0]) if found else 0.0

    def _encode(self, words: Sequence[str]) -> str:
        return "".join(self._characters.get(word, "\0") for word in words)
