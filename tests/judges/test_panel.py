"""Panels: scores combined by votes and by mean, worked by hand, and what makes no panel."""

from pathlib import Path
from typing import Any

import pytest
from builders import TINY_RUN, composed, instruction, records_artifact, response, run, write_tiny_data
from judging import judged, run_judge, scores

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.records import JudgementStatus, ResponseScore
from selfalign.judges.expected import ExpectedScore
from selfalign.judges.implicit import ImplicitReward
from selfalign.judges.pairwise import Pairwise
from selfalign.judges.panel import Panel, disagreements
from selfalign.judges.protocol import only_compares
from selfalign.judges.reward_model import RewardModel
from selfalign.store.artifacts import Artifact

RUBRIC = "{instruction} {response} Score:"
ONE = ExpectedScore(prompt=RUBRIC)
COMPARING = Pairwise(prompt="{instruction} {first} {second}")


def panel(**settings: Any) -> Panel:
    return Panel(members={"a": ONE, "b": ONE}, **settings)


def test_votes_are_the_weighted_share_of_comparisons_won() -> None:
    of_judges = {"a": {"x": 3.0, "y": 1.0, "z": 1.0}, "b": {"x": -7.0, "y": -8.0, "z": -6.0}}
    # a: x wins 2 of 2, y and z tie with each other: ½ of 2. b: z wins 2, x 1, y 0.
    assert panel().scores(of_judges) == pytest.approx({"x": (1 + 0.5) / 2, "y": (0.25 + 0) / 2, "z": (0.25 + 1) / 2})
    weighted = panel(weights={"a": 3.0}).scores(of_judges)
    assert weighted == pytest.approx({"x": (3 + 0.5) / 4, "y": 0.75 / 4, "z": (0.75 + 1) / 4})


def test_votes_do_not_depend_on_the_scale_of_a_judge() -> None:
    of_judges = {"a": {"x": 3.0, "y": 1.0}, "b": {"x": 0.2, "y": 0.9}}
    stretched = {"a": {"x": 300.0, "y": 100.0}, "b": {"x": -2.0, "y": 9.0}}
    assert panel().scores(of_judges) == panel().scores(stretched) == {"x": 0.5, "y": 0.5}


def test_mean_weighs_scores_as_they_are() -> None:
    of_judges = {"a": {"x": 3.0, "y": 1.0}, "b": {"x": 5.0, "y": 5.0}}
    assert panel(combine="mean").scores(of_judges) == {"x": 4.0, "y": 3.0}
    assert panel(combine="mean", weights={"b": 3.0}).scores(of_judges) == {"x": 4.5, "y": 4.0}


def test_response_without_a_score_of_every_judge_has_none() -> None:
    of_judges = {"a": {"x": 3.0, "y": 1.0, "z": 2.0}, "b": {"x": 5.0, "z": 1.0}}
    assert panel().scores(of_judges) == {"x": 1.0, "z": 0.0}
    assert panel(combine="mean").scores({"a": {"x": 3.0}, "b": {}}) == {}


def test_judges_disagree_where_they_rank_two_responses_in_opposite_orders() -> None:
    of_judges = {"a": {"x": 3.0, "y": 1.0, "z": 1.0}, "b": {"x": 1.0, "y": 2.0, "z": 0.0}}
    # x and y: opposite. x and z: alike. y and z: a ties, so it ranks them not.
    assert sorted(disagreements(of_judges)) == [False, True]


def member(folder: Path, values: dict[str, float | None]) -> Artifact:
    made = [
        ResponseScore(id=name, score=score, valid=int(score is not None), variance=None)
        for name, score in values.items()
    ]
    return records_artifact(folder, scores=made)


def test_stage_writes_the_panel_s_scores_and_counts_its_disagreement(tmp_path: Path) -> None:
    answers = [response(f"i-{n}", f"answer {n}") for n in (1, 2, 3)]
    place = records_artifact(tmp_path / "given", instructions=[instruction("i")], responses=answers)
    parts = {
        "a": member(tmp_path / "a", {"i-1": 3.0, "i-2": 1.0, "i-3": 2.0}),
        "b": member(tmp_path / "b", {"i-1": 1.0, "i-2": 2.0, "i-3": None}),
    }
    counts, found = judged(
        tmp_path, panel(weights={"a": 2.0}), None, instructions=place, responses=place, members=parts
    )
    assert {name: one.score for name, one in found.items()} == {
        "i-1": pytest.approx(2 / 3),
        "i-2": pytest.approx(1 / 3),
        "i-3": None,
    }
    assert (found["i-3"].status, found["i-3"].text) == (JudgementStatus.NO_SCORE, "no score by b")
    assert found["i-1"].text == "a 3, b 1"
    assert scores(tmp_path)["i-3"].score is None
    assert counts["judge/disagreement"] == 1.0
    assert counts["dropped"] == {"no_score": 1}


def test_stage_stops_if_too_many_responses_have_no_score_of_every_judge(tmp_path: Path) -> None:
    place = records_artifact(
        tmp_path / "given", instructions=[instruction("i")], responses=[response("i-1"), response("i-2")]
    )
    parts = {
        "a": member(tmp_path / "a", {"i-1": 3.0, "i-2": 1.0}),
        "b": member(tmp_path / "b", {"i-1": None, "i-2": None}),
    }
    with pytest.raises(SelfalignError, match="2 of 2 judgements carry no score"):
        run_judge(tmp_path, panel(), None, instructions=place, responses=place, members=parts)


def test_votes_and_comparisons_score_no_single_answer() -> None:
    """Of one answer alone, the share of comparisons that it wins is a half whatever it says."""
    assert panel().scores({"a": {"x": 5.0}, "b": {"x": 0.0}}) == {"x": 0.5}
    assert only_compares(panel())
    assert not only_compares(panel(combine="mean"))
    assert only_compares(Panel(members={"a": ONE, "b": COMPARING}, combine="mean"))
    assert only_compares(COMPARING)
    assert not only_compares(ONE)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: Panel(members={"a": ONE}),
            r"judge.members: a panel needs two judges or more. .*\+judge@judge.members",
        ),
        (lambda: panel(weights={"c": 2.0}), "judge.weights.c: the judges of judge.members are a, b"),
        (lambda: Panel(members={"a": ONE, "b": panel()}), "judge.members.b is a panel itself"),
        (
            lambda: Panel(members={"a": ONE, "b": ImplicitReward()}, combine="mean"),
            "judge.combine=mean needs judges on one scale, but they score from 0 to 5 and without a scale",
        ),
        (
            lambda: Panel(members={"a": RewardModel(model="a/reward"), "b": ImplicitReward()}, combine="mean"),
            r"but they score without a scale \(ImplicitReward\) and without a scale \(RewardModel\): set judge.combine",
        ),
        (lambda: panel(combine="median"), "judge.combine must be mean or votes, got 'median'"),
        (lambda: panel(weights={"a": 0.0}), "judge.weights.a must be above 0 and finite, got 0"),
    ],
)
def test_what_makes_no_panel_is_refused(made: Any, message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        made().check("judge")


OF_PAIRS = "evaluate.preference_pairs.judge"
SCORING = [f"+judge@{OF_PAIRS}.members.a=expected_score", f"{OF_PAIRS}.members.a.model=sft"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("", "{judge}.members: a panel needs two judges or more"),
        (
            "+judge@{judge}.members.b=implicit {judge}.members.b.model=sft {judge}.combine=mean",
            "{judge}.combine=mean needs judges on one scale, but they score from 0 to 5 and without a scale",
        ),
        ("+judge@{judge}.members.b=implicit +{judge}.weights.c=2", "{judge}.weights.c: the judges of {judge}.members"),
        ("+judge@{judge}.members.b=verifier", "{judge}.members.b cannot be verifier: pairs do not say what is right"),
        ("+judge@{judge}.members.b=expected_score", "{judge}.members.b.model must be the same judge for all models"),
        (
            "+judge@{judge}.members.b=expected_score {judge}.members.b.model=previous",
            "{judge}.members.b.model must be the same judge for all models: .*; got previous",
        ),
    ],
    ids=["one judge", "two scales", "weight of nobody", "verifier", "the model itself", "the model before"],
)
def test_panel_of_held_out_pairs_is_checked_as_any_other(overrides: str, message: str) -> None:
    """One whose members are models of the moment would have the scores of whichever came first."""
    told = [f"judge@{OF_PAIRS}=panel", "evaluate.preference_pairs.source=a.jsonl", *SCORING]
    with pytest.raises(SelfalignError, match=f"^{message.format(judge=OF_PAIRS)}"):
        composed("experiment=smoke", *told, *overrides.format(judge=OF_PAIRS).split())


def test_member_of_the_panel_of_held_out_pairs_is_judged_by_its_own_model(tmp_path: Path) -> None:
    """The run's judge is a panel too, whose member of the same name is another model."""
    told = [*TINY_RUN, *write_tiny_data(tmp_path / "data"), "iterations=1", "data.seed_data.eft_source=none"]
    told += ["judge=panel", f"judge@{OF_PAIRS}=panel", "evaluate.preference_pairs.source=ranked"]
    for key, models in (("judge", ("sft", "sft")), (OF_PAIRS, ("sft", "random:tiny"))):
        for name, model in zip("ab", models, strict=True):
            told += [f"+judge@{key}.members.{name}=expected_score", f"{key}.members.{name}.model={model}"]
    folder = run(tmp_path / "runs", *told)
    inputs = {
        name: read_json(folder / f"artifacts/{name}/manifest.json")
        for name in ("M0", "M1", "preferences/scores_by_a", "preferences/scores_by_b", "preferences/scores")
    }
    judged_by = [inputs[f"preferences/scores_by_{name}"]["inputs"]["policy"]["digest"] for name in "ab"]
    assert judged_by == [inputs["M1"]["digest"], inputs["M0"]["digest"]]
    assert inputs["preferences/scores"]["counts"]["judge/disagreement"] <= 1
    numbers = read_json(folder / "artifacts/evaluation_M2/instruments/manifest.json")["counts"]
    assert "instrument/judge/accuracy" in numbers
    assert "instrument/scores/accuracy" not in numbers, "votes give no win rate by score, so nothing is to be measured"
