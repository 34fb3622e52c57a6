"""The judge by contrastive prompts, against plain passes of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import loaded, policy_artifact, response, small_context_policy
from judging import ANSWERS, ASKED, given, judged

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, JudgementStatus
from selfalign.judges.contrastive import ContrastiveReward
from selfalign.models.checkpoint import PolicyCheckpoint

WELL, BADLY = "Answer well, up to {scale}. ", "Answer badly. "


def test_score_is_the_log_ratio_of_the_answer_behind_both_prompts(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    answers = [*ANSWERS[:4], response("tea-2", "It was cut in the", reason=FinishReason.LENGTH)]
    kind = ContrastiveReward(prompt=WELL, negative_prompt=BADLY)
    counts, judgements = judged(tmp_path, kind, policy_artifact(tiny_policy), **given(tmp_path, answers))
    asked = {record.id: record.text for record in ASKED}
    policy = loaded(tiny_policy.path)
    for answer in answers:
        end = "<|im_end|>" if answer.finish_reason is FinishReason.EOS else ""
        ids = policy.tokenizer(answer.text + end)["input_ids"]
        sums = []
        for p in ("Answer well, up to 100. ", BADLY):
            prompt = f"<|im_start|>user\n{p}{asked[answer.instruction_id]}<|im_end|>\n<|im_start|>assistant\n"
            start = policy.tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([start + ids])).logits[0].double()
            rows = logits[len(start) - 1 : -1].log_softmax(-1)
            sums.append(float(rows[torch.arange(len(ids)), torch.tensor(ids)].sum()))
        assert judgements[answer.id].score == pytest.approx(sums[0] - sums[1], abs=1e-4)
    assert counts["judgements"] == 5
    assert len({one.score for one in judgements.values()}) == 5


def test_response_that_does_not_fit_behind_the_longer_prompt_has_no_score(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    policy = loaded(tiny_policy.path)
    answer = replace(ANSWERS[0], text="They fly.")
    longest = f"<|im_start|>user\n{'well ' * 40}{ASKED[0].text}<|im_end|>\n<|im_start|>assistant\nThey fly.<|im_end|>"
    context = len(policy.tokenizer(longest)["input_ids"]) - 1
    files = small_context_policy(tiny_policy, tmp_path / "small", context)
    kind = ContrastiveReward(prompt="well " * 40, negative_prompt=BADLY, max_failure_rate=1)
    _, judgements = judged(tmp_path, kind, policy_artifact(files), **given(tmp_path, [answer]))
    assert judgements["bees-1"].status is JudgementStatus.PROMPT_TOO_LONG


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "judge.prompt is empty"),
        ({"negative_prompt": "{score}"}, "judge.negative_prompt"),
        ({"place": "nowhere"}, "judge.place must be one of"),
        ({"prompt": "a", "negative_prompt": "a"}, "the same text, so every reward would be 0"),
    ],
)
def test_prompts_that_contrast_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        ContrastiveReward(**settings)
