import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import artifact, demonstration, instruction, judgement, preference, records_artifact, response, workspace
from mutation import assert_caught

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import (
    Demonstration,
    FinishReason,
    Instruction,
    LabelledResponse,
    Message,
    PreferencePair,
    Response,
    ResponseScore,
)
from selfalign.data.pair_rules import AllOrdered, BestVsK, BestWorst, PairRule, RandomPair
from selfalign.data.turns import as_prompt, as_text
from selfalign.stages import pair as module
from selfalign.stages.pair import Labels, PositivesOnly, Rule, gather_pairs, given_pairs, pair, replay_pairs

Scores = dict[str, list[float | None]]
"""{response id: the scores of its judgements}."""


def made(
    folder: Path,
    scores: Scores,
    rule: Rule | None = None,
    answers: list[Response] | None = None,
    seed: int = 0,
    second: dict[str, float] | None = None,
):
    """Runs the stage on one response for every name; returns its counts and the pairs."""
    names = list(scores)
    asked = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in names))
    judgements = [judgement(name, score, n) for name in names for n, score in enumerate(scores[name], start=1)]
    place = records_artifact(
        folder / "given",
        instructions=[instruction(name) for name in asked],
        responses=answers or [response(name) for name in names],
        judgements=judgements,
    )
    counts = pair(
        workspace(folder / "out"),
        rule=rule or BestWorst(),
        instructions=place,
        responses=place,
        judgements=place,
        seed=seed,
        second=None if second is None else records_artifact(folder / "second", scores=scored(second)),
    )
    kinds = {PositivesOnly: ("demonstrations", Demonstration), Labels: ("labelled", LabelledResponse)}
    name, kind = kinds.get(type(rule), ("pairs", PreferencePair))
    return counts, read_records(folder / "out" / f"{name}.jsonl", kind)


def scored(scores: dict[str, float]) -> list[ResponseScore]:
    return [ResponseScore(id=name, score=score, valid=1, variance=None) for name, score in scores.items()]


@pytest.mark.parametrize(("kind", "smoothings"), [("each", [0.0, 1.0]), ("mean", [0.5, 0.5])])
def test_pairs_are_smoothed_by_how_far_a_second_judge_disagrees(
    tmp_path: Path, kind: str, smoothings: list[float]
) -> None:
    scores: Scores = {"a-1": [1], "a-2": [2], "b-1": [1], "b-2": [2]}
    second = {"a-1": 10.0, "a-2": 20.0, "b-1": 20.0, "b-2": 10.0}
    counts, pairs = made(tmp_path, scores, BestWorst(consistency=kind), second=second)
    assert [pair.label_smoothing for pair in pairs] == smoothings
    assert counts["consistency"] == 0.5


def test_instruction_that_the_second_judge_did_not_score_has_the_mean_consistency(tmp_path: Path) -> None:
    scores: Scores = {"a-1": [1], "a-2": [2], "b-1": [1], "b-2": [2], "c-1": [1], "c-2": [2]}
    second = {"a-1": 10.0, "a-2": 20.0, "b-1": 20.0, "b-2": 10.0, "c-1": 3.0}
    _, pairs = made(tmp_path, scores, BestWorst(consistency="each"), second=second)
    assert [pair.label_smoothing for pair in pairs] == [0.0, 1.0, 0.5]


def test_highest_mean_is_chosen_and_lowest_rejected(tmp_path: Path) -> None:
    scores: Scores = {"a-1": [3], "a-2": [5, 4], "a-3": [4, 4, 4], "a-4": [1, 2]}
    counts, (kept,) = made(tmp_path, scores)
    assert (kept.chosen_id, kept.rejected_id) == ("a-2", "a-4")
    assert (kept.chosen, kept.rejected) == ("Answer a-2", "Answer a-4")
    assert (kept.chosen_score, kept.rejected_score) == (4.5, 1.5)
    assert kept.prompt == as_prompt(instruction("a").text)
    assert kept.instruction_id == "a"
    assert counts["dropped"] == {}
    assert (counts["pairs"], counts["mean_score_margin"], counts["mean_length_difference"]) == (1, 3.0, 0.0)


@pytest.mark.parametrize("rule", [BestWorst(), PositivesOnly(minimum_score=1)], ids=["pairs", "positives"])
def test_scores_are_correlated_with_length_within_each_instruction(
    tmp_path: Path, rule: PairRule | PositivesOnly
) -> None:
    lengths = {"a-1": 10, "a-2": 20, "a-3": 30, "b-1": 900, "b-2": 800, "b-3": 700, "c-1": 5, "c-2": 6}
    scores: Scores = {"a-1": [1], "a-2": [2], "a-3": [3], "b-1": [4], "b-2": [2], "b-3": [3], "c-1": [1], "c-2": [None]}
    answers = [replace(response(name, "x" * (999 - tokens)), tokens=tokens) for name, tokens in lengths.items()]
    counts, _ = made(tmp_path, scores, rule, answers)
    # 1 in a, 1/2 in b; c has one scored response. Over all responses at once it would be another number.
    assert counts["score_length_correlation"] == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.length_correlation.add(found)", "self.length_correlation = RunningMean(found, 1)"),
        ("[r.tokens for r in judged]", "[len(r.text) for r in judged]"),
        (
            "in group.responses if response.id in group.scores]",
            "in group.responses[:2] if response.id in group.scores]",
        ),
    ],
    ids=["of the last instruction alone", "characters", "two of each"],
)
def test_wrong_correlation_with_length_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    given = {"tmp_path": tmp_path, "rule": BestWorst(), "monkeypatch": monkeypatch}
    check = test_scores_are_correlated_with_length_within_each_instruction
    assert_caught(module, sys.modules[__name__], old, new, check, given)


def test_equal_lengths_have_no_correlation_with_the_scores(tmp_path: Path) -> None:
    counts, _ = made(tmp_path, {"a-1": [1], "a-2": [2], "a-3": [3]})
    assert "score_length_correlation" not in counts


def test_mean_is_over_valid_judgements_only(tmp_path: Path) -> None:
    _, (kept,) = made(tmp_path, {"a-1": [2, None, None], "a-2": [1, 2], "a-3": [None, 5, 3]})
    assert (kept.chosen_id, kept.chosen_score) == ("a-3", 4.0)
    assert (kept.rejected_id, kept.rejected_score) == ("a-2", 1.5)


def test_unparsed_judgement_never_becomes_rejected_response(tmp_path: Path) -> None:
    _, (kept,) = made(tmp_path, {"a-1": [None, None], "a-2": [4], "a-3": [3], "a-4": [None]})
    assert (kept.chosen_id, kept.rejected_id) == ("a-2", "a-3")


def test_response_judged_zero_is_a_judged_response(tmp_path: Path) -> None:
    _, (kept,) = made(tmp_path, {"a-1": [0], "a-2": [0.5]})
    assert (kept.chosen_id, kept.rejected_id, kept.rejected_score) == ("a-2", "a-1", 0.0)


def test_every_drop_has_its_reason_and_all_add_up(tmp_path: Path) -> None:
    scores: Scores = {
        "kept-1": [1], "kept-2": [5],
        "tie-1": [3], "tie-2": [3], "tie-3": [3],
        "margin-1": [3], "margin-2": [3.4],
        "edge-1": [3], "edge-2": [3.5],
        "one-1": [4], "one-2": [None],
        "none-1": [None], "none-2": [None],
        "same-1": [1], "same-2": [2],
        "empty-1": [1], "empty-2": [2],
    }  # fmt: skip
    texts = {"same-1": "Alike.", "same-2": "Alike."}
    answers = [response(name, texts.get(name, "")) for name in scores]
    answers[-2] = replace(answers[-2], text="")
    counts, kept = made(tmp_path, scores, BestWorst(minimum_margin=0.5), answers)
    assert counts["dropped"] == {
        "empty_response": 1,
        "too_few_judged": 2,
        "identical": 1,
        "small_margin": 2,
        "tie": 1,
    }
    assert [record.instruction_id for record in kept] == ["kept"]
    assert counts["pairs"] + sum(counts["dropped"].values()) == 8


def test_drops_of_instructions_are_not_mixed_with_drops_of_responses(tmp_path: Path) -> None:
    counts, kept = made(tmp_path, {"a-1": [1], "a-2": [2], "a-3": [None], "b-1": [1], "b-2": [1]})
    assert len(kept) + sum(counts["dropped"].values()) == 2
    assert counts["unjudged_responses"] == 1


def test_equal_scores_at_the_top_do_not_make_a_tie(tmp_path: Path) -> None:
    counts, (kept,) = made(tmp_path, {"a-1": [5], "a-2": [5], "a-3": [1], "a-4": [1]})
    assert (kept.chosen_id, kept.rejected_id) == ("a-1", "a-3")
    assert counts["dropped"] == {}


def test_margin_equal_to_the_minimum_is_too_small(tmp_path: Path) -> None:
    counts, kept = made(tmp_path, {"a-1": [1], "a-2": [2], "b-1": [1], "b-2": [2.25]}, BestWorst(minimum_margin=1))
    assert [record.instruction_id for record in kept] == ["b"]
    assert counts["dropped"] == {"small_margin": 1}


def test_too_few_pairs_stop_the_run_with_the_reasons(tmp_path: Path) -> None:
    scores: Scores = {"a-1": [1], "a-2": [1], "b-1": [2], "b-2": [None], "c-1": [1], "c-2": [4]}
    with pytest.raises(SelfalignError) as stop:
        made(tmp_path, scores, BestWorst(minimum_pairs=2))
    message = str(stop.value)
    assert message.startswith("stage: 1 pairs from 3 instructions, fewer than pair.minimum_pairs=2")
    assert "'tie': 1" in message
    assert "'too_few_judged': 1" in message
    assert not (tmp_path / "out/pairs.jsonl").exists()


def test_all_candidates_alike_stop_the_run(tmp_path: Path) -> None:
    scores: Scores = {"a-1": [3], "a-2": [2], "b-1": [4], "b-2": [1]}
    answers = [response(name, "Always the same.") for name in scores]
    with pytest.raises(SelfalignError, match=r"0 pairs from 2 instructions.*'identical': 2"):
        made(tmp_path, scores, answers=answers)


def test_cut_responses_are_marked_so_that_no_end_is_taught(tmp_path: Path) -> None:
    answers = [response("a-1", "Cut he", reason=FinishReason.LENGTH), response("a-2", "Whole.")]
    _, (kept,) = made(tmp_path, {"a-1": [5], "a-2": [1]}, answers=answers)
    assert (kept.chosen_finished, kept.rejected_finished) == (False, True)


def test_pairs_of_different_instructions_have_different_ids(tmp_path: Path) -> None:
    scores: Scores = {"a-1": [1], "a-2": [2], "b-1": [1], "b-2": [2]}
    alike = [response(name, {"1": "No.", "2": "Yes."}[name[-1]]) for name in scores]
    _, kept = made(tmp_path, scores, answers=alike)
    assert [record.chosen for record in kept] == ["Yes.", "Yes."]
    assert len({record.id for record in kept}) == 2


def test_length_difference_is_that_of_chosen_less_rejected_in_tokens(tmp_path: Path) -> None:
    tokens = {"a-1": 2, "a-2": 9, "b-1": 7, "b-2": 4}
    answers = [replace(response(name, f"{name} {'long ' * (9 - n)}"), tokens=n) for name, n in tokens.items()]
    counts, _ = made(tmp_path, {"a-1": [1], "a-2": [2], "b-1": [1], "b-2": [5]}, answers=answers)
    assert counts["mean_length_difference"] == ((9 - 2) + (4 - 7)) / 2
    assert counts["mean_score_margin"] == (1 + 4) / 2


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        (BestWorst(), ["4>1"]),
        (BestVsK(k=2), ["4>1", "4>2"]),
        (AllOrdered(), ["4>3", "4>2", "4>1", "3>2", "3>1", "2>1"]),
    ],
)
def test_rule_makes_its_pairs_of_every_instruction(tmp_path: Path, rule: PairRule, pairs: list[str]) -> None:
    scores: Scores = {f"{name}-{n}": [n] for name in "ab" for n in range(1, 5)}
    answers = [response(name, f"{name} alone is this") for name in scores]
    counts, kept = made(tmp_path, scores, rule, answers)
    assert sorted(f"{p.chosen_id[-1]}>{p.rejected_id[-1]}" for p in kept if p.instruction_id == "a") == sorted(pairs)
    assert counts["pairs"] == counts["candidate_pairs"] == len(kept) == 2 * len(pairs)
    assert len({p.id for p in kept}) == len(kept)
    assert all(p.chosen_id[0] == p.rejected_id[0] == p.instruction_id for p in kept)


def test_random_pair_depends_on_seed_and_instruction_alone(tmp_path: Path) -> None:
    scores: Scores = {f"{name}-{n}": [n] for name in "abcdefgh" for n in range(1, 5)}

    def drawn(folder: str, seed: int, given: Scores = scores) -> dict[str, str]:
        _, kept = made(tmp_path / folder, given, RandomPair(), seed=seed)
        return {p.instruction_id: f"{p.chosen_id}>{p.rejected_id}" for p in kept}

    one = drawn("one", 1)
    assert drawn("again", 1) == one
    assert drawn("other", 2) != one
    assert len({pair.replace(name, "") for name, pair in one.items()}) > 2, "every instruction draws the same"
    backwards = dict(reversed([*scores.items()]))
    assert drawn("some", 1, {name: s for name, s in scores.items() if name[0] in "ch"}) == {n: one[n] for n in "ch"}
    assert drawn("turned", 1, dict(sorted(backwards.items(), key=lambda item: -ord(item[0][0])))) == one


def test_unjudged_responses_are_counted_and_never_paired_by_any_rule(tmp_path: Path) -> None:
    scores: Scores = {"a-1": [1], "a-2": [None], "a-3": [3], "a-4": [2], "b-1": [None], "b-2": [5]}
    for n, rule in enumerate((BestWorst(), RandomPair(), AllOrdered(), BestVsK(k=3))):
        counts, kept = made(tmp_path / str(n), scores, rule)
        assert not {"a-2", "b-1"} & {name for p in kept for name in (p.chosen_id, p.rejected_id)}
        assert all(p.chosen_score > p.rejected_score for p in kept)
        assert counts["unjudged_responses"] == 2
        assert counts["pairs"] + sum(counts["dropped"].values()) == counts["candidate_pairs"]


def test_later_iterations_can_train_on_all_pairs_so_far(tmp_path: Path) -> None:
    scores: list[Scores] = [{"a-1": [1], "a-2": [2]}, {"b-1": [1], "b-2": [2], "c-1": [5], "c-2": [4]}]
    for rule, name, kind in (
        (BestWorst(), "pairs", PreferencePair),
        (PositivesOnly(minimum_score=2), "demonstrations", Demonstration),
        (Labels(), "labelled", LabelledResponse),
    ):
        folder = tmp_path / name
        parts = [made(folder / str(n), given, rule)[1] for n, given in enumerate(scores)]
        places = [artifact(folder / str(n) / "out") for n in range(2)]
        counts = gather_pairs(workspace(folder / "all"), parts=places)
        gathered = read_records(folder / f"all/{name}.jsonl", kind)
        assert gathered == [*parts[0], *parts[1]]
        assert counts == {name: len(gathered)}


def test_gathered_records_whose_ids_two_given_files_share_are_named_by_their_content(tmp_path: Path) -> None:
    asked, taught = demonstration("1", "Why is the sky blue?"), demonstration("1", "Name a bird.", "A wren.")
    others = [taught, demonstration("2", "Name a fish.", "A carp.")]
    parts = [
        records_artifact(tmp_path / "M1", demonstrations=[asked]),
        records_artifact(tmp_path / "positives", demonstrations=others),
    ]
    counts = gather_pairs(workspace(tmp_path / "all"), parts=parts)
    assert counts == {"demonstrations": 3}, "M1's are no positives"
    [first, second, third] = read_records(tmp_path / "all" / "demonstrations.jsonl", Demonstration)
    assert [first, third] == [asked, others[1]]
    assert second.id not in ("1", "2")
    assert replace(second, id="1") == taught


def replayed(folder: Path, share: float, own: int, given: int, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Runs the stage; returns its counts and the ids of what it drew."""
    ours = records_artifact(folder / "own", pairs=[preference(f"o{n}", "Ask.", "Good.", "No.") for n in range(own)])
    others = [preference(f"g{n}", f"Ask {n}.", "Good.", "No.") for n in range(given)]
    source = records_artifact(folder / "given", pairs=others)
    counts = replay_pairs(workspace(folder / f"{seed}"), share=share, pairs=[ours, ours], given=source, seed=seed)
    return counts, [pair.id for pair in read_records(folder / f"{seed}/pairs.jsonl", PreferencePair)]


@pytest.mark.parametrize(("share", "drawn"), [(0.5, 6), (0.25, 2), (0.1, 1), (0.6, 9), (0.01, 1)])
def test_replayed_pairs_are_their_share_of_all(tmp_path: Path, share: float, drawn: int) -> None:
    """Beside six own pairs, n given ones are a share of n / (6 + n); one is drawn at least."""
    counts, ids = replayed(tmp_path, share, own=3, given=20)
    assert len(set(ids)) == len(ids) == drawn
    assert counts == {"replayed_pairs": drawn, "replayed_pairs_missing": 0}


def test_seed_draws_the_replayed_pairs_and_they_stay_in_their_order(tmp_path: Path) -> None:
    draws = [replayed(tmp_path, 0.5, own=3, given=20, seed=seed)[1] for seed in (0, 1, 2, 0)]
    assert draws[0] == draws[3]
    assert len({tuple(ids) for ids in draws}) == 3
    assert all(ids == sorted(ids, key=lambda one: int(one[1:])) for ids in draws)


def test_too_few_pairs_to_replay_are_all_taken_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts, ids = replayed(tmp_path, 0.5, own=3, given=4)
    assert ids == ["g0", "g1", "g2", "g3"]
    assert counts == {"replayed_pairs": 4, "replayed_pairs_missing": 2}
    [line] = caplog.messages
    assert line.endswith(
        "data.replay.share=0.5 of 6 own pairs takes 6 given ones, but data.replay.source has 4 usable: all are taken, "
        "a share of 0.400"
    )


@pytest.mark.parametrize("name", ["instructions", "responses", "scores"])
def test_files_in_another_order_are_refused_and_not_joined_by_chance(tmp_path: Path, name: str) -> None:
    made(tmp_path, {"a-1": [1], "a-2": [2], "b-1": [1], "b-2": [2]})
    file = tmp_path / f"given/{name}.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    place = artifact(tmp_path / "given")
    with pytest.raises(SelfalignError, match=r"(responses|scores)\.jsonl: record for '[ab](-[12])?' is missing or out"):
        pair(
            workspace(tmp_path / "again"),
            rule=BestWorst(),
            instructions=place,
            responses=place,
            judgements=place,
            seed=0,
        )
    assert not (tmp_path / "again/pairs.jsonl").exists()


# --- positives ---------------------------------------------------------------------------------------------------


def test_responses_with_the_score_become_demonstrations(tmp_path: Path) -> None:
    scores: Scores = {"a-1": [5, 5], "a-2": [5, 4], "b-1": [5], "b-2": [0]}
    counts, kept = made(tmp_path, scores, PositivesOnly())
    assert [(d.id, d.response, d.source) for d in kept] == [
        ("a-1", "Answer a-1", "positive"),
        ("b-1", "Answer b-1", "positive"),
    ]
    assert kept[0].prompt == as_prompt(instruction("a").text)
    assert counts == {"positives": 2, "dropped": {"low_score": 2}}


def test_score_equal_to_the_minimum_is_good_enough(tmp_path: Path) -> None:
    _, kept = made(tmp_path, {"a-1": [4], "a-2": [3.99]}, PositivesOnly(minimum_score=4))
    assert [record.id for record in kept] == ["a-1"]


def test_cut_and_empty_responses_are_no_positives(tmp_path: Path) -> None:
    blank = Response(id="a-2", instruction_id="a", text="", finish_reason=FinishReason.EOS, tokens=0, model="m")
    answers = [response("a-1"), blank, response("a-3", "Cut he", reason=FinishReason.LENGTH)]
    counts, kept = made(tmp_path, {"a-1": [5], "a-2": [5], "a-3": [5]}, PositivesOnly(), answers)
    assert [record.id for record in kept] == ["a-1"]
    assert counts["dropped"] == {"cut_response": 1, "empty_response": 1}


def test_every_response_is_a_positive_or_counted_as_dropped(tmp_path: Path) -> None:
    counts, kept = made(tmp_path, {"a-1": [5], "a-2": [1], "a-3": [None], "a-4": [None, None]}, PositivesOnly())
    assert len(kept) + sum(counts["dropped"].values()) == 4


def test_too_few_positives_stop_the_run_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"1 responses score 5.0 or more.*minimum_examples=2.*'low_score': 1"):
        made(tmp_path, {"a-1": [5], "a-2": [4.9]}, PositivesOnly(minimum_examples=2))


# --- labels ------------------------------------------------------------------------------------------------------


def test_responses_above_the_mean_of_their_instruction_are_desirable_and_those_below_undesirable(
    tmp_path: Path,
) -> None:
    """The means are 3 and 2; one that equals it, and one without a score, are neither."""
    scores: Scores = {"a-1": [1, 2], "a-2": [5], "a-3": [3], "a-4": [2.5], "b-1": [1], "b-2": [3], "b-3": [None]}
    counts, kept = made(tmp_path, scores, Labels())
    assert [(one.id, one.desirable, one.score) for one in kept] == [
        ("a-1", False, 1.5),
        ("a-2", True, 5.0),
        ("a-4", False, 2.5),
        ("b-1", False, 1.0),
        ("b-2", True, 3.0),
    ]
    assert (kept[0].prompt, kept[0].response) == (as_prompt(instruction("a").text), "Answer a-1")
    assert (kept[0].instruction_id, kept[0].response_id) == ("a", "a-1")
    numbers = {name: counts[name] for name in ("labelled", "desirable", "dropped")}
    assert numbers == {"labelled": 5, "desirable": 2, "dropped": {"tie": 1, "unjudged": 1}}


def test_responses_from_the_threshold_on_are_desirable_whatever_the_others_score(tmp_path: Path) -> None:
    scores: Scores = {"a-1": [3], "a-2": [5], "b-1": [2.99], "b-2": [1]}
    _, kept = made(tmp_path, scores, Labels(threshold=3))
    assert [one.desirable for one in kept] == [True, True, False, False]


def test_empty_responses_have_no_label_and_cut_ones_only_if_they_may(tmp_path: Path) -> None:
    blank = Response(id="a-1", instruction_id="a", text="", finish_reason=FinishReason.EOS, tokens=0, model="m")
    answers = [blank, response("a-2"), response("a-3"), response("a-4", "Cut he", reason=FinishReason.LENGTH)]
    scores: Scores = {"a-1": [5], "a-2": [1], "a-3": [4], "a-4": [5]}
    counts, kept = made(tmp_path / "all", scores, Labels(), answers)
    assert [(one.id, one.finished) for one in kept] == [("a-2", True), ("a-3", True), ("a-4", False)]
    assert counts["dropped"] == {"empty_response": 1}
    counts, kept = made(tmp_path / "finished", scores, Labels(finished_only=True), answers)
    assert [one.id for one in kept] == ["a-2", "a-3"]
    assert counts["dropped"] == {"empty_response": 1, "unfinished": 1}


def test_labels_of_one_kind_alone_stop_the_run_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"2 desirable and 0 undesirable .*minimum_examples=1 .*'unjudged': 1"):
        made(tmp_path, {"a-1": [5], "a-2": [4], "b-1": [None]}, Labels(threshold=3))


# --- given pairs -------------------------------------------------------------------------------------------------


NOTHING: dict[str, Any] = {"held_out": [], "set_aside": 0, "trained_on": []}
"""No instruction that must not be asked, and no pair to set aside."""


def test_given_pairs_are_pairs_and_their_chosen_responses_demonstrations(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Why?", "chosen": " Because.", "rejected": " No."},
        {
            "prompt": [{"role": "user", "content": "How?"}],
            "chosen": [{"role": "assistant", "content": "So."}],
            "rejected": [{"role": "assistant", "content": "Never."}],
        },
        {"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."},
        {"prompt": "Empty?", "chosen": "Yes.", "rejected": " "},
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = given_pairs(workspace(tmp_path / "out"), source=str(source), count=0, content="d", **NOTHING)
    pairs = read_records(tmp_path / "out/pairs.jsonl", PreferencePair)
    assert counts == {"pairs": 2, "dropped": {"empty_response": 1, "identical": 1}}
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ("Why?", " Because.", " No."),
        (as_prompt("How?"), "So.", "Never."),
    ]
    demonstrations = read_records(tmp_path / "out/demonstrations.jsonl", Demonstration)
    assert [(d.prompt, d.response) for d in demonstrations] == [(p.prompt, p.chosen) for p in pairs]


def test_given_pairs_do_not_ask_what_is_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}]
    for asked in ("How?", "Who?"):
        turns = [{"role": "user", "content": asked}]
        answers = [[{"role": "assistant", "content": text}] for text in ("So.", "Never.")]
        rows.append({"prompt": turns, "chosen": answers[0], "rejected": answers[1]})
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [
        records_artifact(tmp_path / name, instructions=[instruction("q", text)])
        for name, text in (("questions", "Who? \n"), ("ranked", " Why?"))
    ]
    counts = given_pairs(
        workspace(tmp_path / "out"), source=str(source), count=1, content="d", **NOTHING | {"held_out": parts}
    )
    assert counts == {"pairs": 1, "dropped": {"held_out": 2}}
    for name, kind in (("pairs", PreferencePair), ("demonstrations", Demonstration)):
        assert [made.prompt for made in read_records(tmp_path / f"out/{name}.jsonl", kind)] == [as_prompt("How?")]


def test_given_pairs_do_not_ask_what_is_held_out_under_a_system_turn_or_as_a_conversation(tmp_path: Path) -> None:
    """The one is asked under a system turn, the other goes on behind an answer; pairs have them in other places."""

    def turns(*texts: str) -> list[Message]:
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, texts, strict=False)]

    dialogue = turns("Who?", "He.", "And then?")
    asked = [[{"role": "system", "content": "Be brief."}, *turns("How?")], dialogue]
    held_out = [Instruction(id=str(n), text=as_text(one), source="given", turns=one) for n, one in enumerate(asked)]
    rows = [
        {"prompt": turns("How?"), "chosen": "So.", "rejected": "Never."},
        {"prompt": turns("Who?", "She.", "And then?"), "chosen": "Home.", "rejected": "No."},
        {"prompt": dialogue, "chosen": "Home.", "rejected": "Away."},
        {"prompt": turns("Who?", "He.", "And then?", "Home.", "Why?"), "chosen": "Rain.", "rejected": "Snow."},
        {
            "prompt": dialogue[:1],
            "chosen": [*dialogue[1:], {"role": "assistant", "content": "Out."}],
            "rejected": [{"role": "assistant", "content": "You."}],
        },
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [records_artifact(tmp_path / "questions", instructions=held_out)]
    counts = given_pairs(
        workspace(tmp_path / "out"), source=str(source), count=0, content="d", **NOTHING | {"held_out": parts}
    )
    [kept] = read_records(tmp_path / "out/pairs.jsonl", PreferencePair)
    assert counts == {"pairs": 1, "dropped": {"held_out": 4}}
    assert kept.prompt == turns("Who?", "She.", "And then?")


def test_given_ranked_answers_are_the_best_against_the_worst(tmp_path: Path) -> None:
    answers = [{"text": t, "rank": r, "score": s} for t, r, s in (("Fair.", 2, 3), ("Bad.", 3, 1), ("Good.", 1, 5))]
    plain = [{"text": "Yes.", "rank": 1}, {"text": "No.", "rank": 2}]
    rows = [{"id": "a", "instruction": "Why?", "responses": answers}, {"instruction": "How?", "responses": plain}]
    source = tmp_path / "ranked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given_pairs(workspace(tmp_path / "out"), source=str(source), count=0, content="d", **NOTHING)
    pairs = read_records(tmp_path / "out/pairs.jsonl", PreferencePair)
    assert [(p.prompt, p.chosen, p.rejected, p.chosen_score, p.rejected_score) for p in pairs] == [
        (as_prompt("Why?"), "Good.", "Bad.", 5, 1),
        (as_prompt("How?"), "Yes.", "No.", None, None),
    ]


def test_too_few_pairs_to_set_aside_are_noticed_with_the_data(tmp_path: Path) -> None:
    """Four pairs: two of one instruction, and one whose response is taught."""
    rows = [
        {"prompt": asked, "chosen": f"Yes {n}.", "rejected": f"No {n}."}
        for n, asked in enumerate(("Why?", "Why?", "How?", "Who?"))
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seeds = records_artifact(tmp_path / "seeds", demonstrations=[demonstration("d", "When?", "No 3.")])
    given = {"source": str(source), "count": 0, "content": "d", **NOTHING}
    with pytest.raises(
        SelfalignError, match=r"train\.validation_pairs=3, but only 2 of 4 pairs share .* \(1 share one with the"
    ):
        given_pairs(workspace(tmp_path / "out"), **given | {"set_aside": 3, "trained_on": [seeds]})
    counts = given_pairs(workspace(tmp_path / "out"), **given | {"set_aside": 2, "trained_on": [seeds]})
    assert counts == {"pairs": 4, "dropped": {}}, "they are set aside where they are trained on"


def test_given_pairs_whose_scores_contradict_them_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Why {n}?", "chosen": "Yes.", "rejected": "No.", "chosen_score": n, "rejected_score": 2}
        for n in range(5)
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[4]]))
    counts = given_pairs(workspace(tmp_path / "out"), source=str(source), count=0, content="d", **NOTHING)
    assert counts == {"pairs": 2, "dropped": {"duplicate": 1, "scores_contradict": 2, "tie": 1}}


def test_given_data_without_a_usable_pair_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps({"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."}) + "\n")
    with pytest.raises(SelfalignError, match=r"no usable pair \(dropped: \{'identical': 1\}\)"):
        given_pairs(workspace(tmp_path / "out"), source=str(source), count=0, content="d", **NOTHING)


@pytest.mark.parametrize(
    ("rule", "settings", "named"),
    [
        (BestWorst, {"minimum_margin": -0.1}, r"pair\.minimum_margin"),
        (BestWorst, {"minimum_pairs": 0}, r"pair\.minimum_pairs"),
        (RandomPair, {"length_control": 1}, r"pair\.length_control"),
        (RandomPair, {"length_control": -0.1}, r"pair\.length_control"),
        (RandomPair, {"length_control": True}, r"pair\.length_control"),
        (RandomPair, {"length_control": [0.1, None]}, r"pair\.length_control"),
        (RandomPair, {"length_control": []}, r"pair\.length_control"),
        (AllOrdered, {"max_similarity": 1.1}, r"pair\.max_similarity"),
        (AllOrdered, {"minimum_margin": float("nan")}, r"pair\.minimum_margin"),
        (BestVsK, {"k": 0}, r"pair\.k"),
        (BestVsK, {"minimum_pairs": 0}, r"pair\.minimum_pairs"),
        (PositivesOnly, {"minimum_examples": 0}, r"pair\.minimum_examples"),
    ],
)
def test_value_out_of_range_is_refused_with_its_key(rule: type, settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=named):
        rule(**settings)
