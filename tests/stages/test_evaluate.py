from pathlib import Path

import pytest
from builders import instruction, judgement, records_artefact, response, workspace
from scipy import stats

from selfalign.errors import SelfalignError
from selfalign.records import FinishReason, RankedAnswers
from selfalign.stages.evaluate import EvaluateConfig, Judged, evaluate

Scores = dict[str, list[float | None]]


def answers(folder: Path, scores: Scores, texts: dict[str, str] | None = None, cut: tuple[str, ...] = ()) -> Judged:
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
    given = records_artefact(folder / "answers", instructions=[instruction(n) for n in scores], responses=responses)
    return given, records_artefact(folder / "scores", judgements=judgements)


def ranked(folder: Path, ranks: dict[str, list[int]], scores: dict[str, list[float | None]]) -> Judged:
    """Questions with ranked answers and one score for each."""
    questions = [
        RankedAnswers(
            id=name, instruction=f"{name}?", texts=[f"t{i}" for i in order], ranks=order, scores=[],
            justifications=[""] * len(order),
        )
        for name, order in ranks.items()
    ]  # fmt: skip
    judgements = [judgement(f"{name}-{n}", s) for name, row in scores.items() for n, s in enumerate(row, start=1)]
    return records_artefact(folder / "ranked", ranked=questions), records_artefact(
        folder / "own", judgements=judgements
    )


def test_win_rate_counts_wins_and_half_the_ties_against_the_baseline(tmp_path: Path) -> None:
    model = answers(tmp_path / "m", {"a": [4], "b": [2], "c": [3], "d": [5, 3]})
    baseline = answers(tmp_path / "b", {"a": [3], "b": [3], "c": [3], "d": [1]})
    numbers = evaluate(workspace(tmp_path / "out"), judged=model, baseline=baseline, ranked=None, top=5)
    assert (numbers["eval/wins"], numbers["eval/ties"], numbers["eval/losses"]) == (2, 1, 1)
    assert numbers["eval/win_rate"] == 2.5 / 4
    assert numbers["eval/win_rate_low"] < 2.5 / 4 < numbers["eval/win_rate_high"]
    assert numbers["eval/mean_score"] == pytest.approx((4 + 2 + 3 + 4) / 4)
    assert numbers["eval/answers"] == 4


def test_answer_without_a_valid_judgement_is_neither_won_nor_lost(tmp_path: Path) -> None:
    model = answers(tmp_path / "m", {"a": [4], "b": [None], "c": [5]})
    baseline = answers(tmp_path / "b", {"a": [3], "b": [3], "c": [None, None]})
    numbers = evaluate(workspace(tmp_path / "out"), judged=model, baseline=baseline, ranked=None, top=5)
    assert (numbers["eval/wins"], numbers["eval/ties"], numbers["eval/losses"]) == (1, 0, 0)
    assert numbers["eval/mean_score"] == 4.5


def test_lengths_and_endings_are_over_all_answers(tmp_path: Path) -> None:
    texts = {"a": "1234", "b": "12", "c": ""}
    model = answers(tmp_path, {"a": [1], "b": [2], "c": [None]}, {**texts, "c": "123456"}, cut=("b",))
    numbers = evaluate(workspace(tmp_path / "out"), judged=model, baseline=None, ranked=None, top=5)
    assert numbers["eval/mean_characters"] == 4.0
    assert numbers["eval/finished_share"] == pytest.approx(2 / 3)
    assert "eval/win_rate" not in numbers


def test_judge_quality_is_over_questions_whose_answers_all_have_scores(tmp_path: Path) -> None:
    given = ranked(
        tmp_path,
        {"q": [1, 2, 3], "r": [3, 1, 2], "gap": [1, 2, 3]},
        {"q": [5, 3, 1], "r": [2, 4, 3], "gap": [1, None, 5]},
    )
    numbers = evaluate(workspace(tmp_path / "out"), judged=None, baseline=None, ranked=given, top=5)
    assert numbers["judge_quality/questions"] == 2
    assert numbers["judge_quality/pairwise_accuracy"] == 1.0
    assert numbers["judge_quality/spearman"] == pytest.approx(1.0)
    assert numbers["judge_quality/five_best"] == 1.0


def test_judge_quality_in_a_mixed_case_worked_by_hand(tmp_path: Path) -> None:
    given = ranked(tmp_path, {"q": [1, 2, 3], "r": [1, 2, 3]}, {"q": [3, 5, 1], "r": [2, 2, 2]})
    numbers = evaluate(workspace(tmp_path / "out"), judged=None, baseline=None, ranked=given, top=5)
    assert numbers["judge_quality/pairwise_accuracy"] == 2 / 6
    assert numbers["judge_quality/exact_match"] == 0
    assert numbers["judge_quality/five_best"] == 0
    assert numbers["judge_quality/undefined"] == 1
    assert numbers["judge_quality/spearman"] == pytest.approx(stats.spearmanr([3, 2, 1], [3, 5, 1]).statistic)


def test_question_with_an_unjudged_answer_is_counted(tmp_path: Path) -> None:
    given = ranked(tmp_path, {"q": [1, 2], "gap": [1, 2]}, {"q": [5, 3], "gap": [1, None]})
    numbers = evaluate(workspace(tmp_path / "out"), judged=None, baseline=None, ranked=given, top=5)
    assert {name: value for name, value in numbers.items() if "unjudged" in name} == {"judge_quality/unjudged": 1}


def test_judge_that_scored_nothing_has_no_quality_rather_than_a_bad_one(tmp_path: Path) -> None:
    given = ranked(tmp_path, {"q": [1, 2]}, {"q": [None, None]})
    numbers = evaluate(workspace(tmp_path / "out"), judged=None, baseline=None, ranked=given, top=5)
    assert numbers["judge_quality/questions"] == 0
    assert "judge_quality/pairwise_accuracy" not in numbers


def test_model_without_anything_to_measure_has_no_numbers(tmp_path: Path) -> None:
    assert evaluate(workspace(tmp_path / "out"), judged=None, baseline=None, ranked=None, top=5) == {}


@pytest.mark.parametrize(("settings", "named"), [({"count": -1}, "count"), ({"judge": "self"}, "judge")])
def test_value_out_of_range_is_refused_with_its_key(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=rf"evaluate\.{named}"):
        EvaluateConfig(**settings)
