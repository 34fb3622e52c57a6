"""Reward metrics of a batch of pairs or labelled responses, and their intervals."""

import math
from collections.abc import Sequence

from scipy import stats

from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Correlation, Deviation, Difference, Mean, Moments, Sums
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


def label_metrics(rewards: Sequence[float], desirable: Sequence[bool]) -> Sums:
    """Return the sums of the reward metrics over labelled responses.

    They have the names of those of pairs, as in TRL: desirable responses count as chosen and undesirable ones as
    rejected.

    Args:
        rewards: β[log π - log π_ref] of the responses.
        desirable: whether each is desirable.
    """
    labelled = list(zip(rewards, desirable, strict=True))
    good, bad = ([reward for reward, label in labelled if label is kind] for kind in (True, False))
    return {
        catalog.REWARDS_CHOSEN.name: Mean(math.fsum(good), float(len(good))),
        catalog.REWARDS_REJECTED.name: Mean(math.fsum(bad), float(len(bad))),
        catalog.REWARDS_MARGINS.name: Difference(Moments.of(good), Moments.of(bad)),
    }


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

    Between desirable and undesirable responses it is Welch's. The intervals assume independent pairs or responses.
    Held-out ones are: each instruction has only one.
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
    if isinstance(margins, Difference) and min(margins.one.count, margins.other.count) > 1:
        parts = [(max(0.0, of.variance) / (of.count - 1), of.count - 1) for of in (margins.one, margins.other)]
        error = sum(part for part, _ in parts)
        if error and margins.value is not None:
            freedom = error**2 / sum(part**2 / left for part, left in parts)
            half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(error)
            intervals |= {f"{name}_low": margins.value - half, f"{name}_high": margins.value + half}
    return intervals
