import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    RUBRIC,
    artifact,
    demonstration,
    judgement,
    loaded,
    nudged_policy,
    optimization,
    policy_artifact,
    preference,
    records_artifact,
    workspace,
)
from declared import declaration
from mutation import assert_caught
from scipy import stats

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import (
    Instruction,
    PairMargin,
    PairReference,
    PairTokens,
    PreferencePair,
    RankedAnswers,
    Response,
)
from selfalign.engines.openai_client import Endpoint
from selfalign.judges.expected import ExpectedScore
from selfalign.judges.external import ExternalScore
from selfalign.losses.refinement import Augmentation, Refinement, augment
from selfalign.metrics.intervals import wilson
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages import preference_accuracy as module
from selfalign.stages.evaluate import PreferenceTest
from selfalign.stages.preference_accuracy import preference_accuracy, preference_test
from selfalign.stages.reference_logprobs import reference_logprobs
from selfalign.store.artifacts import Artifact, Counts

# log-probabilities of (chosen, rejected) given x and given p⊕x; the reference's are all -10.
OWN = {
    "a": (-8.0, -11.0, -7.0, -9.0),
    "b": (-9.0, -8.0, -10.0, -12.0),
    "c": (-10.0, -10.0, -9.5, -9.5),
    "d": (-6.0, -9.0, -11.0, -9.0),
    "e": (-9.5, -10.5, -9.0, -9.5),
}
# h:   3, -1, 0, 3, 1;  given p⊕x:  2, 2, 0, -2, 0.5.
SCORES = {"a": (5.0, 1.0), "b": (2.0, 3.0), "c": (4.0, 4.0), "d": (3.0, None), "e": (4.0, 2.0)}


def logps(folder: Path, values: dict[str, tuple[float, ...]]) -> Artifact:
    """What a policy makes of the pairs, as the reference stage leaves it."""
    records = [
        PairReference(id=name, chosen=row[0], rejected=row[1], augmented_chosen=row[2], augmented_rejected=row[3])
        for name, row in values.items()
    ]
    return replace(records_artifact(folder, references=records), counts={"prompts_cut": 1})


def given(name: str, prompt: str = "") -> PreferencePair:
    chosen, rejected = SCORES[name]
    pair = preference(name, prompt or f"Ask {name}.", f"Good {name}.", f"Bad {name}.")
    return replace(pair, chosen_score=chosen, rejected_score=rejected)


def measured(
    folder: Path,
    *,
    pairs: Sequence[PreferencePair] = tuple(map(given, OWN)),
    own: dict[str, tuple[float, ...]] = OWN,
    trained_on: Sequence[Artifact] = (),
    scores: Artifact | None = None,
) -> tuple[Counts, list[PairMargin]]:
    """Runs the stage at β = 0.5 against a reference that finds every response equally likely."""
    out = workspace(folder / "out")
    counts = preference_accuracy(
        out,
        pairs=records_artifact(folder / "pairs", pairs=pairs),
        trained_on=list(trained_on),
        policy=logps(folder / "own", own),
        reference=logps(folder / "reference", dict.fromkeys(own, (-10.0, -10.0, -10.0, -10.0))),
        scores=scores,
        beta=0.5,
    )
    return counts, read_records(out.path / "preferences.jsonl", PairMargin)


def test_rewards_and_refinement_are_worked_by_hand(tmp_path: Path) -> None:
    counts, records = measured(tmp_path)
    assert [record.margin for record in records] == [1.5, -0.5, 0.0, 1.5, 0.5]
    assert [record.delta for record in records] == [1.0, 1.0, 0.0, -1.0, 0.25]
    assert (records[0].chosen, records[0].rejected) == (2.0, -1.0)
    assert (records[0].augmented_chosen, records[0].augmented_rejected) == (3.0, 1.0)
    assert counts["preferences/rewards/margins"] == pytest.approx(3.0 / 5)
    # One pair is tied, given x and given p⊕x; three of five have the larger reward, and three of five have Δ > 0.
    assert counts["preferences/rewards/accuracies"] == counts["preferences/rewards/accuracies_augmented"] == 3 / 5
    assert counts["preferences/rewards/ties"] == counts["preferences/rewards/ties_augmented"] == 1 / 5
    assert counts["preferences/refinement/mean"] == pytest.approx(1.25 / 5)
    assert counts["preferences/refinement/std"] == pytest.approx(np.std([1, 1, 0, -1, 0.25]))
    assert counts["preferences/pairs"] == 5
    assert counts["dropped"] == {"trained_on": 0, "too_long": 0}
    assert counts["prompts_cut"] == 1


def test_correlations_are_scipys_over_the_pairs_whose_responses_both_have_a_score(tmp_path: Path) -> None:
    counts, records = measured(tmp_path)
    assert [record.score_difference for record in records] == [4.0, -1.0, 0.0, None, 2.0]
    assert counts["preferences/scored"] == 4
    differences = [4.0, -1.0, 0.0, 2.0]
    for name, values in (("margin", [1.5, -0.5, 0.0, 0.5]), ("delta", [1.0, 1.0, 0.0, 0.25])):
        for kind, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            expected = function(values, differences).statistic
            assert counts[f"preferences/{name}_score_{kind}"] == pytest.approx(expected)


def test_every_number_follows_from_the_records_alone(tmp_path: Path) -> None:
    counts, records = measured(tmp_path)
    margins, deltas = np.array([r.margin for r in records]), np.array([r.delta for r in records])
    assert counts["preferences/rewards/margins"] == pytest.approx(margins.mean())
    assert counts["preferences/rewards/accuracies"] == (margins > 0).mean()
    assert counts["preferences/refinement/mean"] == pytest.approx(deltas.mean())
    assert [0.5 * (r.chosen - r.rejected) for r in records] == margins.tolist()
    assert [0.5 * (r.augmented_chosen - r.augmented_rejected) for r in records] == deltas.tolist()


def test_intervals_are_wilsons_for_shares_and_span_their_value_elsewhere(tmp_path: Path) -> None:
    names = [f"p{n}" for n in range(40)]
    draw = np.random.default_rng(0)
    own = {name: tuple(draw.normal(-10, 2, 4).tolist()) for name in names}
    pairs = [replace(preference(n, n, "y", "z"), chosen_score=draw.normal(), rejected_score=0.0) for n in names]
    counts, records = measured(tmp_path, pairs=pairs, own=own)
    right = sum(record.margin > 0 for record in records)
    share = wilson(right, 40)
    assert (counts["preferences/rewards/accuracies_low"], counts["preferences/rewards/accuracies_high"]) == (
        share.low,
        share.high,
    )
    positive = wilson(sum(record.delta > 0 for record in records), 40)
    assert counts["preferences/rewards/accuracies_augmented_low"] == positive.low
    ends = [name.removesuffix("_low") for name in counts if name.endswith("_low")]
    assert {"preferences/refinement/std", "preferences/refinement/mean", "preferences/delta_score_spearman"} <= {*ends}
    assert all(counts[f"{n}_low"] < counts[n] < counts[f"{n}_high"] for n in ends)
    known = stats.bootstrap(([r.delta for r in records],), np.mean, method="percentile", rng=1).confidence_interval
    assert counts["preferences/refinement/mean_low"] == pytest.approx(known.low, abs=0.05)
    assert counts["preferences/refinement/mean_high"] == pytest.approx(known.high, abs=0.05)


def test_judge_s_scores_take_the_place_of_those_that_came_with_the_pairs(tmp_path: Path) -> None:
    judged = [
        judgement("a-chosen", 1),
        judgement("a-rejected", 4),
        judgement("b-chosen", 2),
        judgement("b-rejected", None),
    ]
    _, records = measured(tmp_path, scores=records_artifact(tmp_path / "scores", judgements=judged))
    assert [record.score_difference for record in records] == [-3.0, None, None, None, None]


def test_pairs_whose_prompt_was_trained_on_are_dropped_and_counted(tmp_path: Path) -> None:
    pairs = [given("a", "Old question? "), given("b"), replace(given("c"), prompt="As text"), given("d"), given("e")]
    trained = [
        records_artifact(tmp_path / "earlier", pairs=[preference("x", "Old question?", "y", "z")]),
        records_artifact(
            tmp_path / "seeds", demonstrations=[demonstration("i", "As text"), demonstration("j", "New.")]
        ),
    ]
    counts, records = measured(tmp_path, pairs=pairs, trained_on=trained)
    assert [record.id for record in records] == ["b", "d", "e"]
    assert counts["dropped"] == {"trained_on": 2, "too_long": 0}
    assert counts["preferences/pairs"] == 3


def test_pairs_with_a_response_that_was_trained_on_are_dropped_and_counted(tmp_path: Path) -> None:
    trained = [
        records_artifact(tmp_path / "earlier", pairs=[preference("x", "Another question?", "Bad a.", "z")]),
        records_artifact(tmp_path / "seeds", demonstrations=[demonstration("i", "Some.", "Good c. ")]),
    ]
    counts, records = measured(tmp_path, trained_on=trained)
    assert [record.id for record in records] == ["b", "d", "e"]
    assert counts["dropped"] == {"trained_on": 2, "too_long": 0}


def test_pairs_that_were_not_scored_for_their_length_are_counted(tmp_path: Path) -> None:
    own = {name: row for name, row in OWN.items() if name != "b"}
    counts, records = measured(tmp_path, own=own)
    assert [record.id for record in records] == ["a", "c", "d", "e"]
    assert counts["dropped"] == {"trained_on": 0, "too_long": 1}


def test_no_pair_left_stops_with_the_setting_s_name(tmp_path: Path) -> None:
    trained = [records_artifact(tmp_path / "earlier", pairs=[given(name) for name in OWN])]
    with pytest.raises(
        SelfalignError, match=r"no pair of evaluate\.preference_pairs\.source is left .*'trained_on': 5"
    ):
        measured(tmp_path, trained_on=trained)


def test_policy_that_is_its_own_reference_ties_and_is_never_right(tmp_path: Path) -> None:
    counts, _ = measured(tmp_path, own=dict.fromkeys(OWN, (-10.0, -10.0, -10.0, -10.0)))
    assert counts["preferences/rewards/ties"] == 1.0
    assert counts["preferences/rewards/margins"] == counts["preferences/refinement/mean"] == 0.0
    assert counts["preferences/rewards/accuracies"] == counts["preferences/rewards/accuracies_augmented"] == 0.0
    assert not {name for name in counts if "_score_" in name}
    assert all(math.isfinite(value) for value in counts.values() if isinstance(value, float))


@pytest.mark.parametrize("known", [0, 1])
def test_too_few_scores_leave_the_correlations_out(tmp_path: Path, known: int) -> None:
    pairs = [replace(given(name), chosen_score=None) for name in OWN][known:] + [given(name) for name in OWN][:known]
    counts, _ = measured(tmp_path, pairs=pairs)
    assert counts["preferences/scored"] == known
    assert not {name for name in counts if "_score_" in name}


def test_log_probability_that_is_no_number_stops_instead_of_being_averaged(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match="1 pairs, such as b, are missing or not finite"):
        measured(tmp_path, own={**OWN, "b": (-9.0, -8.0, math.nan, -12.0)})


def test_every_number_is_explained(tmp_path: Path) -> None:
    counts, _ = measured(tmp_path)
    assert all(map(declaration, counts.keys() - {"dropped"}))


# --- what it is given --------------------------------------------------------------------------------------------


def test_given_pairs_become_responses_that_a_judge_can_score(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go."},
    ]
    rows = [
        {"id": "1", "prompt": "Say hello", "chosen": "Hello.", "rejected": "No."},
        {"id": "2", "prompt": turns, "chosen": [{"role": "assistant", "content": "Gone."}],
         "rejected": [{"role": "assistant", "content": "Why?"}]},
        {"id": "3", "prompt": "More", "chosen": "a", "rejected": "b"},
    ]  # fmt: skip
    source = tmp_path / "test.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = workspace(tmp_path / "out")
    counts = preference_test(out, source=str(source), count=2, content="c", ranked=None, trained_on=[])
    assert counts == {"pairs": 2, "dropped": {}}
    asked = read_records(out.path / "instructions.jsonl", Instruction)
    answers = read_records(out.path / "responses.jsonl", Response)
    assert [a.text for a in asked] == ["Say hello", "user: Hi.\n\nassistant: Yes?\n\nuser: Go."]
    assert [(a.id, a.instruction_id, a.text) for a in answers] == [
        ("1-chosen", "1", "Hello."),
        ("1-rejected", "1", "No."),
        ("2-chosen", "2", "Gone."),
        ("2-rejected", "2", "Why?"),
    ]


def test_first_pair_of_an_instruction_is_taken_and_the_others_are_counted(tmp_path: Path) -> None:
    """Intervals take pairs as independent of each other, which several of one instruction are not."""
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"id": "1", "prompt": "Why?", "chosen": "a", "rejected": "b"},
        {"id": "2", "prompt": "How?", "chosen": "c", "rejected": "d"},
        {"id": "3", "prompt": [system, {"role": "user", "content": "Why? "}], "chosen": "e", "rejected": "f"},
        {"id": "4", "prompt": "Why?", "chosen": "a", "rejected": "g"},
        {"id": "5", "prompt": "Who?", "chosen": "h", "rejected": "i"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = workspace(tmp_path / "out")
    given: dict[str, Any] = {"count": 3, "content": "c", "ranked": None, "trained_on": []}
    counts = preference_test(out, source=str(tmp_path / "test.jsonl"), **given)
    assert counts == {"pairs": 3, "dropped": {"same_instruction": 2}}
    assert [pair.id for pair in read_records(out.path / "pairs.jsonl", PreferencePair)] == ["1", "2", "5"]


def test_data_without_a_pair_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "same.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    given: dict[str, Any] = {"count": 0, "content": "c", "ranked": None, "trained_on": []}
    with pytest.raises(SelfalignError, match=r"evaluate\.preference_pairs\.source.*identical"):
        preference_test(workspace(tmp_path / "out"), source=str(tmp_path / "same.jsonl"), **given)


def test_pairs_that_are_trained_on_are_told_when_they_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taught = [preference("t1", "Why?", "a", "b"), preference("t2", "How?", "c", "d")]
    trained = records_artifact(tmp_path / "given", pairs=taught)
    source = tmp_path / "test.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": f"right {n}", "rejected": text} for n, text in enumerate("db")]
    given: dict[str, Any] = {"source": str(source), "count": 0, "content": "c", "ranked": None}
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SelfalignError, match=r"test.jsonl: 2 of 2 pairs share a prompt or a response with the trainin"):
        preference_test(workspace(tmp_path / "none"), **given, trained_on=[trained])
    rows.append({"prompt": "Who?", "chosen": "right", "rejected": "wrong"})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "not measured" not in caplog.text
    assert preference_test(workspace(tmp_path / "one"), **given, trained_on=[trained])["pairs"] == 3
    assert (
        "test.jsonl: 2 of 3 pairs share a prompt or a response with the training data and are not measured"
        in caplog.text
    )


def test_ranked_questions_give_their_best_against_their_worst_with_the_humans_scores(tmp_path: Path) -> None:
    questions = [
        RankedAnswers(id="q", instruction="Why?", texts=["b", "d", "a", "c"], ranks=[2, 4, 1, 3], scores=[3, 0, 5, 2],
                      justifications=[""] * 4),
        RankedAnswers(id="r", instruction="How?", texts=["y", "x"], ranks=[7, 3], scores=[], justifications=["", ""]),
    ]  # fmt: skip
    out, ranked = workspace(tmp_path / "out"), records_artifact(tmp_path / "seeds", ranked=questions)
    counts = preference_test(out, source="ranked", count=0, content="", ranked=ranked, trained_on=[])
    assert counts == {"pairs": 2, "dropped": {}}
    q, r = read_records(out.path / "pairs.jsonl", PreferencePair)
    assert (q.prompt, q.chosen, q.rejected) == ([{"role": "user", "content": "Why?"}], "a", "d")
    assert (q.chosen_score, q.rejected_score) == (5, 0)
    assert (r.chosen, r.rejected, r.chosen_score, r.rejected_score) == ("x", "y", None, None)


# --- broken on purpose -------------------------------------------------------------------------------------------

HAND, SCIPY, DROPPED, ANSWERED, JUDGED, FIRST = (
    test_rewards_and_refinement_are_worked_by_hand,
    test_correlations_are_scipys_over_the_pairs_whose_responses_both_have_a_score,
    test_pairs_whose_prompt_was_trained_on_are_dropped_and_counted,
    test_pairs_with_a_response_that_was_trained_on_are_dropped_and_counted,
    test_judge_s_scores_take_the_place_of_those_that_came_with_the_pairs,
    test_first_pair_of_an_instruction_is_taken_and_the_others_are_counted,
)
MUTANTS = [
    ("Δ without p", "refinement(augmented, augmented_ref, beta)", "refinement(plain, plain_ref, beta)", HAND),
    ("Δ without the reference", "*rewards(1.0, augmented, augmented_ref)", "*rewards(1.0, augmented, augmented)", HAND),
    ("β squared", "chosen - rejected,\n", "beta * (chosen - rejected),\n", HAND),
    ("swapped responses", "rows = [(r.chosen, r.rejected,", "rows = [(r.rejected, r.chosen,", HAND),
    ("p and no p swapped", "chosen=columns[2], rejected=columns[3]", "chosen=columns[0], rejected=columns[1]", HAND),
    ("missing score as 0", "None if chosen is None or rejected is None else chosen - rejected",
     "(chosen or 0) - (rejected or 0)", SCIPY),
    ("score of rejected minus chosen", "else chosen - rejected for", "else rejected - chosen for", SCIPY),
    ("correlations swapped", 'MARGIN_SCORE_PEARSON, margins', 'MARGIN_SCORE_PEARSON, deltas', SCIPY),
    ("nothing dropped", "if not known.shares(texts_of_pair(pair))", "", DROPPED),
    ("responses not looked at", "texts_of_pair(pair)", "texts_of(pair.prompt)", ANSWERED),
    ("several pairs an instruction", "if first_of_prompt[texts_of(pair.prompt).own[0]] is pair]", "]", FIRST),
    ("judge ignored", "if scores is None\n", "if True\n", JUDGED),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "check"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutant_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, check: Any) -> None:
    assert_caught(module, sys.modules[__name__], old, new, check, {"tmp_path": tmp_path, "monkeypatch": monkeypatch})


# --- on a real policy --------------------------------------------------------------------------------------------


def log_likelihood(policy: PolicyCheckpoint, prompt: Any, answer: str) -> float:
    """Summed over the answer's tokens and its end, from full logits in double precision."""
    reader = loaded(policy.path)
    text = reader.tokenizer(f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    ids = torch.tensor([text + reader.tokenizer(f"{answer}<|im_end|>")["input_ids"]])
    with torch.no_grad():
        values = reader.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return float(values.gather(1, ids[0, 1:, None])[len(text) - 1 :].sum())


def test_margin_and_refinement_of_a_real_policy_are_those_of_its_full_logits(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    policy, p = nudged_policy(tiny_policy, tmp_path / "policy"), Refinement(prompt="Reach {scale}. ", scale=7)
    pairs = [given(name) for name in ("a", "b", "c")]
    there = records_artifact(tmp_path / "given", pairs=pairs)
    scored: list[Artifact] = []
    for n, files in enumerate((policy, tiny_policy)):
        out = workspace(tmp_path / f"logps{n}")
        precision = optimization().logprob_settings("float32")
        counts = reference_logprobs(
            out, policy=policy_artifact(files), pairs=there, augmentation=p, precision=precision, tokens_of=2
        )
        scored.append(replace(artifact(out.path), counts=counts))
    out = workspace(tmp_path / "out")
    counts = preference_accuracy(
        out, pairs=there, trained_on=[], policy=scored[0], reference=scored[1], scores=None, beta=0.5
    )
    found = read_records(out.path / "preferences.jsonl", PairMargin)
    for pair, record in zip(pairs, found, strict=True):
        for prompt, value in (
            (pair.prompt, record.margin),
            (augment(Augmentation("Reach 7. ", "dialogue"), pair.prompt), record.delta),
        ):
            chosen, rejected = (
                log_likelihood(policy, prompt, text) - log_likelihood(tiny_policy, prompt, text)
                for text in (pair.chosen, pair.rejected)
            )
            assert value == pytest.approx(0.5 * (chosen - rejected), abs=1e-3)
            assert abs(value) > 1e-2
    assert counts["preferences/rewards/margins"] == pytest.approx(sum(r.margin for r in found) / 3)
    tokens = read_records(out.path / "tokens.jsonl", PairTokens)
    assert [one.id for one in tokens] == ["a", "b"]
    for one, record in zip(tokens, found, strict=False):
        assert sum(one.chosen_values) == pytest.approx(0.5 * record.augmented_chosen, abs=1e-3)
        assert sum(one.chosen_values) + sum(one.rejected_values) == pytest.approx(record.delta, abs=1e-3)


# --- settings ----------------------------------------------------------------------------------------------------


SELF, SFT = ExpectedScore(prompt=RUBRIC), ExpectedScore(prompt=RUBRIC, model="sft")


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"count": -1}, "count"), ({"judge": SFT}, "judge"), ({"source": "a.jsonl", "judge": SELF}, r"judge\.model")],
)
def test_impossible_setting_is_refused_with_its_key(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SelfalignError, match=rf"evaluate\.preference_pairs\.{named} "):
        PreferenceTest(**settings)


def test_one_judge_for_all_models_is_accepted() -> None:
    server = ExternalScore(prompt=RUBRIC, endpoint=Endpoint(base_url="http://nowhere/v1", model="m"))
    assert [PreferenceTest(source="a.jsonl", judge=judge).judge for judge in (SFT, server)] == [SFT, server]
