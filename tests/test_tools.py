"""Tools in prompts, demonstrations and pairs: how they are read, and the ids that chat templates give them."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import composed, policy_artifact, records_artifact
from tool_templates import DEEPSEEK, PLAIN, QWEN3, TEMPLATES, tokenizer_of

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Demonstration, PreferencePair
from selfalign.data.sources import read_demonstrations, read_instructions, read_outputs, read_pairs, read_ranked
from selfalign.data.turns import as_text
from selfalign.models.batches import encode_pairs
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import Answer, encode_answers, encode_prompt, text_faults
from selfalign.pipeline.requirements import check_requirements
from selfalign.runs.reader import pair_candidates
from selfalign.stages.seed_data import every_turn
from selfalign.stages.sft import encode_demonstration, group_demonstrations

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def say(text: str) -> Row:
    return {"role": "assistant", "content": text}


def call(name: str = "weather", text: str = "", call_id: str = "", **arguments: Any) -> Row:
    named = {"id": call_id} if call_id else {}
    made = {"type": "function", **named, "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": text, "tool_calls": [made]}


def result(text: str, **names: str) -> Row:
    return {"role": "tool", "content": text, **names}


def with_tools(*tools: Row, text: str = "") -> Row:
    return {"role": "system", "content": text, "tools": list(tools)}


INNER = {
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
WEATHER = {"type": "function", "function": INNER}
ASKED = user("How is Rome?")
CALLED = call(city="Rome")
TOLD = result("21 degrees", name="weather")


def write(folder: Path, *rows: Row) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- reading -----------------------------------------------------------------------------------------------------

MESSAGES = [ASKED, CALLED, TOLD, say("It is 21 degrees.")]


@pytest.mark.parametrize(
    "tools",
    [[WEATHER], [INNER], json.dumps([WEATHER]), json.dumps(INNER), WEATHER],
    ids=["wrapped", "bare", "text", "text_of_one", "one"],
)
def test_definitions_stand_in_the_system_turn_however_they_are_given(tmp_path: Path, tools: Any) -> None:
    [made], _ = read_demonstrations(write(tmp_path, {"messages": MESSAGES, "tools": tools}))
    assert made.prompt == [with_tools(WEATHER), *MESSAGES[:3]]
    assert made.response == "It is 21 degrees."
    assert not made.response_calls


@pytest.mark.parametrize(
    "row",
    [{"system": "Be brief."}, {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]}],
    ids=["field", "turn"],
)
def test_definitions_join_the_rows_own_system_turn(tmp_path: Path, row: Row) -> None:
    [made], _ = read_demonstrations(write(tmp_path, {"messages": MESSAGES, "tools": [WEATHER]} | row))
    assert made.prompt == [with_tools(WEATHER, text="Be brief."), *MESSAGES[:3]]


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'], ids=["object", "text"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "list"])
def test_calls_are_read_however_they_are_given(tmp_path: Path, arguments: Any, wrapped: bool, as_json: bool) -> None:
    inner = {"name": "weather", "arguments": arguments}
    calls = [{"id": "call_1", "type": "function", "function": inner} if wrapped else inner]
    turn = {"role": "assistant", "content": None, "tool_calls": json.dumps(calls) if as_json else calls}
    told = {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"}
    [made], _ = read_demonstrations(write(tmp_path, {"messages": [ASKED, turn, told, say("So.")]}))
    expected = call(city="Rome", call_id="call_1" if wrapped else "")
    assert made.prompt == [ASKED, expected, result("21 degrees", name="weather", tool_call_id="call_1")]


def test_results_of_several_calls_are_named_by_their_ids_and_else_in_order(tmp_path: Path) -> None:
    turn = call(city="Rome", call_id="a") | {"content": "I look."}
    turn |= {"tool_calls": [*turn["tool_calls"], *call("clock", call_id="b")["tool_calls"]]}
    by_id = [{"role": "tool", "tool_call_id": "b", "content": "noon"}, result("21", tool_call_id="a")]
    in_order = [result("21"), result("noon")]
    for results, names in ((by_id, ["clock", "weather"]), (in_order, ["weather", "clock"])):
        [made], _ = read_demonstrations(write(tmp_path, {"messages": [ASKED, turn, *results, say("So.")]}))
        assert [one["name"] for one in made.prompt[2:] if isinstance(one, dict)] == names


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, CALLED]},
        {"prompt": [ASKED], "completion": [CALLED]},
        {"instruction": "How is Rome?", "response": CALLED},
    ],
    ids=["messages", "prompt_and_completion", "instruction"],
)
def test_answer_may_be_a_tool_call(tmp_path: Path, row: Row) -> None:
    [made], drops = read_demonstrations(write(tmp_path, row | {"tools": [WEATHER], "id": "d"}))
    assert (made.id, made.prompt, made.response) == ("d", [with_tools(WEATHER), ASKED], "")
    assert made.response_calls == CALLED["tool_calls"]
    assert not +drops


def test_pairs_of_calls_and_of_texts_are_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": [ASKED], "chosen": [CALLED], "rejected": [say("Warm.")]},
        {"chosen": [ASKED, CALLED], "rejected": [ASKED, call(city="Paris")]},
        {"prompt": [ASKED], "chosen": [CALLED, TOLD, say("21.")], "rejected": [say("Hm.")]},
        {"input": {"messages": [ASKED], "tools": [WEATHER]}, "preferred_output": [CALLED],
         "non_preferred_output": [say("No.")]},
    ]  # fmt: skip
    one, two, three, four = read_pairs(write(tmp_path, *({"tools": [WEATHER]} | row for row in rows)))[0]
    assert all(made.prompt == [with_tools(WEATHER), ASKED] for made in (one, two, three, four))
    assert (one.chosen, one.chosen_calls, one.rejected) == ("", CALLED["tool_calls"], "Warm.")
    assert not one.rejected_calls
    assert two.rejected_calls == call(city="Paris")["tool_calls"]
    assert (three.chosen, three.chosen_turns) == ("21.", [CALLED, TOLD])
    assert four.chosen_calls == CALLED["tool_calls"]


def test_log_says_that_tools_and_turns_of_records_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown = {"tools": [INNER], "prompt": [ASKED], "response": "", "response_calls": CALLED["tool_calls"], "source": "a"}
    pair = {"tools": [INNER], "prompt": [ASKED], "chosen": "Wet.", "rejected": "Dry.", "model": "b"}
    pair |= {"chosen_turns": [CALLED, result("Rain.")], "rejected_calls": CALLED["tool_calls"]}
    path = tmp_path / "rows.jsonl"
    for row, read, other in ((shown, read_demonstrations, "source"), (pair, read_pairs, "model")):
        caplog.clear()
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        with caplog.at_level("INFO"):
            [[_], _] = read(str(path))
        assert "tools as the definitions of tools" in caplog.text
        assert [line for line in caplog.messages if "ignored" in line] == [f"{path}: ignored the fields {other}"]


def test_pair_of_equal_calls_is_none(tmp_path: Path) -> None:
    row = {"prompt": [ASKED], "chosen": [CALLED], "rejected": [CALLED]}
    made, drops = read_pairs(write(tmp_path, row))
    assert not made
    assert +drops == Counter(identical=1)


def test_written_records_are_read_again_as_they_are(tmp_path: Path) -> None:
    prompt = [with_tools(WEATHER), ASKED]
    calls = CALLED["tool_calls"]
    pair = PreferencePair(id="p", prompt=prompt, chosen="", rejected="No.", chosen_calls=calls)
    shown = Demonstration(id="d", prompt=prompt, response="", source="ift", response_calls=calls)
    write_records(tmp_path / "pairs.jsonl", [pair])
    write_records(tmp_path / "demonstrations.jsonl", [shown])
    assert read_records(tmp_path / "pairs.jsonl", PreferencePair) == [pair]
    assert read_pairs(str(tmp_path / "pairs.jsonl"))[0] == [pair]
    assert read_demonstrations(str(tmp_path / "demonstrations.jsonl"))[0] == [shown]


REFUSED: dict[str, tuple[Row, str]] = {
    "functions": ({"messages": MESSAGES, "functions": [INNER]}, "functions is filled .* older form of OpenAI's tools"),
    "function_call": (
        {"messages": [ASKED, {**say(""), "function_call": {"name": "f", "arguments": "{}"}}]},
        r"messages\[1\]\.function_call is filled .* older form of OpenAI's tool_calls; convert it to tool_calls",
    ),
    "function_turn": (
        {"messages": [ASKED, CALLED, {"role": "function", "content": "x"}, say("So.")]},
        r"messages\[2\]: a turn's role must be system, user \(or human\), assistant \(or gpt\) or tool; got 'function'",
    ),
    "no_definition": ({"messages": MESSAGES, "tools": [{"type": "files"}]}, r"tools\[0\]: expected .*got the fields"),
    "unknown_kind": (
        {"messages": MESSAGES, "tools": [WEATHER | {"type": "custom"}]},
        r"tools\[0\]: expected .* got the fields type, function",
    ),
    "broken_definitions": ({"messages": MESSAGES, "tools": "[{"}, "tools: the text is not JSON"),
    "text_definition": ({"messages": MESSAGES, "tools": '"weather"'}, "tools: expected a list or its JSON text"),
    "twice": ({"messages": MESSAGES, "tools": [WEATHER, INNER]}, "tools: two tools have the name 'weather'"),
    "plain_prompt": (
        {"prompt": "How is Rome?", "completion": "Warm.", "tools": [WEATHER]},
        "tools are given, but prompt is a text, which no chat template renders; rename prompt to instruction",
    ),
    "call_behind_a_plain_prompt": (
        {"prompt": "How is Rome?", "completion": [CALLED]},
        "completion: a tool call must be the only turn, behind a prompt of turns; got assistant",
    ),
    "broken_arguments": (
        {"messages": [ASKED, {**say(""), "tool_calls": [{"name": "weather", "arguments": "{city"}]}]},
        r"messages\[1\]\.tool_calls\[0\]\.arguments: the text is not JSON",
    ),
    "list_of_arguments": (
        {"messages": [ASKED, {**say(""), "tool_calls": [{"name": "weather", "arguments": "[1]"}]}]},
        r"arguments: expected an object or its JSON text, got a list of 1",
    ),
    "call_of_the_user": ({"messages": [ASKED | {"tool_calls": [{"name": "f"}]}, say("x")]}, "but only the assistant"),
    "tools_in_a_turn": ({"messages": [ASKED | {"tools": [INNER]}, say("x")]}, "which stand beside the turns"),
    "result_of_nothing": ({"messages": [ASKED, TOLD, say("x")]}, "a tool turn does not follow a tool call"),
    "user_behind_a_result": ({"messages": [ASKED, CALLED, TOLD, user("And?"), say("x")]}, "a user turn follows a tool"),
    "call_to_continue": ({"prompt": [ASKED, CALLED], "completion": "x"}, "its last turn is a tool call"),
    "other_definitions": (
        {"messages": [with_tools(WEATHER), *MESSAGES], "tools": [INNER | {"name": "clock"}]},
        "the system turn and the row's tools field have different tools; keep one",
    ),
    "images": ({"messages": MESSAGES, "tools": [WEATHER], "images": ["a.png"]}, "the field images is filled"),
    "reasoning": ({"messages": [ASKED, CALLED | {"reasoning": "Hm."}]}, r"messages\[1\]\.reasoning is filled"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_tools_that_cannot_be_read_are_refused_with_line_and_field(tmp_path: Path, row: Row, message: str) -> None:
    with pytest.raises(SelfalignError, match=rf"a\.jsonl:1: .*{message}"):
        read_demonstrations(write(tmp_path, row))


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (lambda source: read_instructions(source, "evaluation"), {"instruction": "A"}),
        (read_outputs, {"instruction": "A", "output": "B"}),
        (read_ranked, {"instruction": "A", "responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]}),
    ],
    ids=["instructions", "outputs", "ranked"],
)
def test_tools_are_refused_where_only_demonstrations_and_pairs_can_have_them(
    tmp_path: Path, read: Any, row: Row
) -> None:
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: the field tools is filled .*only demonstrations and pairs"):
        read(write(tmp_path, row | {"tools": [WEATHER]}))


def test_tool_calls_within_an_instruction_are_refused(tmp_path: Path) -> None:
    row = {"messages": [ASKED, CALLED, TOLD]}
    with pytest.raises(SelfalignError, match="tool calls, which only demonstrations and pairs can have"):
        read_instructions(write(tmp_path, row), "evaluation")


def test_rows_of_a_published_schema_with_tools_are_refused(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: A\n\nAssistant: y", "tools": [WEATHER]}
    with pytest.raises(SelfalignError, match=r"the field tools is filled .*TranscriptPair"):
        read_pairs(write(tmp_path, row))


def test_every_turn_teaches_calls_and_answers(tmp_path: Path) -> None:
    [whole], _ = read_demonstrations(write(tmp_path, {"id": "c", "messages": MESSAGES, "tools": [WEATHER]}))
    first, last = every_turn(whole, Counter())
    assert (first.prompt, first.response, first.response_calls) == (
        [with_tools(WEATHER), ASKED],
        "",
        CALLED["tool_calls"],
    )
    assert (last.prompt, last.response) == (whole.prompt, whole.response)


def test_tools_and_calls_are_texts_that_are_read_and_compared() -> None:
    text = as_text([with_tools(WEATHER), ASKED, CALLED, TOLD])
    assert "Tell the weather." in text
    assert 'assistant: {"name": "weather", "arguments": {"city": "Rome"}}' in text
    pair = PreferencePair(id="p", prompt=[ASKED], chosen="", rejected="No.", chosen_calls=CALLED["tool_calls"])
    assert pair_candidates(pair)[0].text == '{"name": "weather", "arguments": {"city": "Rome"}}'


# --- templates ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=TEMPLATES)
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> Any:
    return tokenizer_of(tiny_tokenizer, request.param)


def whole(tokenizer: Any, turns: list[Row], tools: list[Row] | None = None) -> list[int]:
    """The ids of the template over a conversation, with arguments and empty contents in the form that it takes."""
    strings = " + f.arguments + " in tokenizer.chat_template

    def formed(turn: Row) -> Row:
        if "tool_calls" not in turn or not strings:
            return turn
        turn = deepcopy(turn)
        for one in turn["tool_calls"]:
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"], ensure_ascii=False)
        return turn | {"content": None}

    text = tokenizer.apply_chat_template([formed(turn) for turn in turns], tools=tools, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


ONCE = call(city="Rome", call_id="abcdefghi")
TOLD_ONCE = result("21 degrees", name="weather", tool_call_id="abcdefghi")
AGAIN = call(city="Oslo", call_id="jklmnopqr")
CONVERSATIONS: dict[str, list[Row]] = {
    "call": [ASKED, ONCE],
    "answer": [ASKED, ONCE, TOLD_ONCE, say("It is 21 degrees.")],
    "call_behind_a_result": [ASKED, ONCE, TOLD_ONCE, AGAIN],
    "call_without_arguments": [ASKED, call("weather", call_id="abcdefghi")],
    "call_of_other_values": [
        ASKED,
        call(days=3, mean=True, places=["Ostia", "Rome"], at={"x": 1.5}, call_id="abcdefghi"),
    ],
    "later_call": [ASKED, say("Warm."), user("Say it exactly."), AGAIN],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("tools", [[WEATHER], []], ids=["tools", "no_tools"])
def test_prompt_and_answer_are_the_ids_of_the_template_over_the_whole_conversation(
    tokenizer: Any, conversation: list[Row], tools: list[Row]
) -> None:
    prompt = [*([with_tools(*tools)] if tools else []), *conversation[:-1]]
    answer = conversation[-1]
    ids = encode_prompt(tokenizer, prompt)
    calls = answer.get("tool_calls", [])
    [own] = encode_answers(tokenizer, prompt, [Answer(text=answer["content"], calls=calls)])
    expected = whole(tokenizer, conversation, tools or None)
    assert [*ids, *own] == expected[: len(ids) + len(own)]
    assert own[-1] == tokenizer.eos_token_id
    assert own.count(tokenizer.eos_token_id) == 1
    assert not tokenizer.decode(expected[len(ids) + len(own) :]).strip()
    assert ("weather" in tokenizer.decode(own)) == bool(calls)
    assert ("Tell the weather." in tokenizer.decode(ids)) == bool(tools)


def test_several_calls_at_once_are_one_answer(tiny_tokenizer: Any) -> None:
    both = ONCE | {"tool_calls": [*ONCE["tool_calls"], *AGAIN["tool_calls"]]}
    for name in ("qwen3", "hermes", "mistral", "deepseek"):
        tokenizer = tokenizer_of(tiny_tokenizer, name)
        ids = encode_prompt(tokenizer, [ASKED])
        [own] = encode_answers(tokenizer, [ASKED], [Answer(text="", calls=both["tool_calls"])])
        assert [*ids, *own] == whole(tokenizer, [ASKED, both])[: len(ids) + len(own)]
        assert tokenizer.decode(own).index("Rome") < tokenizer.decode(own).index("Oslo")
    with pytest.raises(SelfalignError, match=r"refuses turns of user, assistant: one call at a time\. Give another"):
        encode_answers(tokenizer_of(tiny_tokenizer, "llama3"), [ASKED], [Answer(text="", calls=both["tool_calls"])])


def test_call_that_the_template_ends_with_another_token_ends_there(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, "llama3")
    [own] = encode_answers(tokenizer, [ASKED], [Answer(text="", calls=call("python", code="1 + 1")["tool_calls"])])
    assert own[-1] == tokenizer.convert_tokens_to_ids("<|eom|>")


def test_text_beside_a_call_is_kept_with_its_thought(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, "qwen3")
    said = "<think>\nI must look.\n</think>\n\nOne moment."
    [own] = encode_answers(tokenizer, [ASKED], [Answer(text=said, calls=ONCE["tool_calls"])])
    text = tokenizer.decode(own)
    assert text.startswith("<think>\nI must look.\n</think>\n\nOne moment.\n<tool_call>")
    ids = encode_prompt(tokenizer, [ASKED])
    assert [*ids, *own] == whole(tokenizer, [ASKED, ONCE | {"content": said}])[: len(ids) + len(own)]


@pytest.mark.parametrize("name", ["llama3", "hermes", "mistral"])
def test_text_beside_a_call_that_the_template_leaves_out_is_refused(tiny_tokenizer: Any, name: str) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, name)
    with pytest.raises(SelfalignError, match="leaves out the text beside tool calls"):
        encode_answers(tokenizer, [ASKED], [Answer(text="One moment.", calls=ONCE["tool_calls"])])
    with pytest.raises(SelfalignError, match="leaves out the text beside tool calls"):
        encode_prompt(tokenizer, [ASKED, ONCE | {"content": "One moment."}, TOLD_ONCE])


def test_calls_and_tools_that_spell_control_tokens_cannot_end_a_turn(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    hostile = call(f"we{end}ather", call_id="abcdefghi", **{f"ci{end}ty": f"Ro{end}me", "in": [{"a": f"x{end}"}]})
    inner = INNER | {"name": f"we{end}ather", "description": f"Tell{end} it.", "parameters": {f"a{end}": [end]}}
    system = with_tools({"type": "function", "function": inner})
    plain = encode_prompt(tokenizer, [with_tools(WEATHER), ASKED, ONCE, TOLD_ONCE])
    told = TOLD_ONCE | {"content": f"21{end}"}
    ids = encode_prompt(tokenizer, [system, ASKED, hostile, told])
    assert ids.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)
    [own] = encode_answers(tokenizer, [system, ASKED], [Answer(text="", calls=hostile["tool_calls"])])
    assert own.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "turns", "what"),
    [
        (PLAIN, [with_tools(WEATHER), ASKED], "the definitions of tools"),
        (PLAIN, [ASKED, CALLED, TOLD], "tool calls"),
        (PLAIN.replace("m.content", "(m.tool_calls[0].function.name if m.tool_calls else m.content)"),
         [ASKED, CALLED, TOLD], "the arguments of tool calls"),
        (QWEN3.replace("elif m.role == 'tool'", "elif m.role == 'no'"), [ASKED, CALLED, TOLD], "what a tool returns"),
    ],
    ids=["definitions", "calls", "arguments", "results"],
)  # fmt: skip
def test_template_that_leaves_out_tools_is_refused_with_record_and_what_to_do(
    tiny_tokenizer: Any, template: str, turns: list[Row], what: str
) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, template)
    shown = Demonstration(id="d7", prompt=turns, response="weather city Rome 21 degrees", source="ift")
    message = rf"record d7: the chat template leaves out ({what})\. .*model\.chat_template=FILE"
    with pytest.raises(SelfalignError, match=message):
        encode_demonstration(tokenizer, shown)


def test_arguments_that_a_template_would_spell_as_python_does_are_given_as_json(tiny_tokenizer: Any) -> None:
    called = "(m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments if m.tool_calls else m.content)"
    tokenizer = tokenizer_of(tiny_tokenizer, PLAIN.replace("m.content", called))
    assert 'weather{"city": "Rome"}' in tokenizer.decode(encode_prompt(tokenizer, [ASKED, CALLED, TOLD]))


def test_definitions_that_a_template_spells_as_python_does_stay_as_it_writes_them(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, "{{- tools | string if tools else '' }}" + PLAIN)
    assert "'name': 'weather'" in tokenizer.decode(encode_prompt(tokenizer, [with_tools(WEATHER), ASKED]))


def test_template_that_refuses_turns_of_tools_is_named(tiny_tokenizer: Any) -> None:
    refusing = PLAIN.replace(
        "{{- '<|im_start|>'", "{{- raise_exception('no tools') if m.role == 'tool' }}{{- '<|im_start|>'"
    )
    with pytest.raises(SelfalignError, match=r"refuses turns of user, assistant, tool.*: no tools"):
        encode_prompt(tokenizer_of(tiny_tokenizer, refusing), [ASKED, CALLED, TOLD])
    with pytest.raises(SelfalignError, match="ids of calls have 9 characters"):
        encode_prompt(tokenizer_of(tiny_tokenizer, "mistral"), [ASKED, CALLED, TOLD])


def test_template_that_writes_another_prompt_before_a_call_is_refused(tiny_tokenizer: Any) -> None:
    changed = DEEPSEEK.replace("%}{{- '<|results|>' if ns.tool else '' }}", "%}")
    turns, answer = CONVERSATIONS["call_behind_a_result"][:-1], Answer(text="", calls=AGAIN["tool_calls"])
    with pytest.raises(SelfalignError, match="another prompt before a tool call than before a text"):
        encode_answers(tokenizer_of(tiny_tokenizer, changed), turns, [answer])


def test_call_needs_a_prompt_that_a_template_renders(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, "qwen3")
    for prompt, prefill in (("How is Rome?", ""), ([ASKED], "Hm"), ([ASKED, say("Hm")], "")):
        with pytest.raises(SelfalignError, match="a tool call needs a prompt of turns"):
            encode_answers(tokenizer, prompt, [Answer(text="", calls=ONCE["tool_calls"])], prefill)


def test_template_named_tool_use_writes_tools(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, PLAIN)
    alone = encode_prompt(tokenizer, [ASKED])
    tokenizer = tokenizer_of(tiny_tokenizer, "qwen3")
    tokenizer.chat_template = {"default": PLAIN, "tool_use": QWEN3}
    assert encode_prompt(tokenizer, [ASKED]) == alone
    assert "Tell the weather." in tokenizer.decode(encode_prompt(tokenizer, [with_tools(WEATHER), ASKED]))


def test_pairs_of_calls_are_encoded_like_the_template_over_each_conversation(tokenizer: Any) -> None:
    prompt = [with_tools(WEATHER), ASKED]
    pair = PreferencePair(id="p", prompt=prompt, chosen="", rejected="Warm.", chosen_calls=ONCE["tool_calls"])
    [example] = encode_pairs(tokenizer, [pair], None, 10_000, Counter())
    for ids, answer in zip(example.plain.responses, (ONCE, say("Warm.")), strict=True):
        own = [*example.plain.prompt, *ids]
        assert own == whole(tokenizer, [ASKED, answer], [WEATHER])[: len(own)]
    assert example.plain.scored() == list(map(len, example.plain.responses))


@pytest.mark.parametrize("name", ["qwen3", "hermes", "llama3", "mistral"])
def test_tail_of_a_call_its_result_and_an_answer_scores_what_the_assistant_writes(
    tiny_tokenizer: Any, name: str
) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, name)
    prompt = [with_tools(WEATHER), ASKED]
    tail = [ONCE, TOLD_ONCE]
    pair = PreferencePair(id="p", prompt=prompt, chosen="It is 21 degrees.", rejected="Warm.", chosen_turns=tail)
    [example] = encode_pairs(tokenizer, [pair], None, 10_000, Counter())
    ids = example.plain.responses[0]
    own = [*example.plain.prompt, *ids]
    assert own == whole(tokenizer, [ASKED, *tail, say("It is 21 degrees.")], [WEATHER])[: len(own)]
    said = tokenizer.decode([ids[at] for at in example.plain.scored_places(0)])
    assert "Rome" in said
    assert "It is 21 degrees." in said
    assert said.count("21") == 1
    assert said.count(tokenizer.eos_token) == 2


def test_definitions_that_the_template_moves_as_a_conversation_goes_on_are_refused(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(tiny_tokenizer, "mistral")
    tail = [say("Where?"), user("In Italy.")]
    pair = PreferencePair(
        id="p", prompt=[with_tools(WEATHER), ASKED], chosen="Warm.", rejected="No.", chosen_turns=tail
    )
    with pytest.raises(SelfalignError, match=r"record p: in a longer conversation the chat template writes a turn"):
        list(encode_pairs(tokenizer, [pair], None, 10_000, Counter()))


def test_demonstration_of_a_call_is_trained_with_its_end(tokenizer: Any) -> None:
    prompt = [with_tools(WEATHER), ASKED]
    shown = Demonstration(id="d", prompt=prompt, response="", source="ift", response_calls=ONCE["tool_calls"])
    [group] = group_demonstrations(tokenizer, [shown], 10_000, Counter())
    own = [*group.prompt, *group.responses[0]]
    assert own == whole(tokenizer, [ASKED, ONCE], [WEATHER])[: len(own)]
    assert group.num_context_tokens == [0]


def test_characters_of_tools_that_the_vocabulary_lacks_are_counted(tiny_tokenizer: Any) -> None:
    assert not text_faults(tiny_tokenizer, [with_tools(WEATHER), ASKED], [Answer(text="", calls=ONCE["tool_calls"])])


@pytest.mark.parametrize("kind", ["demonstrations", "pairs", "preferences"])
def test_model_whose_template_leaves_out_tools_is_refused_before_anything_is_trained(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, kind: str
) -> None:
    prompt = [with_tools(WEATHER), ASKED]
    pair = PreferencePair(id="r9", prompt=prompt, chosen="x", rejected="y")
    taught = Demonstration(id="r9", prompt=prompt, response="x", source="ift")
    plain = PreferencePair(id="a", prompt=[ASKED], chosen="x", rejected="y")
    counts = {"context": 2048, "chat_template": True, "system_turns": True, "earlier_turns": True, "dropout": True}
    base = replace(policy_artifact(tiny_policy), counts=counts)
    seeds = records_artifact(tmp_path / "seeds", demonstrations=[taught] if kind == "demonstrations" else [])
    inputs: Any = SimpleNamespace(
        seed_data=replace(seeds, counts={"ift": 1, "eft": 0}),
        pairs=records_artifact(tmp_path / "pairs", pairs=[plain, *([pair] if kind == "pairs" else [])]),
        preferences=records_artifact(tmp_path / "test", pairs=[plain, *([pair] if kind == "preferences" else [])]),
        replay=None,
        questions=None,
    )
    config = composed("experiment=smoke", "data=pairs", "data.path=a.jsonl", "iterations=1")[0]
    with pytest.raises(SelfalignError, match="record r9: the chat template leaves out the definitions of tools"):
        check_requirements(config, base, inputs)
