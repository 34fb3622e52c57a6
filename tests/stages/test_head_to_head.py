import random
import re
from pathlib import Path
from typing import Any

import pytest
from builders import instruction, nudged_policy, policy_artifact, records_artifact, response, workspace
from chat_server import chat, chat_server
from judging import FP32
from mutation import mutated

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import Comparison
from selfalign.engines.openai_client import Endpoint
from selfalign.judges import comparator
from selfalign.judges import head_to_head as comparing
from selfalign.metrics.intervals import wilson
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages.head_to_head import HeadToHead, head_to_head
from selfalign.store.artifacts import Artifact, Counts

PROMPT = "{instruction}\n<first>\n{first}\n</first>\n<second>\n{second}\n</second>"
NAMES = [f"q{n}" for n in range(8)]


def answers(folder: Path, texts: dict[str, str], candidates: int = 1) -> Artifact:
    made = [response(f"{name}-{n}", text) for name, text in texts.items() for n in range(1, candidates + 1)]
    return records_artifact(folder, responses=made)


def asked(folder: Path) -> Artifact:
    return records_artifact(folder / "asked", instructions=[instruction(name) for name in NAMES])


def compared(
    folder: Path, mine: dict[str, str], theirs: dict[str, str], says: Any, stage: Any = head_to_head, **settings: Any
) -> Counts:
    """Head to head by a server that says a letter of (first text, second text)."""

    def reply(body: dict[str, Any]) -> bytes:
        shown = body["messages"][0]["content"]
        first, second = (re.search(rf"<{place}>\n(.*?)\n</{place}>", shown, re.DOTALL) for place in ("first", "second"))
        assert first
        assert second
        return chat(says(first[1], second[1]))

    with chat_server(reply) as server:
        judge = HeadToHead(
            prompt=PROMPT, endpoint=Endpoint(base_url=server.url, model="m", api_key_env="", concurrency=2), **settings
        )
        return stage(
            workspace(folder / "out"), judge=judge, policy=None, instructions=asked(folder),
            answers=answers(folder / "mine", mine), opponent=answers(folder / "theirs", theirs), engine=FP32, seed=1,
        )  # fmt: skip


def longer_wins(first: str, second: str) -> str:
    return "[[C]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "[[B]]"


MINE = {name: "x" * (n + 1) for n, name in enumerate(NAMES)}
THEIRS = dict.fromkeys(NAMES, "xxx")


def test_outcomes_are_the_first_models_and_add_up(tmp_path: Path) -> None:
    counts = compared(tmp_path, MINE, THEIRS, longer_wins)
    assert (counts["wins"], counts["ties"], counts["losses"]) == (5, 1, 2)
    expected = wilson(5.5, 8)
    assert (counts["win_rate"], counts["win_rate_low"], counts["win_rate_high"]) == (
        5.5 / 8, expected.low, expected.high,
    )  # fmt: skip
    assert (counts["mean_characters"], counts["mean_characters_opponent"]) == (4.5, 3.0)
    assert counts["judge/position_bias"] == 0.0
    assert counts["comparisons"] == 8
    records = read_records(tmp_path / "out" / "comparisons.jsonl", Comparison)
    assert [one.outcome for one in records] == [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_judge_that_always_names_one_place_ties_all_with_position_bias_one(tmp_path: Path) -> None:
    counts = compared(tmp_path, MINE, THEIRS, lambda first, second: "[[A]]")
    assert (counts["wins"], counts["ties"], counts["losses"]) == (0, 8, 0)
    assert counts["win_rate"] == 0.5
    assert counts["judge/position_bias"] == 1.0


def test_all_ties_are_one_half_without_position_bias(tmp_path: Path) -> None:
    counts = compared(tmp_path, MINE, THEIRS, lambda first, second: "[[C]]")
    assert (counts["ties"], counts["win_rate"], counts["judge/position_bias"]) == (8, 0.5, 0.0)


def test_one_instruction_has_a_rate_and_no_number_that_is_none(tmp_path: Path) -> None:
    counts = compared(tmp_path, {"q3": "longer"}, THEIRS, longer_wins)
    assert (counts["win_rate"], counts["comparisons"]) == (1.0, 1)
    assert counts["dropped"] == {"unanswered": 7}
    assert not [value for value in counts.values() if value != value]


def test_unreadable_verdicts_are_dropped_and_neither_won_nor_lost(tmp_path: Path) -> None:
    counts = compared(tmp_path, MINE, THEIRS, lambda a, b: "Well." if "xxxxxxx" in (a, b) else longer_wins(a, b))
    assert (counts["wins"], counts["ties"], counts["losses"]) == (4, 1, 2)
    assert counts["dropped"] == {"unanswered": 0, "no_score": 1}
    with pytest.raises(SelfalignError, match=r"8 of 8 comparisons have no verdict.*evaluate\.head_to_head"):
        compared(tmp_path / "none", MINE, THEIRS, lambda a, b: "Well.")


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match="there is no instruction that both models answered"):
        compared(tmp_path, {"q0": "a"}, {"q1": "b"}, longer_wins)


def test_first_answer_of_several_is_compared(tmp_path: Path) -> None:
    made = [response("q0-1", "long answer"), response("q0-2", "x")]
    with chat_server(lambda body: chat("[[A]]" if "<first>\nlong" in body["messages"][0]["content"] else "[[B]]")) as s:
        judge = HeadToHead(prompt=PROMPT, endpoint=Endpoint(base_url=s.url, model="m", api_key_env=""))
        counts = head_to_head(
            workspace(tmp_path / "out"), judge=judge, policy=None, instructions=asked(tmp_path),
            answers=records_artifact(tmp_path / "a", responses=made), opponent=answers(tmp_path / "b", {"q0": "y"}),
            engine=FP32, seed=1,
        )  # fmt: skip
    assert (counts["comparisons"], counts["wins"]) == (1, 1)


def test_a_policy_judges_by_its_own_probabilities_the_same_both_ways_round(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    judge = HeadToHead(prompt=PROMPT, debias_position=True)
    policy = policy_artifact(nudged_policy(tiny_policy, tmp_path / "nudged", 0.2))
    one, other = answers(tmp_path / "one", MINE), answers(tmp_path / "other", dict.fromkeys(NAMES, "Not at all."))
    inputs = {"judge": judge, "policy": policy, "instructions": asked(tmp_path), "engine": FP32, "seed": 1}
    there = head_to_head(workspace(tmp_path / "there"), answers=one, opponent=other, **inputs)
    back = head_to_head(workspace(tmp_path / "back"), answers=other, opponent=one, **inputs)
    assert there["win_rate"] + back["win_rate"] == pytest.approx(1)
    assert there["wins"] == back["losses"]
    assert there["judge/position_bias"] == back["judge/position_bias"]
    assert {c.model for c in read_records(tmp_path / "there/comparisons.jsonl", Comparison)} == {policy.digest}


def test_writing_longer_alone_wins_one_half_at_equal_length(tmp_path: Path) -> None:
    """A judge that only favours length; the answers differ in nothing else."""
    draw = random.Random(0)
    mine = {name: "x" * draw.randint(10, 60) for name in NAMES}
    theirs = {name: "x" * draw.randint(5, 30) for name in NAMES}
    counts = compared(tmp_path, mine, theirs, longer_wins)
    assert counts["win_rate"] > 0.7
    assert abs(counts["win_rate_length_controlled"] - 0.5) < abs(counts["win_rate"] - 0.5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ResponsePair(one, mine[one.id], theirs[one.id])", "ResponsePair(one, theirs[one.id], mine[one.id])"),
        ('"dropped": {"unanswered": len(asked) - len(pairs), **', '"dropped": {**'),
    ],
    ids=["sides swapped", "unanswered uncounted"],
)
def test_mutant_is_caught(tmp_path: Path, old: str, new: str) -> None:
    expected = compared(tmp_path / "right", MINE, {**THEIRS, "q7": "Well"}, silent_on_well)
    with mutated(comparing, old, new):
        try:
            broken = compared(tmp_path / "broken", MINE, {**THEIRS, "q7": "Well"}, silent_on_well)
        except (TypeError, ValueError):
            return
    assert broken != expected


@pytest.mark.parametrize(
    ("old", "new"),
    [("len(pair.first.text) - len(pair.second.text)", "0"), ("if c.outcome is not None]", "]")],
    ids=["lengths ignored", "unread counts as lost"],
)
def test_mutant_of_the_referee_is_caught(tmp_path: Path, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compared(tmp_path / "right", MINE, {**THEIRS, "q7": "Well"}, silent_on_well)
    with mutated(comparator, old, new) as copy:
        monkeypatch.setattr(comparator.PairwiseComparator, "compare_models", copy.PairwiseComparator.compare_models)
        try:
            broken = compared(tmp_path / "broken", MINE, {**THEIRS, "q7": "Well"}, silent_on_well)
        except (TypeError, ValueError):
            return
    assert broken != expected


def silent_on_well(first: str, second: str) -> str:
    return "Well." if "Well" in (first, second) else longer_wins(first, second)
