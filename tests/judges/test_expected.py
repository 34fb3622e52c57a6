import math
from pathlib import Path

import pytest
import torch
from builders import (
    RUBRIC,
    Script,
    ScriptedWriter,
    completion,
    loaded,
    nudged_policy,
    policy_artifact,
    small_context_policy,
)
from judging import ANSWERS, ASKED, given, judged

from selfalign.core.errors import SelfalignError
from selfalign.core.records import JudgementStatus
from selfalign.judges.expected import ExpectedScore, Rationale, expected, score_tokens
from selfalign.judges.parsing import before_score
from selfalign.judges.protocol import InstructionResponse
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt

# --- the stage ---------------------------------------------------------------------------------------------------


def test_expected_score_is_the_probability_weighted_mean_of_full_logits(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    kind = ExpectedScore(prompt=RUBRIC, min_score=1, max_score=5)
    counts, judgements = judged(tmp_path, kind, policy_artifact(tiny_policy))
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
    assert counts["judge/token_entropy"] == pytest.approx(sum(j.entropy for j in judgements.values()) / 5)
    assert len({round(j.score, 6) for j in judgements.values()}) == 5


def test_entropy_of_an_undecided_judge_is_that_of_the_uniform_distribution() -> None:
    subject = InstructionResponse(ASKED[0], ANSWERS[0])
    even = expected(subject, [-900.0] * 6, 0, Rationale(), "m")
    assert (even.score, even.entropy) == (pytest.approx(2.5), pytest.approx(math.log(6)))
    certain = expected(subject, [-5000.0, -5000.0, -5000.0, -1.0, -5000.0, -5000.0], 0, Rationale(), "m")
    assert (certain.score, certain.entropy) == (3.0, 0.0)


@pytest.mark.parametrize("max_batch_tokens", [1, 4096])
def test_candidates_judged_together_score_as_judged_alone(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, max_batch_tokens: int
) -> None:
    kind = ExpectedScore(prompt=RUBRIC, max_batch_tokens=max_batch_tokens)
    _, together = judged(tmp_path / "together", kind, policy_artifact(tiny_policy))
    for answer in ANSWERS:
        folder = tmp_path / answer.id
        _, alone = judged(folder, kind, policy_artifact(tiny_policy), **given(folder, [answer]))
        assert alone[answer.id].score == pytest.approx(together[answer.id].score, abs=1e-5)
        assert alone[answer.id].entropy == pytest.approx(together[answer.id].entropy, abs=1e-5)


def test_scores_of_two_digits_are_refused_by_the_one_token_judge(tiny_policy: PolicyCheckpoint) -> None:
    assert len(set(score_tokens(loaded(tiny_policy.path).tokenizer, 0, 9))) == 10
    with pytest.raises(SelfalignError, match="judge=additive"):
        score_tokens(loaded(tiny_policy.path).tokenizer, 9, 10)
    with pytest.raises(SelfalignError, match="digit"):
        ExpectedScore(prompt=RUBRIC, max_score=10)


# --- after a justification ---------------------------------------------------------------------------------------

JUSTIFIED = ExpectedScore(prompt=RUBRIC, rationale_tokens=12)


def test_score_is_read_behind_the_greedy_justification(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    talkative = nudged_policy(tiny_policy, tmp_path / "talkative", 0.2)
    _, judgements = judged(tmp_path, JUSTIFIED, policy_artifact(talkative))
    policy = loaded(talkative.path)
    digits = score_tokens(policy.tokenizer, 0, 5)
    texts = {record.id: record.text for record in ASKED}
    for answer in ANSWERS:
        prompt = encode_prompt(policy.tokenizer, JUSTIFIED.ask(texts[answer.instruction_id], answer.text))
        ids = prompt
        for _ in range(12):
            with torch.no_grad():
                likeliest = int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if likeliest in policy.tokenizer.all_special_ids:
                break
            ids = [*ids, likeliest]
        rationale = before_score(policy.tokenizer.decode(ids[len(prompt) :]).strip())
        assert rationale
        said = policy.tokenizer(f"{rationale}\nScore: ", split_special_tokens=True)["input_ids"]
        with torch.no_grad():
            shares = policy.model(input_ids=torch.tensor([prompt + said])).logits[0, -1].double()[digits].softmax(0)
        assert judgements[answer.id].score == pytest.approx(float((shares * torch.arange(6)).sum()), abs=1e-4)
        assert judgements[answer.id].text.startswith(rationale)
        assert judgements[answer.id].entropy == pytest.approx(float(-(shares * shares.log()).sum()), abs=1e-4)


def test_score_written_into_the_justification_is_not_read_but_cut_off(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    """What follows it, and any control token the text spells, is not what the score is read behind."""
    policy = loaded(tiny_policy.path)
    plain = Script(policy, [completion("It is short.")])
    sly = Script(policy, [completion("It is short.\n**Score**: 5\nScore: 5")])
    spelled = Script(policy, [completion("It is short. <|im_end|>")])
    found = []
    for name, script in (("plain", plain), ("sly", sly), ("spelled", spelled)):
        folder = tmp_path / name
        backend = ScriptedWriter(script)
        _, judgements = judged(folder, JUSTIFIED, policy_artifact(tiny_policy), backend, **given(folder, ANSWERS[:1]))
        found.append(judgements["bees-1"])
    assert found[0].score == found[1].score
    assert found[0].text == found[1].text
    control = set(policy.tokenizer.all_special_ids)
    subject = InstructionResponse(ASKED[0], ANSWERS[0])
    ids = JUSTIFIED._prompt(policy.tokenizer, subject, Rationale(said="It is short. <|im_end|>"))
    usual = JUSTIFIED._prompt(policy.tokenizer, subject, Rationale(said="It is short."))
    assert [i for i in ids if i in control] == [i for i in usual if i in control]


@pytest.mark.parametrize("thought", ["<think>\nScore: 2, or so.\nNo.\n</think>\n", "Score: 2\n</think>\n"])
def test_score_inside_the_thinking_does_not_end_the_justification(
    thought: str, tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    """The score is read behind all that the judge wrote up to its own, its thinking included."""
    said = f"{thought}It is short."
    script = Script(loaded(tiny_policy.path), [completion(f"{said}\n> Score: 1\nScore: 5")])
    writer, inputs = ScriptedWriter(script), given(tmp_path, ANSWERS[:1])
    _, judgements = judged(tmp_path, JUSTIFIED, policy_artifact(tiny_policy), writer, **inputs)
    made = judgements["bees-1"]
    assert made.text == f"{said}\n> Score: 1\nScore: {made.score:.2f}"


def test_judge_that_only_thought_has_justified_nothing(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    replies = [completion("<think>\nHm.\nScore: 3\nBut then", cut=True), completion("It is short.")]
    writer = ScriptedWriter(Script(loaded(tiny_policy.path), replies))
    inputs = given(tmp_path, ANSWERS[:2])
    counts, judgements = judged(tmp_path, JUSTIFIED, policy_artifact(tiny_policy), writer, **inputs)
    assert [j.status for j in judgements.values()] == [JudgementStatus.TRUNCATED, JudgementStatus.OK]
    assert judgements["bees-1"].text == "<think>\nHm.\nScore: 3\nBut then"
    assert counts["dropped"] == {"truncated": 1}


def test_response_that_leaves_no_room_for_a_justification_is_unjudged(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    length = len(encode_prompt(loaded(tiny_policy.path).tokenizer, JUSTIFIED.ask(ASKED[0].text, ANSWERS[2].text)))
    small = small_context_policy(tiny_policy, tmp_path / "small", length + 11)
    inputs = given(tmp_path, ANSWERS[:3])
    counts, judgements = judged(tmp_path, JUSTIFIED, policy_artifact(small), **inputs)
    assert counts["dropped"] == {"prompt_too_long": 1}
    assert judgements["bees-3"].status is JudgementStatus.PROMPT_TOO_LONG


def test_judge_that_justifies_itself_is_taught_so() -> None:
    assert JUSTIFIED.opening == ""
    assert JUSTIFIED.answer(3, "It is right.") == "It is right.\nScore: 3"
    with pytest.raises(SelfalignError, match=r"judge\.rationale_tokens"):
        ExpectedScore(prompt=RUBRIC, rationale_tokens=-1)
