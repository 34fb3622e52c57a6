"""Token sequences in one row where every distinct prefix stands once.

What a decoder computes of a token depends only on the tokens before it. So sequences that begin alike can be computed
as a tree: in sorted order, each sequence adds only what it does not share with the one before.
"""

from bisect import bisect_left
from collections.abc import Sequence

Span = tuple[int, int]
"""[start, end) in the row."""


class PrefixTree:
    """A row of tokens, and where each sequence lies in it.

    Attributes:
        ids: the tokens of the row.
        positions: the index of each token in its sequences.
        before: the row's index of the token before each token; -1 for a first one.
        ends: behind each token, the end of those that go on from it. Token q sees token k if k <= q < ends[k].
        paths: the spans of each sequence, in its order.
        branches: the paths along which the row grew. The last span of each holds its own tokens, which lie behind those
            of the branch before.
    """

    def __init__(self, sequences: Sequence[list[int]]) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.before: list[int] = []
        self.ends: list[int] = []
        self.paths: list[list[Span]] = [[] for _ in sequences]
        self.branches: list[list[Span]] = []
        path: list[Span] = []
        previous: list[int] = []
        for index in sorted(range(len(sequences)), key=sequences.__getitem__):
            sequence = sequences[index]
            path = self._grow(self._close(path, common_prefix(previous, sequence)), sequence)
            self.paths[index], previous = path, sequence
        self._close(path, 0)

    def _close(self, path: list[Span], length: int) -> list[Span]:
        """Return the path's first `length` tokens; nothing goes on from the others any more."""
        kept: list[Span] = []
        for start, end in path:
            middle = min(end, start + length)
            length -= middle - start
            self.ends[middle:end] = [len(self.ids)] * (end - middle)
            if middle > start:
                kept.append((start, middle))
        return kept

    def _grow(self, path: list[Span], sequence: list[int]) -> list[Span]:
        """Add the tokens of a sequence behind its path."""
        length, start = sum(end - start for start, end in path), len(self.ids)
        new = sequence[length:]
        if not new:
            return path
        end = start + len(new)
        self.before += [path[-1][1] - 1 if path else -1, *range(start, end - 1)]
        self.ids += new
        self.positions += range(length, len(sequence))
        self.ends += [end] * len(new)
        path = [*path, (start, end)]
        self.branches.append(path)
        return path

    def row(self, sequence: int) -> list[int]:
        """Return the row's index of each token of a sequence."""
        return [index for start, end in self.paths[sequence] for index in range(start, end)]


class DistinctTokens:
    """Counts the tokens of the tree of sequences that are added one by one."""

    def __init__(self) -> None:
        self._sequences: list[list[int]] = []

    def add(self, sequences: Sequence[list[int]]) -> int:
        """Add sequences. Return by how many tokens the tree grows."""
        return sum(map(self._add, sequences))

    def _add(self, sequence: list[int]) -> int:
        place = bisect_left(self._sequences, sequence)
        neighbours = self._sequences[max(0, place - 1) : place + 1]
        self._sequences.insert(place, sequence)
        return len(sequence) - max((common_prefix(sequence, other) for other in neighbours), default=0)


def common_prefix(one: list[int], other: list[int]) -> int:
    """Return the number of tokens with which both sequences begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
