import re
from pathlib import Path
from typing import Any

import pytest
from builders import RUBRIC, instruction, nudged_policy, policy_artifact, records_artifact, response, workspace
from chat_server import chat, chat_server
from judging import FP32

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import Comparison, Judgement, JudgementStatus, PreferencePair, Verdict
from selfalign.engines.openai_client import Endpoint
from selfalign.judges.comparisons import PositionWeights
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages.judge import SampledScore
from selfalign.stages.meta_judge import MetaJudge, meta_judge
from selfalign.stages.pair import gather_pairs
from selfalign.store.artifacts import Counts

PROMPT = "{instruction}\n<first>\n{first}\n</first>\n<second>\n{second}\n</second>"
JUDGE = SampledScore(prompt=RUBRIC)

Scores = dict[str, list[float | None]]
BEES: Scores = {"bees-1": [3, 3, 3], "bees-2": [1, 3, 5], "bees-3": [5, 3, 1]}


def judgement(name: str, sample: int, score: float | None, text: str = "") -> Judgement:
    """A judgement `<response>-<sample>` that says its score, and how good a judgement it is: sample 1 is the best."""
    said = text or f"{name} {'x' * sample}\nScore: {score}"
    status = JudgementStatus.NO_SCORE if score is None else JudgementStatus.OK
    return Judgement(
        id=f"{name}-{sample}", response_id=name, status=status, score=score, text=said, model="m", sample=sample
    )


def given(folder: Path, scores: Scores, texts: dict[str, str] | None = None) -> dict[str, Any]:
    """The stage's records: the instructions that the responses begin with, and judgements with these scores."""
    names = dict.fromkeys(name.rsplit("-", 1)[0] for name in scores)
    judged = [
        judgement(name, sample, score, (texts or {}).get(f"{name}-{sample}", ""))
        for name, own in scores.items()
        for sample, score in enumerate(own, start=1)
    ]
    place = records_artifact(
        folder / "given",
        instructions=[instruction(name) for name in names],
        responses=[response(name) for name in scores],
        judgements=judged,
    )
    return {"instructions": place, "responses": place, "judgements": place}


def paired(folder: Path, says: Any, scores: Scores = BEES, texts: dict[str, str] | None = None, **more: Any) -> Counts:
    """The stage by a server that says a letter of (first judgement, second judgement)."""

    def reply(body: dict[str, Any]) -> bytes:
        shown = body["messages"][0]["content"]
        first, second = (re.search(rf"<{place}>\n(.*?)\n</{place}>", shown, re.DOTALL) for place in ("first", "second"))
        assert first
        assert second
        return chat(says(first[1], second[1]))

    with chat_server(reply) as server:
        endpoint = Endpoint(base_url=server.url, model="m", api_key_env="", concurrency=2)
        return meta_judge(
            workspace(folder / "out"), comparator=MetaJudge(prompt=PROMPT, endpoint=endpoint, **more), judge=JUDGE,
            policy=None, engine=FP32, seed=1, **given(folder, scores, texts),
        )  # fmt: skip


def pairs_in(folder: Path) -> list[PreferencePair]:
    file = folder / "out/pairs.jsonl"
    return read_records(file, PreferencePair) if file.stat().st_size else []


def shorter_wins(first: str, second: str) -> str:
    return "[[A]]" if len(first) < len(second) else "[[B]]" if len(first) > len(second) else "[[C]]"


def test_judgements_of_the_response_whose_scores_vary_most_are_paired_best_against_worst(tmp_path: Path) -> None:
    counts = paired(tmp_path, shorter_wins)
    compared = read_records(tmp_path / "out/comparisons.jsonl", Comparison)
    assert [(c.instruction_id, c.first_id, c.second_id, c.outcome) for c in compared] == [
        ("bees-2", "bees-2-1", "bees-2-2", 1.0), ("bees-2", "bees-2-1", "bees-2-3", 1.0),
        ("bees-2", "bees-2-2", "bees-2-3", 1.0),
    ]  # fmt: skip
    [pair] = pairs_in(tmp_path)
    assert (pair.chosen_id, pair.rejected_id, pair.instruction_id) == ("bees-2-1", "bees-2-3", "bees")
    assert (pair.chosen, pair.rejected) == ("bees-2 x\nScore: 1", "bees-2 xxx\nScore: 5")
    assert pair.prompt == JUDGE.ask("Tell me about bees.", "Answer bees-2")
    assert (pair.chosen_score, pair.rejected_score, pair.chosen_ids) == (None, None, [])
    assert (counts["pairs"], counts["candidate_pairs"], counts["comparisons"]) == (1, 1, 3)
    assert (counts["judge/position_bias"], counts["judge/first_position_wins"]) == (0.0, 0.5)
    assert counts["judge/higher_score_chosen"] == 0.0


def test_judge_is_shown_the_rubric_the_instruction_the_response_and_both_judgements(tmp_path: Path) -> None:
    comparator = MetaJudge(prompt=PROMPT)
    asked = JUDGE.ask("Why?", "Because.")[0]["content"]
    shown = comparator.ask(asked, "One.\nScore: 1", "Two.\nScore: 2")[0]["content"]
    assert shown == f"{asked}\n<first>\nOne.\nScore: 1\n</first>\n<second>\nTwo.\nScore: 2\n</second>"


def test_every_instruction_has_a_pair_or_a_reason_for_none(tmp_path: Path) -> None:
    scores: Scores = {
        "a-1": [2, 2, None], "a-2": [4, None, None], "b-1": [1, 2, None], "c-1": [1, 4, 4], "d-1": [1, 2, 3],
        "e-1": [1, 3, 5],
    }  # fmt: skip
    texts = {f"c-1-{n}": "Same.\nScore: 1" for n in (1, 2, 3)} | {"d-1-1": "dd " * 40, "d-1-2": "dd " * 41}
    texts["d-1-3"] = "dd " * 42
    counts = paired(tmp_path, shorter_wins, scores, texts, max_chosen_characters=100)
    assert counts["dropped"] == {"no_variance": 1, "tie": 1, "too_long": 1}
    assert [pair.chosen_id for pair in pairs_in(tmp_path)] == ["b-1-1", "e-1-1"]
    assert (counts["pairs"], counts["candidate_pairs"]) == (2, 5)


def test_only_the_first_judgements_take_part_if_so_asked(tmp_path: Path) -> None:
    counts = paired(tmp_path, shorter_wins, {"a-1": [None, 2, 3, 4]}, judgements=2)
    [pair] = pairs_in(tmp_path)
    assert (pair.chosen_id, pair.rejected_id, counts["comparisons"]) == ("a-1-2", "a-1-3", 1)


def test_comparison_without_a_verdict_counts_nothing_and_too_many_stop_the_stage(tmp_path: Path) -> None:
    def silent_on_two(first: str, second: str) -> str:
        return "Well." if {len(first), len(second)} == {17, 19} else shorter_wins(first, second)

    counts = paired(tmp_path, silent_on_two, {"bees-2": [1, 3, 5]})
    assert counts["dropped"] == {"unread_comparison": 1}
    assert [(pair.chosen_id, pair.rejected_id) for pair in pairs_in(tmp_path)] == [("bees-2-1", "bees-2-3")]
    with pytest.raises(SelfalignError, match=r"3 of 3 comparisons have no verdict.*data\.meta_judge"):
        paired(tmp_path / "none", lambda first, second: "Well.")


def test_judge_of_one_position_gives_no_pairs_which_stops_the_run_unless_it_may_go_on(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"0 pairs of judgements from 1 .*minimum_pairs=1 .*'tie': 1"):
        paired(tmp_path / "stops", lambda first, second: "[[A]]")
    counts = paired(tmp_path, lambda first, second: "[[A]]", minimum_pairs=0)
    assert (counts["pairs"], counts["judge/position_bias"], counts["judge/first_position_wins"]) == (0, 1.0, 1.0)
    nothing = paired(tmp_path / "constant", shorter_wins, {"a-1": [3, 3, 3]}, minimum_pairs=0)
    assert (nothing["comparisons"], nothing["dropped"]["no_variance"]) == (0, 1)
    none = records_artifact(tmp_path / "none", pairs=[])
    some = records_artifact(tmp_path / "some", pairs=[PreferencePair(id="p", prompt="x", chosen="a", rejected="b")])
    assert gather_pairs(workspace(tmp_path / "joined"), parts=[some, none])["pairs"] == 1


def compared(forward: str, backward: str, outcome: float | None) -> Comparison:
    status = JudgementStatus.NO_SCORE if outcome is None else JudgementStatus.OK
    return Comparison(
        id="1:2", instruction_id="i", first_id="1", second_id="2", forward=Verdict(forward), backward=Verdict(backward),
        status=status, outcome=outcome, texts=[], model="m",
    )  # fmt: skip


def test_win_in_a_position_counts_as_the_share_of_wins_in_the_other() -> None:
    """Six wins in the first position and two in the second: ¼ for one in the first, ¾ for one in the second."""
    weights = PositionWeights()
    for forward, backward in ("AA", "AA", "AB", "BA"):
        weights.add(compared(forward, backward, 0.5))
    weights.add(compared("A", "C", None))
    assert (weights.first, weights.second) == (6, 2)
    games = {both: weights.games(compared(*both, 0.5)) for both in ("AB", "BA", "AA", "BB", "AC", "CB", "CA", "CC")}
    assert games == {
        "AB": (1.0, 0.0), "BA": (0.0, 1.0), "AA": (0.25, 0.25), "BB": (0.75, 0.75), "AC": (0.25, 0.0),
        "CB": (0.75, 0.0), "CA": (0.0, 0.25), "CC": (0.0, 0.0),
    }  # fmt: skip
    assert weights.games(compared("A", "B", None)) == (0.0, 0.0)


def test_policy_compares_its_judgements_by_its_own_probabilities(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    policy = policy_artifact(nudged_policy(tiny_policy, tmp_path / "nudged", 0.2))
    comparator = MetaJudge(prompt=PROMPT, debias_position=True, minimum_pairs=0)
    inputs: dict[str, Any] = {"comparator": comparator, "judge": JUDGE, "policy": policy, "engine": FP32, "seed": 1}
    scores: Scores = {f"{name}-1": [1, 2, 3, 4] for name in ("bees", "tea", "rain", "salt")}
    counts = meta_judge(workspace(tmp_path / "out"), **inputs, **given(tmp_path, scores))
    made = read_records(tmp_path / "out/comparisons.jsonl", Comparison)
    assert {one.model for one in made} == {policy.digest}
    assert counts["comparisons"] == len(made) == 4 * 6
    assert counts["pairs"] + counts["dropped"].get("tie", 0) == 4
    assert "judge/position_bias_nats" in counts


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompt": "{first} {second}"}, r"data\.meta_judge\.prompt lacks \{instruction\}"),
        ({"iterations": 0}, r"data\.meta_judge\.iterations"),
        ({"iterations": []}, r"data\.meta_judge\.iterations"),
        ({"iterations": [1, "2"]}, r"data\.meta_judge\.iterations"),
        ({"judgements": 1}, r"data\.meta_judge\.judgements"),
        ({"max_chosen_characters": -1}, r"data\.meta_judge\.max_chosen_characters"),
        ({"minimum_pairs": -1}, r"data\.meta_judge\.minimum_pairs"),
        ({"model": "previous"}, r"data\.meta_judge\.model=previous"),
    ],
)
def test_impossible_setting_is_refused_with_its_key(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SelfalignError, match=named):
        MetaJudge(**{"prompt": PROMPT, **settings})


def test_iterations_are_a_list_or_the_last_one_or_all() -> None:
    chosen = {
        str(given): MetaJudge(prompt=PROMPT, iterations=given).chosen_iterations(4) for given in (None, 2, [4, 1])
    }
    assert chosen == {"None": [1, 2, 3, 4], "2": [1, 2], "[4, 1]": [1, 4]}
    with pytest.raises(SelfalignError, match=r"iterations=5 goes beyond iterations=4"):
        MetaJudge(prompt=PROMPT, iterations=5).chosen_iterations(4)
