"""Reward metrics of a batch of pairs, and their intervals."""

import math
from collections.abc import Sequence

from scipy import stats

from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Correlation, Deviation, Mean, Moments, Sums
from selfalign.metrics.intervals import wilson

CHANGES = {
    "chosen": (catalog.LOGPS_CHOSEN_CHANGE, catalog.LOGPS_CHOSEN_CHANGE_PER_TOKEN),
    "rejected": (catalog.LOGPS_REJECTED_CHANGE, catalog.LOGPS_REJECTED_CHANGE_PER_TOKEN),
}
"""{role of a response: metrics of the change of its log π, in nats and in nats per token}."""


def reward_metrics(
    chosen: Sequence[float],
    rejected: Sequence[float],
    refinements: Sequence[float] | None = None,
    *,
    chosen_tokens: Sequence[float] = (),
    rejected_tokens: Sequence[float] = (),
) -> Sums:
    """Return the sums of the reward metrics over pairs.

    Args:
        chosen: rewards β[log π - log π_ref] of the chosen responses.
        rejected: rewards of the rejected responses.
        refinements: Δ of each pair, in units of reward; None if the loss has no Δ.
        chosen_tokens: lengths of the chosen responses; without them there is no margin per token.
        rejected_tokens: lengths of the rejected responses.
    """
    total = float(len(chosen))
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    metrics: Sums = {
        catalog.REWARDS_CHOSEN.name: Mean(math.fsum(chosen), total),
        catalog.REWARDS_REJECTED.name: Mean(math.fsum(rejected), total),
        catalog.REWARDS_MARGINS.name: Moments.of(margins),
        catalog.REWARDS_ACCURACIES.name: Mean(float(sum(margin > 0 for margin in margins)), total),
        catalog.REWARDS_TIES.name: Mean(float(sum(margin == 0 for margin in margins)), total),
    }
    if chosen_tokens:
        lengths = zip(chosen, rejected, chosen_tokens, rejected_tokens, strict=True)
        per_token = math.fsum(a / n - b / m for a, b, n, m in lengths)
        metrics[catalog.REWARDS_MARGINS_PER_TOKEN.name] = Mean(per_token, total)
    if refinements is not None:
        metrics |= {
            catalog.REFINEMENT_MEAN.name: Mean(math.fsum(refinements), total),
            catalog.REFINEMENT_STD.name: Deviation(Moments.of(refinements)),
            catalog.REFINEMENT_CORRELATION_WITH_MARGIN.name: Correlation.between(refinements, margins),
            catalog.REWARDS_ACCURACIES_AUGMENTED.name: Mean(float(sum(delta > 0 for delta in refinements)), total),
            catalog.REWARDS_TIES_AUGMENTED.name: Mean(float(sum(delta == 0 for delta in refinements)), total),
        }
    return metrics


def logp_changes(name: str, changes: Sequence[float], tokens: Sequence[float]) -> Sums:
    """Return the mean change of log π of responses, in nats per response and in nats per token, as sums.

    Args:
        name: "chosen" or "rejected".
        changes: change of each response, in nats summed over its tokens.
        tokens: number of tokens of each response.
    """
    nats, nats_per_token = CHANGES[name]
    total = math.fsum(changes)
    return {nats.name: Mean(total, float(len(changes))), nats_per_token.name: Mean(total, math.fsum(tokens))}


def length_moments(rewards: Sequence[float], tokens: Sequence[float]) -> Sums:
    """Return the correlation of the responses' rewards and lengths, as sums."""
    return {catalog.REWARDS_LENGTH_CORRELATION.name: Correlation.between(rewards, tokens)}


def reward_intervals(metrics: Sums) -> dict[str, float]:
    """Return the ends of 95 % intervals as `…_low` and `…_high`: Wilson's for shares, Student's t for the mean margin.

    The intervals assume independent pairs. Held-out pairs are: each instruction has only one.
    """
    intervals: dict[str, float] = {}
    for name in (catalog.REWARDS_ACCURACIES.name, catalog.REWARDS_ACCURACIES_AUGMENTED.name):
        right = metrics.get(name)
        if isinstance(right, Mean) and right.weight:
            share = wilson(right.total, int(right.weight))
            intervals |= {f"{name}_low": share.low, f"{name}_high": share.high}
    margins = metrics[name := catalog.REWARDS_MARGINS.name]
    if isinstance(margins, Moments) and (pairs := margins.count) > 1:
        mean, variance = margins.total / pairs, max(0.0, margins.variance) * pairs / (pairs - 1)
        half = float(stats.t.ppf(0.975, pairs - 1)) * math.sqrt(variance / pairs)
        intervals |= {f"{name}_low": mean - half, f"{name}_high": mean + half}
    return intervals
