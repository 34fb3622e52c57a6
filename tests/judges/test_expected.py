import math
from pathlib import Path

import pytest
import torch
from builders import RUBRIC, loaded, policy_artefact
from judging import ANSWERS, ASKED, given, judged

from selfalign.errors import SelfalignError
from selfalign.judges.bench import Subject
from selfalign.judges.expected import ExpectedScore, expected, score_tokens
from selfalign.models import PolicyFiles

# --- the stage ---------------------------------------------------------------------------------------------------


def test_expected_score_is_the_probability_weighted_mean_of_full_logits(
    tmp_path: Path, tiny_policy: PolicyFiles
) -> None:
    kind = ExpectedScore(prompt=RUBRIC, low=1, high=5)
    counts, judgements = judged(tmp_path, kind, policy_artefact(tiny_policy))
    policy = loaded(tiny_policy.path)
    digits = [policy.tokenizer(f"x {score}")["input_ids"][-1] for score in range(1, 6)]
    texts = {record.id: record.text for record in ASKED}
    for answer in ANSWERS:
        section = RUBRIC.replace("{instruction}", texts[answer.instruction_id]).replace("{response}", answer.text)
        prompt = f"<|im_start|>user\n{section}<|im_end|>\n<|im_start|>assistant\nScore: "
        ids = torch.tensor([policy.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            shares = policy.model(input_ids=ids).logits[0, -1].double()[digits].softmax(0)
        mean = float((shares * torch.arange(1, 6)).sum())
        entropy = float(-(shares * shares.log()).sum())
        judgement = judgements[answer.id]
        assert judgement.score == pytest.approx(mean, abs=1e-4)
        assert judgement.entropy == pytest.approx(entropy, abs=1e-4)
        assert judgement.model == tiny_policy.digest
    assert counts["judge/mean_score"] == pytest.approx(sum(j.score for j in judgements.values()) / 5)
    assert counts["judge/entropy"] == pytest.approx(sum(j.entropy for j in judgements.values()) / 5)
    assert len({round(j.score, 6) for j in judgements.values()}) == 5


def test_entropy_of_an_undecided_judge_is_that_of_the_uniform_distribution() -> None:
    subject = Subject(ASKED[0], ANSWERS[0])
    even = expected(subject, [-900.0] * 6, 0, "", "m")
    assert (even.score, even.entropy) == (pytest.approx(2.5), pytest.approx(math.log(6)))
    certain = expected(subject, [-5000.0, -5000.0, -5000.0, -1.0, -5000.0, -5000.0], 0, "", "m")
    assert (certain.score, certain.entropy) == (3.0, 0.0)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_candidates_judged_together_score_as_judged_alone(
    tmp_path: Path, tiny_policy: PolicyFiles, batch_tokens: int
) -> None:
    kind = ExpectedScore(prompt=RUBRIC, batch_tokens=batch_tokens)
    _, together = judged(tmp_path / "together", kind, policy_artefact(tiny_policy))
    for answer in ANSWERS:
        folder = tmp_path / answer.id
        _, alone = judged(folder, kind, policy_artefact(tiny_policy), **given(folder, [answer]))
        assert alone[answer.id].score == pytest.approx(together[answer.id].score, abs=1e-5)
        assert alone[answer.id].entropy == pytest.approx(together[answer.id].entropy, abs=1e-5)


def test_scores_of_two_digits_are_refused_by_the_one_token_judge(tiny_policy: PolicyFiles) -> None:
    assert len(set(score_tokens(loaded(tiny_policy.path), 0, 9))) == 10
    with pytest.raises(SelfalignError, match="judge=additive"):
        score_tokens(loaded(tiny_policy.path), 9, 10)
    with pytest.raises(SelfalignError, match="digit"):
        ExpectedScore(prompt=RUBRIC, high=10)
