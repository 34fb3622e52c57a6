"""A pair rule of one's own: the best response against the middle one."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from selfalign.data.pair_rules import PairRule, Picked, ScoredResponse


@dataclass(kw_only=True, slots=True)
class BestMedian(PairRule):
    """The response with the highest mean score against the one in the middle of the order, the lower of two."""

    def wanted(self, responses: int) -> int:
        """One."""
        return 1

    def pick(self, best: Sequence[ScoredResponse], worst: Sequence[ScoredResponse], draw: Random) -> Picked:
        """The first of the best, and the middle of the worst."""
        middle = (len(worst) - 1) // 2
        return [(best[0], worst[middle])] if best and worst[middle] is not best[0] else []
