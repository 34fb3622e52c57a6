"""Summary statistics of a stage's records: instructions, judgements, scores and wins."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from selfalign.core.records import Judgement
from selfalign.metrics import catalog
from selfalign.metrics.intervals import RunningMean, distinct, length_controlled, wilson


def instruction_statistics(texts: Sequence[Sequence[str]], highest: Sequence[float]) -> dict[str, float]:
    """Return novelty, diversity and mean length of instructions.

    Args:
        texts: the words of each instruction; there must be an instruction.
        highest: each instruction's highest ROUGE-L F1 to the instructions known before it.
    """
    varied = {catalog.DISTINCT_1.name: distinct(texts, 1), catalog.DISTINCT_2.name: distinct(texts, 2)}
    return {
        catalog.NOVELTY.name: 1 - math.fsum(highest) / len(highest),
        **{name: value for name, value in varied.items() if value is not None},
        catalog.MEAN_WORDS.name: sum(map(len, texts)) / len(texts),
    }


def judgement_statistics(judgements: Iterable[Judgement]) -> dict[str, float]:
    """Return mean and standard deviation of the scores, and the mean entropy of judgements that have one."""
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
    """Return {instruction id: 1 for the higher score, 0 for the lower, ½ for equal ones} of the ids in both."""
    both = sorted(scores.keys() & others.keys())
    return {name: (scores[name] > others[name]) + (scores[name] == others[name]) / 2 for name in both}


def win_statistics(outcomes: Sequence[float], longer: Sequence[float]) -> dict[str, float]:
    """Return wins, ties, losses, and win rates with their intervals. A tie counts half. Without outcomes: no rate.

    Args:
        outcomes: one for each instruction: 1 won, ½ tied, 0 lost.
        longer: characters of the response minus those of the opponent's.
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
    """Count the scores from `low` to `high`, rounded to multiples of 1/`parts`."""
    rounded = Counter(round(score * parts) for score in scores)
    return [rounded[position] for position in range(low * parts, high * parts + 1)]
