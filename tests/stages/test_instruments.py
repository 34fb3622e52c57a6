"""Judges of win rates measured on ranked answers: cases worked by hand, and judges of which the truth is known."""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import judgement, nudged_policy, policy_artifact, records_artifact, workspace
from chat_server import chat, chat_server
from declared import declaration
from judging import FP32

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import Comparison, Instruction, JudgementStatus, RankedAnswers, Response, Verdict
from selfalign.data.questions import write_questions
from selfalign.engines.openai_client import Endpoint
from selfalign.metrics.instruments import InstrumentTest
from selfalign.metrics.intervals import wilson
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages.compare_ranked import compare_ranked, ranked_pairs
from selfalign.stages.head_to_head import HeadToHead
from selfalign.stages.instruments import instruments
from selfalign.store.artifacts import Artifact, Counts

A, B, C = Verdict.A, Verdict.B, Verdict.TIE
PROMPT = "{instruction}\n<first>\n{first}\n</first>\n<second>\n{second}\n</second>"


def question(name: str, ranks: Sequence[int]) -> RankedAnswers:
    """The text of an answer says its rank, so that a judge may see it."""
    return RankedAnswers(
        id=name, instruction=f"{name}?", texts=[f"{name} rank {rank}" for rank in ranks], ranks=list(ranks), scores=[],
        justifications=[""] * len(ranks),
    )  # fmt: skip


def ranked(folder: Path, questions: Sequence[RankedAnswers]) -> Artifact:
    folder.mkdir(parents=True)
    write_questions(folder, list(questions))
    return records_artifact(folder)


def measured(
    folder: Path, questions: Sequence[RankedAnswers], readings: dict[str, Artifact], **bar: float
) -> dict[str, float]:
    """What the stage counts, by instrument and name."""
    counts = instruments(
        workspace(folder / "measured"), ranked=ranked(folder / "ranked", questions), readings=readings,
        test=InstrumentTest(**bar),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    assert all(map(declaration, counts))
    return {name.removeprefix("instrument/"): value for name, value in counts.items()}


def compared(folder: Path, verdicts: Mapping[tuple[str, str], tuple[Verdict | None, Verdict | None]]) -> Artifact:
    """Comparisons with the verdicts of both orders; the outcome is worked out here once more."""
    made: list[Comparison] = []
    for (first, second), (forward, backward) in verdicts.items():
        ways = {(A, B): 1.0, (B, A): 0.0}
        known = forward is not None and backward is not None
        made.append(
            Comparison(
                id=f"{first}:{second}", instruction_id=f"{first}:{second}", first_id=first, second_id=second,
                forward=forward, backward=backward, status=JudgementStatus.OK if known else JudgementStatus.NO_SCORE,
                outcome=ways.get((forward, backward), 0.5) if known else None,  # pyright: ignore[reportArgumentType]
                texts=["", ""], model="m",
            )
        )  # fmt: skip
    return records_artifact(folder, comparisons=made)


def test_comparisons_worked_by_hand(tmp_path: Path) -> None:
    """q: 1 is better than 2 and 3; r: 2 is better than 1. Right, one place, unread; wrong; so (1 + ½ + ½ + 0) / 4."""
    asked = [question("q", [1, 2, 3]), question("r", [2, 1])]
    made = compared(
        tmp_path / "made",
        {("q-1", "q-2"): (A, B), ("q-1", "q-3"): (A, A), ("q-2", "q-3"): (None, A), ("r-1", "r-2"): (A, B)},
    )
    found = measured(tmp_path, asked, {"head_to_head": made})
    assert found["head_to_head/comparisons"] == 4
    assert found["head_to_head/accuracy"] == 2 / 4
    assert found["head_to_head/ties"] == 1 / 4
    assert found["head_to_head/unread"] == 1 / 4
    # Three have verdicts in both orders. Their wins are A B, A A, A B: four of six in the first place.
    assert found["head_to_head/one_place"] == 1 / 3
    assert found["head_to_head/first_place"] == 4 / 6
    assert found["head_to_head/passed"] == 0.0


def test_scores_worked_by_hand(tmp_path: Path) -> None:
    """q: 5 > 3 right, 5 > 4 right, 3 < 4 wrong, r: equal, s: one answer without a score."""
    asked = [question("q", [1, 2, 3]), question("r", [2, 1]), question("s", [1, 2])]
    scores = {"q-1": 5.0, "q-2": 3.0, "q-3": 4.0, "r-1": 2.0, "r-2": 2.0, "s-1": 1.0, "s-2": None}
    made = records_artifact(tmp_path / "made", judgements=[judgement(name, score) for name, score in scores.items()])
    found = measured(tmp_path, asked, {"scores": made})
    assert found["scores/accuracy"] == (2 + 0.5 + 0.5) / 5
    assert (found["scores/ties"], found["scores/unread"], found["scores/comparisons"]) == (1 / 5, 1 / 5, 5)
    assert not {"scores/one_place", "scores/repeated"} & found.keys()


def test_repeated_samples_agree_where_they_order_two_answers_alike(tmp_path: Path) -> None:
    """Samples of q-1 and q-2: 5>1, 4>2, 3=3. One of three pairs of samples is alike. A judge of one sample has none."""
    made = records_artifact(
        tmp_path / "made",
        judgements=[
            replace(judgement(name, score, n), sample=n)
            for name, row in {"q-1": (5, 4, 3), "q-2": (1, 2, 3)}.items()
            for n, score in enumerate(row, start=1)
        ],
    )
    found = measured(tmp_path, [question("q", [1, 2])], {"judge": made})
    assert found["judge/repeated"] == 1 / 3
    assert found["judge/accuracy"] == 1.0
    assert "judge/accuracy_low" not in found
    assert found["judge/passed"] == 0.0  # One question says nothing of how certain this is.


def test_accuracy_has_the_interval_of_the_questions_and_not_of_the_pairs(tmp_path: Path) -> None:
    """Twenty questions of three pairs, each all right or all wrong, are as uncertain as twenty pairs."""
    asked = [question(f"q{n}", [1, 2, 3]) for n in range(20)]
    right = [judgement(f"q{n}-{k}", (1 if n < 14 else -1) * (3.0 - k)) for n in range(20) for k in (1, 2, 3)]
    found = measured(tmp_path, asked, {"scores": records_artifact(tmp_path / "made", judgements=right)})
    assert found["scores/accuracy"] == pytest.approx(0.7)
    draw = random.Random(3)
    means = sorted(sum(draw.random() < 0.7 for _ in range(20)) / 20 for _ in range(4000))
    assert found["scores/accuracy_low"] == pytest.approx(means[100], abs=0.051)
    assert found["scores/accuracy_high"] == pytest.approx(means[3900], abs=0.051)
    assert found["scores/accuracy_low"] < wilson(42, 60).low


@pytest.mark.parametrize(
    ("verdicts", "passed"),
    [
        ((A, B), 1.0),  # always right
        ((B, A), 0.0),  # always wrong
        ((A, A), 0.0),  # always the first place
        ((B, B), 0.0),
        ((C, C), 0.0),  # always a tie
        ((None, None), 0.0),
    ],
)
def test_judge_that_does_not_look_does_not_pass(
    tmp_path: Path, verdicts: tuple[Verdict | None, Verdict | None], passed: float
) -> None:
    asked = [question(f"q{n}", [1, 2]) for n in range(30)]
    made = compared(tmp_path / "made", {(f"q{n}-1", f"q{n}-2"): verdicts for n in range(30)})
    found = measured(tmp_path, asked, {"head_to_head": made})
    assert found["head_to_head/passed"] == passed
    assert found["head_to_head/accuracy"] == {1.0: 1.0}.get(passed, 0.0 if verdicts == (B, A) else 0.5)


def test_judge_that_reads_the_place_more_than_the_answers_does_not_pass_however_right_the_rest_is(
    tmp_path: Path,
) -> None:
    asked = [question(f"q{n}", [1, 2]) for n in range(40)]
    for biased, passed in ((20, 1.0), (21, 0.0)):
        made = compared(
            tmp_path / f"made{biased}",
            {(f"q{n}-1", f"q{n}-2"): (A, A) if n < biased else (A, B) for n in range(40)},
        )
        found = measured(tmp_path / str(biased), asked, {"head_to_head": made})
        assert found["head_to_head/one_place"] == biased / 40
        assert found["head_to_head/accuracy_low"] > 0.5
        assert found["head_to_head/passed"] == passed


def test_coin_tosses_pass_hardly_ever(tmp_path: Path) -> None:
    """Two tosses name one place in half of the comparisons, and are right on half; the bar lets few of them through."""
    draw, passed, asked = random.Random(0), 0, [question(f"q{n}", [1, 2, 3]) for n in range(24)]
    pairs = [(f"q{n}-{a}", f"q{n}-{b}") for n in range(24) for a, b in ((1, 2), (1, 3), (2, 3))]
    for study in range(60):
        verdicts = {pair: (draw.choice((A, B)), draw.choice((A, B))) for pair in pairs}
        made = compared(tmp_path / f"made{study}", verdicts)
        found = measured(tmp_path / f"study{study}", asked, {"head_to_head": made})
        assert abs(found["head_to_head/one_place"] - 0.5) < 0.25
        passed += int(found["head_to_head/passed"])
    assert passed <= 5  # 2.5 % are expected, and fewer with the second condition


def test_bar_is_a_setting(tmp_path: Path) -> None:
    asked = [question(f"q{n}", [1, 2]) for n in range(30)]
    made = compared(tmp_path / "made", {(f"q{n}-1", f"q{n}-2"): (A, B) if n < 24 else (A, A) for n in range(30)})
    for number, (bar, passed) in enumerate(
        [({}, 1.0), ({"min_accuracy": 0.9}, 0.0), ({"max_one_place": 0.1}, 0.0), ({"max_one_place": 0.2}, 1.0)]
    ):
        assert measured(tmp_path / str(number), asked, {"h": made}, **bar)["h/passed"] == passed
    for wrong in ({"min_accuracy": 0.4}, {"max_one_place": 1.5}, {"comparisons": -1}):
        with pytest.raises(SelfalignError, match=f"evaluate.instruments.{next(iter(wrong))}"):
            InstrumentTest(**wrong)  # pyright: ignore[reportArgumentType]


# --- comparing ranked answers ------------------------------------------------------------------------------------


def by_server(folder: Path, questions: Sequence[RankedAnswers], says: Any, comparisons: int = 0) -> Counts:
    """Ranked answers compared by a server that says a letter of (first text, second text)."""

    def reply(body: dict[str, Any]) -> bytes:
        shown = body["messages"][0]["content"]
        first, second = (re.search(rf"<{place}>\n(.*?)\n</{place}>", shown, re.DOTALL) for place in ("first", "second"))
        assert first
        assert second
        return chat(says(first[1], second[1]))

    with chat_server(reply) as server:
        judge = HeadToHead(
            prompt=PROMPT, endpoint=Endpoint(base_url=server.url, model="m", api_key_env="", concurrency=2)
        )
        return compare_ranked(
            workspace(folder / "out"), judge=judge, policy=None, ranked=ranked(folder / "asked", questions),
            comparisons=comparisons, engine=FP32, seed=1,
        )  # fmt: skip


def rank_in(text: str) -> int:
    return int(text.rpartition(" ")[2])


def test_judge_that_knows_the_ranks_is_right_on_every_pair(tmp_path: Path) -> None:
    asked = [question("q", [2, 1, 3]), question("r", [4, 2, 1, 3])]
    counts = by_server(tmp_path, asked, lambda a, b: "[[A]]" if rank_in(a) < rank_in(b) else "[[B]]")
    assert (counts["comparisons"], counts["judge/position_bias"]) == (3 + 6, 0.0)
    found = measured(tmp_path, asked, {"head_to_head": records_artifact(tmp_path / "out")})
    assert (found["head_to_head/accuracy"], found["head_to_head/ties"], found["head_to_head/unread"]) == (1, 0, 0)


def test_judge_that_names_the_first_place_is_told_by_its_figures(tmp_path: Path) -> None:
    asked = [question(f"q{n}", [2, 1, 3]) for n in range(4)]
    by_server(tmp_path, asked, lambda a, b: "[[A]]")
    found = measured(tmp_path, asked, {"head_to_head": records_artifact(tmp_path / "out")})
    assert {name: found[f"head_to_head/{name}"] for name in ("accuracy", "ties", "one_place", "first_place")} == {
        "accuracy": 0.5, "ties": 1.0, "one_place": 1.0, "first_place": 1.0,
    }  # fmt: skip


def test_unread_verdicts_stop_nothing_and_are_counted(tmp_path: Path) -> None:
    asked = [question(f"q{n}", [2, 1]) for n in range(4)]
    counts = by_server(tmp_path, asked, lambda a, b: "Well.")
    assert counts["dropped"] == {"unread_comparison": 4}
    found = measured(tmp_path, asked, {"head_to_head": records_artifact(tmp_path / "out")})
    assert (found["head_to_head/unread"], found["head_to_head/accuracy"], found["head_to_head/passed"]) == (1, 0.5, 0)


def test_pairs_are_drawn_from_all_questions_as_evenly_as_can_be(tmp_path: Path) -> None:
    made = ranked(tmp_path / "asked", [question("q", [1, 2, 3, 4]), question("r", [1, 2]), question("s", [1, 2, 3])])
    asked = read_records(made.path / "instructions.jsonl", Instruction)
    given = read_records(made.path / "responses.jsonl", Response)
    every = ranked_pairs(asked, given, 0, seed=0)
    assert len({pair.id for pair in every}) == len(every) == 6 + 1 + 3
    assert all(pair.first.instruction_id == pair.second.instruction_id for pair in every)
    for count in (3, 5, 7):
        drawn = ranked_pairs(asked, given, count, seed=0)
        each = [sum(pair.first.instruction_id == name for pair in drawn) for name in ("q", "r", "s")]
        assert sum(each) == count
        assert each[1] == 1
        assert abs(each[0] - each[2]) <= 1
    several = {tuple(pair.id for pair in ranked_pairs(asked, given, 3, seed=seed)) for seed in range(20)}
    assert len(several) > 5


def test_policy_compares_like_head_to_head_and_takes_its_preference_for_a_place_off(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    asked = [question(f"q{n}", [2, 1, 3]) for n in range(6)]
    policy, given = policy_artifact(nudged_policy(tiny_policy, tmp_path / "nudged", 0.2)), ranked(tmp_path / "r", asked)
    bias: list[float] = []
    for debiased in (False, True):
        counts = compare_ranked(
            workspace(tmp_path / f"out{debiased}"), judge=HeadToHead(prompt=PROMPT, debias_position=debiased),
            policy=policy, ranked=given, comparisons=0, engine=FP32, seed=1,
        )  # fmt: skip
        bias.append(counts["judge/position_bias"])
    assert bias[1] < bias[0]
    assert math.isfinite(counts["judge/position_bias_nats"])
