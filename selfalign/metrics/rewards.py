"""Rewards, margins and accuracies of a batch of pairs, and their intervals."""

import math
from collections.abc import Sequence

from scipy import stats

from selfalign.metrics.accumulate import LENGTH_MOMENTS, Sums
from selfalign.metrics.intervals import wilson


def reward_metrics(
    chosen: Sequence[float],
    rejected: Sequence[float],
    refinements: Sequence[float] | None = None,
    *,
    chosen_tokens: Sequence[float] = (),
    rejected_tokens: Sequence[float] = (),
) -> Sums:
    """Sums and weights of the reward metrics over pairs.

    Args:
        chosen: rewards β[log π - log π_ref] of the chosen responses.
        rejected: of the rejected ones.
        refinements: Δ of each pair, where the loss has one.
        chosen_tokens: lengths of the chosen responses; without them there is no margin a token.
        rejected_tokens: of the rejected ones.
    """
    total = float(len(chosen))
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    metrics = {
        "rewards/chosen": (math.fsum(chosen), total),
        "rewards/rejected": (math.fsum(rejected), total),
        "rewards/margins": (math.fsum(margins), total),
        "rewards/mean_square_margin": (math.fsum(margin * margin for margin in margins), total),
        "rewards/accuracies": (float(sum(margin > 0 for margin in margins)), total),
        "rewards/ties": (float(sum(margin == 0 for margin in margins)), total),
    }
    if chosen_tokens:
        lengths = zip(chosen, rejected, chosen_tokens, rejected_tokens, strict=True)
        metrics["rewards/margins_per_token"] = (math.fsum(a / n - b / m for a, b, n, m in lengths), total)
    if refinements is not None:
        metrics |= {
            "refinement/mean": (math.fsum(refinements), total),
            "refinement/mean_square": (math.fsum(delta * delta for delta in refinements), total),
            "refinement/mean_product": (math.fsum(d * m for d, m in zip(refinements, margins, strict=True)), total),
            "rewards/accuracies_augmented": (float(sum(delta > 0 for delta in refinements)), total),
            "rewards/ties_augmented": (float(sum(delta == 0 for delta in refinements)), total),
        }
    return metrics


def logp_changes(name: str, changes: Sequence[float], tokens: Sequence[float]) -> Sums:
    """How much log π of responses has changed: nats a response, and nats a token.

    Args:
        name: "chosen" or "rejected".
        changes: of each response, nats summed over its tokens.
        tokens: how many these are.
    """
    total = math.fsum(changes)
    return {
        f"logps/{name}_change": (total, float(len(changes))),
        f"logps/{name}_change_per_token": (total, math.fsum(tokens)),
    }


def length_moments(rewards: Sequence[float], tokens: Sequence[float]) -> Sums:
    """What `averages` makes `rewards/length_correlation` of: moments of the responses' rewards and lengths."""
    count = float(len(rewards))
    parts = {
        "reward": rewards,
        "tokens": tokens,
        "square_reward": [reward * reward for reward in rewards],
        "square_tokens": [length * length for length in tokens],
        "product": [reward * length for reward, length in zip(rewards, tokens, strict=True)],
    }
    return {f"{LENGTH_MOMENTS}{part}": (math.fsum(values), count) for part, values in parts.items()}


def reward_intervals(metrics: Sums) -> dict[str, float]:
    """The ends of 95 % intervals, as `…_low` and `…_high`: Wilson's for shares, Student's t for the mean margin.

    Both take the pairs as independent of each other, as those are that are held out: one of each instruction.
    """
    intervals: dict[str, float] = {}
    for name in ("rewards/accuracies", "rewards/accuracies_augmented"):
        total, weight = metrics.get(name, (0.0, 0.0))
        if weight:
            share = wilson(total, int(weight))
            intervals |= {f"{name}_low": share.low, f"{name}_high": share.high}
    total, pairs = metrics["rewards/margins"]
    if pairs > 1:
        mean = total / pairs
        variance = max(0.0, metrics["rewards/mean_square_margin"][0] / pairs - mean**2) * pairs / (pairs - 1)
        half = float(stats.t.ppf(0.975, pairs - 1)) * math.sqrt(variance / pairs)
        intervals |= {"rewards/margins_low": mean - half, "rewards/margins_high": mean + half}
    return intervals
