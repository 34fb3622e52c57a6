"""Runs on conversations: turns and system turns reach every rendering, and judges read the whole of them."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarking import write_rows
from builders import TINY_RUN, run
from transformers import PreTrainedTokenizerBase

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.core.records import Demonstration, Instruction, Message, PreferencePair
from selfalign.data.turns import as_text
from selfalign.models.batches import encode_pairs
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.tokenizer import answer_prompt, encode_prompt
from selfalign.stages.sft import encode_demonstration
from selfalign.store.key import to_key_json

SYSTEM = "Speak of okapis."


def turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def dialogue(kind: str, n: int) -> list[Message]:
    return [
        turn("system", f"You are keeper {kind}-{n}."),
        turn("user", f"Name animal {kind}-{n} please."),
        turn("assistant", f"A wren, number {kind}-{n}."),
        turn("user", f"Which colour has wren {kind}-{n}?"),
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def records(out: Path, stage: str, name: str) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob(f"store/{stage}/*/{name}.jsonl")) for row in lines(path)]


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[list[Message]]:
    """Every conversation that is rendered."""
    found: list[list[Message]] = []
    original: Callable[..., Any] = PreTrainedTokenizerBase.apply_chat_template

    def spy(self: Any, conversation: Any, *arguments: Any, **named: Any) -> Any:
        found.append([dict(message) for message in conversation])
        return original(self, conversation, *arguments, **named)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", spy)
    return found


def test_conversations_and_the_system_prompt_of_others_go_through_the_whole_loop(
    rendered: list[list[Message]], tmp_path: Path
) -> None:
    rows = {
        "ift": [{"messages": [*dialogue("ift", n), turn("assistant", f"Brown {n}.")]} for n in range(3)],
        "ranked": [
            {
                "messages": dialogue("ranked", n),
                "responses": [{"text": f"Brown, as leaves {n}.", "rank": 1}, {"text": "No.", "rank": 2}],
            }
            for n in range(4)
        ],
        "given": [{"messages": dialogue("given", n)} for n in range(2)],
        "asked": [{"messages": dialogue("asked", n)} for n in range(2)],
    }
    rows["ift"] += [{"instruction": "Say one thing about bees.", "response": "They hum."}]
    rows["given"] += [{"instruction": "What do people make of clocks?"}]
    rows["asked"] += [{"instruction": "What do people make of bread?"}]
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", some) for name, some in rows.items()}
    question = {"question_id": 1, "category": "writing", "turns": ["Write a line on rain.", "Now on snow."]}
    out = tmp_path / "out"
    run(
        out,
        *(one for one in TINY_RUN if not one.startswith("data.instruct")),
        f"data.seed_data.demonstrations={paths['ift']}",
        f"data.seed_data.ranked={paths['ranked']}",
        f"data.instruct.source={paths['given']}",
        *("data.instruct.count=3", "data.instruct.max_rouge_l=1", "data.instruct.min_words=1", "iterations=1"),
        *(f"evaluate.instructions={paths['asked']}", "evaluate.count=0", "pair.minimum_pairs=1"),
        *("benchmark=[vicuna_bench]", "benchmark.vicuna_bench.max_new_tokens=8"),
        f"benchmark.vicuna_bench.questions={write_rows(tmp_path / 'question.jsonl', [question])}",
        f"model.system_prompt='{SYSTEM}'",
    )
    assert records(out, "given_instructions", "instructions")[0]["turns"] == dialogue("given", 0)
    asked = [[turn("user", "What do people make of clocks?")], dialogue("given", 0), dialogue("given", 1)]
    pairs = records(out, "pair", "pairs")
    assert pairs
    assert all(pair["prompt"] in asked for pair in pairs)
    for kind in ("ift", "given", "asked"):
        assert dialogue(kind, 1) in [one[:4] for one in rendered]
    users = [one["content"] for messages in rendered for one in messages if one["role"] == "user"]
    for kind in ("ranked", "given", "asked"):
        assert any("Score:" in text and as_text(dialogue(kind, 1)) in text for text in users)
    under = {one[1]["content"] for one in rendered if one[0] == turn("system", SYSTEM)}
    alone = {one[0]["content"] for one in rendered if one[0]["role"] == "user"}
    subjects = {f"What do people make of {subject}?" for subject in ("clocks", "bread")}
    assert {"Write a line on rain.", "Say one thing about bees.", *subjects} <= under - alone
    assert sum("Score:" in text for text in alone) > 10
    assert not any("Score:" in text for text in under)
    [made] = out.glob("store/load_model/*/manifest.json")
    assert read_json(made)["inputs"]["model"]["system_prompt"] == SYSTEM


@pytest.fixture
def policy(tmp_path: Path) -> PolicyCheckpoint:
    return fetch_pretrained(ModelConfig(path="random:tiny", system_prompt=SYSTEM), tmp_path / "M0")


def test_trained_and_generated_prompts_are_under_the_same_system_prompt(policy: PolicyCheckpoint) -> None:
    tokenizer = policy.load_tokenizer()
    asked, own = [turn("user", "Hello?")], [turn("system", "Be brief."), turn("user", "Hello?")]
    whole = encode_prompt(tokenizer, [turn("system", SYSTEM), *asked])
    assert encode_prompt(tokenizer, answer_prompt(tokenizer, asked)) == whole
    assert answer_prompt(tokenizer, own) == own
    assert answer_prompt(tokenizer, "Hello?") == "Hello?"
    shown = Demonstration(id="d", prompt=asked, response="Hi.", source="ift")
    judging = Demonstration(id="e", prompt=asked, response="Hi.", source="eft")
    assert encode_demonstration(tokenizer, shown).prompt == whole
    assert encode_demonstration(tokenizer, judging).prompt == encode_prompt(tokenizer, asked)
    [example] = encode_pairs(
        tokenizer, [PreferencePair(id="p", prompt=asked, chosen="Hi.", rejected="No.")], None, 512, Counter()
    )
    assert example.plain.prompt == whole


def test_system_prompt_that_the_template_does_not_write_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    config = ModelConfig(path="random:tiny", chat_template=str(template), system_prompt=SYSTEM)
    with pytest.raises(SelfalignError, match=r"model\.system_prompt: the chat template of random:tiny does not write"):
        fetch_pretrained(config, tmp_path / "M0")


def test_what_a_model_was_asked_by_in_the_run_it_comes_from_is_told(
    policy: PolicyCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = read_json(policy.path / "tokenizer/tokenizer_config.json")
    assert settings["system_prompt"] == SYSTEM
    path = tmp_path / "comes-from-a-run"
    for part in ("weights", "tokenizer"):
        shutil.copytree((policy.path / part).resolve(), path, dirs_exist_ok=True)
    write_json(path / "tokenizer_config.json", settings | {"chat_template_arguments": {"enable_thinking": False}})
    with caplog.at_level("INFO"):
        for name, prompt in (("without", ""), ("another", "Be brief."), ("same", SYSTEM)):
            (tmp_path / name).mkdir()
            fetch_pretrained(ModelConfig(path=str(path), system_prompt=prompt), tmp_path / name)
    told = [line.removeprefix(f"{path} comes from a run with ") for line in caplog.messages if "comes from" in line]
    kept = "model.chat_template_arguments={'enable_thinking': False}, which still hold: set others to change them"
    begun = f"model.system_prompt={SYSTEM!r}, under which it was trained, and is asked "
    without, another = (f"{begun}{how} here: set it to keep it" for how in ("without it", "with another"))
    assert told == [kept, without, kept, another, kept]


def test_absent_system_prompt_leaves_keys_as_they_are() -> None:
    assert "system_prompt" not in to_key_json(ModelConfig(path="random:tiny"))
    assert to_key_json(ModelConfig(path="random:tiny", system_prompt=" A\n"))["system_prompt"] == "A"


def test_instruction_of_one_turn_is_its_text() -> None:
    assert Instruction(id="i", text="Hello?", source="given").prompt == [turn("user", "Hello?")]
