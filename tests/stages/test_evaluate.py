from collections.abc import Sequence
from pathlib import Path

import pytest
from builders import artifact, instruction, judgement, records_artifact, response, workspace
from scipy import stats

from selfalign.benchmarks.lm_eval import LmEval
from selfalign.benchmarks.mt_bench import MTBench
from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, RankedAnswers
from selfalign.metrics.bounds import MetricBounds
from selfalign.metrics.intervals import length_controlled, wilson
from selfalign.stages.evaluate import EvaluateConfig, JudgedTexts, MaybeJudged, compares_on, evaluate, opponents
from selfalign.stages.head_to_head import HeadToHead
from selfalign.store.artifacts import Artifact, Counts

Scores = dict[str, list[float | None]]


def answers(
    folder: Path, scores: Scores, texts: dict[str, str] | None = None, cut: tuple[str, ...] = ()
) -> JudgedTexts:
    """One judged answer to every instruction named."""
    responses = [
        response(
            f"{name}-1",
            (texts or {}).get(name, "Yes."),
            reason=FinishReason.LENGTH if name in cut else FinishReason.EOS,
        )
        for name in scores
    ]
    judgements = [judgement(f"{name}-1", score, n) for name in scores for n, score in enumerate(scores[name], 1)]
    given = records_artifact(folder / "answers", instructions=[instruction(n) for n in scores], responses=responses)
    return given, records_artifact(folder / "scores", judgements=judgements)


def ranked(folder: Path, ranks: dict[str, list[int]], scores: dict[str, list[float | None]]) -> JudgedTexts:
    """Questions with ranked answers and one score for each."""
    questions = [
        RankedAnswers(
            id=name, instruction=f"{name}?", texts=[f"t{i}" for i in order], ranks=order, scores=[],
            justifications=[""] * len(order),
        )
        for name, order in ranks.items()
    ]  # fmt: skip
    judgements = [judgement(f"{name}-{n}", s) for name, row in scores.items() for n, s in enumerate(row, start=1)]
    return records_artifact(folder / "ranked", ranked=questions), records_artifact(
        folder / "own", judgements=judgements
    )


def measured(
    folder: Path,
    *,
    judged: MaybeJudged | None = None,
    baseline: MaybeJudged | None = None,
    ranked: JudgedTexts | None = None,
    compared: dict[str, Artifact] | None = None,
    moved: Artifact | None = None,
    trained: Sequence[Artifact] = (),
    bounds: MetricBounds | None = None,
) -> Counts:
    """Runs the stage."""
    out = workspace(folder / "out")
    bounds = bounds or MetricBounds()
    compared = compared or {}
    return evaluate(
        out, judged=judged, baseline=baseline, compared=compared, moved=moved, trained=trained, ranked=ranked, top=5,
        bounds=bounds,
    )  # fmt: skip


def test_score_win_rate_counts_wins_and_half_the_ties_against_the_baseline(tmp_path: Path) -> None:
    model = answers(tmp_path / "m", {"a": [4], "b": [2], "c": [3], "d": [5, 3]})
    baseline = answers(tmp_path / "b", {"a": [3], "b": [3], "c": [3], "d": [1]})
    numbers = measured(tmp_path, judged=model, baseline=baseline, ranked=None)
    assert numbers["eval/score_win_rate"] == 2.5 / 4
    assert numbers["eval/score_win_rate_low"] < 2.5 / 4 < numbers["eval/score_win_rate_high"]
    assert numbers["eval/mean_score"] == pytest.approx((4 + 2 + 3 + 4) / 4)
    assert numbers["eval/answers"] == 4


def test_answer_without_a_valid_judgement_is_neither_won_nor_lost(tmp_path: Path) -> None:
    model = answers(tmp_path / "m", {"a": [4], "b": [None], "c": [5]})
    baseline = answers(tmp_path / "b", {"a": [3], "b": [3], "c": [None, None]})
    numbers = measured(tmp_path, judged=model, baseline=baseline, ranked=None)
    assert numbers["eval/score_win_rate"] == 1.0
    assert numbers["eval/score_win_rate_low"] == wilson(1, 1).low
    assert numbers["eval/mean_score"] == 4.5


def test_lengths_and_endings_are_over_all_answers(tmp_path: Path) -> None:
    texts = {"a": "1234", "b": "12", "c": ""}
    model = answers(tmp_path, {"a": [1], "b": [2], "c": [None]}, {**texts, "c": "123456"}, cut=("b",))
    numbers = measured(tmp_path, judged=model, baseline=None, ranked=None)
    assert numbers["eval/mean_characters"] == 4.0
    assert numbers["eval/finished_share"] == pytest.approx(2 / 3)
    assert "eval/score_win_rate" not in numbers


def test_judge_quality_is_over_questions_whose_answers_all_have_scores(tmp_path: Path) -> None:
    given = ranked(
        tmp_path,
        {"q": [1, 2, 3], "r": [3, 1, 2], "gap": [1, 2, 3]},
        {"q": [5, 3, 1], "r": [2, 4, 3], "gap": [1, None, 5]},
    )
    numbers = measured(tmp_path, judged=None, baseline=None, ranked=given)
    assert numbers["judge_quality/questions"] == 2
    assert numbers["judge_quality/pairwise_accuracy"] == 1.0
    assert numbers["judge_quality/spearman"] == pytest.approx(1.0)
    assert numbers["judge_quality/top_score_precision"] == 1.0


def test_judge_quality_in_a_mixed_case_worked_by_hand(tmp_path: Path) -> None:
    given = ranked(tmp_path, {"q": [1, 2, 3], "r": [1, 2, 3]}, {"q": [3, 5, 1], "r": [2, 2, 2]})
    numbers = measured(tmp_path, judged=None, baseline=None, ranked=given)
    assert numbers["judge_quality/pairwise_accuracy"] == 2 / 6
    assert numbers["judge_quality/exact_match"] == 0
    assert numbers["judge_quality/top_score_precision"] == 0
    assert numbers["judge_quality/undefined"] == 1
    assert numbers["judge_quality/spearman"] == pytest.approx(stats.spearmanr([3, 2, 1], [3, 5, 1]).statistic)


def test_question_with_an_unjudged_answer_is_counted(tmp_path: Path) -> None:
    given = ranked(tmp_path, {"q": [1, 2], "gap": [1, 2]}, {"q": [5, 3], "gap": [1, None]})
    numbers = measured(tmp_path, judged=None, baseline=None, ranked=given)
    assert {name: value for name, value in numbers.items() if "unjudged" in name} == {"judge_quality/unjudged": 1}


def test_judge_that_scored_nothing_has_no_quality_rather_than_a_bad_one(tmp_path: Path) -> None:
    given = ranked(tmp_path, {"q": [1, 2]}, {"q": [None, None]})
    numbers = measured(tmp_path, judged=None, baseline=None, ranked=given)
    assert numbers["judge_quality/questions"] == 0
    assert "judge_quality/pairwise_accuracy" not in numbers


def test_model_without_anything_to_measure_has_no_numbers(tmp_path: Path) -> None:
    assert measured(tmp_path, judged=None, baseline=None, ranked=None) == {}


@pytest.mark.parametrize(("settings", "named"), [({"count": -1}, "count"), ({"judge": "self"}, "judge")])
def test_value_out_of_range_is_refused_with_its_key(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=rf"evaluate\.{named}"):
        EvaluateConfig(**settings)


def test_answers_are_compared_at_equal_length_and_their_growth_is_told(tmp_path: Path) -> None:
    model = answers(
        tmp_path / "m", {"a": [4], "b": [2], "c": [3], "only": [5]},
        {"a": "x" * 30, "b": "x" * 10, "c": "x" * 20, "only": "x" * 20},
    )  # fmt: skip
    baseline = answers(tmp_path / "b", {"a": [3], "b": [3], "c": [3]}, dict.fromkeys("abc", "x" * 10))
    numbers = measured(tmp_path, judged=model, baseline=baseline)
    expected = length_controlled([1.0, 0.0, 0.5], [20.0, 0.0, 10.0])
    assert numbers["eval/score_win_rate_length_controlled"] == expected.value
    assert numbers["eval/score_win_rate_length_controlled_low"] == expected.low
    assert numbers["eval/length_growth"] == 2.0
    alone = measured(tmp_path / "alone", judged=model)
    assert "eval/length_growth" not in alone
    assert "eval/score_win_rate_length_controlled" not in alone


def test_variety_of_the_answers_worked_by_hand(tmp_path: Path) -> None:
    texts = {"a": "One two, one two! One two one.", "b": "Three four."}
    numbers = measured(tmp_path, judged=answers(tmp_path, {"a": [1], "b": [2]}, texts))
    # Pairs of a: 1-2 2-1 1-2 2-1 1-2 2-1; of b: 3-4. Runs of four of a: 1212 2121 1212 2121.
    assert numbers["eval/distinct_2"] == pytest.approx(3 / 7)
    assert numbers["eval/repetition_4"] == pytest.approx(2 / 4)


def test_crossed_bounds_are_warned_of_and_counted_or_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, baseline = (
        answers(tmp_path / "m", {"a": [4]}, {"a": "x" * 50}),
        answers(tmp_path / "b", {"a": [3]}, {"a": "x"}),
    )
    moved = artifact(tmp_path / "moved", "divergence", {"eval/kl_to_m1": 3.0})
    bounds = MetricBounds(max_length_growth=10, max_kl_to_m1=2.5)
    numbers = measured(tmp_path, judged=model, baseline=baseline, moved=moved, bounds=bounds)
    assert numbers["bound_violated"] == {"max_length_growth": 50.0, "max_kl_to_m1": 3.0}
    assert "stage: eval/length_growth is 50, above evaluate.bounds.max_length_growth=10" in caplog.text
    with pytest.raises(SelfalignError, match=r"length_growth.*evaluate\.bounds\.stop=true stops the run"):
        measured(
            tmp_path, judged=model, baseline=baseline, moved=moved, bounds=MetricBounds(max_length_growth=10, stop=True)
        )
    assert "bound_violated" not in measured(tmp_path, judged=model, bounds=bounds)


def test_comparisons_are_numbers_named_for_the_opponent(tmp_path: Path) -> None:
    counts = {
        "comparisons": 4, "wins": 1, "ties": 2, "losses": 1, "win_rate": 0.5, "win_rate_low": 0.2, "win_rate_high": 0.8,
        "win_rate_length_controlled": 0.4, "judge/position_bias": 0.25, "mean_characters": 9.0,
    }  # fmt: skip
    compared = {
        "": artifact(tmp_path / "a", "compare", counts),
        "_vs_given": artifact(tmp_path / "b", "compare", counts),
    }
    numbers = measured(tmp_path, judged=answers(tmp_path, {"a": [1]}), compared=compared)
    assert (numbers["eval/wins"], numbers["eval/ties_vs_given"], numbers["eval/position_bias_vs_given"]) == (1, 2, 0.25)
    assert (numbers["eval/win_rate_low"], numbers["eval/win_rate_vs_given_high"]) == (0.2, 0.8)
    assert numbers["eval/win_rate_length_controlled"] == 0.4
    assert "eval/win_rate_vs_previous" not in numbers


def test_answers_that_nobody_scored_are_described_and_not_compared_by_score(tmp_path: Path) -> None:
    (model, _), (baseline, _) = answers(tmp_path / "m", {"a": [4]}), answers(tmp_path / "b", {"a": [3]})
    numbers = measured(tmp_path, judged=(model, None), baseline=(baseline, None))
    assert numbers["eval/length_growth"] == 1.0
    assert "eval/score_win_rate" not in numbers
    assert "eval/mean_score" not in numbers


@pytest.mark.parametrize(
    ("matrix", "before", "expected"),
    [
        (False, [], []),
        (False, ["M1"], ["M1"]),
        (False, ["M1", "M2", "M3"], ["M1", "M3"]),
        (True, ["M1", "M2", "M3"], ["M1", "M2", "M3"]),
    ],
)
def test_opponents_are_m1_and_the_model_before_or_all(matrix: bool, before: list[str], expected: list[str]) -> None:
    judge = HeadToHead(prompt="{instruction} {first} {second}")
    assert opponents(EvaluateConfig(head_to_head=judge, round_robin=matrix), before) == expected
    assert opponents(EvaluateConfig(), before) == []


def test_models_are_compared_on_question_files_alone_where_there_are_no_instructions() -> None:
    judge = HeadToHead(prompt="{instruction} {first} {second}")
    nothing = EvaluateConfig(head_to_head=judge, instructions="")
    assert opponents(nothing, ["M1"]) == []
    asked = EvaluateConfig(head_to_head=judge, instructions="", compare_benchmarks=True, round_robin=True)
    assert opponents(asked, ["M1", "M2"]) == ["M1", "M2"]
    assert compares_on(asked, MTBench())
    assert not compares_on(EvaluateConfig(head_to_head=judge), MTBench())
    assert not compares_on(asked, LmEval(tasks=[]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"round_robin": True}, "evaluate.head_to_head"),
        ({"compare_benchmarks": True}, "evaluate.head_to_head"),
        ({"round_robin": True, "head_to_head": HeadToHead(prompt="{instruction}{first}{second}"), "instructions": ""},
         "evaluate.compare_benchmarks"),
        ({"reference_outputs": "o.json", "head_to_head": HeadToHead(prompt="{instruction}{first}{second}"),
        "instructions": ""},
         "instructions"),
        ({"round_robin": True, "head_to_head": HeadToHead(prompt="{instruction}{first}{second}", model="self")},
        "self"),
    ],
)  # fmt: skip
def test_comparing_without_what_it_needs_is_refused(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=named):
        EvaluateConfig(**settings)


def test_scores_of_the_answers_are_correlated_with_their_length(tmp_path: Path) -> None:
    texts = {"a": "x" * 30, "b": "x" * 10, "c": "x" * 20, "d": "x" * 99}
    numbers = measured(tmp_path, judged=answers(tmp_path, {"a": [4], "b": [1], "c": [5], "d": [None]}, texts))
    assert numbers["eval/score_length_correlation"] == pytest.approx(stats.spearmanr([4, 1, 5], [30, 10, 20]).statistic)
    constant = measured(tmp_path / "same", judged=answers(tmp_path / "same", {"a": [3], "b": [3]}, texts))
    assert "eval/score_length_correlation" not in constant


def test_numbers_of_the_training_are_held_against_their_bounds(tmp_path: Path) -> None:
    trained = {"logps/chosen_change_per_token": -0.6, "score_length_correlation": 0.5}
    model = artifact(tmp_path / "model", "align", {**trained, "loss": 0.7})
    numbers = measured(tmp_path, trained=[model])
    assert numbers == {**trained, "bound_violated": {"min_chosen_logp_change": -0.6}}
    with pytest.raises(SelfalignError, match=r"min_chosen_logp_change.*evaluate\.bounds\.stop=true stops the run"):
        measured(tmp_path, trained=[model], bounds=MetricBounds(stop=True))
