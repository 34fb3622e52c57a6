"""Responses compared in both orders, and scores from many comparisons."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from selfalign.core.records import Comparison, FinishReason, Instruction, JudgementStatus, Response, Verdict
from selfalign.judges.parsing import read_bracketed
from selfalign.judges.verdict_text import other_choices
from selfalign.metrics import catalog
from selfalign.metrics.intervals import RunningMean

VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True, slots=True)
class ResponsePair:
    """Two responses to one instruction."""

    instruction: Instruction
    first: Response
    second: Response

    @property
    def id(self) -> str:
        """The id of the comparison."""
        return f"{self.first.id}:{self.second.id}"


@dataclass(frozen=True, slots=True)
class OrderedPair:
    """A pair of responses in one presentation order."""

    pair: ResponsePair
    swapped: bool

    @property
    def texts(self) -> tuple[str, str]:
        """The text shown first, and the text shown second."""
        first, second = self.pair.first.text, self.pair.second.text
        return (second, first) if self.swapped else (first, second)


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """A judge's verdict on one order. There is a verdict exactly when `status` is ok."""

    status: JudgementStatus
    verdict: Verdict | None
    text: str


def compare_in_both_orders(
    pairs: Sequence[ResponsePair], read: Callable[[Sequence[OrderedPair]], Sequence[PairVerdict]], model: str
) -> list[Comparison]:
    """Compare each pair of responses in both orders. The judge is asked about all orders at once.

    Args:
        pairs: the pairs.
        read: returns the judge's verdict on each ordered pair, in their order.
        model: name of the judge in records.
    """
    readings = iter(read([OrderedPair(pair, swapped) for pair in pairs for swapped in (False, True)]))
    return [_settled(pair, next(readings), next(readings), model) for pair in pairs]


def combine_orders(forward: Verdict, backward: Verdict) -> float:
    """Return the outcome for the response that `forward` showed first: 1 won, 0 lost, ½ if the orders disagree."""
    value = {Verdict.A: 1.0, Verdict.TIE: 0.5, Verdict.B: 0.0}
    there, back = value[forward], 1 - value[backward]
    return there if there == back else 0.5


def parse_verdict(text: str, finish_reason: FinishReason = FinishReason.EOS, shown: Sequence[str] = ()) -> PairVerdict:
    """Read `[[A]]`, `[[B]]` or `[[C]]` (a tie) from the judge's own lines of newly generated text.

    Two different verdicts are ambiguous, wherever they stand, and so is a verdict after which another letter is chosen.
    A text without a verdict has a status that says why, for which `finish_reason` counts too.

    Args:
        text: what the judge wrote.
        finish_reason: why it ended.
        shown: the responses; their own words are no verdict.
    """
    found = read_bracketed(text, VERDICT, finish_reason, shown)
    if isinstance(found, JudgementStatus):
        return PairVerdict(found, None, text)
    said, behind = found
    if len(set(said)) > 1 or other_choices(behind, said[0]):
        return PairVerdict(JudgementStatus.AMBIGUOUS, None, text)
    return PairVerdict(JudgementStatus.OK, Verdict(said[0]), text)


def unread_text(comparison: Comparison) -> str:
    """Return the judge's text whose verdict could not be read."""
    return comparison.texts[0 if comparison.forward is None else 1]


def bias_statistics(comparisons: Iterable[Comparison]) -> dict[str, float]:
    """Return the shares of valid comparisons in which one position won both orders, and of ties."""
    biased, tied = RunningMean(), RunningMean()
    for comparison in comparisons:
        if comparison.outcome is not None:
            biased.add(comparison.forward is comparison.backward and comparison.forward is not Verdict.TIE)
            tied.add(comparison.outcome == 0.5)
    if biased.value is None or tied.value is None:
        return {}
    return {catalog.JUDGE_POSITION_BIAS.name: biased.value, catalog.JUDGE_TIED_COMPARISONS.name: tied.value}


@dataclass(slots=True)
class PositionWeights:
    """Weights of wins by position, which take a judge's preference for a position off (arXiv 2407.19594).

    A win in a position counts as much as the other position's share of all wins. Of a judge that names the first
    position nine times of ten, a win in the second counts nine times as much as one in the first.

    Attributes:
        first: number of wins in the first position so far, over both orders of comparisons that have an outcome.
        second: of those in the second.
    """

    first: int = 0
    second: int = 0

    def add(self, comparison: Comparison) -> None:
        """Count the wins of both orders. A comparison without an outcome has none."""
        if comparison.outcome is not None:
            verdicts = (comparison.forward, comparison.backward)
            self.first += verdicts.count(Verdict.A)
            self.second += verdicts.count(Verdict.B)

    @property
    def share_of_first(self) -> float:
        """The share of all wins that are in the first position, which is the weight of one in the second; ½ of none."""
        wins = self.first + self.second
        return self.first / wins if wins else 0.5

    def games(self, comparison: Comparison) -> tuple[float, float]:
        """Return the weighted wins of the first response over the second, and those of the second over the first."""
        if comparison.outcome is None:
            return 0.0, 0.0
        there, back, in_second = comparison.forward, comparison.backward, self.share_of_first
        in_first = 1 - in_second
        first = in_first * (there is Verdict.A) + in_second * (back is Verdict.B)
        return first, in_second * (there is Verdict.B) + in_first * (back is Verdict.A)


def win_shares(outcomes: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Return {response: the share of its comparisons that it won}, a tie counting half."""
    won: dict[str, list[float]] = {}
    for first, second, outcome in outcomes:
        won.setdefault(first, []).append(outcome)
        won.setdefault(second, []).append(1 - outcome)
    return {name: math.fsum(values) / len(values) for name, values in won.items()}


def expected_win_rates(
    outcomes: Sequence[tuple[str, str, float]], weights: Sequence[float] | None = None, rounds: int = 200
) -> dict[str, float]:
    """Return {response: its expected win rate against an average opponent} by Bradley and Terry's model.

    Response i of strength w_i beats j with probability w_i / (w_i + w_j), which is Elo's model. The strengths have the
    highest posterior probability when every response also ties once with an opponent of strength 1. They are found by
    minorisation-maximisation (Hunter 2004): w_i ← (wins_i + ½) / (Σ_j n_ij / (w_i + w_j) + 1 / (w_i + 1)). The result
    is w_i / (w_i + 1). It tells responses apart whose opponents were of unequal strength.

    Args:
        outcomes: (first, second, outcome of the first) of every comparison.
        weights: how much each comparison counts in wins_i and n_ij; None counts each as 1.
        rounds: iterations.
    """
    counted = [(*one, weight) for one, weight in zip(outcomes, weights or [1.0] * len(outcomes), strict=True)]
    names = sorted({name for first, second, _ in outcomes for name in (first, second)})
    strength = dict.fromkeys(names, 1.0)
    wins = dict.fromkeys(names, 0.5)
    for first, second, outcome, weight in counted:
        wins[first] += weight * outcome
        wins[second] += weight * (1 - outcome)
    for _ in range(rounds):
        games = {name: 1 / (strength[name] + 1) for name in names}
        for first, second, _, weight in counted:
            share = weight / (strength[first] + strength[second])
            games[first] += share
            games[second] += share
        strength = {name: wins[name] / games[name] for name in names}
    return {name: round(value / (value + 1), 9) for name, value in strength.items()}


def _settled(pair: ResponsePair, forward: PairVerdict, backward: PairVerdict, model: str) -> Comparison:
    outcome = None
    if forward.verdict is not None and backward.verdict is not None:
        outcome = combine_orders(forward.verdict, backward.verdict)
    return Comparison(
        id=pair.id,
        instruction_id=pair.instruction.id,
        first_id=pair.first.id,
        second_id=pair.second.id,
        forward=forward.verdict,
        backward=backward.verdict,
        status=backward.status if forward.verdict is not None else forward.status,
        outcome=outcome,
        texts=[forward.text, backward.text],
        model=model,
    )
