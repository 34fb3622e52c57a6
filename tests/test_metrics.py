import math
import random
from itertools import permutations

import pytest
from builders import judgement
from scipy import stats

from selfalign.metrics import (
    METRICS,
    Sums,
    add_sums,
    averages,
    head_to_head,
    judge_quality,
    judgement_statistics,
    reward_intervals,
    reward_metrics,
    score_histogram,
    wilson,
)
from selfalign.records import Judgement, JudgementStatus, RankedAnswers


def question(*ranks: int) -> RankedAnswers:
    texts, blank = [f"t{i}" for i in ranks], [""] * len(ranks)
    return RankedAnswers(id="q", instruction="?", texts=texts, ranks=list(ranks), scores=[], justifications=blank)


def quality(*cases: tuple[tuple[int, ...], tuple[float, ...]], top: float = 5) -> dict[str, float]:
    """Judge quality over (ranks, scores), without the prefix of the names."""
    measured = judge_quality([question(*ranks) for ranks, _ in cases], [scores for _, scores in cases], top)
    assert all(math.isfinite(value) for value in measured.values())
    assert measured.pop("judge_quality/unjudged", 0) == 0
    assert measured.keys() <= METRICS.keys()
    return {name.removeprefix("judge_quality/"): value for name, value in measured.items()}


# --- judge quality -----------------------------------------------------------------------------------------------


def test_perfect_judge() -> None:
    assert quality(((1, 2, 3), (5, 3, 1)), ((3, 1, 2), (0, 4, 2))) == {
        "questions": 2,
        "undefined": 0,
        "pairwise_accuracy": 1.0,
        "exact_match": 1.0,
        "five_best": 1.0,
        "spearman": pytest.approx(1.0),
        "kendall": pytest.approx(1.0),
    }


def test_judge_that_turns_every_order_round() -> None:
    measured = quality(((1, 2, 3), (1, 3, 5)))
    assert (measured["pairwise_accuracy"], measured["exact_match"], measured["five_best"]) == (0, 0, 0)
    assert (measured["spearman"], measured["kendall"]) == (pytest.approx(-1.0), pytest.approx(-1.0))


def test_mixed_case_worked_by_hand() -> None:
    # q1: ranks 1 2 3 4, scores 4 5 2 2. Pairs in order: 1>3 1>4 2>3 2>4; wrong: 1>2; tied: 3=4. 4 of 6.
    # q2: ranks 2 1 3, scores 3 5 1. All 3 pairs in order. Top scores: 5 (rank 2) and 5 (rank 1): 1 of 2 best.
    measured = quality(((1, 2, 3, 4), (4, 5, 2, 2)), ((2, 1, 3), (3, 5, 1)))
    assert measured["pairwise_accuracy"] == 7 / 9
    assert measured["exact_match"] == 1 / 2
    assert measured["five_best"] == 1 / 2
    # q1: ρ is Pearson's of 4 3 2 1 with the scores' ranks 3 4 1.5 1.5; from their mean 2.5:
    # (1.5·0.5 + 0.5·1.5 + 0.5·1 + 1.5·1) / √(5 · 4.5).
    pearson = 3.5 / math.sqrt(5.0 * 4.5)
    assert measured["spearman"] == pytest.approx((pearson + 1) / 2)
    # τ-b of q1: (4 concordant - 1 discordant) / √(6 · 5).
    assert measured["kendall"] == pytest.approx((3 / math.sqrt(30) + 1) / 2)


def test_tied_pair_counts_as_not_agreeing() -> None:
    assert quality(((1, 2, 3), (4, 4, 1)))["pairwise_accuracy"] == 2 / 3
    assert quality(((1, 2, 3), (4, 4, 1)))["exact_match"] == 0


def test_constant_scores_are_undefined_and_counted_not_nan() -> None:
    measured = quality(((1, 2, 3), (4, 4, 4)), ((1, 2, 3), (5, 3, 1)))
    assert measured["undefined"] == 1
    assert measured["questions"] == 2
    assert measured["pairwise_accuracy"] == 3 / 6
    assert (measured["spearman"], measured["kendall"]) == (pytest.approx(1.0), pytest.approx(1.0))


def test_only_constant_scores_have_no_correlation_at_all() -> None:
    measured = quality(((1, 2), (3, 3)), ((2, 1), (0, 0)))
    assert measured == {"questions": 2, "undefined": 2, "pairwise_accuracy": 0.0, "exact_match": 0.0}


def test_one_question_is_enough() -> None:
    measured = quality(((2, 1), (1.5, 1.75)))
    assert measured == {
        "questions": 1,
        "undefined": 0,
        "pairwise_accuracy": 1.0,
        "exact_match": 1.0,
        "spearman": pytest.approx(1.0),
        "kendall": pytest.approx(1.0),
    }


@pytest.mark.parametrize(("score", "counted"), [(4.49, False), (4.5, True), (5.0, True)])
def test_five_best_takes_scores_that_round_to_the_top(score: float, counted: bool) -> None:
    assert ("five_best" in quality(((1, 2), (score, 1)))) == counted


def test_five_best_counts_every_answer_at_the_top() -> None:
    assert quality(((1, 2, 3), (5, 5, 5)))["five_best"] == pytest.approx(1 / 3)
    assert quality(((1, 2, 3), (3, 3, 1)), top=3)["five_best"] == 1 / 2


def test_correlations_agree_with_scipy_question_by_question() -> None:
    draw = random.Random(1)
    cases, spearman, kendall = [], [], []
    while len(cases) < 40:
        ranks = draw.sample(range(1, 6), draw.randint(2, 5))
        scores = [draw.choice([0, 1, 2, 3, 4, 5]) for _ in ranks]
        cases.append((tuple(ranks), tuple(scores)))
        if len(set(scores)) > 1:
            spearman.append(stats.spearmanr([-r for r in ranks], scores).statistic)
            kendall.append(stats.kendalltau([-r for r in ranks], scores, variant="b").statistic)
    measured = quality(*cases)
    assert measured["spearman"] == pytest.approx(sum(spearman) / len(spearman))
    assert measured["kendall"] == pytest.approx(sum(kendall) / len(kendall))
    assert measured["undefined"] == 40 - len(spearman) > 0


def test_exact_match_means_every_pair_in_order() -> None:
    for scores in permutations((4, 3, 2, 1)):
        assert quality(((1, 2, 3, 4), scores))["exact_match"] == (scores == (4, 3, 2, 1))


def test_order_of_the_answers_does_not_matter() -> None:
    expected = quality(((1, 2, 3), (4, 4.6, 1)))
    for order in permutations(range(3)):
        ranks, scores = tuple((1, 2, 3)[i] for i in order), tuple((4, 4.6, 1)[i] for i in order)
        assert quality((ranks, scores)) == {k: pytest.approx(v) for k, v in expected.items()}


# --- shares and head to head -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "total"), [(0, 1), (1, 1), (0, 24), (24, 24), (7, 24), (50, 256), (805, 805), (3, 1000)]
)
def test_wilson_interval_is_scipys(wins: int, total: int) -> None:
    share = wilson(wins, total)
    interval = stats.binomtest(wins, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert share.value == wins / total
    assert share.low == pytest.approx(interval.low, abs=1e-12)
    assert share.high == pytest.approx(interval.high, abs=1e-12)


def test_wilson_interval_at_another_confidence_and_with_half_wins() -> None:
    interval = stats.binomtest(30, 80).proportion_ci(confidence_level=0.99, method="wilson")
    assert wilson(30, 80, 0.99).low == pytest.approx(interval.low)
    assert wilson(30, 80, 0.99).high == pytest.approx(interval.high)
    between = wilson(7.5, 24)
    assert wilson(7, 24).low < between.low < wilson(8, 24).low
    assert between.value == 7.5 / 24


def test_head_to_head_counts_only_what_both_answered() -> None:
    numbers = head_to_head({"a": 3, "b": 2, "c": 1, "d": 4, "x": 5}, {"a": 2, "b": 2, "c": 3, "d": 1, "y": 0})
    assert (numbers["eval/wins"], numbers["eval/ties"], numbers["eval/losses"]) == (2, 1, 1)
    interval = wilson(2.5, 4)
    assert numbers["eval/win_rate"] == 0.625
    assert (numbers["eval/win_rate_low"], numbers["eval/win_rate_high"]) == (interval.low, interval.high)


def test_model_against_itself_ties_everywhere_at_one_half() -> None:
    scores = {str(n): n / 7 for n in range(9)}
    numbers = head_to_head(scores, scores)
    assert (numbers["eval/wins"], numbers["eval/ties"], numbers["eval/losses"]) == (0, 9, 0)
    assert numbers["eval/win_rate"] == 0.5
    assert numbers["eval/win_rate_low"] < 0.5 < numbers["eval/win_rate_high"]


def test_swapping_sides_mirrors_the_win_rate() -> None:
    one, other = {"a": 3, "b": 2, "c": 1}, {"a": 1, "b": 2, "c": 0}
    there, back = head_to_head(one, other), head_to_head(other, one)
    assert there["eval/win_rate"] + back["eval/win_rate"] == pytest.approx(1)
    assert there["eval/win_rate_low"] == pytest.approx(1 - back["eval/win_rate_high"])


def test_nothing_in_common_has_no_win_rate() -> None:
    assert head_to_head({"a": 1}, {"b": 1}) == {"eval/wins": 0, "eval/ties": 0, "eval/losses": 0}


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

    assert judgement_statistics([with_entropy(0.5), with_entropy(1.5)])["judge/entropy"] == 1.0


def test_no_valid_judgement_gives_no_statistics_and_no_nan() -> None:
    assert judgement_statistics([failed("a"), failed("b", JudgementStatus.NO_SCORE)]) == {}


def test_histogram_counts_rounded_valid_scores() -> None:
    records = [judgement(str(n), score) for n, score in enumerate((0, 0.4, 0.6, 4.51, 5, 5))]
    assert score_histogram([*records, failed("x")], 0, 5) == [2, 1, 0, 0, 0, 3]
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
        "rewards/accuracies": 2 / 3,
        "rewards/ties": 1 / 4,
        "refinement/mean": pytest.approx(0.1),
        "refinement/positive_share": 2 / 4,
        "rewards/accuracies_augmented": 2 / 3,
        "refinement/std": pytest.approx(math.sqrt((0.1**2 + 0.2**2 + 0.1**2 + 0.2**2) / 4)),
        # Deviations from the means: Δ 0.1, -0.2, -0.1, 0.2 and margin 0.375, -1.125, -0.125, 0.875.
        "refinement/correlation_with_margin": pytest.approx(0.45 / math.sqrt(0.1 * 2.1875)),
    }


def test_ties_are_not_counted_as_wrong() -> None:
    assert averages(rewards_of([1.0, 0.0], [1.0, -1.0]))["rewards/accuracies"] == 1.0


def test_only_ties_have_no_accuracy_rather_than_a_bad_one() -> None:
    numbers = averages(rewards_of([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]))
    assert "rewards/accuracies" not in numbers
    assert "rewards/accuracies_augmented" not in numbers
    assert numbers["rewards/ties"] == 1.0
    assert not any(math.isnan(value) for value in numbers.values())


def test_metrics_of_unequal_batches_add_up_as_of_one() -> None:
    """Sums and weights, so that a mean over passes is no mean of means."""
    chosen, rejected, deltas = [0.1, 0.5, -0.2, 0.9, 0.0], [0.0, 0.7, -0.3, 0.9, 0.2], [1.0, -1.0, 0.5, 0.0, 2.0]
    whole = rewards_of(chosen, rejected, deltas)
    first, second = (rewards_of(chosen[a:b], rejected[a:b], deltas[a:b]) for a, b in ((0, 1), (1, 5)))
    together = add_sums(add_sums({}, first), second)
    assert together.keys() == whole.keys()
    for name, (total, weight) in whole.items():
        assert together[name] == (pytest.approx(total), weight)
    assert averages(together) == pytest.approx(averages(whole))


def test_reward_intervals_by_hand() -> None:
    # Margins 1, 2, -1, 2: mean 1, standard deviation √2, t(0.975, 3) = 3.18245; three of four are right.
    intervals = reward_intervals(rewards_of([1.0, 2.0, 0.0, 2.0], [0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.1, 0.2]))
    half = 3.18245 * math.sqrt(2) / 2
    assert intervals["rewards/margins_low"] == pytest.approx(1 - half, rel=1e-5)
    assert intervals["rewards/margins_high"] == pytest.approx(1 + half, rel=1e-5)
    right, augmented = wilson(3, 4), wilson(3, 3)
    assert intervals["rewards/accuracies_low"] == right.low
    assert intervals["rewards/accuracies_high"] == right.high
    assert intervals["rewards/accuracies_augmented_low"] == augmented.low


def test_reward_intervals_of_one_pair_or_of_ties_are_left_out_rather_than_made_up() -> None:
    assert reward_intervals(rewards_of([0.5], [0.5])) == {}


def test_every_reward_metric_is_explained() -> None:
    assert averages(rewards_of([1.0, 0.0], [0.0, 0.5], [0.5, 0.1])).keys() <= METRICS.keys()
    assert all(text and text == text.strip() for text in METRICS.values())
