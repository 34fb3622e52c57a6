"""Judges that think: what they read of a response, and what is read of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import RUBRIC, Script, ScriptedWriter, loaded, nudged_policy, policy_artifact
from judging import ANSWERS, ASKED, given, judged
from thinking_families import family, thinking_model

from selfalign.core.records import FinishReason, JudgementStatus, RankedAnswers
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import Completion
from selfalign.judges.expected import ExpectedScore
from selfalign.judges.external import ExternalScore
from selfalign.judges.implicit import ImplicitReward
from selfalign.judges.pairwise import Pairwise
from selfalign.judges.protocol import InstructionResponse
from selfalign.judges.sampled import SampledScore
from selfalign.judges.written import JudgementRequest
from selfalign.models.batches import SharedPrompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import decode_response

COMPARED = "<i>{instruction}</i> <first>{first}</first> <second>{second}</second> Which?"
THOUGHT = family("qwen3").thought
NOTHING = family("qwen3").nothing


@pytest.fixture(scope="module")
def thinker(tiny_policy: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    """A tiny policy of Qwen3's family."""
    folder = thinking_model(tiny_policy, "qwen3", tmp_path_factory.mktemp("qwen3"))
    return fetch_pretrained(ModelConfig(path=str(folder)), tmp_path_factory.mktemp("thinker"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts behind which next tokens are scored."""
    found: list[str] = []
    original: Any = LogProbScorer.next_token_logprobs

    def spy(self: LogProbScorer, groups: Sequence[SharedPrompt], alternatives: Sequence[int]) -> Any:
        found.extend(str(self.tokenizer.decode([*group.prompt, *ids])) for group in groups for ids in group.responses)
        return original(self, groups, alternatives)

    monkeypatch.setattr(LogProbScorer, "next_token_logprobs", spy)
    return found


def writer(thinker: PolicyCheckpoint, *texts: str) -> ScriptedWriter:
    """An engine that writes these texts, each up to its end of turn."""
    policy = loaded(thinker.path)

    def written(text: str) -> Completion:
        ids = policy.tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
        plain = decode_response(policy.tokenizer, ids)
        return Completion(text=plain, finish_reason=FinishReason.EOS, tokens=len(ids), ids=ids)

    return ScriptedWriter(Script(policy, [written(text) for text in texts]))


def test_score_is_read_behind_an_empty_thought(tmp_path: Path, thinker: PolicyCheckpoint, read: list[str]) -> None:
    judged(tmp_path, ExpectedScore(prompt=RUBRIC), policy_artifact(thinker))
    assert len(read) == len(ANSWERS)
    assert all(text.endswith(f"<|im_start|>assistant\n{NOTHING}Score: ") for text in read)


def test_score_is_read_behind_the_thought_that_has_a_budget(
    tmp_path: Path, thinker: PolicyCheckpoint, read: list[str]
) -> None:
    long, endless = THOUGHT.replace("see.", "see" + " more" * 40), "<think>\nScore: 3\nHm"
    texts = [f"{THOUGHT}Score: 5", f"{THOUGHT}", f"{long}Score: 5", endless, "Score: 2"]
    kind = ExpectedScore(prompt=RUBRIC, thought_tokens=30, max_failure_rate=1)
    _, judgements = judged(tmp_path, kind, policy_artifact(thinker), writer(thinker, *texts))
    status = [one.status for one in judgements.values()]
    assert status == [JudgementStatus.OK] * 2 + [JudgementStatus.TRUNCATED] * 2 + [JudgementStatus.OK]
    behind = [text.rpartition("<|im_start|>assistant\n")[2] for text in read]
    assert sorted(behind) == sorted([f"{THOUGHT}Score: "] * 2 + [f"{NOTHING}Score: "])
    assert judgements["bees-1"].text.startswith(f"{THOUGHT}Score: ")
    assert judgements["tea-1"].text == endless


def test_justification_stands_behind_the_thought(tmp_path: Path, thinker: PolicyCheckpoint, read: list[str]) -> None:
    texts = [f"{THOUGHT}It is short.\nScore: 5"] * len(ANSWERS)
    kind = ExpectedScore(prompt=RUBRIC, thought_tokens=30, rationale_tokens=30)
    judged(tmp_path, kind, policy_artifact(thinker), writer(thinker, *texts))
    assert all(text.endswith(f"assistant\n{THOUGHT}It is short.\nScore: ") for text in read)


def test_written_score_is_that_behind_the_thought(tmp_path: Path, thinker: PolicyCheckpoint) -> None:
    mind = THOUGHT.replace("Let", "Score: 1\nLet")
    texts = [f"{mind}Score: 4", f"{mind}Good.", "<think>\nScore: 1", "Score: 3", f"{mind}Fair.\nScore: 2"]
    kind = SampledScore(prompt=RUBRIC, num_samples=1, retries=0, max_failure_rate=1)
    _, judgements = judged(tmp_path, kind, policy_artifact(thinker), writer(thinker, *texts))
    assert [one.score for one in judgements.values()] == [4, None, None, 3, 2]
    assert [one.status.value for one in judgements.values()] == ["ok", "no_score", "truncated", "ok", "ok"]
    assert judgements["bees-1"].text == texts[0]


def test_verdict_is_read_behind_the_thoughts_of_both_orders(
    tmp_path: Path, thinker: PolicyCheckpoint, read: list[str]
) -> None:
    inputs = given(tmp_path, ANSWERS[3:])
    kind = Pairwise(prompt=COMPARED, thought_tokens=30, max_failure_rate=1)
    texts = [f"{THOUGHT}[[A]]", f"{THOUGHT.replace('see', 'look')}[[B]]"]
    judged(tmp_path / "thinks", kind, policy_artifact(thinker), writer(thinker, *texts), **inputs)
    behind = [text.rpartition("<|im_start|>assistant\n")[2] for text in read]
    assert sorted(behind) == sorted([f"{THOUGHT}[[", f"{THOUGHT.replace('see', 'look')}[["])
    endless = writer(thinker, "<think>\nHm", f"{THOUGHT}[[A]]")
    _, judgements = judged(tmp_path / "endless", kind, policy_artifact(thinker), endless, **inputs)
    assert {one.status for one in judgements.values()} == {JudgementStatus.TRUNCATED}
    read.clear()
    judged(tmp_path / "empty", replace(kind, thought_tokens=0), policy_artifact(thinker), **inputs)
    assert all(text.endswith(f"assistant\n{NOTHING}[[") for text in read)


def test_reward_counts_the_answers_tokens_alone(
    tmp_path: Path, thinker: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same answer behind a thought has another probability, and the same length."""
    trained = policy_artifact(nudged_policy(thinker, tmp_path_factory.mktemp("nudged")))
    thought = [replace(ANSWERS[0], thought=THOUGHT), replace(ANSWERS[1], thought=THOUGHT)]
    found: list[list[float]] = []
    for alpha in (0.0, 0.5):
        kind, inputs = ImplicitReward(alpha=alpha), given(tmp_path / f"{alpha}", thought)
        folder = tmp_path / f"out-{alpha}"
        _, judgements = judged(folder, kind, trained, reference=policy_artifact(thinker), **inputs)
        found.append([one.score or 0.0 for one in judgements.values()])
    tokenizer = loaded(thinker.path).tokenizer
    lengths = [1 + len(tokenizer(one.text)["input_ids"]) for one in thought]
    taken = [(one - other) / 0.5 for one, other in zip(*found, strict=True)]
    assert taken == pytest.approx(lengths, abs=1e-3)


def test_response_without_an_answer_is_not_judged(tmp_path: Path, thinker: PolicyCheckpoint) -> None:
    cut = replace(ANSWERS[1], text="", thought="<think>\nHm", finish_reason=FinishReason.TRUNCATED)
    inputs = given(tmp_path, [ANSWERS[0], cut, *ANSWERS[2:]])
    for name, kind in {"scored": ExpectedScore(prompt=RUBRIC), "compared": Pairwise(prompt=COMPARED)}.items():
        counts, judgements = judged(tmp_path / name, kind, policy_artifact(thinker), **inputs)
        assert (judgements["bees-2"].status, judgements["bees-2"].model) == (JudgementStatus.TRUNCATED, "nobody")
        assert counts["dropped"] == {"truncated_response": 1}
        assert counts["unjudged_responses"] == 1
        assert all(judgements[one.id].score is not None for one in ANSWERS if one.id != "bees-2")


def test_given_answer_with_a_thought_is_shown_without_it(thinker: PolicyCheckpoint) -> None:
    """As of ranked questions whose answers were read from data."""
    kind = SampledScore(prompt=RUBRIC)
    assert kind.ask("Hm?", f"{THOUGHT}A wren.") == kind.ask("Hm?", "A wren.")
    assert kind.ask("Hm?", "<think>\nA wren.") == kind.ask("Hm?", "")
    compare = Pairwise(prompt=COMPARED)
    assert compare.ask("Hm?", f"{THOUGHT}A wren.", "<think>a") == compare.ask("Hm?", "A wren.", "")
    question = RankedAnswers(
        id="q", instruction="Hm?", texts=[f"{THOUGHT}Yes.", "No."], ranks=[1, 2], scores=[], justifications=[]
    )
    assert "see" not in str([one.prompt for one in compare.demonstrate(question)])


def test_server_has_room_for_thought_and_judgement() -> None:
    endpoint = Endpoint(base_url="http://localhost/v1", model="m")
    kind = ExternalScore(prompt=RUBRIC, endpoint=endpoint)
    kind.sampling.max_new_tokens, kind.sampling.thought_tokens = 100, 900
    subject = InstructionResponse(ASKED[0], replace(ANSWERS[0], thought=THOUGHT))
    asked = kind._request(JudgementRequest(subject, 1, 1, 0))
    assert asked["max_tokens"] == 1000
    assert "see" not in str(asked["messages"])
    compare = Pairwise(prompt=COMPARED, endpoint=endpoint, verdict_tokens=100, thought_tokens=900)
    assert compare.probe()["max_tokens"] == 1000
