"""The style of an answer, as Arena-Hard-Auto's style control counts it: its length and its markdown."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from selfalign.metrics.intervals import Floats
from selfalign.models.tokenizer import plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FEATURES = ("length", "headers", "lists", "bold")
"""Features of a difference in style, in their order."""

CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
"""A block of code, whose characters are no markdown."""

MARKDOWN = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^\s*(?:[-*+]|\d+\.)\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)
"""Beginnings of headers and of items of lists, and texts in bold."""


def style_of(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Return the numbers of an answer's tokens, headers, items of lists, and texts in bold."""
    prose = CODE.sub("", text)
    return [len(plain_ids(tokenizer, text)), *(len(pattern.findall(prose)) for pattern in MARKDOWN)]


def style_differences(own: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> Floats:
    """Return the differences in style between answers and others, shape (answers, features).

    Of lengths a and b it is (a - b) / (a + b). Of markdown it is (a - b) / (a + b + 1), where a and b are numbers of
    elements a token. A feature of two empty answers does not differ.

    Args:
        own: the `style_of` each answer.
        others: the `style_of` each answer that it is compared with.
    """
    one, other = np.asarray(own, dtype=np.float64), np.asarray(others, dtype=np.float64)
    lengths = _relative(one[:, :1] - other[:, :1], one[:, :1] + other[:, :1])
    dense, other_dense = (_relative(counts[:, 1:], counts[:, :1]) for counts in (one, other))
    return np.hstack([lengths, (dense - other_dense) / (dense + other_dense + 1)])


def _relative(part: Floats, whole: Floats) -> Floats:
    """Return a quotient; 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=np.broadcast_to(whole > 0, part.shape))
