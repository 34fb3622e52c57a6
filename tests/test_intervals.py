"""Each statistic against scipy, a case worked by hand, or a simulation with a planted effect."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import optimize, special, stats

from selfalign.metrics.intervals import (
    RIDGE,
    Estimate,
    bootstrap,
    bootstrap_average,
    bootstrap_correlation,
    bootstrap_mean,
    correlation,
    distinct,
    length_controlled,
    repetition,
    sign_test,
    style_controlled,
    wilson,
)


@pytest.mark.parametrize(
    ("won", "total"), [(0, 1), (1, 1), (0, 24), (24, 24), (7, 24), (50, 256), (805, 805), (3, 1000)]
)
def test_wilsons_interval_is_scipys(won: int, total: int) -> None:
    ours = wilson(won, total)
    theirs = stats.binomtest(won, total).proportion_ci(method="wilson")
    assert ours.value == won / total
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_bootstrap_interval_of_a_correlation_is_scipys(kind: str) -> None:
    draw = np.random.default_rng(3)
    x = draw.normal(size=80)
    y = x + draw.normal(size=80)
    function = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[kind]
    ours = bootstrap_correlation(x.tolist(), y.tolist(), kind)
    theirs = stats.bootstrap(
        (x, y), lambda a, b: function(a, b).statistic, paired=True, vectorized=False, method="percentile", rng=0,
        n_resamples=1000,
    ).confidence_interval  # fmt: skip
    assert ours.value == pytest.approx(function(x, y).statistic)
    # The pairs are drawn together; drawn apart, the interval would lie around 0.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=(theirs.high - theirs.low) / 6)


def test_correlation_that_is_not_defined_is_no_number() -> None:
    undefined = bootstrap_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "pearson")
    assert [math.isnan(v) for v in (undefined.value, undefined.low, undefined.high)] == [True] * 3
    # One value that differs is left out by a third of the draws, which define no correlation.
    rare = bootstrap_correlation([0.0] * 9 + [1.0], [float(n) for n in range(10)], "pearson")
    assert rare.low <= rare.value <= rare.high


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 8), (8, 0), (50, 104), (76, 77), (1, 11)])
def test_sign_test_is_scipys_exact_binomial_one(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses, alternative="less").pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_bootstrap_interval_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    ours = bootstrap_mean(values.tolist())
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0, n_resamples=20_000).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    # The Monte Carlo error of an end with 1,000 resamples is well below a tenth of the interval.
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=width / 10)


def test_bootstrap_covers_at_its_nominal_rate() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for number in range(200):
        found = bootstrap_mean((draw.random(40) < 0.3).astype(float).tolist(), seed=number)
        hits += found.low <= 0.3 <= found.high
    # 95 % nominal; percentile intervals of 40 units cover a little less, and 200 trials have a spread of 1.5 %.
    assert 0.88 <= hits / 200 <= 0.99


def test_wilson_covers_at_its_nominal_rate() -> None:
    draw = np.random.default_rng(0)
    found = [wilson(int(draw.binomial(40, 0.3)), 40) for _ in range(2000)]
    assert 0.93 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.97


def test_draws_that_define_nothing_are_left_out_and_too_many_of_them_leave_no_interval() -> None:
    values = np.array([math.nan, 1.0, 2.0, 3.0])

    def mean(units: np.ndarray) -> float:
        return float(np.nanmean(values[units])) if np.isfinite(values[units]).any() else math.nan

    some = bootstrap(mean, 4)
    assert some.value == 2
    assert 1 <= some.low < some.high <= 3
    none = bootstrap(lambda units: math.nan if len(set(units.tolist())) < 4 else 1.0, 4)
    assert none.value == 1
    assert math.isnan(none.low)
    assert math.isnan(none.high)


def test_one_unit_has_no_interval() -> None:
    found = bootstrap_mean([0.25])
    assert found.value == 0.25
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_an_estimate_is_named_with_the_ends_of_its_interval() -> None:
    assert Estimate(0.5, 0.25, 1.0).named("x") == {"x": 0.5, "x_low": 0.25, "x_high": 1.0}


def test_wilson_at_another_confidence_and_with_half_wins() -> None:
    interval = stats.binomtest(30, 80).proportion_ci(confidence_level=0.99, method="wilson")
    assert wilson(30, 80, 0.99).low == pytest.approx(interval.low)
    assert wilson(30, 80, 0.99).high == pytest.approx(interval.high)
    between = wilson(7.5, 24)
    assert wilson(7, 24).low < between.low < wilson(8, 24).low
    assert between.value == 7.5 / 24


def plant(model: float, length: float, *, longer: float = 0.0, count: int = 400, seed: int = 0):
    """Outcomes of a judge with this much taste for the model and for length, in logits, ties aside."""
    draw = np.random.default_rng(seed)
    difference = draw.normal(longer, 100, size=count)
    chance = special.expit(model + length * np.tanh(difference / difference.std()))
    return (draw.random(count) < chance).astype(float).tolist(), difference.tolist()


def test_a_model_that_only_writes_longer_wins_half_when_length_is_controlled() -> None:
    outcomes, lengths = plant(0.0, 2.0, longer=120)
    assert np.mean(outcomes) > 0.7
    controlled = length_controlled(outcomes, lengths)
    assert controlled.value == pytest.approx(0.5, abs=0.08)
    assert controlled.low < 0.5 < controlled.high


def test_a_planted_advantage_is_found_behind_longer_and_behind_shorter_answers() -> None:
    for longer in (-120, 120):
        outcomes, lengths = plant(1.0, 2.0, longer=longer)
        assert length_controlled(outcomes, lengths).value == pytest.approx(special.expit(1.0), abs=0.08)


@pytest.mark.parametrize("count", [6, 40])
def test_length_controlled_model_is_the_penalised_maximum(count: int) -> None:
    outcomes, lengths = plant(0.7, 1.5, count=count, longer=30)
    feature = np.tanh(np.array(lengths) / np.std(lengths))

    def loss(coefficients: np.ndarray) -> float:
        logits = coefficients[0] + coefficients[1] * feature
        return np.logaddexp(0, logits).sum() - np.array(outcomes) @ logits + RIDGE * coefficients @ coefficients

    best = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}).x[0]
    assert length_controlled(outcomes, lengths).value == pytest.approx(special.expit(best), abs=1e-5)


def test_length_controlled_intervals_cover_at_their_nominal_rate() -> None:
    hits = 0
    for number in range(40):
        outcomes, lengths = plant(0.5, 1.0, longer=60, count=150, seed=number)
        found = length_controlled(outcomes, lengths, seed=number)
        hits += found.low <= special.expit(0.5) <= found.high
    assert 0.85 <= hits / 40 <= 1.0


@pytest.mark.parametrize(
    ("outcomes", "lengths", "rate"),
    [
        ([0.5, 0.5, 0.5, 0.5], [3.0, -1.0, 7.0, 2.0], 0.5),
        ([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], 0.75),
        ([1.0, 1.0, 1.0], [10.0, -10.0, 0.0], None),
        ([1.0, 0.0, 1.0, 0.0], [50.0, -50.0, 60.0, -60.0], 0.5),
    ],
    ids=["all_ties", "equal_lengths", "all_won", "length_decides_all"],
)
def test_length_controlled_win_rate_stays_finite(outcomes: list, lengths: list, rate: float | None) -> None:
    found = length_controlled(outcomes, lengths)
    assert all(0 <= end <= 1 for end in (found.value, found.low, found.high))
    if rate is None:
        assert found.value > 0.5
    else:
        assert found.value == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize(("outcome", "ends"), [(1.0, (0.862, 1.0)), (0.5, (0.314, 0.686)), (0.0, (0.0, 0.138))])
def test_equal_outcomes_have_wilsons_interval_at_equal_length_too(outcome: float, ends: tuple[float, float]) -> None:
    """24 of 24 won are no more certain at equal length than Wilson has them; every draw of a bootstrap is the same."""
    lengths = np.random.default_rng(0).normal(0, 100, size=24).tolist()
    found, plain = length_controlled([outcome] * 24, lengths), wilson(24 * outcome, 24)
    assert (found.low, found.high) == (plain.low, plain.high) == pytest.approx(ends, abs=5e-4)
    assert found.low <= found.value <= found.high
    wider = length_controlled([outcome] * 24, lengths, confidence=0.99)
    assert wider.high - wider.low > found.high - found.low


def test_one_instruction_has_a_length_controlled_rate_and_no_interval() -> None:
    found = length_controlled([1.0], [40.0])
    assert found.value > 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize("kind", ["pearson", "spearman", "kendall"])
def test_correlations_are_scipys_and_none_where_one_side_is_constant(kind: str) -> None:
    first, second = [1.0, 2.0, 2.0, 5.0], [0.5, 0.1, 0.9, 0.9]
    theirs = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}[kind]
    assert correlation(first, second, kind) == pytest.approx(theirs(first, second).statistic)
    assert correlation([1.0, 1.0], [1.0, 2.0], kind) is None
    assert correlation([1.0, 2.0], [3.0, 3.0], kind) is None
    assert correlation([1.0], [2.0], kind) is None


def test_distinct_and_repeated_worked_by_hand() -> None:
    texts = [["a", "b", "a", "b"], ["a", "b"], []]
    # Words: a b a b a b. Two-word runs: ab ba ab | ab.
    assert distinct(texts, 1) == pytest.approx(2 / 6)
    assert distinct(texts, 2) == pytest.approx(2 / 4)
    # Within a text: of ab ba ab one repeats; the other text's ab does not count as repeated.
    assert repetition(texts, 2) == pytest.approx(1 / 4)
    assert distinct([["a"]], 2) is None
    assert repetition([], 1) is None


# --- style -------------------------------------------------------------------------------------------------------


def styled(model: float, tastes: Sequence[float], *, more: float = 0.0, count: int = 1500, seed: int = 0):
    """Outcomes of a judge with this much taste for the model and for features of style, in logits, and the features."""
    draw = np.random.default_rng(seed)
    differences = draw.normal(more, 0.5, size=(count, len(tastes)))
    chance = special.expit(model + differences / differences.std(axis=0) @ np.array(tastes))
    return (draw.random(count) < chance).astype(float), differences


def test_planted_effects_of_style_are_found_and_taken_off() -> None:
    outcomes, differences = styled(-0.6, (1.2, 0.0, -0.6, 0.4), more=0.5, count=3000, seed=2)
    assert outcomes.mean() > 0.5, "style wins against the better model"
    found, effects = style_controlled(outcomes, np.ones(len(outcomes)), differences)
    assert found.value == pytest.approx(special.expit(-0.6), abs=0.06)
    assert found.low < special.expit(-0.6) < found.high < 0.5
    assert effects == pytest.approx([1.2, 0.0, -0.6, 0.4], abs=0.2)


@pytest.mark.parametrize("features", [1, 4])
def test_style_controlled_model_is_the_weighted_penalised_maximum(features: int) -> None:
    outcomes, differences = styled(0.5, [0.7] * features, count=40)
    outcomes[:3], weights = 0.5, np.tile([1.0, 2.0, 6.0, 3.0], 10)
    terms = np.column_stack([np.ones(40), differences / differences.std(axis=0)])

    def loss(coefficients: np.ndarray) -> float:
        logits = terms @ coefficients
        return weights @ (np.logaddexp(0, logits) - outcomes * logits) + RIDGE * coefficients @ coefficients

    best = optimize.minimize(loss, np.zeros(1 + features), method="BFGS", options={"gtol": 1e-8}).x
    found, effects = style_controlled(outcomes, weights, differences)
    assert found.value == pytest.approx(special.expit(best[0]), abs=1e-5)
    assert effects == pytest.approx(best[1:], abs=1e-4)


def test_feature_that_never_differs_has_no_effect_and_changes_nothing() -> None:
    outcomes, differences = styled(0.3, (0.9,), count=60)
    weights = np.ones(60)
    alone, [effect] = style_controlled(outcomes, weights, differences)
    both, effects = style_controlled(outcomes, weights, np.column_stack([differences, np.zeros(60)]))
    assert effects == pytest.approx([effect, 0.0])
    assert both.value == pytest.approx(alone.value)


def test_style_of_one_instruction_or_of_one_outcome_has_the_interval_that_it_can_have() -> None:
    one, _ = style_controlled([1.0], [2.0], [[0.3]])
    assert np.isnan(one.low)
    assert np.isnan(one.high)
    all_won, _ = style_controlled([1.0] * 5, [1.0] * 5, [[0.1], [0.2], [-0.1], [0.0], [0.4]])
    assert (all_won.low, all_won.high) == (wilson(5, 5).low, wilson(5, 5).high)


def test_average_is_of_its_parts_whatever_their_size() -> None:
    many, few = np.array([1.0, 0.0] * 100), np.array([1.0, 1.0, 1.0, 0.0])
    found = bootstrap_average([(lambda at: many[at].mean(), 200), (lambda at: few[at].mean(), 4)])
    assert found.value == (0.5 + 0.75) / 2
    # The variance of the mean of both: a quarter of the sum of 0.25 / 200 and 0.1875 / 4.
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt((0.25 / 200 + 0.1875 / 4) / 4), rel=0.15)
    alike = bootstrap_average([(lambda at: 1.0, 9), (lambda at: 0.5, 9)])
    assert alike.value == 0.75
    assert np.isnan(alike.low)
