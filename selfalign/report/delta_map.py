"""The report's map of Δ: held-out pairs whose words are coloured by what they add to Δ."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from selfalign.core.records import Instruction, PairTokens
from selfalign.report.html import note
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished

SCRIPTS_WITHOUT_SPACES = "\u2e80"
"""The first character behind the scripts that put spaces between words; the tokens of the others stand alone."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word, or a sign between words, with what its tokens add to Δ, in units of reward."""

    text: str
    delta: float


def delta_map(run: Finished) -> str:
    """Return some held-out pairs with each word's part of Δ under the last model; empty if no pair was measured."""
    tokens = {
        row["model"]: [*run.records(Label.evaluation(row["model"], "preferences"), PairTokens)] for row in run.models
    }
    model = next((name for name in reversed(tokens) if tokens[name]), None)
    if model is None:
        return ""
    pairs = tokens[model]
    texts = {one.id: one.text for one in run.records(Label.input("preferences", "pairs"), Instruction)}
    drawn = [
        (pair, words_of(pair.chosen, pair.chosen_values), words_of(pair.rejected, pair.rejected_values))
        for pair in pairs
    ]
    largest = max((abs(word.delta) for _, *sides in drawn for side in sides for word in side), default=0.0)
    remark = note(
        f"What each word adds to the Δ of {escape(model)}: β (log π − log π_ref) of its tokens given p⊕x in the chosen "
        "response, and the negative of it in the rejected one. Green raises Δ, red lowers it; the fullest colour is "
        f"{largest:.3g}, and a word's own value shows under the pointer. The first {len(pairs)} pairs, not selected."
    )
    return remark + "".join(
        _pair(texts.get(pair.id, pair.id), chosen, rejected, largest) for pair, chosen, rejected in drawn
    )


def words_of(tokens: Sequence[str], deltas: Sequence[float]) -> list[Word]:
    """Join tokens to words, and add up their parts of Δ.

    A token without a text, such as the first bytes of a character, counts for the word of the next one.
    """
    words: list[Word] = []
    carried = 0.0
    for text, delta in zip(tokens, deltas, strict=True):
        if not text:
            carried += delta
        elif words and _continues(words[-1].text, text):
            words[-1] = Word(words[-1].text + text, words[-1].delta + carried + delta)
            carried = 0.0
        else:
            words.append(Word(text, carried + delta))
            carried = 0.0
    return [*words, Word("", carried)] if carried else words


def _continues(before: str, text: str) -> bool:
    """Whether a token goes on with the word before it."""
    return before[-1].isalnum() and text[0].isalnum() and text[0] < SCRIPTS_WITHOUT_SPACES


def _pair(instruction: str, chosen: Sequence[Word], rejected: Sequence[Word], largest: float) -> str:
    """Return a pair: its instruction, and both responses with their parts of Δ."""
    total = sum(word.delta for word in (*chosen, *rejected))
    sides = "".join(
        f'<div class="candidate"><p class="head"><mark class="{role}">{role}</mark> '
        f"<span>adds {signed(sum(word.delta for word in words), 3)}</span></p>"
        f'<p class="text">{"".join(_word(word, largest) for word in words)}</p></div>\n'
        for role, words in (("chosen", chosen), ("rejected", rejected))
    )
    return (
        f'<article><p class="instruction">{escape(instruction)}</p><p class="note">Δ = {signed(total, 3)}</p>'
        f'<div class="candidates">{sides}</div></article>\n'
    )


def _word(word: Word, largest: float) -> str:
    """Return a word with its colour, between none and full in hundredths."""
    share = round(100 * abs(word.delta) / largest) if largest else 0
    if not share:
        return escape(word.text)
    tone = "raises" if word.delta > 0 else "lowers"
    return f'<span class="{tone}" style="--share: {share}%" title="{signed(word.delta, 4)}">{escape(word.text)}</span>'


def signed(value: float, digits: int) -> str:
    """Return a number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")
