"""What a stage's records come to: instructions, judgements, scores, wins."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from selfalign.core.records import Judgement
from selfalign.metrics import catalog
from selfalign.metrics.intervals import RunningMean, distinct, length_controlled, wilson


def instruction_statistics(texts: Sequence[Sequence[str]], highest: Sequence[float]) -> dict[str, float]:
    """How new, how varied and how long instructions are.

    Args:
        texts: their words; there is at least one instruction.
        highest: the highest ROUGE-L F1 of each to anything known before it.
    """
    varied = {catalog.DISTINCT_1.name: distinct(texts, 1), catalog.DISTINCT_2.name: distinct(texts, 2)}
    return {
        catalog.NOVELTY.name: 1 - math.fsum(highest) / len(highest),
        **{name: value for name, value in varied.items() if value is not None},
        catalog.MEAN_WORDS.name: sum(map(len, texts)) / len(texts),
    }


def judgement_statistics(judgements: Iterable[Judgement]) -> dict[str, float]:
    """Mean, spread and (where the judge has one) entropy of the scores."""
    scores, entropies = RunningMean(), RunningMean()
    for judgement in judgements:
        if judgement.score is not None:
            scores.add(judgement.score)
        if judgement.entropy is not None:
            entropies.add(judgement.entropy)
    if scores.value is None:
        return {}
    statistics = {catalog.JUDGE_MEAN_SCORE.name: scores.value, catalog.JUDGE_STD_SCORE.name: scores.deviation}
    return statistics | ({} if entropies.value is None else {catalog.JUDGE_ENTROPY.name: entropies.value})


def outcomes_by_score(scores: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    """{instruction id: 1 where the score is the higher one, 0 where it is the lower, ½ if equal}, of those in both."""
    both = sorted(scores.keys() & others.keys())
    return {name: (scores[name] > others[name]) + (scores[name] == others[name]) / 2 for name in both}


def win_statistics(outcomes: Sequence[float], longer: Sequence[float]) -> dict[str, float]:
    """Wins, ties and losses, and the win rates with their intervals, a tie counting half; no rate without outcomes.

    Args:
        outcomes: of each instruction: 1 won, ½ tied, 0 lost.
        longer: characters of the answer minus those of the opponent's.
    """
    counts: dict[str, float] = {
        catalog.WINS.name: outcomes.count(1.0),
        catalog.TIES.name: outcomes.count(0.5),
        catalog.LOSSES.name: outcomes.count(0.0),
    }
    if not outcomes:
        return counts
    equal = length_controlled(outcomes, longer).known(catalog.WIN_RATE_LENGTH_CONTROLLED.name)
    return counts | wilson(math.fsum(outcomes), len(outcomes)).named(catalog.WIN_RATE.name) | equal


def score_histogram(scores: Sequence[float], low: int, high: int, parts: int = 1) -> list[int]:
    """How many scores round to each whole one from `low` to `high`, or to each of so many parts of a point."""
    rounded = Counter(round(score * parts) for score in scores)
    return [rounded[place] for place in range(low * parts, high * parts + 1)]
