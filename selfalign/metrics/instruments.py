"""Quality of an instrument: a judge that tells two models' answers apart, measured on answers in a human's order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from selfalign.core.errors import SelfalignError
from selfalign.core.records import RankedAnswers
from selfalign.metrics import catalog
from selfalign.metrics.intervals import bootstrap_share

HEAD_TO_HEAD, SCORES, JUDGE = "head_to_head", "scores", "judge"
"""The instruments: `evaluate.head_to_head`, the scores by `evaluate.judge`, and the model's own judging."""


@dataclass(kw_only=True, slots=True)
class InstrumentTest:
    """How instruments are measured, and the bar that they must pass to be believed.

    The accuracy of a judge that does not look at the answers is ½, whether it guesses, is constant or always names one
    place, since what it does not decide counts half. A judge that tosses a coin for each order names one place in half
    of the comparisons; one that does so more often reads the place more than the answers.

    Attributes:
        comparisons: the most pairs of held-out ranked answers that the judge of head-to-head comparisons compares, as
            many of each question as possible; 0 takes all.
        min_accuracy: the lower end of the 95 % interval of the accuracy must be above this.
        max_one_place: the largest share of comparisons in which the same place wins in both orders.
    """

    comparisons: int = 100
    min_accuracy: float = 0.5
    max_one_place: float = 0.5

    def __post_init__(self) -> None:
        if self.comparisons < 0:
            raise SelfalignError(f"evaluate.instruments.comparisons must be 0 (all) or more, got {self.comparisons}")
        for name, lowest in (("min_accuracy", 0.5), ("max_one_place", 0.0)):
            if not lowest <= (value := getattr(self, name)) <= 1:
                raise SelfalignError(f"evaluate.instruments.{name} must lie between {lowest:g} and 1, got {value}")

    def passes(self, lowest_accuracy: float, one_place: float) -> bool:
        """Whether an instrument passes the bar.

        Args:
            lowest_accuracy: the lower end of the interval of its accuracy; NaN, if there is no interval, does not pass.
            one_place: the share of comparisons in which it names one place; 0 for an instrument that does not compare.
        """
        return lowest_accuracy > self.min_accuracy and one_place <= self.max_one_place


@dataclass(frozen=True, slots=True)
class RankedOutcome:
    """What an instrument says of two answers to a question.

    Attributes:
        question: id of the question.
        outcome: 1 if it prefers the answer that people ranked higher, 0 the other one, ½ none; None if it has no
            verdict or score.
    """

    question: str
    outcome: float | None


def ranks_of(questions: Sequence[RankedAnswers]) -> dict[str, tuple[str, int]]:
    """Return {answer id: (question id, rank)}; the id of an answer is `<question id>-<number>`."""
    return {f"{q.id}-{number}": (q.id, rank) for q in questions for number, rank in enumerate(q.ranks, start=1)}


def outcomes_of_scores(questions: Sequence[RankedAnswers], scores: Mapping[str, float]) -> list[RankedOutcome]:
    """Return what scores say of every two answers to a question; `scores` lacks the answers that have none."""
    found: list[RankedOutcome] = []
    for question in questions:
        answers = [(rank, scores.get(f"{question.id}-{number}")) for number, rank in enumerate(question.ranks, start=1)]
        for (_, better), (_, worse) in combinations(sorted(answers, key=lambda answer: answer[0]), 2):
            outcome = None if better is None or worse is None else (better > worse) + (better == worse) / 2
            found.append(RankedOutcome(question.id, outcome))
    return found


def instrument_quality(name: str, outcomes: Sequence[RankedOutcome]) -> dict[str, float]:
    """Return accuracy, ties and missing verdicts of an instrument, over all comparisons.

    A tie counts half, and so does a comparison without a verdict. The units of the interval are questions.

    Args:
        name: of the instrument, in the names of the metrics.
        outcomes: what it says of pairs of answers.

    Returns:
        {metric: value}; nothing without pairs.
    """
    if not outcomes:
        return {}
    points = [0.5 if one.outcome is None else one.outcome for one in outcomes]
    of_question: dict[str, list[float]] = {}
    for one, point in zip(outcomes, points, strict=True):
        of_question.setdefault(one.question, []).append(point)
    accuracy = bootstrap_share([(math.fsum(found), len(found)) for found in of_question.values()])
    return {
        catalog.INSTRUMENT_COMPARISONS.of(instrument=name).name: len(outcomes),
        **accuracy.known(catalog.INSTRUMENT_ACCURACY.of(instrument=name).name),
        catalog.INSTRUMENT_TIES.of(instrument=name).name: share([one.outcome == 0.5 for one in outcomes]),
        catalog.INSTRUMENT_UNREAD.of(instrument=name).name: share([one.outcome is None for one in outcomes]),
    }


def repeated_order(questions: Sequence[RankedAnswers], samples: Mapping[str, Mapping[int, float]]) -> float | None:
    """Return how often two samples of a judge order two answers alike, as a share; equal scores are an order too.

    Args:
        questions: the questions.
        samples: {answer id: {sample: score}}.

    Returns:
        None if no two answers have two samples each.
    """
    alike: list[bool] = []
    for question in questions:
        answers = [samples.get(f"{question.id}-{number}", {}) for number in range(1, len(question.ranks) + 1)]
        for one, other in combinations(answers, 2):
            signs = [(one[n] > other[n]) - (one[n] < other[n]) for n in sorted(one.keys() & other.keys())]
            alike += [first == second for first, second in combinations(signs, 2)]
    return share(alike) if alike else None


def share(values: Sequence[float]) -> float:
    """Return the mean of shares or of truth values."""
    return math.fsum(values) / len(values)
