"""Rules that make preference pairs from the judged responses to one instruction.

A rule picks pairs from two orders of the responses: the best first, and the worst first. A picked pair must then differ
enough, in score and in words. Every pair that a rule would have given and that is dropped is counted by reason.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from random import Random
from typing import Any, Self

from rapidfuzz.distance import Indel

from selfalign.core.errors import SelfalignError
from selfalign.core.iterations import check_iterations, is_below_one, value_at, values_of
from selfalign.core.records import Response
from selfalign.data.text_filters import pieces_of

ROUNDING = 1e-9
"""Tolerance at the ends of a score band, because scores are means of floats."""


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """A response with its mean score."""

    response: Response
    score: float


Picked = list[tuple[ScoredResponse, ScoredResponse]]
"""(chosen, rejected)."""


@dataclass(kw_only=True, slots=True)
class PairRule(ABC):
    """What all rules ask of a pair.

    Length control is Meta-Rewarding's (arXiv 2407.19594): of the responses to an instruction, with scores from S_min
    to S_max, chosen is the shortest that scores at least (1-ρ) S_max + ρ S_min, rejected the longest that scores at
    most (1-ρ) S_min + ρ S_max. Lengths are in tokens; of equal length the better, or the worse, is taken.

    Attributes:
        minimum_margin: the scores must differ by more than this; equal scores never make a pair.
        length_control: ρ, at least 0 and below 1, or a list with one for each iteration; null goes by score alone, and
            by the order of the responses among equal scores.
        finished_only: only responses that ended by themselves take part, not those cut at the token limit.
        max_similarity: pairs are dropped whose texts reach this ROUGE-L F1 of words, whatever their capitals, above 0;
            1 drops equal texts only, which make no pair whatever it is.
        minimum_pairs: the run stops when fewer pairs are left.
        consistency: judges the responses a second time, by `consistent_with`, and takes the share of an instruction's
            response pairs that both judges order alike as its consistency C (ties count half; (τ+1)/2 of CREAM, arXiv
            2410.12735). ε = 1 - C becomes the pairs' label smoothing: "each" takes the C of the instruction, "mean"
            that of all, and "none" judges once.
        consistent_with: the model that judges a second time: "previous" (M_{t-1}), "sft" (M1) or "base" (M0).
    """

    minimum_margin: float = 0.0
    length_control: Any = None
    finished_only: bool = False
    max_similarity: float = 0.95
    minimum_pairs: int = 1
    consistency: str = field(default="none", metadata={"keyed": "if set"})
    consistent_with: str = field(default="previous", metadata={"keyed": "if set"})

    def __post_init__(self) -> None:
        if self.consistency not in ("none", "mean", "each"):
            raise SelfalignError(f"pair.consistency must be none, mean or each, got {self.consistency!r}")
        if self.consistent_with not in ("previous", "sft", "base"):
            raise SelfalignError(f"pair.consistent_with must be previous, sft or base, got {self.consistent_with!r}")
        if not 0 <= self.minimum_margin < math.inf:
            raise SelfalignError(f"pair.minimum_margin must be 0 or more, got {self.minimum_margin}")
        rhos = values_of(self.length_control)
        if self.length_control is not None and not (rhos and all(map(is_below_one, rhos))):
            raise SelfalignError(
                "pair.length_control must be null, a number from 0 to below 1, or a list of them, "
                f"got {self.length_control!r}"
            )
        if not 0 < self.max_similarity <= 1:
            raise SelfalignError(f"pair.max_similarity must be above 0 and at most 1, got {self.max_similarity}")
        if self.minimum_pairs < 1:
            raise SelfalignError(f"pair.minimum_pairs must be 1 or more, got {self.minimum_pairs}")

    def check_iterations(self, iterations: int) -> None:
        """Check that every iteration has its ρ.

        Raises:
            SelfalignError: there is a list of another length.
        """
        check_iterations("pair.length_control", self.length_control, iterations)

    def at(self, iteration: int) -> Self:
        """Return the rule of one iteration, counted from 1."""
        if not isinstance(self.length_control, list):
            return self
        return replace(self, length_control=value_at(self.length_control, iteration))

    @property
    def needs_scores(self) -> bool:
        """Whether the responses have to be judged."""
        return True

    def without_writer(self, writer: str, other: str) -> Self:
        """Return the rule for responses in which another writer takes the place of one."""
        return self

    def assumed_scores(self, responses: Sequence[Response]) -> dict[str, float]:
        """Return {response id: score} of responses that are not judged."""
        return {}

    @abstractmethod
    def wanted(self, responses: int) -> int:
        """Return how many pairs so many responses should give: the unit in which drops are counted."""

    @abstractmethod
    def pick(self, best: Sequence[ScoredResponse], worst: Sequence[ScoredResponse], draw: Random) -> Picked:
        """Return pairs of a response from `best`, the best first, and one from `worst`, the worst first."""


@dataclass(kw_only=True, slots=True)
class BestWorst(PairRule):
    """Pair the response of the highest mean score with that of the lowest: one pair an instruction.

    arXiv 2401.10020, section 2.2.
    """

    def wanted(self, responses: int) -> int:
        """Return 1, whatever the number of responses."""
        return 1

    def pick(self, best: Sequence[ScoredResponse], worst: Sequence[ScoredResponse], draw: Random) -> Picked:
        """Pair the best response with the worst."""
        return _first_against(best, worst, 1)


@dataclass(kw_only=True, slots=True)
class RandomPair(PairRule):
    """Pair two responses drawn by seed; the one with the higher score is chosen. One pair an instruction.

    With length control one is drawn from the scores that a chosen response may have, and one from the others.
    """

    def wanted(self, responses: int) -> int:
        """Return 1, whatever the number of responses."""
        return 1

    def pick(self, best: Sequence[ScoredResponse], worst: Sequence[ScoredResponse], draw: Random) -> Picked:
        """Pair one response drawn from each order."""
        possible = [(one, other) for one in best for other in worst if one is not other]
        if not possible:
            return []
        one, other = draw.choice(possible)
        return [(one, other) if one.score >= other.score else (other, one)]


@dataclass(kw_only=True, slots=True)
class AllOrdered(PairRule):
    """Pair each two responses of different score, so n responses give up to n(n-1)/2 pairs.

    With length control only those whose scores a chosen, and a rejected, response may have.
    """

    def wanted(self, responses: int) -> int:
        """Return the number of all pairs."""
        return math.comb(responses, 2)

    def pick(self, best: Sequence[ScoredResponse], worst: Sequence[ScoredResponse], draw: Random) -> Picked:
        """Pair each two responses, once."""
        rank = {c.response.id: (c.score, -place) for place, c in enumerate([*best, *worst])}
        return [(one, other) for one in best for other in worst if rank[one.response.id] > rank[other.response.id]]


@dataclass(kw_only=True, slots=True)
class BestVsK(PairRule):
    """Pair the response of the highest mean score with the k that score lowest: k pairs an instruction.

    Attributes:
        k: how many it is paired with.
    """

    k: int = 2

    def __post_init__(self) -> None:
        PairRule.__post_init__(self)
        if self.k < 1:
            raise SelfalignError(f"pair.k must be 1 or more, got {self.k}")

    def wanted(self, responses: int) -> int:
        """Return k, whatever the number of responses."""
        return self.k

    def pick(self, best: Sequence[ScoredResponse], worst: Sequence[ScoredResponse], draw: Random) -> Picked:
        """Pair the best response with the first k others of the worst."""
        return _first_against(best, worst, self.k)


@dataclass(kw_only=True, slots=True)
class ByWriter(PairRule):
    """Pair the best response of one writer with the worst of another: one pair an instruction.

    Temporal self-rewarding (arXiv 2508.06026) takes the chosen response from a later model and the rejected one from an
    earlier; SPIN (arXiv 2401.01335) takes a demonstration and the model's own response, and judges neither.

    Attributes:
        chosen_from: the writer of chosen responses, one of `data.respond.writers`.
        rejected_from: the writer of rejected responses.
        by_score: whether responses are judged. If false, nothing is judged, and each writer's first response is taken.
    """

    chosen_from: str = "self"
    rejected_from: str = "sft"
    by_score: bool = True

    def __post_init__(self) -> None:
        PairRule.__post_init__(self)
        if self.chosen_from == self.rejected_from:
            raise SelfalignError(f"pair.chosen_from and pair.rejected_from must differ, got {self.chosen_from} twice")
        if self.length_control is not None:
            raise SelfalignError(
                f"pair.length_control={self.length_control} has no effect with pair=by_writer, whose responses come "
                "from two writers: remove it"
            )
        if not self.by_score and self.consistency != "none":
            raise SelfalignError(
                f"pair.consistency={self.consistency} compares scores, and pair.by_score=false has none: set none"
            )
        if not self.by_score and self.minimum_margin:
            raise SelfalignError(
                f"pair.minimum_margin={self.minimum_margin} has no effect with pair.by_score=false: remove it"
            )

    @property
    def needs_scores(self) -> bool:
        """Whether the responses have to be judged."""
        return self.by_score

    def without_writer(self, writer: str, other: str) -> Self:
        """Return the rule for responses in which another writer takes the place of one."""
        names = {"chosen_from": self.chosen_from, "rejected_from": self.rejected_from}
        return replace(self, **{key: other if name == writer else name for key, name in names.items()})

    def wanted(self, responses: int) -> int:
        """Return 1, whatever the number of responses."""
        return 1

    def assumed_scores(self, responses: Sequence[Response]) -> dict[str, float]:
        """Return 1 for the responses of the writer that is taken to be better, and 0 for those of the other."""
        better = {self.chosen_from: 1.0, self.rejected_from: 0.0}
        return {one.id: better[str(one.writer)] for one in responses if one.writer in better}

    def pick(self, best: Sequence[ScoredResponse], worst: Sequence[ScoredResponse], draw: Random) -> Picked:
        """Pair the first of the best by one writer with the first of the worst by the other."""
        chosen = next((one for one in best if one.response.writer == self.chosen_from), None)
        rejected = next((one for one in worst if one.response.writer == self.rejected_from), None)
        return [(chosen, rejected)] if chosen is not None and rejected is not None else []


def pick_pairs(
    rule: PairRule, responses: Sequence[Response], scores: dict[str, float], seed: int
) -> tuple[Picked, Counter[str]]:
    """Return the pairs of one instruction, and how many of the wanted pairs are dropped, by reason.

    Args:
        rule: the rule of one iteration (see `PairRule.at`).
        responses: the responses to the instruction.
        scores: {response id: mean score}; a response without a score is left out.
        seed: of rules that draw.
    """
    judged = [ScoredResponse(response, scores[response.id]) for response in responses if response.id in scores]
    usable = [c for c in judged if c.response.finished] if rule.finished_only else judged
    rounds = [
        ("too_few_judged", judged, None),
        ("unfinished", usable, None),
        ("length_control", usable, rule.length_control),
    ]
    picked: Picked = []
    drops: Counter[str] = Counter()
    left = rule.wanted(len(responses))
    for reason, pool, rho in rounds:
        picked = rule.pick(*ordered(pool, rho), Random(seed))
        drops[reason] += left - len(picked)
        left = len(picked)
    kept: Picked = []
    for chosen, rejected in picked:
        if reason := against_pair(rule, chosen, rejected):
            drops[reason] += 1
        else:
            kept.append((chosen, rejected))
    return kept, +drops


def ordered(pool: Sequence[ScoredResponse], rho: float | None) -> tuple[list[ScoredResponse], list[ScoredResponse]]:
    """Return (responses that may be chosen, best first; responses that may be rejected, worst first)."""
    best = sorted(pool, key=lambda c: -c.score)
    worst = sorted(pool, key=lambda c: c.score)
    if rho is None or not pool:
        return best, worst
    reach = rho * (best[0].score - worst[0].score) + ROUNDING
    near_best = [c for c in best if c.score >= best[0].score - reach]
    near_worst = [c for c in worst if c.score <= worst[0].score + reach]
    shortest = sorted(near_best, key=lambda c: c.response.tokens)
    return shortest, sorted(near_worst, key=lambda c: -c.response.tokens)


def against_pair(rule: PairRule, chosen: ScoredResponse, rejected: ScoredResponse) -> str | None:
    """Return why two responses make no pair, or None."""
    margin = chosen.score - rejected.score
    if margin < 0:  # A large ρ can pick a shorter response that is not the better one.
        return "rejected_is_better" if rule.length_control is None else "length_control"
    if margin <= rule.minimum_margin:
        return "tie" if margin == 0 else "small_margin"
    one, other = chosen.response.text, rejected.response.text
    if one == other:
        return "identical"
    if not one or not other:
        return "empty_response"
    if rule.max_similarity == 1:
        return None
    alike = Indel.normalized_similarity(pieces_of(one), pieces_of(other))
    return "near_identical" if alike >= rule.max_similarity else None


def agreement(scores: Mapping[str, float], others: Mapping[str, float]) -> float | None:
    """Return the share of response pairs that two judges order alike, where a tie counts half; None without a pair.

    It is (τ+1)/2 with Kendall's τ-a: the consistency of CREAM, arXiv 2410.12735.
    """
    both = [(score, others[name]) for name, score in scores.items() if name in others]
    orders = [(one[0] - two[0]) * (one[1] - two[1]) for one, two in combinations(both, 2)]
    return sum(0.5 if order == 0 else float(order > 0) for order in orders) / len(orders) if orders else None


def _first_against(best: Sequence[ScoredResponse], worst: Sequence[ScoredResponse], count: int) -> Picked:
    """Pair the first of the best with the first others of the worst."""
    return [(best[0], other) for other in worst if other is not best[0]][:count] if best else []
