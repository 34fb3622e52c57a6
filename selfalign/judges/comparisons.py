"""Two responses compared in both orders, and what many comparisons say of each response."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from selfalign.core.records import Comparison, FinishReason, Instruction, JudgementStatus, Response, Verdict
from selfalign.judges.parsing import read_bracketed
from selfalign.judges.verdict_text import other_choices
from selfalign.metrics.intervals import RunningMean

VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True, slots=True)
class Duel:
    """Two responses to one instruction."""

    instruction: Instruction
    first: Response
    second: Response

    @property
    def id(self) -> str:
        """Of its comparison."""
        return f"{self.first.id}:{self.second.id}"


@dataclass(frozen=True, slots=True)
class Showing:
    """A duel in one of its two orders."""

    duel: Duel
    swapped: bool

    @property
    def texts(self) -> tuple[str, str]:
        """What is shown first, and what second."""
        first, second = self.duel.first.text, self.duel.second.text
        return (second, first) if self.swapped else (first, second)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a judge said of a showing: a verdict exactly when `status` is ok."""

    status: JudgementStatus
    verdict: Verdict | None
    text: str


def compare(
    duels: Sequence[Duel], read: Callable[[Sequence[Showing]], Sequence[Reading]], model: str
) -> list[Comparison]:
    """Compares each two responses in both orders; the judge is asked about all showings at once.

    Args:
        duels: who against whom.
        read: the judge's verdicts on so many showings, in their order.
        model: who judges.
    """
    readings = iter(read([Showing(duel, swapped) for duel in duels for swapped in (False, True)]))
    return [_settled(duel, next(readings), next(readings), model) for duel in duels]


def settle(forward: Verdict, backward: Verdict) -> float:
    """The outcome for the response that `forward` showed first: 1 won, 0 lost, ½ where the orders do not agree."""
    value = {Verdict.A: 1.0, Verdict.TIE: 0.5, Verdict.B: 0.0}
    there, back = value[forward], 1 - value[backward]
    return there if there == back else 0.5


def parse_verdict(text: str, finish_reason: FinishReason = FinishReason.EOS, shown: Sequence[str] = ()) -> Reading:
    """Reads `[[A]]`, `[[B]]` or `[[C]]` (a tie) from the judge's own lines of newly generated text.

    Two different ones are ambiguous, wherever they stand, and so is one that another letter follows as what is chosen;
    none is no verdict, for which `finish_reason` may give the reason.

    Args:
        text: what the judge wrote.
        finish_reason: why it ended.
        shown: the responses; their own words are no verdict.
    """
    found = read_bracketed(text, VERDICT, finish_reason, shown)
    if isinstance(found, JudgementStatus):
        return Reading(found, None, text)
    said, behind = found
    if len(set(said)) > 1 or other_choices(behind, said[0]):
        return Reading(JudgementStatus.AMBIGUOUS, None, text)
    return Reading(JudgementStatus.OK, Verdict(said[0]), text)


def unread_text(comparison: Comparison) -> str:
    """What the judge wrote where its verdict could not be read."""
    return comparison.texts[0 if comparison.forward is None else 1]


def bias_statistics(comparisons: Iterable[Comparison]) -> dict[str, float]:
    """Shares of the valid comparisons in which the same place won in both orders, and which are ties."""
    biased, tied = RunningMean(), RunningMean()
    for comparison in comparisons:
        if comparison.outcome is not None:
            biased.add(comparison.forward is comparison.backward and comparison.forward is not Verdict.TIE)
            tied.add(comparison.outcome == 0.5)
    if biased.value is None or tied.value is None:
        return {}
    return {"judge/position_bias": biased.value, "judge/tied_comparisons": tied.value}


def win_shares(outcomes: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """{response: its wins, a tie counting half, as a share of its comparisons}, given (first, second, outcome)."""
    won: dict[str, list[float]] = {}
    for first, second, outcome in outcomes:
        won.setdefault(first, []).append(outcome)
        won.setdefault(second, []).append(1 - outcome)
    return {name: math.fsum(values) / len(values) for name, values in won.items()}


def expected_win_rates(outcomes: Sequence[tuple[str, str, float]], rounds: int = 200) -> dict[str, float]:
    """{response: the share of games it should win against an average opponent}, by Bradley and Terry's model.

    Response i of strength w_i beats j with probability w_i / (w_i + w_j), which is Elo's model; the strengths are
    those of highest posterior probability when everybody also ties once with an opponent of strength 1, found by
    minorisation-maximisation (Hunter 2004): w_i ← (wins_i + ½) / (Σ_j n_ij / (w_i + w_j) + 1 / (w_i + 1)). The result
    is w_i / (w_i + 1), which tells responses apart that had opponents of unlike strength.

    Args:
        outcomes: (first, second, outcome of the first) of every comparison.
        rounds: iterations.
    """
    names = sorted({name for first, second, _ in outcomes for name in (first, second)})
    strength = dict.fromkeys(names, 1.0)
    wins = dict.fromkeys(names, 0.5)
    for first, second, outcome in outcomes:
        wins[first] += outcome
        wins[second] += 1 - outcome
    for _ in range(rounds):
        games = {name: 1 / (strength[name] + 1) for name in names}
        for first, second, _ in outcomes:
            share = 1 / (strength[first] + strength[second])
            games[first] += share
            games[second] += share
        strength = {name: wins[name] / games[name] for name in names}
    return {name: round(value / (value + 1), 9) for name, value in strength.items()}


def _settled(duel: Duel, forward: Reading, backward: Reading, model: str) -> Comparison:
    outcome = None
    if forward.verdict is not None and backward.verdict is not None:
        outcome = settle(forward.verdict, backward.verdict)
    return Comparison(
        id=duel.id,
        instruction_id=duel.instruction.id,
        first_id=duel.first.id,
        second_id=duel.second.id,
        forward=forward.verdict,
        backward=backward.verdict,
        status=backward.status if forward.verdict is not None else forward.status,
        outcome=outcome,
        texts=[forward.text, backward.text],
        model=model,
    )
