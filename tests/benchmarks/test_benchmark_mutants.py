"""Benchmarks broken on purpose: every mutant must be caught by a named test."""

from types import ModuleType
from typing import Any

import benchmarking
import pytest
import test_alpaca_eval
import test_arena_hard
import test_judge_benchmarks
import test_mt_bench
import test_rating
from mutation import Check, assert_caught

from selfalign.benchmarks import (
    alpaca_eval,
    arena_hard,
    arena_judge,
    grading,
    judge_bench,
    judge_test,
    mt_bench,
    multi_turn,
    rating,
    reward_bench,
    style,
)
from selfalign.benchmarks.rating import Grade

MT = test_mt_bench
MUTANTS: dict[str, tuple[ModuleType, ModuleType, str, str, Check]] = {
    "failure counted as 0": (
        mt_bench, benchmarking,
        "for question, turn, grade in graded:", "for question, turn, grade in map(zeroed, graded):",
        MT.test_scores_are_means_of_the_ratings_and_a_failure_is_none,
    ),
    "answers as units of the interval": (
        mt_bench, benchmarking, "setdefault(question.question_id, [])", "setdefault((question.question_id, turn), [])",
        MT.test_interval_is_over_questions_not_over_answers,
    ),
    "all turns shown of a first answer": (
        mt_bench, benchmarking, "asked=asked.turns[:turn]", "asked=asked.turns",
        MT.test_scores_are_means_of_the_ratings_and_a_failure_is_none,
    ),
    "references whatever the category": (
        mt_bench, benchmarking, "if asked.category in REFERENCED", "if True",
        MT.test_references_are_shown_in_their_categories_only,
    ),
    "references of some turns only": (
        mt_bench, benchmarking, "if len(right) >= turn else []", "if right else []",
        MT.test_reference_for_the_first_turn_alone_is_shown_there_alone,
    ),
    "one temperature for all": (
        mt_bench, benchmarking, "self.temperatures.get(question.category, OTHERWISE)", "OTHERWISE",
        MT.test_temperature_is_the_categorys,
    ),
    "score under the wrong name": (
        mt_bench, benchmarking, ".of(turn=turn)", ".of(turn=1)",
        MT.test_scores_are_means_of_the_ratings_and_a_failure_is_none,
    ),
    "failure written as -1": (
        mt_bench, benchmarking, '"score": grade.score,', '"score": -1 if grade.score is None else grade.score,',
        MT.test_files_are_in_fastchats_layout,
    ),
    "judge that may fail entirely": (
        grading, benchmarking, "or failed == len(grades)", "and False",
        MT.test_policy_that_writes_no_rating_stops_with_what_it_wrote,
    ),
    "turn's prompt for every turn": (
        grading, benchmarking, "(len(task.asked) > 1)", "False",
        MT.test_prompts_of_a_file_are_used_by_turn_and_reference,
    ),
    "reference as the first": (
        alpaca_eval, test_alpaca_eval,
        "return ResponsePair(instruction, first, second)",
        "return ResponsePair(instruction, second, first)",
        test_alpaca_eval.test_win_rates_are_of_the_models_answers_in_both_orders,
    ),
    "preference for the reference": (
        alpaca_eval, test_alpaca_eval, "1 + comparison.outcome", "2 - comparison.outcome",
        test_alpaca_eval.test_files_are_in_alpaca_evals_layout,
    ),
    "no verdict as a tie": (
        alpaca_eval, test_alpaca_eval, "None if comparison.outcome is None", "1.5 if comparison.outcome is None",
        test_alpaca_eval.test_files_are_in_alpaca_evals_layout,
    ),
    "outputs swapped": (
        alpaca_eval, test_alpaca_eval, '"output_2": talk.answers[0]', '"output_2": row.output',
        test_alpaca_eval.test_files_are_in_alpaca_evals_layout,
    ),
    "first rating counts": (
        rating, test_rating, "{float(one) for one in ratings} != {score} or", "",
        test_rating.test_rating_is_read_strictly_and_a_failure_is_no_number,
    ),
    "rating clipped": (
        rating, test_rating, "score = float(ratings[0])", "score = min(float(ratings[0]), HIGH)",
        test_rating.test_rating_is_read_strictly_and_a_failure_is_no_number,
    ),
    "any digits": (
        rating, test_rating, r"[0-9]+(?:", r"\d+(?:",
        test_rating.test_rating_is_read_strictly_and_a_failure_is_no_number,
    ),
    "one and ten swapped": (
        rating, test_rating, "ten, one = distribution", "one, ten = distribution",
        test_rating.test_share_of_what_begins_with_one_is_divided_between_one_and_ten,
    ),
    "ratings from 0": (
        rating, test_rating, "enumerate(shares, start=LOW)", "enumerate(shares)",
        test_rating.test_ten_as_one_token_needs_no_second_look,
    ),
    "strong verdict counted once": (
        arena_hard, test_arena_hard, "STRONG_WEIGHT if", "1 if",
        test_arena_hard.test_value_of_each_verdict_is_the_models_in_either_place,
    ),
    "baseline's verdicts as the model's": (
        arena_hard, test_arena_hard,
        "game.verdict.score if is_first else 1 -", "1 - game.verdict.score if is_first else",
        test_arena_hard.test_value_of_each_verdict_is_the_models_in_either_place,
    ),
    "games in the other order": (
        arena_hard, test_arena_hard, "for game in (as_second, as_first)", "for game in (as_first, as_second)",
        test_arena_hard.test_files_are_in_arena_hard_autos_layout,
    ),
    "verdict of another spelling misread": (
        arena_judge, test_arena_hard, '"B<A": ArenaVerdict.A,', '"B<A": ArenaVerdict.B,',
        test_arena_hard.test_verdicts_are_read_in_every_spelling,
    ),
    "code counted as markdown": (
        style, test_arena_hard, 'CODE.sub("", text)', "text",
        test_arena_hard.test_style_counts_markdown_outside_of_code,
    ),
    "tie for the best as a win": (
        judge_test, test_judge_benchmarks, "/ len(best)", "",
        test_judge_benchmarks.test_share_of_best_is_of_the_highest_scores,
    ),
    "failure left out": (
        judge_test, test_judge_benchmarks, "if len(known) < len(scores):", "if not known:",
        test_judge_benchmarks.test_share_of_best_is_of_the_highest_scores,
    ),
    "mathematics as any other": (
        reward_bench, test_judge_benchmarks, "984 / 447", "1.0",
        test_judge_benchmarks.test_pairs_are_averaged_by_section_with_mathematics_as_much_as_code,
    ),
    "spread of the other answers": (
        reward_bench, test_judge_benchmarks, "max(known[:correct]) - min(known[:correct])",
        "max(known[correct:]) - min(known[correct:])",
        test_judge_benchmarks.test_score_of_ties_is_reward_bench_2s,
    ),
    "one order suffices": (
        judge_bench, test_judge_benchmarks, "return there - back", "return there",
        test_judge_benchmarks.test_pairwise_judge_must_be_right_on_the_whole,
    ),
    "right response second": (
        judge_bench, test_judge_benchmarks, "responses if found.label", "responses[::-1] if found.label",
        test_judge_benchmarks.test_scores_decide_pairs_and_a_tie_is_wrong,
    ),
}  # fmt: skip


@pytest.fixture
def fixtures(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return given


def zeroed(graded: tuple[Any, int, Grade]) -> tuple[Any, int, Grade]:
    """A failure as a number."""
    question, turn, grade = graded
    return question, turn, Grade(grade.status, grade.score or 0.0, grade.text)


def every_text(text: str) -> None:
    """The parser's whole table in one test."""
    for said in test_rating.SAID:
        test_rating.test_rating_is_read_strictly_and_a_failure_is_no_number(said)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, fixtures: dict[str, Any]) -> None:
    module, tested_in, old, new, check = MUTANTS[name]
    if check is test_rating.test_rating_is_read_strictly_and_a_failure_is_no_number:
        check = every_text
    assert_caught(module, tested_in, old, new, check, {**fixtures, "text": ""}, zeroed=zeroed)


def test_conversation_without_its_own_answers_is_caught(fixtures: dict[str, Any]) -> None:
    old, new = '{"role": "assistant", "content": answer}', '{"role": "assistant", "content": ""}'
    check = MT.test_second_turn_is_asked_behind_the_models_own_first_answer
    assert_caught(multi_turn, mt_bench, old, new, check, fixtures)


def test_seed_that_every_turn_shares_is_caught(fixtures: dict[str, Any]) -> None:
    old, new = "derive_seed(seed, talk.question.question_id, turn)", "derive_seed(seed, talk.question.question_id)"
    assert_caught(multi_turn, mt_bench, old, new, MT.test_request_of_each_turn_has_a_seed_of_its_own, fixtures)
