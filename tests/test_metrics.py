import ast
import math
from pathlib import Path

import numpy as np
import pytest
from builders import judgement
from declared import declaration
from scipy import stats

from selfalign.core.records import Judgement, JudgementStatus
from selfalign.metrics import catalog
from selfalign.metrics.accumulate import Correlation, Deviation, Mean, Moments, Sums, add_sums, averages
from selfalign.metrics.catalog import METRICS
from selfalign.metrics.intervals import length_controlled, wilson
from selfalign.metrics.rewards import (
    label_metrics,
    length_moments,
    logp_changes,
    reward_intervals,
    reward_metrics,
)
from selfalign.metrics.summaries import (
    instruction_statistics,
    judgement_statistics,
    outcomes_by_score,
    score_histogram,
    win_statistics,
)
from selfalign.report.html import Column

# --- shares and head to head -------------------------------------------------------------------------------------


def test_outcomes_are_of_what_both_answered() -> None:
    outcomes = outcomes_by_score({"a": 3, "b": 2, "c": 1, "d": 4, "x": 5}, {"a": 2, "b": 2, "c": 3, "d": 1, "y": 0})
    assert outcomes == {"a": 1.0, "b": 0.5, "c": 0.0, "d": 1.0}
    assert outcomes_by_score({"a": 1}, {"b": 1}) == {}


def test_win_statistics_by_hand() -> None:
    numbers = win_statistics([1.0, 0.5, 0.0, 1.0], [3.0, 0.0, -2.0, 1.0])
    assert (numbers["wins"], numbers["ties"], numbers["losses"]) == (2, 1, 1)
    interval, equal = wilson(2.5, 4), length_controlled([1.0, 0.5, 0.0, 1.0], [3.0, 0.0, -2.0, 1.0])
    assert numbers["win_rate"] == 0.625
    assert (numbers["win_rate_low"], numbers["win_rate_high"]) == (interval.low, interval.high)
    assert numbers["win_rate_length_controlled"] == equal.value
    assert numbers["win_rate_length_controlled_low"] == equal.low


def test_model_against_itself_ties_everywhere_at_one_half() -> None:
    numbers = win_statistics([0.5] * 9, [0.0] * 9)
    assert (numbers["wins"], numbers["ties"], numbers["losses"]) == (0, 9, 0)
    assert numbers["win_rate"] == 0.5
    assert numbers["win_rate_low"] < 0.5 < numbers["win_rate_high"]


def test_swapping_sides_mirrors_the_win_rate() -> None:
    there, back = win_statistics([1.0, 0.5, 1.0], [1.0, 2.0, 5.0]), win_statistics([0.0, 0.5, 0.0], [-1.0, -2.0, -5.0])
    assert there["win_rate"] + back["win_rate"] == pytest.approx(1)
    assert there["win_rate_low"] == pytest.approx(1 - back["win_rate_high"])
    assert there["win_rate_length_controlled"] + back["win_rate_length_controlled"] == pytest.approx(1)


def test_one_instruction_has_a_rate_but_no_interval_at_equal_length() -> None:
    numbers = win_statistics([1.0], [4.0])
    assert numbers["win_rate"] == 1.0
    assert all(math.isfinite(value) for value in numbers.values())
    assert "win_rate_length_controlled_low" not in numbers


def test_nothing_in_common_has_no_win_rate() -> None:
    assert win_statistics([], []) == {"wins": 0, "ties": 0, "losses": 0}


# --- scores ------------------------------------------------------------------------------------------------------


def failed(name: str, status: JudgementStatus = JudgementStatus.AMBIGUOUS) -> Judgement:
    return Judgement(id=f"{name}-9", response_id=name, status=status, score=None, text="", model="m")


def test_judgement_statistics_by_hand() -> None:
    records = [judgement("a", 1), judgement("b", 2), judgement("c", 6), failed("d")]
    numbers = judgement_statistics(records)
    assert numbers == {"judge/mean_score": pytest.approx(3.0), "judge/std_score": pytest.approx(math.sqrt(14 / 3))}


def test_entropy_is_averaged_where_there_is_one() -> None:
    def with_entropy(value: float) -> Judgement:
        ok = JudgementStatus.OK
        return Judgement(id="i", response_id="r", status=ok, score=1.0, text="", model="m", entropy=value)

    assert judgement_statistics([with_entropy(0.5), with_entropy(1.5)])["judge/token_entropy"] == 1.0


def test_no_valid_judgement_gives_no_statistics_and_no_nan() -> None:
    assert judgement_statistics([failed("a"), failed("b", JudgementStatus.NO_SCORE)]) == {}


def test_histogram_counts_rounded_scores() -> None:
    assert score_histogram([0, 0.4, 0.6, 4.51, 5, 5], 0, 5) == [2, 1, 0, 0, 0, 3]
    assert score_histogram([1.1, 1.2, 2.0], 1, 2, parts=4) == [1, 1, 0, 0, 1]
    assert score_histogram([], 1, 3) == [0, 0, 0]


# --- rewards -----------------------------------------------------------------------------------------------------


def rewards_of(chosen: list[float], rejected: list[float], deltas: list[float] | None = None) -> Sums:
    """Of responses of one token."""
    one = [1.0] * len(chosen)
    return reward_metrics(chosen, rejected, deltas, chosen_tokens=one, rejected_tokens=one)


def test_reward_metrics_by_hand() -> None:
    chosen, rejected, deltas = [1.0, -0.5, 2.0, 0.0], [0.5, 0.5, 2.0, -1.0], [0.2, -0.1, 0.0, 0.3]
    numbers = averages(
        reward_metrics(chosen, rejected, deltas, chosen_tokens=[2, 5, 4, 1], rejected_tokens=[1, 2, 8, 4])
    )
    assert numbers == {
        # 1/2 - 0.5/1 = 0, -0.5/5 - 0.5/2 = -0.35, 2/4 - 2/8 = 0.25, 0 + 1/4 = 0.25.
        "rewards/margins_per_token": pytest.approx(0.15 / 4),
        "rewards/chosen": pytest.approx(2.5 / 4),
        "rewards/rejected": pytest.approx(2.0 / 4),
        "rewards/margins": pytest.approx(0.5 / 4),
        # Of four pairs two are right, one is wrong and one is tied; of four Δ two are above 0 and one is 0.
        "rewards/accuracies": 2 / 4,
        "rewards/ties": 1 / 4,
        "refinement/mean": pytest.approx(0.1),
        "rewards/accuracies_augmented": 2 / 4,
        "rewards/ties_augmented": 1 / 4,
        "refinement/std": pytest.approx(math.sqrt((0.1**2 + 0.2**2 + 0.1**2 + 0.2**2) / 4)),
        # Deviations from the means: Δ 0.1, -0.2, -0.1, 0.2 and margin 0.375, -1.125, -0.125, 0.875.
        "refinement/correlation_with_margin": pytest.approx(0.45 / math.sqrt(0.1 * 2.1875)),
    }


def test_accuracy_is_a_share_of_all_pairs_and_ties_are_told_apart() -> None:
    """METHOD: share of pairs with r⁺ > r⁻, and the same under p⊕x. Two ties, one right, one wrong: a quarter."""
    numbers = averages(rewards_of([1.0, 0.5, 0.0, 2.0], [1.0, 0.5, -1.0, 3.0], [0.0, 0.0, -0.3, 0.2]))
    assert numbers["rewards/accuracies"] == numbers["rewards/accuracies_augmented"] == 0.25
    assert numbers["rewards/ties"] == numbers["rewards/ties_augmented"] == 0.5


def test_only_ties_are_never_right_and_all_tied() -> None:
    numbers = averages(rewards_of([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]))
    assert numbers["rewards/accuracies"] == numbers["rewards/accuracies_augmented"] == 0.0
    assert numbers["rewards/ties"] == numbers["rewards/ties_augmented"] == 1.0
    assert not any(math.isnan(value) for value in numbers.values())


def test_metrics_of_unequal_batches_add_up_as_of_one() -> None:
    """Sums and weights, so that a mean over passes is no mean of means."""
    chosen, rejected, deltas = [0.1, 0.5, -0.2, 0.9, 0.0], [0.0, 0.7, -0.3, 0.9, 0.2], [1.0, -1.0, 0.5, 0.0, 2.0]
    whole = rewards_of(chosen, rejected, deltas)
    first, second = (rewards_of(chosen[a:b], rejected[a:b], deltas[a:b]) for a, b in ((0, 1), (1, 5)))
    together = add_sums(add_sums({}, first), second)
    assert together.keys() == whole.keys()
    assert averages(together) == pytest.approx(averages(whole))
    assert {sums.weight for sums in together.values() if isinstance(sums, Mean)} == {5.0}


def test_moments_of_parts_add_up_to_those_of_the_whole() -> None:
    x, y = [0.5, -1.25, 2.0, 8.0, 0.0], [3.0, -1.0, 0.25, 0.5, 7.0]
    for whole, first, second in (
        (Moments.of(x), Moments.of(x[:2]), Moments.of(x[2:])),
        (Deviation(Moments.of(x)), Deviation(Moments.of(x[:1])), Deviation(Moments.of(x[1:]))),
        (Correlation.between(x, y), Correlation.between(x[:4], y[:4]), Correlation.between(x[4:], y[4:])),
        (Mean(9.25, 5.0), Mean(1.25, 2.0), Mean(8.0, 3.0)),
    ):
        assert first + second == second + first == whole


def test_moments_come_to_mean_deviation_and_correlation() -> None:
    x, y = [0.5, -1.25, 2.0, 8.0, 0.0], [3.0, -1.0, 0.25, 0.5, 7.0]
    assert Moments.of(x).value == pytest.approx(np.mean(x))
    assert Deviation(Moments.of(x)).value == pytest.approx(np.std(x))
    assert Correlation.between(x, y).value == pytest.approx(stats.pearsonr(x, y).statistic)


def test_number_of_no_unit_is_left_out() -> None:
    empty = {"a": Mean(0.0, 0.0), "b": Moments.of([]), "c": Deviation(Moments.of([])), "d": Correlation.between([], [])}
    assert averages(empty) == {}


def test_label_metrics_are_means_by_label_and_their_interval_is_welchs() -> None:
    """Whatever parts they are added up from, also such as have one label alone."""
    rewards, labels = [1.0, 3.0, -1.0, 0.5, 2.0], [True, True, False, False, True]
    whole = label_metrics(rewards, labels)
    parts = add_sums(label_metrics(rewards[:2], labels[:2]), label_metrics(rewards[2:], labels[2:]))
    for sums in (whole, parts):
        values = averages(sums)
        assert values == pytest.approx({"rewards/chosen": 2.0, "rewards/rejected": -0.25, "rewards/margins": 2.25})
        welch = stats.ttest_ind([1.0, 3.0, 2.0], [-1.0, 0.5], equal_var=False).confidence_interval(0.95)
        ends = {"rewards/margins_low": welch.low, "rewards/margins_high": welch.high}
        assert reward_intervals(sums) == pytest.approx(ends)
    alone = label_metrics([1.0, 2.0], [True, True])
    assert averages(alone) == {"rewards/chosen": 1.5}
    assert reward_intervals(alone) == {}


def test_reward_intervals_by_hand() -> None:
    # Margins 1, 2, -1, 2: mean 1, standard deviation √2, t(0.975, 3) = 3.18245; three of four are right.
    intervals = reward_intervals(rewards_of([1.0, 2.0, 0.0, 2.0], [0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.1, 0.2]))
    half = 3.18245 * math.sqrt(2) / 2
    assert intervals["rewards/margins_low"] == pytest.approx(1 - half, rel=1e-5)
    assert intervals["rewards/margins_high"] == pytest.approx(1 + half, rel=1e-5)
    right, augmented = wilson(3, 4), wilson(3, 4)
    assert intervals["rewards/accuracies_low"] == right.low
    assert intervals["rewards/accuracies_high"] == right.high
    assert intervals["rewards/accuracies_augmented_low"] == augmented.low


def test_margin_of_one_pair_has_no_interval_rather_than_one_made_up() -> None:
    tied = wilson(0, 1)
    ends = {"rewards/accuracies_low": tied.low, "rewards/accuracies_high": tied.high}
    assert reward_intervals(rewards_of([0.5], [0.5])) == ends


def test_accuracies_have_wilsons_interval_over_all_pairs_with_ties_as_not_right() -> None:
    intervals = reward_intervals(rewards_of([1.0, 2.0, 0.0], [1.0, 0.0, 1.0], [0.5, 0.0, -0.1]))
    assert intervals["rewards/accuracies_low"] == intervals["rewards/accuracies_augmented_low"] == wilson(1, 3).low


def test_without_lengths_there_is_no_margin_a_token() -> None:
    numbers = averages(reward_metrics([1.0, 0.5], [0.0, 1.0]))
    assert numbers["rewards/margins"] == 0.25
    assert "rewards/margins_per_token" not in numbers


def test_changes_of_log_probability_are_nats_a_response_and_nats_a_token() -> None:
    first, second = logp_changes("chosen", [-4.0], [2]), logp_changes("chosen", [1.0, -3.0], [6, 4])
    numbers = averages(add_sums(first, second))
    assert numbers == {"logps/chosen_change": -2.0, "logps/chosen_change_per_token": -0.5}
    assert numbers.keys() <= METRICS.keys()


def test_correlation_with_length_is_pearsons_however_the_pairs_are_split() -> None:
    rewards, tokens = [0.1, -0.4, 0.3, 0.9, -1.0, 0.2], [300.0, 12.0, 512.0, 44.0, 45.0, 7.0]
    parts = [length_moments(rewards[a:b], tokens[a:b]) for a, b in ((0, 1), (1, 6))]
    numbers = averages(add_sums(*parts))
    assert numbers == {"rewards/length_correlation": pytest.approx(stats.pearsonr(rewards, tokens).statistic)}


@pytest.mark.parametrize(
    ("rewards", "tokens"),
    [([0.1, 0.1, 0.1], [5.0, 6.0, 9.0]), ([-0.3] * 7, [0.1 * n for n in range(7)]), ([0.1, 0.2, 0.7], [3.0, 3.0, 3.0])],
)
def test_constant_rewards_or_lengths_have_no_correlation_rather_than_one_of_roundings(
    rewards: list[float], tokens: list[float]
) -> None:
    assert averages(length_moments(rewards, tokens)) == {}


def test_names_are_written_once() -> None:
    """The declaration is the only place, so that a name that is mistyped elsewhere is an error; labels may be alike."""
    labels = {"preferences/pairs"}
    grouped = {name for name in METRICS if "/" in name} - labels
    package = Path(catalog.__file__).parents[1]
    found = {
        (file.name, node.value)
        for file in package.rglob("*.py")
        if file.name != "catalog.py"
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in grouped
    }
    assert found == set()


def test_no_two_constants_declare_one_name() -> None:
    constants = [value for value in vars(catalog).values() if isinstance(value, catalog.Metric)]
    assert len(constants) == len(METRICS)


def test_every_unit_can_be_written() -> None:
    assert all(Column.of(metric).form(0.25) for metric in METRICS.values())


def test_variants_say_over_what_and_against_whom() -> None:
    held_out = catalog.over(catalog.HELD_OUT, catalog.REWARDS_ACCURACIES)
    assert (held_out.name, held_out.heading) == ("held_out/rewards/accuracies", "held-out reward accuracy")
    assert (catalog.REWARDS_ACCURACIES.axis, held_out.axis) == ("step", "iteration")
    given = catalog.against("_vs_given", catalog.JUDGE_POSITION_BIAS)
    assert (given.name, given.heading) == ("eval/position_bias_vs_given", "position bias vs\u00a0given outputs")
    assert given.better == "lower"


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("score", catalog.BENCHMARK_SCORE),
        ("turn_2", catalog.BENCHMARK_TURN),
        ("writing", catalog.BENCHMARK_CATEGORY),
        ("win_rate", catalog.WIN_RATE),
        ("judge/position_bias", catalog.JUDGE_POSITION_BIAS),
        ("arc_easy/acc", catalog.BENCHMARK_TASK_METRIC),
        ("arc_easy/documents", catalog.BENCHMARK_TASK_DOCUMENTS),
    ],
)
def test_benchmarks_numbers_are_told_apart(name: str, declared: catalog.Metric) -> None:
    assert catalog.of_benchmark(name) is declared


def test_family_is_filled_and_found_again() -> None:
    third = catalog.CALIBRATION_SCORE_OF_RANK.of(rank=3)
    assert (third.name, third.heading) == ("calibration/score_of_rank/3", "score of rank 3")
    assert catalog.CALIBRATION_SCORE_OF_RANK.matches(third.name)
    assert not catalog.CALIBRATION_SCORE_OF_RANK.matches("calibration/score_of_rank/3/4")


@pytest.mark.parametrize("name", ["rewards/margin", "eval/win_rate_vs_m1", "held_out/accuracies", "novelty_mean"])
def test_name_that_is_not_declared_is_found_out(name: str) -> None:
    with pytest.raises(LookupError):
        declaration(name)


def test_every_reward_metric_is_explained() -> None:
    assert averages(rewards_of([1.0, 0.0], [0.0, 0.5], [0.5, 0.1])).keys() <= METRICS.keys()
    assert all(m.meaning and m.meaning == m.meaning.strip() for m in METRICS.values())


# --- instructions ------------------------------------------------------------------------------------------------


def test_statistics_of_instructions_are_worked_by_hand() -> None:
    texts = [["name", "a", "bird"], ["name", "a", "fish"], ["why"]]
    measured = instruction_statistics(texts, [0.0, 2 / 3, 0.0])
    assert measured == {
        "novelty": pytest.approx(7 / 9),
        "distinct_1": 5 / 7,  # name a bird fish why
        "distinct_2": 3 / 4,  # name a, a bird, a fish: no pair spans two texts
        "mean_words": 7 / 3,
    }
    assert measured.keys() <= METRICS.keys()


def test_single_words_have_no_pairs_to_be_distinct() -> None:
    assert instruction_statistics([["why"], ["how"]], [0.0, 1.0]) == {
        "novelty": 0.5,
        "distinct_1": 1,
        "mean_words": 1,
    }
