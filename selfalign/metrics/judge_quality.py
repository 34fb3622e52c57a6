"""Judge quality: agreement of a judge with humans, and calibration of its scores."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from selfalign.core.records import Judgement, RankedAnswers
from selfalign.metrics import catalog
from selfalign.metrics.intervals import bootstrap_ratio, bootstrap_share, correlation, entropy


@dataclass(frozen=True, slots=True)
class RankedQuestion:
    """The human ranks of a question's answers (1 is best) and the judge's scores, in the same order."""

    ranks: Sequence[int]
    scores: Sequence[float]

    def agreement(self) -> tuple[int, int]:
        """Return (answer pairs in the humans' order, answer pairs). A tie of scores is not in the humans' order."""
        answers = list(zip(self.ranks, self.scores, strict=True))
        pairs = [(a, b) if a[0] < b[0] else (b, a) for a, b in combinations(answers, 2)]
        return sum(better[1] > worse[1] for better, worse in pairs), len(pairs)

    def tops(self, top: float) -> tuple[int, int]:
        """Return (humans' best answers among those with a top score, answers with a top score).

        A top score is within half a point of `top`.
        """
        ranks = [rank for rank, score in zip(self.ranks, self.scores, strict=True) if score >= top - 0.5]
        return ranks.count(min(self.ranks)), len(ranks)

    def correlation(self, kind: str) -> float | None:
        """Return Spearman's ρ or Kendall's τ-b with the human order; None if all scores are equal."""
        return correlation([-rank for rank in self.ranks], self.scores, kind)


def judge_quality(questions: Sequence[RankedQuestion], top: float | None) -> dict[str, float]:
    """Measure the agreement of scores with human ranks (arXiv 2401.10020, section 3.1), with 95 % intervals.

    The paper does not define ties of scores. Here a tied pair does not agree, Kendall's coefficient is τ-b, and a
    question whose scores are all equal has no correlation and is counted in `undefined`.

    Args:
        questions: questions with at least two answers each; they are the units of the intervals.
        top: the highest score of the scale, or None. Scores within half a point of it count for
            `top_score_precision`.
    """
    agreement = [question.agreement() for question in questions]
    exact = [(int(agreeing == pairs), 1) for agreeing, pairs in agreement]
    measured: dict[str, float] = {catalog.JUDGE_QUALITY_QUESTIONS.name: len(questions)}
    for metric, parts in (
        (catalog.JUDGE_QUALITY_PAIRWISE_ACCURACY, agreement),
        (catalog.JUDGE_QUALITY_EXACT_MATCH, exact),
        (catalog.JUDGE_QUALITY_FIVE_BEST, [question.tops(math.inf if top is None else top) for question in questions]),
    ):
        measured |= bootstrap_share(parts).known(metric.name)
    for metric, kind in (
        (catalog.JUDGE_QUALITY_SPEARMAN, "spearman"),
        (catalog.JUDGE_QUALITY_KENDALL, "kendall"),
    ):
        values = [question.correlation(kind) for question in questions]
        measured[catalog.JUDGE_QUALITY_UNDEFINED.name] = values.count(None)
        defined = [(value or 0.0, value is not None) for value in values]
        measured |= bootstrap_ratio(defined).known(metric.name)
    return measured


def calibration(judgements: Sequence[Judgement], ranked: Sequence[RankedAnswers]) -> dict[str, float]:
    """Describe a judge's scores of human-ranked answers: parsed share, entropy, ties, consistency, length, ranks.

    Args:
        judgements: judgements of the answers; the id of an answer is `<question id>-<number>`.
        ranked: the questions.
    """
    of_answer: dict[str, list[float]] = {}
    for judgement in judgements:
        if judgement.score is not None:
            of_answer.setdefault(judgement.response_id, []).append(judgement.score)
    means = {answer: math.fsum(scores) / len(scores) for answer, scores in of_answer.items()}
    ties: list[bool] = []
    candidate_lists: list[list[tuple[float, float]]] = []
    of_rank: dict[int, list[float]] = {}
    for question in ranked:
        answers = [(f"{question.id}-{n}", text) for n, text in enumerate(question.texts, start=1)]
        scored = [(means[answer], float(len(text))) for answer, text in answers if answer in means]
        ties += [one[0] == other[0] for one, other in combinations(scored, 2)]
        candidate_lists.append(scored)
        for (answer, _), rank in zip(answers, question.ranks, strict=True):
            if answer in means:
                of_rank.setdefault(sorted(question.ranks).index(rank) + 1, []).append(means[answer])
    alike = [one == other for scores in of_answer.values() for one, other in combinations(scores, 2)]
    found = {
        catalog.CALIBRATION_PARSED.name: _share([judgement.score is not None for judgement in judgements]),
        catalog.CALIBRATION_SPREAD.name: entropy(list(means.values()), digits=0) if means else None,
        catalog.CALIBRATION_TIES.name: _share(ties),
        catalog.CALIBRATION_SELF_CONSISTENCY.name: _share(alike),
        catalog.CALIBRATION_LENGTH_CORRELATION.name: length_correlation(candidate_lists),
    }
    for rank, scores in sorted(of_rank.items()):
        found[catalog.CALIBRATION_SCORE_OF_RANK.of(rank=rank).name] = _share(scores)
    return {name: value for name, value in found.items() if value is not None}


def length_correlation(candidate_lists: Iterable[Sequence[tuple[float, float]]]) -> float | None:
    """Return the mean over instructions of Spearman's correlation of score and length.

    Args:
        candidate_lists: (score, length) of the responses to each instruction.

    Returns:
        None if no instruction has a correlation, because its scores or lengths are constant.
    """
    found = [correlation([score for score, _ in f], [length for _, length in f], "spearman") for f in candidate_lists]
    return _share([value for value in found if value is not None])


def _share(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
