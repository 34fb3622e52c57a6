"""Judge quality and calibration against cases worked by hand and scipy."""

import math
import random
from itertools import permutations

import pytest
from builders import judgement
from declared import declaration
from scipy import stats

from selfalign.core.records import RankedAnswers
from selfalign.metrics.intervals import wilson
from selfalign.metrics.judge_quality import RankedQuestion, calibration, judge_quality, length_correlation


def measure(*cases: tuple[tuple[int, ...], tuple[float, ...]], top: float = 5) -> dict[str, float]:
    """Judge quality over (ranks, scores), without the prefix of the names."""
    measured = judge_quality([RankedQuestion(*case) for case in cases], top)
    assert all(math.isfinite(value) for value in measured.values())
    assert all(map(declaration, measured))
    return {name.removeprefix("judge_quality/"): value for name, value in measured.items()}


def quality(*cases: tuple[tuple[int, ...], tuple[float, ...]], top: float = 5) -> dict[str, float]:
    """The same without intervals."""
    return {name: value for name, value in measure(*cases, top=top).items() if not name.endswith(("_low", "_high"))}


def test_perfect_judge() -> None:
    assert quality(((1, 2, 3), (5, 3, 1)), ((3, 1, 2), (0, 4, 2))) == {
        "questions": 2,
        "undefined": 0,
        "pairwise_accuracy": 1.0,
        "exact_match": 1.0,
        "top_score_precision": 1.0,
        "spearman": pytest.approx(1.0),
        "kendall": pytest.approx(1.0),
    }


def test_judge_that_turns_every_order_round() -> None:
    measured = quality(((1, 2, 3), (1, 3, 5)))
    assert (measured["pairwise_accuracy"], measured["exact_match"], measured["top_score_precision"]) == (0, 0, 0)
    assert (measured["spearman"], measured["kendall"]) == (pytest.approx(-1.0), pytest.approx(-1.0))


def test_mixed_case_worked_by_hand() -> None:
    # q1: ranks 1 2 3 4, scores 4 5 2 2. Pairs in order: 1>3 1>4 2>3 2>4; wrong: 1>2; tied: 3=4. 4 of 6.
    # q2: ranks 2 1 3, scores 3 5 1. All 3 pairs in order. Top scores: 5 (rank 2) and 5 (rank 1): 1 of 2 best.
    measured = quality(((1, 2, 3, 4), (4, 5, 2, 2)), ((2, 1, 3), (3, 5, 1)))
    assert measured["pairwise_accuracy"] == 7 / 9
    assert measured["exact_match"] == 1 / 2
    assert measured["top_score_precision"] == 1 / 2
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
    assert ("top_score_precision" in quality(((1, 2), (score, 1)))) == counted


def test_five_best_counts_every_answer_at_the_top() -> None:
    assert quality(((1, 2, 3), (5, 5, 5)))["top_score_precision"] == pytest.approx(1 / 3)
    assert quality(((1, 2, 3), (3, 3, 1)), top=3)["top_score_precision"] == 1 / 2


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


def test_intervals_are_over_questions_and_widen_with_fewer() -> None:
    cases = [((1, 2, 3), (5, 3, 1)), ((1, 2), (2, 4))] * 20
    many, few = measure(*cases), measure(*cases[:8])
    for name in ("pairwise_accuracy", "exact_match", "spearman", "kendall"):
        assert many[f"{name}_low"] < many[name] < many[f"{name}_high"]
        assert few[f"{name}_high"] - few[f"{name}_low"] > many[f"{name}_high"] - many[f"{name}_low"]
    # 60 of 80 pairs agree. Were pairs drawn instead of questions, the spread would be √(.75·.25/80) = .048; questions
    # agree in all their 3 pairs or in none of 1: .065 in simulation, so the interval is about .26 wide.
    assert many["pairwise_accuracy_high"] - many["pairwise_accuracy_low"] == pytest.approx(0.25, abs=0.04)


def answered(name: str, *ranks: int, texts: tuple[str, ...] = ()) -> RankedAnswers:
    return RankedAnswers(
        id=name,
        instruction="?",
        texts=list(texts) or [f"t{rank}" for rank in ranks],
        ranks=list(ranks),
        scores=[],
        justifications=[""] * len(ranks),
    )


@pytest.mark.parametrize(("order", "share"), [([3.0, 2.0, 1.0], 1.0), ([1.0, 2.0, 3.0], 0.0)])
def test_judge_that_is_always_right_or_wrong_is_no_more_certain_than_its_questions_are_many(
    order: list[float], share: float
) -> None:
    """Every draw of a bootstrap over 12 such questions is the same; Wilson's interval of 12 of 12 is [.757, 1]."""
    numbers = judge_quality([RankedQuestion([1, 2, 3], order)] * 12, None)
    same = wilson(12 * share, 12)
    for name in ("pairwise_accuracy", "exact_match"):
        found = [numbers[f"judge_quality/{name}{end}"] for end in ("", "_low", "_high")]
        assert found == [share, same.low, same.high]


def test_calibration_worked_by_hand() -> None:
    questions = [answered("a", 1, 2, 3, texts=("long text", "text", "t")), answered("b", 5, 2)]
    judgements = [
        judgement("a-1", 5, 1), judgement("a-1", 4, 2), judgement("a-1", 4, 3),
        judgement("a-2", 2, 1), judgement("a-2", 2, 2), judgement("a-2", None, 3),
        judgement("a-3", 2, 1),
        judgement("b-1", 2, 1), judgement("b-2", 2, 1),
    ]  # fmt: skip
    measured = {k.removeprefix("calibration/"): v for k, v in calibration(judgements, questions).items()}
    assert measured == {
        "parsed": pytest.approx(8 / 9),
        # Means 13/3, 2, 2, 2, 2: one four and four twos.
        "score_entropy": pytest.approx(-(0.2 * math.log(0.2) + 0.8 * math.log(0.8))),
        # a: 1-2 no, 1-3 no, 2-3 yes; b: yes.
        "ties": pytest.approx(2 / 4),
        # 5-4 no, 5-4 no, 4-4 yes; 2-2 yes.
        "self_consistency": pytest.approx(2 / 4),
        # Of a: lengths 9 4 1, scores 13/3 2 2; b's scores are constant.
        "length_correlation": pytest.approx(stats.spearmanr([9, 4, 1], [13 / 3, 2, 2]).statistic),
        # b's best answer has rank 2 there, its second 5.
        "score_of_rank/1": pytest.approx((13 / 3 + 2) / 2),
        "score_of_rank/2": pytest.approx(2),
        "score_of_rank/3": pytest.approx(2),
    }


def test_constant_judge_has_no_spread_and_ties_everywhere() -> None:
    questions = [answered("a", 1, 2), answered("b", 2, 1)]
    measured = calibration([judgement(f"{name}-{n}", 5) for name in "ab" for n in (1, 2)], questions)
    assert measured["calibration/score_entropy"] == 0
    assert measured["calibration/ties"] == 1
    assert "calibration/length_correlation" not in measured
    assert "calibration/self_consistency" not in measured


def test_nothing_parsed_is_a_rate_of_zero_and_no_other_number() -> None:
    measured = calibration([judgement("a-1", None), judgement("a-2", None)], [answered("a", 1, 2)])
    assert measured == {"calibration/parsed": 0}


def test_length_correlation_is_within_families_and_leaves_out_those_without_one() -> None:
    families = [[(1, 5), (2, 9), (3, 7)], [(4, 90), (5, 80)], [(1, 1), (1, 2)], [(3, 1)], []]
    assert length_correlation(families) == pytest.approx((stats.spearmanr([1, 2, 3], [5, 9, 7]).statistic - 1) / 2)
    assert length_correlation(families[2:]) is None
