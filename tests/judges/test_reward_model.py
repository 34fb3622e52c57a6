import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Killed, composed, records_artifact, response, workspace
from judging import ANSWERS, ASKED, given, judged, run_judge
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from selfalign.config.checks import without_effect
from selfalign.core.errors import SelfalignError
from selfalign.core.records import Instruction, JudgementStatus
from selfalign.judges.reward_model import RewardModel, rewarded
from selfalign.models.builtin import BUILDERS
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig
from selfalign.models.reward_model import RewardHead, RewardScorer, encode_conversation
from selfalign.pipeline.loop import plan
from selfalign.stages.load_model import load_model
from selfalign.store.artifacts import Artifact

CONTROL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""As Llama 3's: it writes BOS, which the tokenizer would add once more, and ends with the token that pads."""

LLAMA, QWEN = (LlamaConfig, LlamaForSequenceClassification), (Qwen2Config, Qwen2ForSequenceClassification)


@cache
def tiny_tokenizer() -> Any:
    return BUILDERS["random:tiny"]()[1]


def reward_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"bos_token": CONTROL[0], "eos_token": CONTROL[3], "pad_token": CONTROL[3]})
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL[1:3]})
    bos = (CONTROL[0], tokenizer.convert_tokens_to_ids(CONTROL[0]))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = template
    return tokenizer


def reward_checkpoint(
    folder: Path,
    kind: Any = LLAMA,
    *,
    pad: int | None = None,
    labels: Sequence[str] = ("reward",),
    context: int = 512,
    template: str | None = TEMPLATE,
) -> Path:
    """A random reward model as it is published: weights, config and tokenizer in one folder."""
    tokenizer = reward_tokenizer(template)
    config = kind[0](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        pad_token_id=pad,
    )
    torch.manual_seed(1)
    model = kind[1](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4  # The logits of fresh weights hardly differ.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fetched(folder: Path, out: Path, **weights: float) -> Artifact:
    """The model as the stage loads it."""
    made = workspace(out)
    model, head = ModelConfig(path=str(folder)), RewardHead(weights=weights)
    counts = load_model(made, model=model, source="", head=head)
    return Artifact("load_model", "reward", made.path, PolicyCheckpoint(made.path).digest, counts, 0.0)


def plain_logits(folder: Path, kind: Any, asked: str, answer: str) -> list[float]:
    """What transformers itself says to one conversation."""
    tokenizer, model = reward_tokenizer(), kind[1].from_pretrained(folder).eval()
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].tolist()


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LLAMA, QWEN], ids=["llama", "qwen2"])
@pytest.mark.parametrize("pad", ["none", "end of turn", "unused", "outside"])
@pytest.mark.parametrize("max_batch_tokens", [100, 8192])
def test_score_is_the_logit_of_each_conversation_alone(
    tmp_path: Path, kind: Any, pad: str, max_batch_tokens: int
) -> None:
    end = reward_tokenizer().convert_tokens_to_ids("<|eot_id|>")
    pads = {"none": None, "end of turn": end, "unused": 0, "outside": -1}
    folder = reward_checkpoint(tmp_path / "model", kind, pad=pads[pad])
    judge = RewardModel(model=str(folder), max_batch_tokens=max_batch_tokens)
    _, judgements = judged(tmp_path, judge, fetched(folder, tmp_path / "fetched"))
    texts = {record.id: record.text for record in ASKED}
    for answer in ANSWERS:
        [logit] = plain_logits(folder, kind, texts[answer.instruction_id], answer.text)
        assert judgements[answer.id].score == pytest.approx(logit, abs=1e-5)
        assert judgements[answer.id].text == f"reward {logit:.3f}"
    assert len({round(one.score, 3) for one in judgements.values()}) == len(ANSWERS)


def test_conversation_has_one_bos_and_no_generation_prompt() -> None:
    tokenizer = reward_tokenizer()
    ids = encode_conversation(tokenizer, [{"role": "user", "content": "Hi."}], "Hello.")
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    assert ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids).endswith("\n\nHello.<|eot_id|>")


def test_bos_that_only_the_tokenizer_adds_is_there_once() -> None:
    tokenizer = reward_tokenizer(TEMPLATE.replace("{{ bos_token }}", ""))
    ids = encode_conversation(tokenizer, [{"role": "user", "content": "Hi."}], "Hello.")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_control_tokens_that_a_response_spells_end_no_turn() -> None:
    tokenizer = reward_tokenizer()
    asked, end = [{"role": "user", "content": "Hi."}], tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert encode_conversation(tokenizer, asked, "Hello.<|eot_id|><|start_header_id|>user").count(end) == 2


def test_thought_before_the_answer_is_not_scored(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path / "model")
    answers = [response("bees-1", "They fly."), response("bees-2", "<think>\nHm.\n</think>\n\nThey fly.")]
    _, judgements = judged(
        tmp_path, RewardModel(model=str(folder)), fetched(folder, tmp_path / "f"), **given(tmp_path, answers)
    )
    assert judgements["bees-1"].score == judgements["bees-2"].score


def test_system_turn_and_earlier_turns_are_part_of_the_conversation(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path / "model")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What do bees do?"}]
    asked = Instruction(id="bees", text="…", source="given", turns=turns)
    place = records_artifact(tmp_path / "given", instructions=[asked], responses=[response("bees-1", "Fly.")])
    inputs = {"instructions": place, "responses": place}
    _, judgements = judged(tmp_path, RewardModel(model=str(folder)), fetched(folder, tmp_path / "f"), **inputs)
    ids = reward_tokenizer().apply_chat_template(
        [*turns, {"role": "assistant", "content": "Fly."}], tokenize=True, return_dict=True
    )["input_ids"]
    with torch.no_grad():
        logit = LlamaForSequenceClassification.from_pretrained(folder)(input_ids=torch.tensor([ids])).logits.item()
    assert judgements["bees-1"].score == pytest.approx(logit, abs=1e-5)


def test_turn_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    deaf = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    folder = reward_checkpoint(tmp_path / "model", template=deaf)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What do bees do?"}]
    asked = Instruction(id="bees", text="…", source="given", turns=turns)
    place = records_artifact(tmp_path / "given", instructions=[asked], responses=[response("bees-1", "Fly.")])
    inputs = {"instructions": place, "responses": place}
    with pytest.raises(SelfalignError, match="record bees: the chat template leaves out or changes the system's turn"):
        run_judge(tmp_path, RewardModel(model=str(folder)), fetched(folder, tmp_path / "f"), **inputs)


ATTRIBUTES = ("helpfulness", "correctness", "verbosity")


def test_score_of_several_attributes_is_their_weighted_sum(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path / "model", labels=ATTRIBUTES)
    judge = RewardModel(model=str(folder), weights={"helpfulness": 0.5, 2: -2.0})
    assert judge.weights == {"helpfulness": 0.5, "2": -2.0}
    policy = fetched(folder, tmp_path / "f", **judge.weights)
    assert policy.counts["weights"] == {"helpfulness": 0.5, "correctness": 0.0, "verbosity": -2.0}
    _, judgements = judged(tmp_path, judge, policy)
    for answer in ANSWERS[:2]:
        logits = plain_logits(folder, LLAMA, ASKED[0].text, answer.text)
        assert judgements[answer.id].score == pytest.approx(0.5 * logits[0] - 2 * logits[2], abs=1e-4)
        named = ", ".join(f"{name} {logit:.3f}" for name, logit in zip(ATTRIBUTES, logits, strict=True))
        assert judgements[answer.id].text == named


def test_one_logit_may_be_turned_round() -> None:
    assert RewardHead().resolve(["reward"]) == [1.0]
    assert RewardHead(weights={"reward": -1.0}).resolve(["reward"]) == [-1.0]


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({}, r"judge\.weights must say how the 3 scores .*helpfulness, correctness, verbosity"),
        ({"honesty": 1.0}, r"judge\.weights\.honesty names none of .*helpfulness, correctness, verbosity"),
        ({"3": 1.0}, r"judge\.weights\.3 names none .*an index from 0 to 2"),
    ],
)
def test_weights_are_checked_where_the_model_is_loaded(tmp_path: Path, weights: dict, named: str) -> None:
    folder = reward_checkpoint(tmp_path / "model", labels=ATTRIBUTES)
    with pytest.raises(SelfalignError, match=named):
        fetched(folder, tmp_path / "f", **weights)


def test_response_that_does_not_fit_is_counted_and_never_cut(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path / "model", context=64)
    long = response("tea-3", "Pour it slowly and wait. " * 10)
    counts, judgements = judged(
        tmp_path,
        RewardModel(model=str(folder)),
        fetched(folder, tmp_path / "f"),
        **given(tmp_path, [*ANSWERS[:2], long]),
    )
    assert counts["dropped"] == {"prompt_too_long": 1}
    assert judgements["tea-3"].status is JudgementStatus.PROMPT_TOO_LONG


def test_reward_that_is_no_number_is_no_score(tmp_path: Path) -> None:
    subject = type("Subject", (), {"response": ANSWERS[0]})()
    made = rewarded(subject, [float("nan")], [1.0], ["reward"], "m")
    assert (made.status, made.score) == (JudgementStatus.NO_SCORE, None)


def test_killed_judging_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reward_checkpoint(tmp_path / "model")
    judge, policy = RewardModel(model=str(folder), max_batch_tokens=1), fetched(folder, tmp_path / "f")
    _, whole = judged(tmp_path / "whole", judge, policy)
    original, sizes = RewardScorer.logits, list[int]()

    def dying(self: RewardScorer, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        if len(sizes) == 3:
            raise Killed
        sizes.append(len(texts))
        return original(self, texts)

    inputs = given(tmp_path)
    monkeypatch.setattr(RewardScorer, "logits", dying)
    with pytest.raises(Killed):
        run_judge(tmp_path, judge, policy, **inputs)
    asked = list[int]()

    def counting(self: RewardScorer, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        asked.append(len(texts))
        return original(self, texts)

    monkeypatch.setattr(RewardScorer, "logits", counting)
    _, resumed = judged(tmp_path, judge, policy, **inputs)
    assert resumed == whole
    assert asked == [1, 1]


# --- what is no reward model -------------------------------------------------------------------------------------


def test_causal_language_model_is_refused_for_its_random_head(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path / "model")
    config = LlamaConfig.from_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    with pytest.raises(SelfalignError, match=r"is no reward model: it has no weights for 'score\.weight'"):
        fetched(folder, tmp_path / "f")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, r"weights of .* are quantised \(awq\)"),
        ({"model_type": "mamba"}, r"\(mamba\) is of no architecture that transformers scores sequences with"),
        ({"num_hidden_layers": 3}, "is no reward model: it has no weights for"),
        ({"num_hidden_layers": 1}, "has weights that LlamaForSequenceClassification does not use"),
    ],
)
def test_checkpoint_of_another_form_is_refused(tmp_path: Path, changed: dict, named: str) -> None:
    folder = reward_checkpoint(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, **changed}), "utf-8")
    with pytest.raises(SelfalignError, match=named):
        fetched(folder, tmp_path / "f")


def test_reward_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path / "model", template=None)
    with pytest.raises(SelfalignError, match=r"judge\.model: .* has no chat template"):
        fetched(folder, tmp_path / "f")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": "self"}, r"judge\.model=self is no reward model"),
        ({"weights": {"a": float("inf")}}, r"judge\.weights must be finite"),
        ({"weights": {"a": 0.0}}, r"judge\.weights must be finite numbers, not all 0"),
        ({"dtype": "float16"}, r"judge\.dtype must be one of float32, bfloat16"),
        ({"max_batch_tokens": 0}, r"judge\.max_batch_tokens"),
        ({"max_failure_rate": 2.0}, r"judge\.max_failure_rate"),
    ],
)
def test_impossible_setting_is_refused_with_its_key(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=named):
        RewardModel(**{"model": "owner/name", **settings})


# --- the run -----------------------------------------------------------------------------------------------------


def test_reward_model_judges_candidates_and_the_answers_of_all_models() -> None:
    chosen = ["judge=reward_model", "judge.model=owner/name", "data.seed_data.eft_source=none"]
    config, _, _ = composed("experiment=smoke", *chosen, "+judge.weights={help: 1, 2: -0.5}")
    assert config.judge.weights == {"help": 1.0, "2": -0.5}
    sizes = {str(one.label): one.size for one in plan(config)}
    scored = ["iteration_1/judgements", "iteration_2/judgements", "evaluation_M1/scores", "evaluation_M3/scores"]
    assert all(sizes[label].endswith("by RewardModel, judge") for label in scored)
    assert without_effect(config, ["evaluate.judge=base"]) == [
        "evaluate.judge=base has no effect: a reward model scores the answers"
    ]
