"""Shares, means, correlations and win rates with their intervals, and diversity of texts, as pure functions."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]

RESAMPLES = 1000
"""Resamples of a bootstrap. The ends of a 95 % interval are the 25th values from both sides."""

RIDGE = 0.01
"""Penalty on the squared coefficients of the logistic models. It keeps them finite for separable outcomes."""

NEWTON_STEPS = 40
"""Most steps of Newton's method, enough for the largest coefficients that the penalty allows."""

CONVERGED = 1e-10
"""A step of Newton's method below which the coefficients are final."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """Return {name: value, name_low: low, name_high: high}."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def known(self, name: str) -> dict[str, float]:
        """Return `named` without values that are not finite."""
        return {key: value for key, value in self.named(name).items() if math.isfinite(value)}


@dataclass(slots=True)
class RunningMean:
    """Running mean and standard deviation; the values are not stored (Welford 1962)."""

    total: float = 0.0
    count: int = 0
    _mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        """Add a value."""
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
    """Return a share with Wilson's score interval (Wilson 1927). A tie may count as half a success."""
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def sign_test(wins: int, losses: int) -> float:
    """Return the p-value of the one-sided sign test: the probability of at most this many wins among equals.

    It is exact, by the binomial distribution. Ties are left out. Without wins and losses the value is 1.
    """
    return float(stats.binom.cdf(wins, wins + losses, 0.5))


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], units: int, *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Return a statistic with its percentile bootstrap interval (Efron 1979).

    Args:
        statistic: a function from the indices of units to the statistic; NaN if it is undefined. Such resamples are
            left out.
        units: number of units: questions or instructions, not single responses, because these are not independent.
        seed: seeds the resampling.
        confidence: level of the interval.

    Returns:
        The statistic of all units and its interval. Both ends are NaN for one unit, or if fewer than half of the
        resamples define the statistic.
    """
    value = statistic(np.arange(units))
    if units < 2:
        return Estimate(value, math.nan, math.nan)
    return _between(value, np.array([statistic(drawn) for drawn in _draws(units, seed)]), confidence)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Return a mean with its bootstrap interval; `values` has one value for each unit."""
    numbers = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda units: float(numbers[units].mean()), len(numbers), seed=seed, confidence=confidence)


def bootstrap_correlation(
    first: Sequence[float], second: Sequence[float], kind: str, *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Return a `correlation` with its bootstrap interval; NaN if it is undefined."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)

    def statistic(units: NDArray[np.int64]) -> float:
        found = correlation(x[units], y[units], kind)
        return math.nan if found is None else found

    return bootstrap(statistic, len(x), seed=seed, confidence=confidence)


def bootstrap_ratio(parts: Sequence[tuple[float, float]]) -> Estimate:
    """Return the first sum over the second, with its bootstrap interval; NaN if the second sum is 0.

    Args:
        parts: (numerator, denominator) of each unit.
    """
    table = np.array(parts, dtype=np.float64)

    def ratio(units: NDArray[np.int64]) -> float:
        above, below = table[units].sum(0)
        return above / below if below else math.nan

    return bootstrap(ratio, len(table))


def bootstrap_share(parts: Sequence[tuple[float, float]]) -> Estimate:
    """Return a share, like `bootstrap_ratio`. If all units agree, the interval is Wilson's over the units.

    In that case all resamples are equal, so the bootstrap interval would have no width.
    """
    found, units = bootstrap_ratio(parts), sum(whole > 0 for _, whole in parts)
    if math.isnan(found.low) or found.low < found.high:
        return found
    same = wilson(found.value * units, units)
    return Estimate(found.value, same.low, same.high)


def bootstrap_average(
    parts: Sequence[tuple[Callable[[NDArray[np.int64]], float], int]], *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Return the mean of several statistics with its bootstrap interval; each is resampled among its own units.

    Args:
        parts: (statistic, number of units) as `bootstrap` takes them.
        seed: seeds the resampling.
        confidence: level of the interval.

    Returns:
        The mean and its interval. Both ends are NaN if the resamples do not differ.
    """
    value = float(np.mean([statistic(np.arange(units)) for statistic, units in parts]))
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [[statistic(generator.integers(units, size=units)) for _ in range(RESAMPLES)] for statistic, units in parts]
    ).mean(axis=0)
    return _between(value, drawn, confidence) if np.ptp(drawn) else Estimate(value, math.nan, math.nan)


def length_controlled(
    outcomes: Sequence[float], length_differences: Sequence[float], *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Return the expected win rate at equal length of both responses.

    A logistic model predicts each outcome from a constant and tanh(length difference / its standard deviation), after
    AlpacaEval (arXiv 2404.04475). The rate is the prediction with the length term at 0. Differs from the paper:
    AlpacaEval's third term, the difficulty of each instruction, needs all models of its leaderboard and is left out.

    The interval is a bootstrap interval over instructions. If all outcomes are equal, all resamples are equal too, so
    the interval is Wilson's.

    Args:
        outcomes: one for each instruction: 1 won, ½ tied, 0 lost.
        length_differences: characters of the model's response minus those of the opponent's.
        seed: seeds the resampling.
        confidence: level of the interval.

    Returns:
        The rate and its interval. Both ends are NaN for one instruction.
    """
    won = np.asarray(outcomes, dtype=np.float64)
    lengths = np.asarray(length_differences, dtype=np.float64)
    spread = float(lengths.std())
    feature = np.tanh(lengths / spread) if spread else np.zeros_like(lengths)
    terms = np.column_stack([np.ones(len(won)), feature])
    rate = float(special.expit(_fit_logistic(won, terms, np.ones((1, len(won))))[0, 0]))
    return _at_zero(rate, won, terms, np.ones(len(won)), seed, confidence)


def style_controlled(
    outcomes: ArrayLike,
    weights: ArrayLike,
    differences: ArrayLike,
    *,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[Estimate, list[float]]:
    """Return the expected win rate where both responses have the same style, and the effect of each feature.

    A Bradley-Terry model with features of style, after Arena-Hard-Auto v2.0: the log-odds of a win are
    a + Σ_k c_k d_k / s_k, where d_k is the difference of the responses in feature k, s_k its standard deviation over
    the instructions, and a the strength of the model minus that of its opponent. Each instruction counts by its weight
    in the likelihood, to which `RIDGE` times the squared coefficients is a penalty. The rate is the prediction σ(a).

    Differs from Arena-Hard-Auto: it fits all models of its leaderboard at once and centres d_k over their answers, so
    that its rates are at their mean style. Here is one model, whose own mean would be taken off, and with it the style
    that is to be controlled; so d_k is not centred, and the rates are at equal style. Its fit has no penalty.

    The interval is a bootstrap interval over instructions; Wilson's if all outcomes are equal, as in
    `length_controlled`.

    Args:
        outcomes: one for each instruction, between 0 (lost) and 1 (won).
        weights: weight of each instruction.
        differences: d, shape (instructions, features).
        seed: seeds the resampling.
        confidence: level of the interval.

    Returns:
        The rate with its interval, whose ends are NaN for one instruction, and c. The effect of a feature that never
        differs in its value is 0.
    """
    won, counted = np.asarray(outcomes, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    given = np.asarray(differences, dtype=np.float64)
    spread = given.std(axis=0)
    scaled = np.divide(given, spread, out=np.zeros_like(given), where=spread > 0)
    terms = np.column_stack([np.ones(len(won)), scaled])
    [fitted] = _fit_logistic(won, terms, counted[None])
    rate = float(special.expit(fitted[0]))
    return _at_zero(rate, won, terms, counted, seed, confidence), fitted[1:].tolist()


def _at_zero(value: float, won: Floats, terms: Floats, weights: Floats, seed: int, confidence: float) -> Estimate:
    """Return a logistic model's prediction where all terms but the constant are 0, with its interval."""
    if len(won) < 2:
        return Estimate(value, math.nan, math.nan)
    if not np.ptp(won):
        same = wilson(float(won.sum()), len(won), confidence)
        return Estimate(value, same.low, same.high)
    drawn = np.array([np.bincount(units, minlength=len(won)) for units in _draws(len(won), seed)], dtype=np.float64)
    return _between(value, special.expit(_fit_logistic(won, terms, drawn * weights)[:, 0]), confidence)


def _fit_logistic(won: Floats, terms: Floats, counts: Floats) -> Floats:
    """Return the coefficients of a penalised logistic model for each resample, shape (resamples, terms).

    The model is fitted by Newton's method with steps of bounded length.

    Args:
        won: outcomes, shape (instructions,).
        terms: the terms of the model, shape (instructions, terms).
        counts: how much each resample has of each instruction, shape (resamples, instructions).
    """
    size = terms.shape[1]
    products = (terms[:, :, None] * terms[:, None, :]).reshape(len(won), size * size)
    coefficients = np.zeros((len(counts), size))
    for _ in range(NEWTON_STEPS):
        chance = special.expit(coefficients @ terms.T)
        slope = (counts * (chance - won)) @ terms + 2 * RIDGE * coefficients
        curve = ((counts * chance * (1 - chance)) @ products).reshape(-1, size, size) + 2 * RIDGE * np.eye(size)
        step = np.linalg.solve(curve, slope[:, :, None])[:, :, 0]
        size_of_step = np.linalg.norm(step, axis=1, keepdims=True)
        coefficients -= step * np.minimum(1, 1 / np.maximum(size_of_step, 1e-12))
        if size_of_step.max() < CONVERGED:
            break
    return coefficients


def _draws(units: int, seed: int) -> Iterator[NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    return (draw.integers(units, size=units) for _ in range(RESAMPLES))


def _between(value: float, drawn: Floats, confidence: float) -> Estimate:
    """Return a value with the percentile interval of its resamples; both ends are NaN if fewer than half are finite."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < len(drawn) / 2:
        return Estimate(value, math.nan, math.nan)
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(value, float(low), float(high))


def correlation(first: ArrayLike, second: ArrayLike, kind: str = "pearson") -> float | None:
    """Return Pearson's, Spearman's or Kendall's (τ-b) correlation; None if a side is constant or has one value."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return None
    if kind == "kendall":
        return float(stats.kendalltau(x, y).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "spearman":
        x, y = _midranks(x), _midranks(y)
    # scipy's functions take ten times as long, and a bootstrap calls this a thousand times.
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def _midranks(values: Floats) -> Floats:
    """Return each value's rank, from 1. Equal values have the mean of their ranks."""
    order = np.sort(values)
    return (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") + 1) / 2


def entropy(values: Iterable[float], digits: int = 3) -> float:
    """Return the entropy (nats) of the frequencies of the values, rounded to `digits`."""
    counts = Counter(round(value, digits) for value in values)
    total = counts.total()
    return math.fsum(n / total * math.log(total / n) for n in counts.values())


def distinct(texts: Sequence[Sequence[str]], size: int) -> float | None:
    """Return distinct-n (Li et al. 2016): distinct over all word n-grams of the texts; None without n-grams."""
    grams = [gram for words in texts for gram in _grams(words, size)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: Sequence[Sequence[str]], size: int) -> float | None:
    """Return the share of n-grams that occur earlier in the same text, over all texts; None without n-grams."""
    counts = [(len(grams), len(set(grams))) for words in texts for grams in [_grams(words, size)]]
    total = sum(many for many, _ in counts)
    return 1 - sum(different for _, different in counts) / total if total else None


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False))
