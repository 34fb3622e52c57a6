import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import (
    instruction,
    loaded,
    nudged_policy,
    policy_artifact,
    records_artifact,
    response,
    workspace,
)

from selfalign.core.jsonl import read_records
from selfalign.core.records import FinishReason, ResponseKL
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.stages.kl_divergence import kl_divergence

ASKED = [instruction("bees", "What do bees do?"), instruction("tea", "How is tea made?")]
ANSWERS = [
    response("bees-1", "They dance."),
    response("tea-1", "With leaves and", reason=FinishReason.LENGTH),
]


def moved(folder: Path, policy: PolicyCheckpoint, origin: PolicyCheckpoint, answers: list = ANSWERS) -> dict:
    given = records_artifact(folder / "given", instructions=ASKED, responses=answers)
    return kl_divergence(
        workspace(folder / "out"),
        policy=policy_artifact(policy),
        origin=policy_artifact(origin),
        instructions=given,
        answers=given,
    )


def log_probability(policy: PolicyCheckpoint, text: str, answer: str, *, ended: bool) -> tuple[float, int]:
    """Of an answer's tokens, from full logits; and how many there are."""
    reader = loaded(policy.path)
    prompt = reader.tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    tokens = reader.tokenizer(answer + "<|im_end|>" * ended)["input_ids"]
    with torch.no_grad():
        logps = reader.model(input_ids=torch.tensor([prompt + tokens])).logits[0, :-1].double().log_softmax(-1)
    return float(logps[len(prompt) - 1 :].gather(1, torch.tensor(tokens)[:, None]).sum()), len(tokens)


def test_distance_is_the_mean_log_ratio_of_the_policy_s_own_answers(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    policy = nudged_policy(tiny_policy, tmp_path / "policy")
    cases = [(ASKED[0].text, "They dance.", True), (ASKED[1].text, "With leaves and", False)]
    ratios, tokens = [], 0
    for text, answer, ended in cases:
        (own, count), (other, _) = (log_probability(p, text, answer, ended=ended) for p in (policy, tiny_policy))
        ratios.append(own - other)
        tokens += count
    found = moved(tmp_path, policy, tiny_policy)
    records = read_records(tmp_path / "out/moved.jsonl", ResponseKL)
    assert [one.policy - one.origin for one in records] == pytest.approx(ratios, abs=1e-3)
    assert sum(one.tokens for one in records) == tokens
    assert abs(sum(ratios)) > 0.01
    assert found["eval/kl_to_m1"] == pytest.approx(sum(ratios) / 2, abs=1e-3)
    assert found["eval/kl_to_m1_per_token"] == pytest.approx(sum(ratios) / tokens, abs=1e-3)


def test_a_model_is_at_no_distance_from_itself(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    assert moved(tmp_path, tiny_policy, tiny_policy) == {"eval/kl_to_m1": 0.0, "eval/kl_to_m1_per_token": 0.0}


def test_empty_answers_are_no_distance(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    nothing = [replace(response("bees-1"), text="")]
    assert moved(tmp_path, tiny_policy, tiny_policy, nothing) == {}


def test_distance_from_a_model_with_other_tokens_is_not_measured(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """The same ids would be other words to it, and the number would look like any other."""
    other = nudged_policy(tiny_policy, tmp_path / "other")
    written = other.load_tokenizer()("They dance.")["input_ids"]
    file = other.path / "tokenizer/tokenizer.json"
    spelled = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = spelled["model"]["vocab"]
    one, two = (next(token for token, at in vocabulary.items() if at == written[place]) for place in (0, -1))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(spelled), encoding="utf-8")
    assert moved(tmp_path, tiny_policy, other) == {}
    assert (tmp_path / "out/moved.jsonl").read_bytes() == b""
    assert "M1 has another tokenizer" in caplog.text
