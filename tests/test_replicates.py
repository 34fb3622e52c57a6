"""Means over seeds and effects against scipy, brute force, and simulated studies whose truth is known."""

import math
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from mutation import assert_caught
from numpy.typing import NDArray
from scipy import optimize, stats

from selfalign.metrics import replicates
from selfalign.metrics.intervals import Estimate, bootstrap_mean
from selfalign.metrics.replicates import (
    crossed_mean,
    effect,
    holm,
    in_common,
    mean_of_estimates,
    over_seeds,
    simple_mean,
    two_sided_sign_test,
)

Floats = NDArray[np.float64]
Study = Callable[[np.random.Generator], Floats]

STUDIES = 500


def units_of(values: Sequence[float] | Floats, first: int = 0) -> dict[str, float]:
    """{instruction: value} of instructions with numbers from `first`."""
    return {f"q{number}": float(value) for number, value in enumerate(values, start=first)}


def ends_of(found: Estimate) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def drawn(seed: int, seeds: int, units: int, spreads: tuple[float, float, float]) -> Floats:
    """Values of the model y = a + b + e with these standard deviations."""
    draw = np.random.default_rng(seed)
    a, b, e = spreads
    crossed = a * draw.normal(size=(seeds, 1)) + b * draw.normal(size=(1, units))
    return crossed + e * draw.normal(size=(seeds, units))


# --- means over seeds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spreads", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (2.0, 0.7, 0.5)])
def test_variance_of_the_mean_is_that_of_restricted_maximum_likelihood(spreads: tuple[float, float, float]) -> None:
    """The likelihood is written with the whole covariance matrix, and maximised numerically."""
    table = drawn(4, 4, 12, spreads)
    seeds, units = table.shape
    y, ones = table.ravel(), np.ones(table.size)
    same_seed = np.kron(np.eye(seeds), np.ones((units, units)))
    same_unit = np.kron(np.ones((seeds, seeds)), np.eye(units))

    def parts(logs: Floats) -> tuple[Floats, float, float]:
        a, b, e = np.exp(logs)
        inverse = np.linalg.inv(a * same_seed + b * same_unit + e * np.eye(table.size))
        weight = ones @ inverse @ ones
        return inverse, float(weight), float(ones @ inverse @ y / weight)

    def minus_likelihood(logs: Floats) -> float:
        inverse, weight, mean = parts(logs)
        left = y - mean
        return float(-np.linalg.slogdet(inverse)[1] + math.log(weight) + left @ inverse @ left)

    best = optimize.minimize(
        minus_likelihood, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9}
    )
    _, weight, mean = parts(best.x)
    ours = crossed_mean(table)
    assert ours.value == pytest.approx(mean)
    assert ours.variance == pytest.approx(1 / weight, rel=1e-3)


def test_freedom_is_satterthwaites_of_the_mean_squares() -> None:
    table = drawn(1, 3, 10, (2.0, 2.0, 1.0))
    mean = sum(table[s, i] for s, i in product(range(3), range(10))) / 30
    by_seed = sum(10 * (sum(table[s]) / 10 - mean) ** 2 for s in range(3)) / 2
    by_unit = sum(3 * (sum(table[:, i]) / 3 - mean) ** 2 for i in range(10)) / 9
    whole = sum((table[s, i] - mean) ** 2 for s, i in product(range(3), range(10)))
    rest = (whole - 2 * by_seed - 9 * by_unit) / 18
    assert min(by_seed, by_unit) > rest
    found = crossed_mean(table)
    assert found.variance == pytest.approx((by_seed + by_unit - rest) / 30)
    assert found.freedom == pytest.approx(
        (by_seed + by_unit - rest) ** 2 / (by_seed**2 / 2 + by_unit**2 / 9 + rest**2 / 18)
    )
    half = stats.t.ppf(0.975, found.freedom) * math.sqrt(found.variance)
    interval = found.interval()
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half))


def test_seeds_that_differ_less_than_by_chance_count_as_equal() -> None:
    row = np.arange(10.0)
    table = np.stack([row, row, row]) + np.tile([[1, -1], [-1, 1], [0, 0]], 5)
    found = crossed_mean(table)
    assert found.variance == pytest.approx(np.var(table.mean(axis=0), ddof=1) / 10)
    assert found.freedom == pytest.approx(9)


def test_seeds_that_do_not_differ_leave_the_interval_of_their_instructions() -> None:
    row = np.random.default_rng(0).normal(size=20)
    found = crossed_mean(np.stack([row, row, row])).interval()
    theirs = stats.ttest_1samp(row, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


def test_seeds_with_instructions_of_their_own_count_by_their_means() -> None:
    table = drawn(2, 4, 6, (1.0, 1.0, 1.0))
    seeds = [units_of(row, first=100 * number) for number, row in enumerate(table)]
    found, theirs = over_seeds(seeds).interval(), stats.ttest_1samp(table.mean(axis=1), 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert over_seeds([units_of(row) for row in table]).variance == crossed_mean(table).variance


def test_instructions_that_a_seed_lacks_are_left_out_of_the_crossed_table() -> None:
    table = drawn(3, 3, 10, (1.0, 1.0, 1.0))
    seeds = [units_of(row) for row in table]
    del seeds[1]["q4"]
    assert over_seeds(seeds).variance == pytest.approx(crossed_mean(np.delete(table, 4, axis=1)).variance)


def test_too_few_common_instructions_are_none() -> None:
    a, b = units_of(range(10)), units_of(range(10), first=5)
    assert in_common([a, b]) == ["q5", "q6", "q7", "q8", "q9"]
    assert in_common([a, units_of(range(10), first=6)]) == []
    assert in_common([units_of([1]), units_of([1])]) == []


def test_nothing_that_varies_has_no_interval() -> None:
    same = crossed_mean(np.full((3, 4), 0.5))
    assert same.value == 0.5
    assert [math.isnan(value) for value in (same.interval().low, same.p_value())] == [True, True]


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, 0.74, 0.9, -1e-9, 1e9])
def test_rounding_is_no_variance(value: float) -> None:
    """The mean of three times 0.7 is 0.6999999999999998 in floating point, so that each differs from it."""
    found = [simple_mean([value] * seeds) for seeds in (2, 3, 5, 7)]
    found += [crossed_mean(np.full((seeds, 24), value)) for seeds in (2, 3, 5, 7)]
    found.append(mean_of_estimates([Estimate(value, math.nan, math.nan)] * 3))
    for mean in found:
        assert (mean.value, mean.variance) == (value, 0.0)
        assert math.isnan(mean.interval().low)
        assert math.isnan(mean.p_value())


def test_instruction_on_which_seeds_cancel_out_is_a_tie() -> None:
    """0.3 - 0.2 is a little less than 0.2 - 0.1 in floating point."""
    first = {0: {"a": 0.3, "b": 0.9}, 1: {"a": 0.1, "b": 0.9}}
    second = {0: {"a": 0.2, "b": 0.1}, 1: {"a": 0.2, "b": 0.2}}
    found = effect(first, second)
    assert (found.higher, found.lower) == (1, 0)


def test_welch_takes_a_side_that_does_not_vary() -> None:
    """Its variance is 0, so that the degrees of freedom are the other side's."""
    wins, mixed = units_of([1.0] * 20), units_of([0.0, 1.0, 1.0, 0.5] * 5, first=100)
    found = effect({0: wins}, {1: mixed})
    error = float(np.std([*mixed.values()], ddof=1)) / math.sqrt(20)
    half = float(stats.t.ppf(0.975, 19)) * error
    assert not found.paired
    assert found.p == pytest.approx(2 * stats.t.sf(0.375 / error, 19))
    assert ends_of(found.difference) == pytest.approx((0.375, 0.375 - half, 0.375 + half))


def test_mean_of_intervals_adds_the_seeds_and_what_they_may_share() -> None:
    values = [0.4, 0.5, 0.9]
    found = mean_of_estimates([Estimate(value, value - 0.2, value + 0.2) for value in values])
    between, within = np.var(values, ddof=1) / 3, (0.2 / stats.norm.ppf(0.975)) ** 2
    assert found.variance == pytest.approx(between + within)
    assert found.freedom == pytest.approx((between + within) ** 2 / (between**2 / 2))
    alone = mean_of_estimates([Estimate(value, math.nan, math.nan) for value in values])
    assert (alone.variance, alone.freedom) == pytest.approx((between, 2))
    equal = mean_of_estimates([Estimate(0.5, 0.4, 0.6)] * 3).interval()
    assert (equal.low, equal.high) == pytest.approx((0.4, 0.6))


# --- coverage ----------------------------------------------------------------------------------------------------


def coverage(study: Study, truth: float, interval: Callable[[Floats], Estimate]) -> float:
    draw = np.random.default_rng(7)
    found = [interval(study(draw)) for _ in range(STUDIES)]
    return sum(one.low <= truth <= one.high for one in found) / STUDIES


def of_model(seeds: int, units: int, a: float, b: float) -> Study:
    return lambda draw: (
        a * draw.normal(size=(seeds, 1)) + b * draw.normal(size=(1, units)) + 0.4 * draw.normal(size=(seeds, units))
    )


def of_wins(seeds: int, units: int, a: float, b: float, ties: float) -> Study:
    """Wins, ties and losses, whose mean over seeds and instructions is a half."""

    def study(draw: np.random.Generator) -> Floats:
        chance = 0.5 + a * draw.uniform(-1, 1, size=(seeds, 1)) + b * draw.uniform(-1, 1, size=(1, units))
        won = (draw.uniform(size=(seeds, units)) < chance).astype(float)
        return np.where(draw.uniform(size=(seeds, units)) < ties, 0.5, won)

    return study


LEAST, MOST = 0.92, 0.985
"""Bounds of the measured coverage of 500 studies, whose own standard error is 0.01."""


@pytest.mark.parametrize(
    "study",
    [
        of_model(3, 24, 0.0, 0.2),
        of_model(3, 24, 0.1, 0.2),
        of_model(3, 100, 0.06, 0.2),
        of_model(5, 24, 0.3, 0.2),
        of_wins(3, 24, 0.1, 0.3, 0.3),
        of_wins(3, 100, 0.15, 0.2, 0.6),
        of_wins(5, 48, 0.05, 0.3, 0.0),
    ],
)
def test_interval_of_few_seeds_covers_the_mean_of_all(study: Study) -> None:
    truth = float(study(np.random.default_rng(0)).mean() > 0.2) * 0.5
    assert LEAST <= coverage(study, truth, lambda table: crossed_mean(table).interval()) <= MOST


def both_resampled(table: Floats) -> Estimate:
    """The percentile interval of a bootstrap that draws seeds and instructions (Owen 2007)."""
    draw, (seeds, units) = np.random.default_rng(0), table.shape
    by_seed, by_unit = (draw.multinomial(n, [1 / n] * n, size=200) / n for n in (seeds, units))
    low, high = np.quantile(np.einsum("rs,si,ri->r", by_seed, table, by_unit), [0.025, 0.975])
    return Estimate(float(table.mean()), float(low), float(high))


def test_bootstrap_of_three_seeds_is_too_narrow_where_they_differ() -> None:
    assert coverage(of_model(3, 100, 0.3, 0.2), 0.0, both_resampled) < 0.85


def test_instructions_alone_do_not_cover_the_mean_of_all_seeds() -> None:
    """Neither do seeds alone: this is why the model has both."""
    only = coverage(of_model(3, 100, 0.1, 0.2), 0.0, lambda table: simple_mean(table.mean(axis=0).tolist()).interval())
    seeds = coverage(of_model(5, 24, 0.0, 0.4), 0.0, lambda table: simple_mean(table.mean(axis=1).tolist()).interval())
    assert only < 0.75
    assert seeds < 0.85


def test_paired_effect_covers_the_true_difference() -> None:
    """Both sides share what the instruction and the seed do; the second is better by 0.1 on the average."""

    def study(draw: np.random.Generator, seeds: int) -> Estimate:
        shared = draw.normal(size=(seeds, 1)) + draw.normal(size=(1, 40))
        sides = [
            shared + 0.05 * draw.normal(size=(seeds, 1)) + 0.3 * draw.normal(size=(seeds, 40)) + more
            for more in (0, 0.1)
        ]
        first, second = ({s: units_of(row) for s, row in enumerate(side)} for side in sides)
        return effect(first, second).difference

    draw = np.random.default_rng(1)
    found = [study(draw, 3) for _ in range(STUDIES)]
    assert LEAST <= sum(one.low <= -0.1 <= one.high for one in found) / STUDIES <= MOST


# --- effects -----------------------------------------------------------------------------------------------------


def test_one_seed_is_compared_by_paired_bootstrap_and_exact_sign_test() -> None:
    first, second = [1, 0.5, 1, 1, 0, 1, 1, 0.5], [0, 0.5, 0.5, 0, 1, 0, 0.5, 0.5]
    found = effect({1: units_of(first)}, {2: units_of(second)})
    differences = [a - b for a, b in zip(first, second, strict=True)]
    assert found.difference == bootstrap_mean(differences)
    assert (found.higher, found.lower, found.units, found.seeds, found.paired) == (5, 1, 8, 1, True)
    assert found.p == found.sign_p == pytest.approx(stats.binomtest(5, 6).pvalue)


def test_pairs_are_of_one_seed_and_one_instruction() -> None:
    table, other = drawn(5, 3, 20, (1.0, 1.0, 0.2)), drawn(6, 3, 20, (0.0, 0.0, 0.2))
    first = {seed: units_of(row) for seed, row in zip((1, 2, 3), table, strict=True)}
    second = {seed: units_of(row) for seed, row in zip((3, 1, 2), (table + other)[[2, 0, 1]], strict=True)}
    found, mean = effect(first, second), crossed_mean(-other)
    assert ends_of(found.difference) == pytest.approx(ends_of(mean.interval()))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean.value) / math.sqrt(mean.variance), mean.freedom))
    higher = int(sum(-other.mean(axis=0) > 0))
    assert (found.higher, found.lower, found.seeds) == (higher, 20 - higher, 3)
    assert found.sign_p == pytest.approx(stats.binomtest(higher, 20).pvalue)
    back = effect(second, first)
    assert (back.p, back.difference.low) == pytest.approx((found.p, -found.difference.high))


def test_other_instructions_are_compared_by_welchs_test() -> None:
    first, second = np.random.default_rng(0).normal(size=12), np.random.default_rng(1).normal(1.0, 2.0, size=30)
    found = effect({1: units_of(first)}, {1: units_of(second, first=50)})
    theirs: Any = stats.ttest_ind(first, second, equal_var=False)
    ends = theirs.confidence_interval()
    assert found.p == pytest.approx(theirs.pvalue)
    assert ends_of(found.difference) == pytest.approx((first.mean() - second.mean(), ends.low, ends.high))
    assert (found.paired, found.units, math.isnan(found.sign_p)) == (False, 12, True)


def test_seeds_that_only_one_side_has_are_left_out_of_the_pairs() -> None:
    rows = [units_of(row) for row in drawn(9, 4, 12, (1.0, 1.0, 1.0))]
    found = effect({1: rows[0], 2: rows[1], 3: rows[2]}, {2: rows[3], 3: rows[0], 4: rows[1]})
    assert (found.paired, found.seeds) == (True, 2)
    apart = effect({1: rows[0], 2: rows[1]}, {3: rows[2], 4: rows[3]})
    assert (apart.paired, apart.seeds) == (False, 2)


def test_differences_that_are_all_equal_have_no_interval() -> None:
    none = effect({1: units_of([0.5] * 9)}, {1: units_of([0.5] * 9)})
    assert (none.difference.value, math.isnan(none.difference.low), none.p) == (0.0, True, 1.0)
    every = effect({1: units_of([1.0] * 9), 2: units_of([1.0] * 9)}, {1: units_of([0.0] * 9), 2: units_of([0.0] * 9)})
    assert (every.difference.value, math.isnan(every.difference.low), every.p) == (1.0, True, 2 / 2**9)


def test_sign_test_is_scipys() -> None:
    for higher, lower in product(range(9), range(9)):
        expected = stats.binomtest(higher, higher + lower).pvalue if higher + lower else 1.0
        assert two_sided_sign_test(higher, lower) == pytest.approx(expected)


def test_holms_correction_rejects_as_its_steps_do() -> None:
    """By the procedure: the k-th smallest of m is rejected at α if it and all before are at most α/(m − k + 1)."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        given = (draw.uniform(size=6) ** 3).tolist()
        corrected = holm(given)
        for level in (0.01, 0.05, 0.2, 0.7):
            rejected = set()
            for step, place in enumerate(sorted(range(6), key=given.__getitem__)):
                if given[place] > level / (6 - step):
                    break
                rejected.add(place)
            assert {place for place, p in enumerate(corrected) if p <= level} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02, math.nan])[0] == 0.02
    assert math.isnan(holm([0.02, math.nan])[1])
    assert holm([]) == []


# --- broken on purpose -------------------------------------------------------------------------------------------

MUTANTS: dict[Callable[..., None], list[tuple[str, str]]] = {
    test_freedom_is_satterthwaites_of_the_mean_squares: [
        ("(rest * (1 - len(counted)), left)", "(rest, left)"),
        ("left = (seeds - 1) * (units - 1)", "left = seeds * units - 1"),
        ("(by_seed, seeds - 1), (by_unit, units - 1)", "(by_seed, units - 1), (by_unit, seeds - 1)"),
    ],
    test_seeds_that_differ_less_than_by_chance_count_as_equal: [("if square > rest]", "]")],
    test_one_seed_is_compared_by_paired_bootstrap_and_exact_sign_test: [
        ("sum(value < 0 for value in means)", "sum(value <= 0 for value in means)"),
        ("if not shared and len(first) == len(second) == 1:", "if False:"),
    ],
    test_pairs_are_of_one_seed_and_one_instruction: [
        ("[(first[seed], second[seed]) for seed in shared]", "[*zip(first.values(), second.values(), strict=True)]"),
    ],
    test_differences_that_are_all_equal_have_no_interval: [
        ("if varies else Estimate(means[0], math.nan, math.nan)", ""),
        ("p = sign_p if math.isnan(p) else p", "pass"),
    ],
    test_holms_correction_rejects_as_its_steps_do: [
        ("least = max(least, min(1.0", "least = max(0.0, min(1.0"),
        ("(len(order) - rank)", "len(order)"),
    ],
}
CASES = [(check, *mutant) for check, mutants in MUTANTS.items() for mutant in mutants]


@pytest.mark.parametrize(("check", "old", "new"), CASES, ids=[f"{old} -> {new}" for _, old, new in CASES])
def test_mutant_is_caught(check: Callable[..., None], old: str, new: str) -> None:
    given: dict[str, Any] = {}
    assert_caught(replicates, sys.modules[__name__], old, new, check, given)
