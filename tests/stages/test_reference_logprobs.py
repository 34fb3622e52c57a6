from pathlib import Path

import pytest
import torch
from builders import (
    Killed,
    loaded,
    nudged_policy,
    optimization,
    policy_artifact,
    preference,
    records_artifact,
    workspace,
)

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import PairReference, PairTokens, PreferencePair
from selfalign.losses.refinement import Refinement
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.scorer import LogProbScorer
from selfalign.stages.reference_logprobs import reference_logprobs

PAIRS = [
    preference("a", "Name a bird.", "A wren.", "A stone, I think."),
    preference("b", "Name a fish that lives in rivers.", "The trout does.", "No."),
    PreferencePair(
        id="c", prompt="Once upon a time", chosen=" there was a king", rejected=" no", chosen_finished=False
    ),
]
P = Refinement(prompt="Reach {scale} of {scale}. ", scale=7)


def scored(
    folder: Path,
    policy: PolicyCheckpoint,
    refinement: Refinement | None = P,
    pairs=PAIRS,
    tokens_of: int = 0,
    **settings: object,
):
    counts = reference_logprobs(
        workspace(folder / "out"),
        policy=policy_artifact(policy),
        pairs=records_artifact(folder / "given", pairs=pairs),
        augmentation=refinement,
        precision=optimization(**settings).logprob_settings("float32"),
        tokens_of=tokens_of,
    )
    return counts, read_records(folder / "out/references.jsonl", PairReference)


def log_likelihood(policy: PolicyCheckpoint, prompt: str, answer: str) -> float:
    """Summed over the answer's tokens, from full logits in double precision."""
    reader = loaded(policy.path)
    start = len(reader.tokenizer(prompt)["input_ids"])
    ids = torch.tensor([reader.tokenizer(prompt)["input_ids"] + reader.tokenizer(answer)["input_ids"]])
    with torch.no_grad():
        logps = reader.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return float(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


EXPECTED = {
    "a": (turn("Name a bird."), "A wren.<|im_end|>", "A stone, I think.<|im_end|>"),
    "b": (turn("Name a fish that lives in rivers."), "The trout does.<|im_end|>", "No.<|im_end|>"),
    "c": ("Once upon a time", " there was a king", " no<|im_end|>"),
}
AUGMENTED = {
    "a": turn("Reach 7 of 7. Name a bird."),
    "b": turn("Reach 7 of 7. Name a fish that lives in rivers."),
    "c": "Reach 7 of 7. Once upon a time",
}


@pytest.mark.parametrize("microbatch_tokens", [1, 8192])
def test_values_are_the_summed_log_probabilities_of_full_logits(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, microbatch_tokens: int
) -> None:
    counts, references = scored(tmp_path, tiny_policy, microbatch_tokens=microbatch_tokens)
    assert [record.id for record in references] == ["a", "b", "c"]
    assert counts == {"pairs": 3, "prompts_cut": 0, "prompts_cut_behind_p": 0, "dropped": {"too_long": 0}}
    for record in references:
        prompt, chosen, rejected = EXPECTED[record.id]
        assert record.chosen == pytest.approx(log_likelihood(tiny_policy, prompt, chosen), abs=1e-3)
        assert record.rejected == pytest.approx(log_likelihood(tiny_policy, prompt, rejected), abs=1e-3)
        p = AUGMENTED[record.id]
        assert record.augmented_chosen == pytest.approx(log_likelihood(tiny_policy, p, chosen), abs=1e-3)
        assert record.augmented_rejected == pytest.approx(log_likelihood(tiny_policy, p, rejected), abs=1e-3)
        assert abs(record.chosen - record.augmented_chosen) > 1e-4


@pytest.mark.parametrize("microbatch_tokens", [1, 8192])
def test_tokens_of_the_first_pairs_add_up_to_the_responses(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, microbatch_tokens: int
) -> None:
    _, references = scored(tmp_path, tiny_policy, tokens_of=2, microbatch_tokens=microbatch_tokens)
    tokens = read_records(tmp_path / "out/tokens.jsonl", PairTokens)
    assert [one.id for one in tokens] == ["a", "b"]
    for one, record in zip(tokens, references, strict=False):
        _, chosen, rejected = EXPECTED[record.id]
        assert ("".join(one.chosen), "".join(one.rejected)) == (chosen, rejected)
        assert len(one.chosen) == len(one.chosen_values)
        assert sum(one.chosen_values) == pytest.approx(record.augmented_chosen, abs=1e-3)
        assert sum(one.rejected_values) == pytest.approx(record.augmented_rejected, abs=1e-3)


def test_without_refinement_there_are_no_augmented_values(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    _, with_p = scored(tmp_path / "with", tiny_policy)
    _, plain = scored(tmp_path / "without", tiny_policy, None)
    assert {(r.augmented_chosen, r.augmented_rejected) for r in plain} == {(None, None)}
    assert [(r.chosen, r.rejected) for r in plain] == [(r.chosen, r.rejected) for r in with_p]


def test_another_policy_has_other_values(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    _, own = scored(tmp_path / "own", tiny_policy)
    _, others = scored(tmp_path / "other", nudged_policy(tiny_policy, tmp_path / "policy"))
    assert all(abs(a.chosen - b.chosen) > 1e-3 for a, b in zip(own, others, strict=True))


def test_longer_pair_is_dropped_whole_and_counted(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    long = preference("long", "Go on.", "and on " * 80, "no")
    counts, references = scored(tmp_path, tiny_policy, pairs=[PAIRS[0], long, PAIRS[1]], max_length=80)
    assert [record.id for record in references] == ["a", "b"]
    assert counts == {"pairs": 2, "prompts_cut": 0, "prompts_cut_behind_p": 0, "dropped": {"too_long": 1}}


def test_pairs_that_fit_are_scored_behind_p_however_long_it_is(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    """So that losses with and without a second pass hold the same pairs; the model's context alone is a limit."""
    wordy = Refinement(prompt="Try hard, " * 20)
    counts, _ = scored(tmp_path, tiny_policy, wordy, max_length=50)
    plain, _ = scored(tmp_path / "plain", tiny_policy, None, max_length=50)
    assert counts == plain == {"pairs": 3, "prompts_cut": 0, "prompts_cut_behind_p": 0, "dropped": {"too_long": 0}}


def test_p_that_leaves_no_room_in_the_context_is_named(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    endless = Refinement(prompt="Try hard, " * 2000)
    with pytest.raises(
        SelfalignError, match=r"^none of 3 pairs .*=50 tokens, and behind loss\.refinement\.prompt into the model's"
    ):
        scored(tmp_path, tiny_policy, endless, max_length=50)


def kill_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, left = LogProbScorer.score, [batches]

    def score(self: LogProbScorer, groups: list) -> list[list[float]]:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return original(self, groups)

    monkeypatch.setattr(LogProbScorer, "score", score)


def test_interrupted_scoring_goes_on_where_it_stopped(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(tmp_path / "whole", tiny_policy, microbatch_tokens=1)
    with monkeypatch.context() as patch:
        kill_after(4, patch)
        with pytest.raises(Killed):
            scored(tmp_path / "cut", tiny_policy, microbatch_tokens=1)
    with monkeypatch.context() as patch:
        kill_after(2, patch)  # Two of six batches are left, and not one more.
        scored(tmp_path / "cut", tiny_policy, microbatch_tokens=1)
    whole, cut = (tmp_path / name / "out/references.jsonl" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_smaller_batches_after_an_interruption_do_not_mix_pairs_up(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`microbatch_tokens` is no part of the key, so a run that ran out of memory goes on with less of it."""
    _, whole = scored(tmp_path / "whole", tiny_policy, microbatch_tokens=1)
    with monkeypatch.context() as patch:
        kill_after(1, patch)
        with pytest.raises(Killed):
            scored(tmp_path / "cut", tiny_policy, microbatch_tokens=8192)
    _, resumed = scored(tmp_path / "cut", tiny_policy, microbatch_tokens=1)
    assert [r.id for r in resumed] == [r.id for r in whole]
    assert [r.chosen for r in resumed] == pytest.approx([r.chosen for r in whole], abs=1e-3)
    assert [r.augmented_rejected for r in resumed] == pytest.approx([r.augmented_rejected for r in whole], abs=1e-3)
