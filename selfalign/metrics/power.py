"""The smallest win rate that a comparison of two models can tell from one half: the exact power of its test."""

import math

import numpy as np
from scipy import stats

from selfalign.core.formatting import plural

LEVEL = 0.05
"""Two-sided level of the test."""

POWER = 0.8
"""Wanted probability of seeing a difference that is there."""

ASSUMED_TIES = 1 / 3
"""Tie rate before there are comparisons: near those that arXiv 2401.10020 reports between its successive models."""

TEST = "power 80\u00a0%, two-sided 5\u00a0%"
"""Test and power in words."""

LADDER = (25, 100, 400, 1600)
"""Numbers of instructions to choose from, where nobody knows how many there are."""

PRECISION = 1e-4
"""Precision of the smallest difference, as a share."""


def detection_power(difference: float, comparisons: int, tie_rate: float) -> float:
    """Return the probability that the 95 % interval of a win rate lies above 50 %.

    The interval is `wilson` of (wins + ties/2) / n, as in the reports. It lies above ½ exactly if
    wins - losses > z √n with z = 1.96: for p = ½ Wilson's interval inverts the score test, whatever is tied. The
    comparisons are independent; each is won with probability (1 - t)/2 + d, tied with t, and else lost. The number of
    decided ones is binomial, and so are the wins among these.

    Args:
        difference: d, the true win rate minus ½, between 0 and (1 - t)/2. A tie counts half.
        comparisons: their number n.
        tie_rate: the share t of ties.
    """
    if tie_rate >= 1:
        return 0.0
    ahead = float(stats.norm.ppf(1 - LEVEL / 2)) * math.sqrt(comparisons)
    decided = np.arange(comparisons + 1)
    won = min(1.0, 0.5 + difference / (1 - tie_rate))
    seen = stats.binom.sf(np.floor((ahead + decided) / 2), decided, won)
    return float(stats.binom.pmf(decided, comparisons, 1 - tie_rate) @ seen)


def detectable_difference(comparisons: int, tie_rate: float) -> float | None:
    """Return the smallest distance of a win rate from ½ that n comparisons show with a power of 80 %.

    Returns:
        A share; None if not even a model that wins everything that is not tied would be seen.
    """
    low, high = 0.0, (1 - tie_rate) / 2
    if detection_power(high, comparisons, tie_rate) < POWER:
        return None
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if detection_power(middle, comparisons, tie_rate) >= POWER else (middle, high)
    return high


def what_a_plan_can_see(instructions: int, seeds: int = 1) -> str:
    """Return the smallest detectable difference at the assumed tie rate, before anything is compared.

    Args:
        instructions: their number; 0 if it is not known before the data are read.
        seeds: number of seeds of one setting.
    """
    if instructions:
        return f"{what_can_be_seen(instructions, ASSUMED_TIES, seeds)} ({TEST}; ties assumed)"
    found = [(count, detectable_difference(count * seeds, ASSUMED_TIES)) for count in LADDER]
    steps = ", ".join(f"{count} can see {math.ceil(100 * gain)}" for count, gain in found if gain is not None)
    what = "instructions" + (f" × {seeds} seeds" if seeds > 1 else "")
    ties = f"{100 * ASSUMED_TIES:.0f}\u00a0% ties assumed"
    return f"points from 50\u00a0% of a win rate, by the number of {what}: {steps} ({TEST}; {ties})"


def what_can_be_seen(instructions: int, tie_rate: float, seeds: int = 1) -> str:
    """Return the smallest detectable difference as a sentence.

    Instructions times seeds is the most that several seeds can see: as if they were independent. Seeds that agree on
    every instruction see no more than one.
    """
    found = detectable_difference(instructions * seeds, tie_rate)
    what = plural(instructions, "instruction") + (f" × {seeds} seeds" if seeds > 1 else "")
    what = f"{what} with {100 * tie_rate:.0f}\u00a0% ties"
    if found is None:
        return f"{what} can see no difference: too few comparisons are decided"
    return f"{what} can see a win rate {math.ceil(100 * found)} points or more from 50\u00a0%"
