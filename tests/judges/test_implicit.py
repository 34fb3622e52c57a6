from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import loaded, nudged_policy, policy_artifact, response, small_context_policy
from judging import ANSWERS, ASKED, given, judged, run_judge

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, JudgementStatus
from selfalign.judges.implicit import ImplicitReward, balancing_alpha
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Artifact


@pytest.fixture(scope="module")
def trained(tiny_policy: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    """What the tiny policy might have been trained to."""
    return nudged_policy(tiny_policy, tmp_path_factory.mktemp("trained"))


def test_score_is_beta_times_the_log_ratio_less_alpha_a_token(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, trained: PolicyCheckpoint
) -> None:
    answers = [*ANSWERS[:4], response("tea-2", "It was cut in the", reason=FinishReason.LENGTH)]
    kind = ImplicitReward(beta=0.3, alpha=0.02)
    inputs = given(tmp_path, answers)
    counts, judgements = judged(
        tmp_path, kind, policy_artifact(trained), reference=policy_artifact(tiny_policy), **inputs
    )
    asked = {record.id: record.text for record in ASKED}
    tokenizer = loaded(tiny_policy.path).tokenizer
    for answer in answers:
        end = "<|im_end|>" if answer.finish_reason is FinishReason.EOS else ""
        prompt = f"<|im_start|>user\n{asked[answer.instruction_id]}<|im_end|>\n<|im_start|>assistant\n"
        start, ids = tokenizer(prompt)["input_ids"], tokenizer(answer.text + end)["input_ids"]
        sums = []
        for files in (trained, tiny_policy):
            with torch.no_grad():
                logits = loaded(files.path).model(input_ids=torch.tensor([start + ids])).logits[0].double()
            rows = logits[len(start) - 1 : -1].log_softmax(-1)
            sums.append(float(rows[torch.arange(len(ids)), torch.tensor(ids)].sum()))
        expected = 0.3 * (sums[0] - sums[1]) - 0.02 * len(ids)
        assert judgements[answer.id].score == pytest.approx(expected, abs=1e-4)
        assert judgements[answer.id].model == trained.digest
    assert counts["judge/alpha"] == 0.02
    assert len({j.score for j in judgements.values()}) == 5


def test_control_tokens_a_response_spells_are_text(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, trained: PolicyCheckpoint
) -> None:
    sly = response("bees-1", "Done.<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>")
    kind, inputs = ImplicitReward(alpha=1.0, beta=1e-6), given(tmp_path, [sly, ANSWERS[1]])
    policy, reference = policy_artifact(trained), policy_artifact(tiny_policy)
    _, judgements = judged(tmp_path, kind, policy, reference=reference, **inputs)
    tokenizer = loaded(tiny_policy.path).tokenizer
    text = tokenizer(sly.text, split_special_tokens=True)["input_ids"]
    assert judgements["bees-1"].score == pytest.approx(-(len(text) + 1), abs=1e-2)
    assert not set(text) & set(tokenizer.all_special_ids)


def test_response_of_a_writer_with_other_tokens_is_read_by_its_text(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, trained: PolicyCheckpoint
) -> None:
    kind, policy = ImplicitReward(alpha=0.0), policy_artifact(trained)
    foreign = [replace(answer, ids=[at + 300, at + 5, 7]) for at, answer in enumerate(ANSWERS)]
    rewards: list[dict[str, float | None]] = []
    for place, answers in ((tmp_path / "own", ANSWERS), (tmp_path / "foreign", foreign)):
        _, made = judged(place, kind, policy, reference=policy_artifact(tiny_policy), **given(place, answers))
        rewards.append({name: one.score for name, one in made.items()})
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-5)


def test_order_turns_round_when_policy_and_reference_change_places(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, trained: PolicyCheckpoint
) -> None:
    kind, one, other = ImplicitReward(alpha=0.0), policy_artifact(trained), policy_artifact(tiny_policy)
    _, there = judged(tmp_path / "there", kind, one, reference=other)
    _, back = judged(tmp_path / "back", kind, other, reference=one)
    assert {n: j.score for n, j in there.items()} == pytest.approx({n: -j.score for n, j in back.items()}, abs=1e-5)


def test_alpha_is_found_where_none_is_given(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, trained: PolicyCheckpoint
) -> None:
    reference = policy_artifact(tiny_policy)
    counts, _ = judged(tmp_path, ImplicitReward(), policy_artifact(trained), reference=reference)
    assert counts["judge/alpha"] >= 0


@pytest.mark.parametrize(
    ("families", "low", "high"),
    [
        # Rewards equal their length: the longer wins until α is 1, then the shorter does.
        ([[(10.0, 10), (4.0, 4)]], 0.0, 0.0),
        # Two instructions: one favours length by 0.5 a token, one by 2; between the two the lengths are even.
        ([[(5.0, 10), (0.0, 0)], [(20.0, 10), (0.0, 0)]], 0.5, 2.0),
        # The shorter one is better already.
        ([[(1.0, 3), (0.0, 9)]], 0.0, 0.0),
        # Nothing to compare.
        ([[(3.0, 5)], []], 0.0, 0.0),
        ([[(3.0, 5), (1.0, 5)]], 0.0, 0.0),
    ],
)
def test_alpha_makes_the_best_as_long_as_the_worst(families: list, low: float, high: float) -> None:
    alpha = balancing_alpha(families)
    assert low <= alpha <= high
    if len(families) == 2 and len(families[0]) == 2:
        assert low < alpha < high


def test_longer_response_of_like_reward_a_token_does_not_win_by_its_length(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, trained: PolicyCheckpoint
) -> None:
    """α grows, and every score falls by it times the tokens."""
    reference = policy_artifact(tiny_policy)
    _, free = judged(tmp_path / "0", ImplicitReward(alpha=0.0), policy_artifact(trained), reference=reference)
    _, dear = judged(tmp_path / "1", ImplicitReward(alpha=1.0), policy_artifact(trained), reference=reference)
    tokenizer = loaded(tiny_policy.path).tokenizer
    for answer in ANSWERS:
        tokens = len(tokenizer(answer.text)["input_ids"]) + 1
        assert free[answer.id].score - dear[answer.id].score == pytest.approx(tokens, abs=1e-5)


@pytest.mark.parametrize("same", [False, True])
def test_judge_without_a_reference_of_its_own_is_refused(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, same: bool
) -> None:
    policy = policy_artifact(tiny_policy)
    reference: Artifact | None = policy if same else None
    with pytest.raises(SelfalignError, match="has no reference policy or equals it"):
        run_judge(tmp_path, ImplicitReward(), policy, reference=reference)


def test_response_that_does_not_fit_is_counted_and_never_cut(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, trained: PolicyCheckpoint
) -> None:
    small = [small_context_policy(files, tmp_path / str(n), 160) for n, files in enumerate((trained, tiny_policy))]
    inputs = given(tmp_path, [*ANSWERS[:2], response("tea-3", "Pour it slowly and wait. " * 40)])
    policy, reference = map(policy_artifact, small)
    counts, judgements = judged(tmp_path, ImplicitReward(), policy, reference=reference, **inputs)
    assert counts["dropped"] == {"prompt_too_long": 1}
    assert judgements["tea-3"].status is JudgementStatus.PROMPT_TOO_LONG


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": "base"}, r"judge\.model=base has no reference policy, which judge=implicit needs"),
        ({"model": "/models/other"}, r"judge\.model=/models/other"),
        ({"beta": 0.0}, r"judge\.beta"),
        ({"alpha": -1.0}, r"judge\.alpha"),
        ({"max_batch_tokens": 0}, r"judge\.max_batch_tokens"),
    ],
)
def test_impossible_setting_is_refused_with_its_key(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=named):
        ImplicitReward(**settings)
