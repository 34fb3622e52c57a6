"""How a model's answers and a judge's scores stand against the truth, where instructions say what is right."""

from collections.abc import Sequence
from itertools import combinations

from selfalign.metrics import catalog
from selfalign.metrics.intervals import bootstrap_mean, bootstrap_share, wilson
from selfalign.metrics.summaries import outcomes_by_score

TrueAndScore = tuple[float, float | None]
"""(share of the checks that a response passes, the judge's score or None) of a response."""


def true_rates(truth: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    """Return the mean true rate of a model's answers, and its difference from M1's on the same instructions.

    The intervals are bootstrap intervals over instructions; that of the difference is paired. The win rate counts ties
    half and has Wilson's interval.

    Args:
        truth: {instruction id: share of the checks that the answer passes, 0 to 1}.
        baseline: the same of M1's answers; empty for M1 itself.
    """
    measured = bootstrap_mean(list(truth.values())).known(catalog.EVAL_TRUE_RATE.name)
    both = sorted(truth.keys() & baseline.keys())
    if both:
        gained = bootstrap_mean([truth[name] - baseline[name] for name in both])
        won = outcomes_by_score(truth, baseline).values()
        measured |= gained.known(catalog.EVAL_TRUE_GAIN.name)
        measured |= wilson(sum(won), len(won)).named(catalog.EVAL_TRUE_WIN_RATE.name)
    return measured


def judged_truth(groups: Sequence[Sequence[TrueAndScore]]) -> dict[str, float]:
    """Return the mean true rate of candidates, and how often the judge orders them as the truth does.

    Compared are every two candidates of an instruction that differ in truth and have scores. Equal scores count half,
    so that a judge that guesses has ½. Units of the bootstrap are instructions.

    Args:
        groups: (truth, score) of the candidates of each instruction.
    """
    ordered: list[tuple[float, float]] = []
    for group in groups:
        scored = [(truth, score) for truth, score in group if score is not None]
        two = [(a, b) if a[0] > b[0] else (b, a) for a, b in combinations(scored, 2) if a[0] != b[0]]
        right = sum((better[1] > worse[1]) + (better[1] == worse[1]) / 2 for better, worse in two)
        ordered.append((right, float(len(two))))
    means = [sum(truth for truth, _ in group) / len(group) for group in groups if group]
    measured = bootstrap_mean(means).known(catalog.TRUTH_RATE.name) if means else {}
    return measured | bootstrap_share(ordered).known(catalog.TRUTH_JUDGE_ACCURACY.name)


def true_gaps(gaps: Sequence[float]) -> dict[str, float]:
    """Return what the truth says of preference pairs: the mean gap, and the shares that are right and wrong.

    Args:
        gaps: true rate of the chosen response minus that of the rejected one, of each pair.
    """
    if not gaps:
        return {}
    return {
        **bootstrap_mean(gaps).known(catalog.TRUTH_PAIR_GAP.name),
        **wilson(sum(gap > 0 for gap in gaps), len(gaps)).named(catalog.TRUTH_PAIRS_RIGHT.name),
        **wilson(sum(gap < 0 for gap in gaps), len(gaps)).named(catalog.TRUTH_PAIRS_WRONG.name),
    }
