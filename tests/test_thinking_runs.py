"""Whole runs of a model that thinks: only the answer is judged, compared and measured, and training keeps both."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarking import write_rows
from builders import TINY_RUN, composed, run, write_tiny_data
from thinking_families import completion_of, thinking_model
from transformers import PreTrainedTokenizerBase

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.engines.protocol import Completion, Request, Sampling
from selfalign.engines.transformers import TransformersGenerator
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig, Thinking
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import decode_response
from selfalign.store.key import to_key_json

SECRET = "zebra"
THOUGHT = f"<think>\nA {SECRET}, perhaps? No.\n</think>\n\n"
ASK = "Think of an okapi first."
ASKED = ["data.instruct.count=3", "data.instruct.max_rouge_l=1", "iterations=1"]
ASKED += ["evaluate.instructions=shipped:evaluation", "evaluate.count=3"]
ANIMALS = ("wren", "cod", "bee", "cat", "hen", "fox", "eel")


def think(self: TransformersGenerator, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
    """A thought and an answer for every seed; every fourth thought has no end."""

    def write(seed: int) -> Completion:
        words = " ".join(ANIMALS[(seed + n) % 7] for n in range(1 + seed % 3))
        text = THOUGHT.removesuffix("\n</think>\n\n") if seed % 4 == 3 else f"{THOUGHT}A {words} {seed % 101}."
        return completion_of(self.tokenizer, f"{text}<|im_end|>")

    return [[write(seed) for seed in request.seeds] for request in requests]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(field, value) of everything in a record."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, key)
    elif isinstance(value, list) and not name.endswith("ids"):
        for item in value:
            yield from leaves(item, name)
    else:
        yield name, value


def rows_of(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """(stage, field, value) of every record of a run's store."""
    for path in sorted(folder.glob("store/*/*/**/*.json*")):
        if path.suffix == ".jsonl":
            stage = path.relative_to(folder / "store").parts[0]
            for line in path.read_text(encoding="utf-8").splitlines():
                yield from ((stage, name, value) for name, value in leaves(json.loads(line)))


def questions(folder: Path) -> list[str]:
    asked = [{"question_id": 1, "category": "writing", "turns": ["Write a line on rain.", "Now on snow."]}]
    path = write_rows(folder / "question.jsonl", asked)
    return ["benchmark=[vicuna_bench]", f"benchmark.vicuna_bench.questions={path}"]


@pytest.fixture
def model(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> list[str]:
    """A model of Qwen3's family."""
    return ["model=pretrained", f"model.path={thinking_model(tiny_policy, 'qwen3', tmp_path / 'qwen3')}"]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read by judges that score next tokens, in this run."""
    found: list[str] = []
    original: Callable[..., Any] = LogProbScorer.next_token_logprobs

    def spy(self: LogProbScorer, groups: Sequence[Any], alternatives: Sequence[int]) -> Any:
        found.extend(str(self.tokenizer.decode([*group.prompt, *ids])) for group in groups for ids in group.responses)
        return original(self, groups, alternatives)

    monkeypatch.setattr(LogProbScorer, "next_token_logprobs", spy)
    return found


def small(tmp_path: Path, *more: str) -> list[str]:
    data = write_tiny_data(tmp_path / "data")
    source = f"data.instruct.source={tmp_path / 'data' / 'asked.jsonl'}"
    smoke = [one for one in TINY_RUN if not one.startswith("data.instruct")]
    return [*smoke, *data, source, *ASKED, *more]


def test_nothing_but_the_answer_is_judged_compared_and_measured(
    model: list[str], read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record of a run is looked at: only the fields of thoughts have one."""
    monkeypatch.setattr(TransformersGenerator, "generate", think)
    out = tmp_path / "out"
    settings = ["data.respond.candidates=6", f"model.thinking.prompt='{ASK}'"]
    settings += ["pair.length_control=0.2", "evaluate.sampling.max_new_tokens=40"]
    settings += ["data.respond.sampling.max_new_tokens=40", "benchmark.vicuna_bench.max_new_tokens=40"]
    folder = run(out, *small(tmp_path), *model, *questions(tmp_path), *settings)
    rows = list(rows_of(out))
    assert {name for _, name, value in rows if SECRET in str(value)} == {
        "thought",
        "chosen_thought",
        "rejected_thought",
    }
    assert {name for _, name, value in rows if ASK in str(value)} == {"thought_prompt"}
    assert read
    assert not [prompt for prompt in read if SECRET in prompt or ASK in prompt]
    told = {stage for stage, name, value in rows if name == "thought" and value}
    assert told == {"respond"}
    assert {stage for stage, _, _ in rows} >= {"respond", "judge", "pair", "head_to_head", "benchmark", "kl_divergence"}
    texts = [value for stage, name, value in rows if stage == "respond" and name == "text"]
    lengths = [read_json(path)["counts"] for path in out.glob("store/respond/*/manifest.json")]
    assert sum(one["mean_characters"] * one["responses"] for one in lengths) == pytest.approx(sum(map(len, texts)))
    assert any(one["truncated_share"] for one in lengths)
    assert all(one["mean_thought_tokens"] > 5 for one in lengths)
    judged = [read_json(path)["counts"]["dropped"] for path in out.glob("store/judge/*/manifest.json")]
    assert any(one.get("truncated_response") for one in judged)
    pairs = [json.loads(row) for path in out.glob("store/pair/*/pairs.jsonl") for row in path.read_text().splitlines()]
    assert pairs
    [made] = out.glob("store/load_model/*/manifest.json")
    tokenizer = PolicyCheckpoint(made.parent).load_tokenizer()
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert pair[f"{side}_thought"] == THOUGHT
            assert decode_response(tokenizer, pair[f"{side}_ids"]) == THOUGHT + pair[side]
    assert (folder / "report.html").exists()


def test_arguments_of_the_template_reach_every_rendering_and_the_keys(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[Any] = []
    original: Callable[..., Any] = PreTrainedTokenizerBase.apply_chat_template

    def spy(self: Any, *arguments: Any, **named: Any) -> Any:
        rendered.append(named.get("enable_thinking"))
        return original(self, *arguments, **named)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", spy)
    off = "+model.chat_template_arguments.enable_thinking=false"
    out = tmp_path / "out"
    run(out, *small(tmp_path), *model, *questions(tmp_path), off, "benchmark.vicuna_bench.max_new_tokens=8")
    assert len(rendered) > 100
    assert set(rendered) == {False}
    [made] = out.glob("store/load_model/*/manifest.json")
    assert read_json(made)["inputs"]["model"]["chat_template_arguments"] == {"enable_thinking": False}
    first = out / "store" / "sft"
    keys = {path.name for path in first.iterdir()}
    run(out, *small(tmp_path), *model, off.replace("false", "true"))
    assert len({path.name for path in first.iterdir() if path.is_dir()} - keys) == 1


def test_settings_of_thoughts_leave_the_keys_of_others_as_they_are() -> None:
    plain = to_key_json(ModelConfig(path="random:tiny"))
    assert {"chat_template_arguments", "thinking"}.isdisjoint(plain)
    assert "thought_tokens" not in to_key_json(Sampling())
    assert to_key_json(Sampling(thought_tokens=5))["thought_tokens"] == 5
    one, other = (ModelConfig(path="x/y", chat_template_arguments={"a": a}) for a in (1, 2))
    assert to_key_json(one) != to_key_json(other)
    assert (
        to_key_json(ModelConfig(path="x/y", thinking=Thinking(open="<a>", close="</a>")))["thinking"]["open"] == "<a>"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chat_template_arguments": {"enable_thinkng": True}}, "enable_thinkng has no effect: the chat template of"),
        ({"thinking": Thinking(prompt="Think.")}, "model.thinking.prompt asks for thoughts, but the chat template of"),
    ],
    ids=["argument", "prompt"],
)
def test_settings_that_the_template_does_not_know_are_refused(settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=said):
        fetch_pretrained(ModelConfig(path="random:tiny", **settings), tmp_path / "M0")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.thinking.open=BEGIN", "model.thinking.open and model.thinking.close are given together, or neither"),
        ("+model.chat_template_arguments.messages=1", "chat_template_arguments.messages is set by the run itself"),
        ("data.instruct.sampling.thought_tokens=9", "data.instruct.sampling.thought_tokens has no effect"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(override: str, said: str) -> None:
    with pytest.raises(SelfalignError, match=said):
        composed("experiment=smoke", override)


def test_given_markers_hold_for_the_model_and_those_trained_from_it(tmp_path: Path) -> None:
    config = ModelConfig(path="random:tiny", thinking=Thinking(open="<plan>", close="</plan>", prompt="Plan."))
    tokenizer = fetch_pretrained(config, tmp_path / "M0").load_tokenizer()
    assert tokenizer.init_kwargs["thought_markers"] == ["<plan>", "</plan>"]
    assert tokenizer.init_kwargs["thought_prompt"] == "Plan."
    tokenizer.save_pretrained(tmp_path / "M1")
    again = PolicyCheckpoint(tmp_path / "M0").load_tokenizer().from_pretrained(tmp_path / "M1")
    assert again.init_kwargs["thought_markers"] == ["<plan>", "</plan>"]


def test_study_of_thoughts_asks_for_them_and_controls_the_answers_length() -> None:
    config, _, _ = composed("experiment=thought_preference")
    assert config.model.thinking.open in config.model.thinking.prompt
    assert config.model.thinking.close in config.model.thinking.prompt
    assert (config.data.respond.candidates, config.judge.model, config.pair.length_control) == (8, "sft", 0.1)
    assert config.data.respond.sampling.longest < config.train.align.max_length
