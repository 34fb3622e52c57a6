"""Where thinking ends, in the markers of the models that are served today."""

import re

import pytest

from selfalign.data import thinking
from selfalign.data.thinking import answer_behind, thinks_on, unanswered

ENDED = {
    "Qwen, DeepSeek, GLM": "<think>\nScore: 2\n</think>\n\nScore: 4",
    "begun in the prompt": "Score: 2, or so.\n</think>\n\nScore: 4",
    "nothing thought": "<think>\n\n</think>\n\nScore: 4",
    "twice": "<think>a</think>Score: 1\n<think>no</think>\nScore: 4",
    "thinking": "<thinking>Score: 2</thinking>\nScore: 4",
    "EXAONE": "<thought>\nScore: 2\n</thought>\n\nScore: 4",
    "reasoning": "<reasoning>Score: 2</reasoning>\nScore: 4",
    "Seed": "<seed:think>Score: 2</seed:think>Score: 4",
    "MiniMax": "<mm:think>Score: 2</mm:think>Score: 4",
    "Kimi": "◁think▷Score: 2◁/think▷Score: 4",
    "Kimi K3": "<|open|>think<|sep|>Score: 2<|close|>think<|sep|><|open|>response<|sep|>Score: 4",
    "Magistral": "[THINK]Score: 2[/THINK]Score: 4",
    "Command A": "<|START_THINKING|>Score: 2<|END_THINKING|><|START_RESPONSE|>Score: 4",
    "Apertus": "<|inner_prefix|>Score: 2<|inner_suffix|>Score: 4",
    "Sky-T1": "<|begin_of_thought|>Score: 2<|end_of_thought|>\nScore: 4",
    "Gemma 4": "<|channel>thought\nScore: 2<channel|>Score: 4",
    "gpt-oss": "<|channel|>analysis<|message|>Score: 2<|end|><|start|>assistant<|channel|>final<|message|>Score: 4",
    "gpt-oss, JSON": "<|channel|>analysis<|message|>x<|channel|>final <|constrain|>json<|message|>Score: 4",
    "gpt-oss, control tokens taken out": "analysisWe think.\nScore: 2assistantfinalScore: 4",
    "Granite": "Here is my thought process:\nScore: 2\nHere is my response:\nScore: 4",
    "Apriel": "Here are my reasoning steps:\nScore: 2\n[BEGIN FINAL RESPONSE]\nScore: 4",
    "Solar": "<|think|>Score: 2<|end|><|begin|>assistant<|content|>Score: 4",
}


@pytest.mark.parametrize("name", ENDED)
def test_only_what_stands_behind_the_thinking_is_the_answer(name: str) -> None:
    answer = answer_behind(ENDED[name])
    assert answer is not None
    assert answer.strip() == "Score: 4"


def before_its_end(text: str) -> str:
    """The text as it was before its thinking ended."""
    [*_, last] = [*thinking.CLOSING.finditer(text), *re.finditer("assistantfinal", text)]
    return text[: last.start()]


BEGUN = [name for name in ENDED if name != "begun in the prompt"]


@pytest.mark.parametrize("name", BEGUN)
def test_thinking_without_an_end_has_no_answer(name: str) -> None:
    assert answer_behind(before_its_end(ENDED[name])) is None
    assert answer_behind(f"{ENDED[name]}\n<think>\nBut no.\nScore: 3") is None


@pytest.mark.parametrize(
    "text",
    [
        "Score: 4",
        "",
        "The response shows its <think> section.\nScore: 4",
        "It leaks a `</think>` tag.\nScore: 4",
        'It ends with "</think>".\nScore: 4',
        "analysis of the answer: good.\nScore: 4",
        "Analysis: good.\nassistantfinal is no word.\nScore: 4",
    ],
)
def test_answer_that_speaks_of_thinking_is_one(text: str) -> None:
    assert answer_behind(text) == text


def test_thinking_that_a_server_took_apart_is_thinking_without_an_answer() -> None:
    assert answer_behind(unanswered("hmm\nScore: 3")) is None
    assert answer_behind(unanswered("hmm</think>\nScore: 3")) is None


def test_text_has_marks_of_thinking_where_it_begins_or_ends() -> None:
    assert [thinking.marks_thinking(text) for text in ("Hm.</think>", "[THINK]", "I think.", "a <think> tag")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_text_thinks_on_where_its_prompt_began_to() -> None:
    begun = "<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert thinks_on(begun, "I might say\nScore: 3\n")
    assert not thinks_on(begun, "Hm.\n</think>\nScore: 3")
    assert not thinks_on("<|im_start|>assistant\n", "I might say\nScore: 3")
    assert not thinks_on("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Score: 3")
