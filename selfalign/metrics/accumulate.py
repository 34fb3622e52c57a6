"""Metrics as sums. The sums over parts of a step, or of the data, add up to exactly those of the whole."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self


class Statistic(ABC):
    """A statistic over units, stored as sums over them."""

    __slots__ = ()

    @property
    @abstractmethod
    def value(self) -> float | None:
        """The value of the statistic; None if it is undefined."""

    def __add__(self, other: Self) -> Self:
        """Return the statistic over the units of both."""
        names = [field.name for field in fields(self)]  # pyright: ignore[reportArgumentType]
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class Mean(Statistic):
    """A mean: the weighted sum of a quantity, and the sum of the weights."""

    total: float
    weight: float

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


@dataclass(frozen=True, slots=True)
class Moments(Statistic):
    """First and second moments of a quantity: the number of units, Σx and Σx². The value is the mean."""

    count: float
    total: float
    squares: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum one value for each unit."""
        return cls(float(len(values)), math.fsum(values), math.fsum(value * value for value in values))

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def variance(self) -> float:
        """The variance, with n in the denominator. There must be a unit."""
        return self.mean_square - (self.total / self.count) ** 2

    @property
    def mean_square(self) -> float:
        """The mean of x². There must be a unit."""
        return self.squares / self.count


@dataclass(frozen=True, slots=True)
class Difference(Statistic):
    """The mean over one group of units minus that over another; undefined if one of them is empty."""

    one: Moments
    other: Moments

    @property
    def value(self) -> float | None:
        one, other = self.one.value, self.other.value
        return None if one is None or other is None else one - other


@dataclass(frozen=True, slots=True)
class Deviation(Statistic):
    """A standard deviation, with n in the denominator."""

    of: Moments

    @property
    def value(self) -> float | None:
        return math.sqrt(max(0.0, self.of.variance)) if self.of.count else None


@dataclass(frozen=True, slots=True)
class Correlation(Statistic):
    """Pearson's correlation of two quantities; undefined if one of them is constant."""

    x: Moments
    y: Moments
    products: float

    @classmethod
    def between(cls, x: Sequence[float], y: Sequence[float]) -> Self:
        """Sum one pair of values for each unit."""
        return cls(Moments.of(x), Moments.of(y), math.fsum(a * b for a, b in zip(x, y, strict=True)))

    @property
    def value(self) -> float | None:
        x, y = self.x, self.y
        if not x.count or any(of.variance <= 1e-12 * of.mean_square for of in (x, y)):
            return None
        covariance = self.products / x.count - (x.total / x.count) * (y.total / y.count)
        return min(1.0, max(-1.0, covariance / math.sqrt(x.variance * y.variance)))


Sums = dict[str, Statistic]
"""{metric: its sums}."""


def add_sums(metrics: Sums, others: Sums) -> Sums:
    """Return the sums over the units of both."""
    return metrics | {name: metrics[name] + other if name in metrics else other for name, other in others.items()}


def averages(metrics: Sums) -> dict[str, float]:
    """Return the values of the metrics. An undefined one is left out instead of being NaN."""
    return {name: value for name, sums in metrics.items() if (value := sums.value) is not None}
