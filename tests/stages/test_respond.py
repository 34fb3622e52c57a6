from pathlib import Path

import pytest
from builders import (
    Killed,
    instruction,
    killed_after,
    loaded,
    policy_artifact,
    records_artifact,
    small_context_policy,
    taught_policy,
    workspace,
)

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import FinishReason, Instruction, Response
from selfalign.engines.protocol import Sampling
from selfalign.engines.transformers import Transformers
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages.respond import RespondConfig, respond

ASKED = [
    instruction("bees", "What do bees do all day?"),
    instruction("tea", "How is tea made, and why does it matter which water is taken for it?"),
    instruction("sea", "Why?"),
    instruction("map", "Name three rivers that flow through more than one country, and say which countries those are."),
    instruction("owl", "Do owls sleep?"),
]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=6)
SEVERAL_BATCHES = 3 * 2 * 40
"""Tokens that hold about two of these instructions with three candidates each."""


def answer(
    folder: Path,
    policy: PolicyCheckpoint,
    asked: list[Instruction] = ASKED,
    *,
    seed: int = 5,
    candidates: int = 3,
    sampling: Sampling = SAMPLING,
    max_batch_tokens: int = 1 << 16,
):
    """Runs the stage; returns its counts and the responses."""
    counts = respond(
        workspace(folder / "out"),
        config=RespondConfig(candidates=candidates, sampling=sampling),
        policy=policy_artifact(policy),
        instructions=records_artifact(folder / "given", instructions=asked),
        engine=Transformers(dtype="float32", max_batch_tokens=max_batch_tokens),
        seed=seed,
    )
    return counts, read_records(folder / "out/responses.jsonl", Response)


def test_every_instruction_gets_its_candidates_and_no_other(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts, responses = answer(tmp_path, tiny_policy, max_batch_tokens=SEVERAL_BATCHES)
    assert [r.instruction_id for r in responses] == [record.id for record in ASKED for _ in range(3)]
    assert len({r.id for r in responses}) == counts["responses"] == 15
    assert {r.model for r in responses} == {tiny_policy.digest}
    assert counts["dropped"] == {"prompt_too_long": 0}
    assert counts["mean_tokens"] == sum(r.tokens for r in responses) / 15
    assert counts["mean_characters"] == sum(len(r.text) for r in responses) / 15


def test_candidates_of_one_instruction_are_drawn_apart(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    _, responses = answer(tmp_path, tiny_policy)
    assert len({r.text for r in responses}) == 15


def test_same_seed_writes_the_same_file_and_another_seed_another(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        answer(tmp_path / name, tiny_policy, seed=seed)
    one, again, other = ((tmp_path / name / "out/responses.jsonl").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


@pytest.mark.parametrize("max_batch_tokens", [1 << 16, SEVERAL_BATCHES])
def test_order_of_the_instructions_does_not_change_a_text(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, max_batch_tokens: int
) -> None:
    _, given = answer(tmp_path / "given", tiny_policy, max_batch_tokens=max_batch_tokens)
    _, turned = answer(tmp_path / "turned", tiny_policy, ASKED[::-1], max_batch_tokens=max_batch_tokens)
    assert {r.id: r for r in turned} == {r.id: r for r in given}
    assert [r.instruction_id for r in turned[::3]] == [record.id for record in ASKED[::-1]]


def test_further_candidates_do_not_change_the_first_ones(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    _, two = answer(tmp_path / "two", tiny_policy, candidates=2)
    _, three = answer(tmp_path / "three", tiny_policy, candidates=3)
    texts = {r.id: r.text for r in three}
    assert all(texts[r.id] == r.text for r in two)


def test_interrupted_run_goes_on_without_repeating_finished_batches(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(99, monkeypatch) as all_batches:
        answer(tmp_path / "whole", tiny_policy, max_batch_tokens=SEVERAL_BATCHES)
    assert len(all_batches) >= 3
    with killed_after(2, monkeypatch) as first, pytest.raises(Killed):
        answer(tmp_path / "cut", tiny_policy, max_batch_tokens=SEVERAL_BATCHES)
    with killed_after(99, monkeypatch) as rest:
        answer(tmp_path / "cut", tiny_policy, max_batch_tokens=SEVERAL_BATCHES)
    assert [*first, *rest] == all_batches
    whole, cut = (tmp_path / name / "out/responses.jsonl" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_half_written_journal_line_is_made_again(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(tmp_path / "whole", tiny_policy, max_batch_tokens=SEVERAL_BATCHES)
    with killed_after(2, monkeypatch), pytest.raises(Killed):
        answer(tmp_path / "cut", tiny_policy, max_batch_tokens=SEVERAL_BATCHES)
    journal = tmp_path / "cut/out/scratch/journal-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    answer(tmp_path / "cut", tiny_policy, max_batch_tokens=SEVERAL_BATCHES)
    whole, cut = (tmp_path / name / "out/responses.jsonl" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_prompt_longer_than_the_context_is_dropped_and_counted_not_cut(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    long = instruction("long", "Say what this means: " + "the rivers run to the sea " * 30)
    small = small_context_policy(tiny_policy, tmp_path / "small", 100)
    counts, responses = answer(tmp_path / "with", small, [ASKED[0], long, ASKED[1]])
    _, without = answer(tmp_path / "without", small, [ASKED[0], ASKED[1]])
    assert counts["dropped"] == {"prompt_too_long": 1}
    assert responses == without
    assert "long" not in {r.instruction_id for r in responses}


def test_prompt_that_just_leaves_room_for_the_answer_is_kept(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    prompt = f"<|im_start|>user\n{ASKED[0].text}<|im_end|>\n<|im_start|>assistant\n"
    length = len(loaded(tiny_policy.path).tokenizer(prompt)["input_ids"])
    for context, dropped in ((length + 6, 0), (length + 5, 1)):
        small = small_context_policy(tiny_policy, tmp_path / f"c{context}", context)
        counts, _ = answer(tmp_path / f"a{context}", small, [ASKED[0], ASKED[2]])
        assert counts["dropped"] == {"prompt_too_long": dropped}


def test_instructions_that_all_are_too_long_are_an_error(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    small = small_context_policy(tiny_policy, tmp_path / "small", 10)
    with pytest.raises(SelfalignError, match="stage: no instruction fits into the context of 10 tokens"):
        answer(tmp_path, small)


def test_reason_to_finish_is_that_of_each_response(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    policy = taught_policy(tiny_policy, tmp_path / "policy")
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=9)
    counts, responses = answer(tmp_path, policy, sampling=sampling, candidates=6)
    cut = [r for r in responses if r.finish_reason is FinishReason.LENGTH]
    ended = [r for r in responses if r.finish_reason is FinishReason.EOS]
    assert cut
    assert ended
    assert {r.tokens for r in cut} == {9}
    assert min(r.tokens for r in ended) < 9
    assert counts["finished_share"] == len(ended) / len(responses)
    assert not any("<|" in r.text for r in responses)


def test_temperature_zero_gives_equal_candidates(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    _, responses = answer(tmp_path, tiny_policy, ASKED[:1], sampling=Sampling(temperature=0, max_new_tokens=6))
    assert len({r.text for r in responses}) == 1


def test_no_candidates_is_refused_with_the_key() -> None:
    with pytest.raises(SelfalignError, match=r"data\.respond\.candidates"):
        RespondConfig(candidates=0)
