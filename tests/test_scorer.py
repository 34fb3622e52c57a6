"""Scoring: summed log-probabilities and next-token alternatives against full logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selfalign.core.errors import SelfalignError
from selfalign.models.batches import SharedPrompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.scorer import LogProbScorer, with_next_token
from selfalign.store.journal import Journal

ALTERNATIVES = [20, 21, 25, 1000]


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(3, 1024, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def groups() -> list[SharedPrompt]:
    return [
        SharedPrompt(id="a", prompt=draw(9, 1), responses=[draw(7, 2), draw(3, 3)], num_context_tokens=[0, 0]),
        SharedPrompt(id="b", prompt=draw(4, 4), responses=[draw(1, 5)], num_context_tokens=[0]),
        SharedPrompt(id="c", prompt=draw(5, 6), responses=[draw(6, 7), draw(8, 8)], num_context_tokens=[2, 7]),
    ]


@pytest.fixture(scope="module")
def full(tiny_policy: PolicyCheckpoint) -> Any:
    return tiny_policy.load("float32").model


@pytest.fixture(scope="module")
def scorer(tiny_policy: PolicyCheckpoint) -> LogProbScorer:
    return LogProbScorer(tiny_policy.load("float32"), max_batch_tokens=64)


@torch.no_grad()
def sum_by_hand(model: Any, group: SharedPrompt, index: int) -> float:
    ids = [*group.prompt, *group.responses[index]]
    logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    start = len(group.prompt) + group.num_context_tokens[index]
    return sum(float(logps[at - 1, ids[at]]) for at in range(start, len(ids)))


def test_scores_are_the_full_models_summed_log_probabilities(scorer: LogProbScorer, full: Any) -> None:
    scores = scorer.score(groups())
    assert [len(row) for row in scores] == [2, 1, 2]
    for group, row in zip(groups(), scores, strict=True):
        for index, value in enumerate(row):
            assert value == pytest.approx(sum_by_hand(full, group, index), abs=1e-4)
            assert value < -1


def test_scores_do_not_depend_on_how_groups_are_batched(scorer: LogProbScorer) -> None:
    together = scorer.score(groups())
    alone = [scorer.score([group])[0] for group in groups()]
    for row, other in zip(together, alone, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


@torch.no_grad()
def next_by_hand(model: Any, ids: list[int]) -> list[float]:
    logps = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    return [float(logps[token]) for token in ALTERNATIVES]


def test_alternatives_are_the_full_models_next_token_log_probabilities(scorer: LogProbScorer, full: Any) -> None:
    chosen = scorer.next_token_logprobs(groups(), ALTERNATIVES)
    for group, rows in zip(groups(), chosen, strict=True):
        assert len(rows) == len(group.responses)
        for response, row in zip(group.responses, rows, strict=True):
            assert row == pytest.approx(next_by_hand(full, [*group.prompt, *response]), abs=1e-5)


def test_alternatives_right_behind_the_prompt(scorer: LogProbScorer, full: Any) -> None:
    bare = SharedPrompt(id="bare", prompt=draw(6, 9), responses=[[]], num_context_tokens=[0])
    ((row,),) = scorer.next_token_logprobs([bare], ALTERNATIVES)
    assert row == pytest.approx(next_by_hand(full, bare.prompt), abs=1e-5)


def test_the_placeholder_token_does_not_matter(scorer: LogProbScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scorer.next_token_logprobs(groups(), ALTERNATIVES)

    def other(group: SharedPrompt) -> SharedPrompt:
        padded = with_next_token(group)
        return SharedPrompt(
            id=group.id,
            prompt=group.prompt,
            responses=[[*r[:-1], 500] for r in padded.responses],
            num_context_tokens=padded.num_context_tokens,
        )

    monkeypatch.setattr("selfalign.models.scorer.with_next_token", other)
    assert scorer.next_token_logprobs(groups(), ALTERNATIVES) == before


def test_all_alternatives_together_are_certain(scorer: LogProbScorer) -> None:
    rows = scorer.next_token_logprobs(groups()[:1], list(range(1024)))[0]
    for row in rows:
        assert float(torch.tensor(row).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_plan_keeps_the_order_within_the_budget(scorer: LogProbScorer) -> None:
    many = [
        SharedPrompt(id=str(i), prompt=[i] * 20, responses=[[6] * (10 + i)], num_context_tokens=[0]) for i in range(5)
    ]
    planned = scorer.plan(many)
    assert [group.id for batch in planned for group in batch] == ["0", "1", "2", "3", "4"]
    # 30 + 31 = 61 ≤ 64, 32 + 33 = 65 > 64
    assert [[len(group) for group in batch] for batch in planned] == [[30, 31], [32], [33], [34]]
    # A prompt that all have counts once: 20 + 10 + 11 + 12 = 53, and 13 more are too many.
    alike = [replace(group, prompt=[5] * 20, responses=[[7 + i] * (10 + i)]) for i, group in enumerate(many)]
    assert [[len(group) for group in batch] for batch in scorer.plan(alike)] == [[30, 31, 32], [33, 34]]


def test_scoring_is_free_of_dropout_and_of_gradients(tiny_policy: PolicyCheckpoint, full: Any) -> None:
    policy = tiny_policy.load("float32")
    policy.model.train()
    for layer in policy.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    scorer = LogProbScorer(policy, max_batch_tokens=64)
    ((value, _),) = scorer.score(groups()[:1])
    assert value == pytest.approx(sum_by_hand(full, groups()[0], 0), abs=1e-4)
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_autocast_multiplies_in_bfloat16_and_adds_up_in_float32(
    tiny_policy: PolicyCheckpoint, scorer: LogProbScorer
) -> None:
    low = LogProbScorer(tiny_policy.load("float32"), max_batch_tokens=64, autocast="bfloat16")
    assert low.policy.model.dtype == torch.float32
    for row, exact in zip(low.score(groups()), scorer.score(groups()), strict=True):
        for value, reference in zip(row, exact, strict=True):
            assert value != reference
            assert value == pytest.approx(reference, abs=0.3)


def test_log_probability_that_is_not_finite_is_no_score_and_is_not_kept(
    tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    scorer = LogProbScorer(tiny_policy.load("float32"), max_batch_tokens=1)
    journal = Journal(tmp_path, lambda size: None)
    assert len(list(scorer.score_all(groups()[:1], journal, "policy"))) == 1
    with torch.no_grad():
        next(scorer.policy.model.parameters()).fill_(float("nan"))
    with pytest.raises(SelfalignError, match="record b: its log-probabilities are not finite"):
        list(scorer.score_all(groups(), journal, "policy"))
    assert "policy-a-1" in journal
    assert "policy-b-1" not in journal
