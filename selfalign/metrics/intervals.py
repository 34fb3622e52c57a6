"""Shares, means and win rates with their intervals, and how varied a text is: pure functions of numbers and texts."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]

RESAMPLES = 1000
"""Of a bootstrap: the ends of a 95 % interval are then the 25th of them from either side."""

RIDGE = 0.01
"""Penalty on the squared coefficients of the length-controlled model, so that they stay finite where outcomes or
lengths separate perfectly."""


NEWTON_STEPS = 40
"""Enough for coefficients as large as the penalty allows."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """{name, name_low, name_high}."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def known(self, name: str) -> dict[str, float]:
        """The same without what is no number."""
        return {key: value for key, value in self.named(name).items() if math.isfinite(value)}


@dataclass(slots=True)
class RunningMean:
    """Mean and standard deviation of values that come one by one and are not kept (Welford 1962)."""

    total: float = 0.0
    count: int = 0
    _mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        """Takes another value in."""
        self.total += value
        self.count += 1
        change = value - self._mean
        self._mean += change / self.count
        self._squares += change * (value - self._mean)

    @property
    def value(self) -> float | None:
        """The mean; None without values."""
        return self.total / self.count if self.count else None

    @property
    def deviation(self) -> float:
        """The standard deviation, with n in the denominator."""
        return math.sqrt(self._squares / self.count)


def wilson(successes: float, total: int, confidence: float = 0.95) -> Estimate:
    """A share with Wilson's score interval (Wilson 1927); half successes (ties) are allowed."""
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def sign_test(wins: int, losses: int) -> float:
    """Returns how likely so few wins or fewer are if both sides are as good: the one-sided p value of the sign test.

    Exact, by the binomial distribution. Ties say nothing and are left out; without a win or a loss it is 1.
    """
    return float(stats.binom.cdf(wins, wins + losses, 0.5))


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], units: int, *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """A statistic with its percentile interval over units drawn again with replacement (Efron 1979).

    Args:
        statistic: of the units with these indices; NaN where it is not defined, and such draws are left out.
        units: how many there are: questions or instructions, never single answers, which depend on each other.
        seed: draws them.
        confidence: of the interval.

    Returns:
        The statistic of all units; both ends are NaN where fewer than half of the draws define it, and for one unit.
    """
    value = statistic(np.arange(units))
    if units < 2:
        return Estimate(value, math.nan, math.nan)
    return _between(value, np.array([statistic(drawn) for drawn in _draws(units, seed)]), confidence)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """The mean with its bootstrap interval; `values` are one a unit."""
    numbers = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda units: float(numbers[units].mean()), len(numbers), seed=seed, confidence=confidence)


def bootstrap_correlation(
    first: Sequence[float], second: Sequence[float], kind: str, *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """A correlation (as `correlation` has them) with its bootstrap interval; NaN where it is not defined."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)

    def statistic(units: NDArray[np.int64]) -> float:
        found = correlation(x[units], y[units], kind)
        return math.nan if found is None else found

    return bootstrap(statistic, len(x), seed=seed, confidence=confidence)


def bootstrap_ratio(parts: Sequence[tuple[float, float]]) -> Estimate:
    """Sum over sum, with its bootstrap interval over the parts, one a unit; NaN where the second sum is 0."""
    table = np.array(parts, dtype=np.float64)

    def ratio(units: NDArray[np.int64]) -> float:
        above, below = table[units].sum(0)
        return above / below if below else math.nan

    return bootstrap(ratio, len(table))


def bootstrap_share(parts: Sequence[tuple[float, float]]) -> Estimate:
    """As `bootstrap_ratio`, of a part of a whole; where all units say the same, with Wilson's interval over the units.

    There every draw is the same, and the bootstrap's interval has no width.
    """
    found, units = bootstrap_ratio(parts), sum(whole > 0 for _, whole in parts)
    if math.isnan(found.low) or found.low < found.high:
        return found
    same = wilson(found.value * units, units)
    return Estimate(found.value, same.low, same.high)


def length_controlled(
    outcomes: Sequence[float], length_differences: Sequence[float], *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """The win rate to expect if both answers were equally long.

    A logistic model of each outcome on a constant and tanh(difference / its standard deviation), after AlpacaEval's
    (arXiv 2404.04475); the rate is the model's prediction with the length term at 0. AlpacaEval's third term, the
    difficulty of each instruction, comes of all models of its leaderboard and is left out here, so this is not its
    number.

    The interval is by bootstrap over the instructions. Where all outcomes are equal every draw is the same and length
    explains nothing, so there it is Wilson's at the same counts.

    Args:
        outcomes: of each instruction: 1 won, ½ tied, 0 lost.
        length_differences: characters of the model's answer minus those of the other's.
        seed: draws the instructions for the interval.
        confidence: of the interval.

    Returns:
        The rate; both ends are NaN for one instruction.
    """
    won = np.asarray(outcomes, dtype=np.float64)
    lengths = np.asarray(length_differences, dtype=np.float64)
    spread = float(lengths.std())
    feature = np.tanh(lengths / spread) if spread else np.zeros_like(lengths)
    value = float(_without_length(won, feature, np.ones((1, len(won))))[0])
    if len(won) < 2:
        return Estimate(value, math.nan, math.nan)
    if not np.ptp(won):
        same = wilson(float(won.sum()), len(won), confidence)
        return Estimate(value, same.low, same.high)
    drawn = np.array([np.bincount(units, minlength=len(won)) for units in _draws(len(won), seed)], dtype=np.float64)
    return _between(value, _without_length(won, feature, drawn), confidence)


def _without_length(won: Floats, feature: Floats, counts: Floats) -> Floats:
    """The logistic model's prediction at feature 0, for each row of how often every instruction counts.

    Fitted by Newton's method with steps of bounded length.
    """
    constant, slope = np.zeros((2, len(counts), 1))
    for _ in range(NEWTON_STEPS):
        chance = special.expit(constant + slope * feature)
        surplus, weight = counts * (chance - won), counts * chance * (1 - chance)
        pull = surplus.sum(1, keepdims=True) + 2 * RIDGE * constant
        tilt = (surplus * feature).sum(1, keepdims=True) + 2 * RIDGE * slope
        a = weight.sum(1, keepdims=True) + 2 * RIDGE
        b = (weight * feature).sum(1, keepdims=True)
        d = (weight * feature**2).sum(1, keepdims=True) + 2 * RIDGE
        first, second = (d * pull - b * tilt) / (a * d - b * b), (a * tilt - b * pull) / (a * d - b * b)
        short = np.minimum(1, 1 / np.maximum(np.hypot(first, second), 1e-12))
        constant, slope = constant - short * first, slope - short * second
    return special.expit(constant[:, 0])


def _draws(units: int, seed: int) -> Iterator[NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    return (draw.integers(units, size=units) for _ in range(RESAMPLES))


def _between(value: float, drawn: Floats, confidence: float) -> Estimate:
    """A value with the middle part of what was drawn; NaN for both ends where fewer than half of it is a number."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < len(drawn) / 2:
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(value, float(low), float(high))


def correlation(first: ArrayLike, second: ArrayLike, kind: str = "pearson") -> float | None:
    """Pearson's, Spearman's or Kendall's (τ-b) correlation; None where one side is constant or shorter than 2."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return None
    if kind == "kendall":
        return float(stats.kendalltau(x, y).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "spearman":
        x, y = _midranks(x), _midranks(y)
    # Written out, because scipy's functions take ten times as long, and a bootstrap calls this a thousand times.
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def _midranks(values: Floats) -> Floats:
    """Each value's rank from 1; equal ones share the mean of theirs."""
    order = np.sort(values)
    return (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") + 1) / 2


def entropy(values: Iterable[float], digits: int = 3) -> float:
    """Entropy (nats) of how often each value occurs; values that are equal when rounded to `digits` count as one."""
    counts = Counter(round(value, digits) for value in values)
    total = counts.total()
    return math.fsum(n / total * math.log(total / n) for n in counts.values())


def distinct(texts: Sequence[Sequence[str]], size: int) -> float | None:
    """Distinct-n (Li et al. 2016): different n-grams over all n-grams of the texts' words; None without any."""
    grams = [gram for words in texts for gram in _grams(words, size)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: Sequence[Sequence[str]], size: int) -> float | None:
    """Share of n-grams that stood before in the same text, all texts together; None without any."""
    counts = [(len(grams), len(set(grams))) for words in texts for grams in [_grams(words, size)]]
    total = sum(many for many, _ in counts)
    return 1 - sum(different for _, different in counts) / total if total else None


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False))
