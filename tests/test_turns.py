"""What a row asks: every field that carries a part of the task is joined or refused, in every format in wide use."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import SelfalignError
from selfalign.data.sources import read_demonstrations, read_instructions, read_outputs, read_pairs, read_ranked
from selfalign.data.turns import as_text, compared, instruction_of, texts_in

Row = dict[str, Any]


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def say(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def write(folder: Path, *rows: Row) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- demonstrations ----------------------------------------------------------------------------------------------

DEMONSTRATIONS: dict[str, tuple[Row, Any]] = {
    "own": ({"instruction": "A", "response": "C"}, [user("A")]),
    "alpaca": ({"instruction": "A", "input": "B", "output": "C"}, [user("A\n\nB")]),
    "alpaca_without_input": ({"instruction": "A", "input": "", "output": "C"}, [user("A")]),
    "dolly": ({"instruction": "A", "context": "B", "response": "C", "category": "closed_qa"}, [user("A\n\nB")]),
    "llama_factory": (
        {"instruction": "A", "input": "B", "output": "C", "system": "S", "history": [["q", "r"], ["s", "t"]]},
        [system("S"), user("q"), say("r"), user("s"), say("t"), user("A\n\nB")],
    ),
    "ms_swift": (
        {"query": "A", "response": "C", "system": "S", "history": [["q", "r"]]},
        [system("S"), user("q"), say("r"), user("A")],
    ),
    "open_orca": ({"system_prompt": "S", "question": "A", "response": "C"}, [system("S"), user("A")]),
    "question_and_answer": ({"question": "A", "answer": "C"}, [user("A")]),
    "question_about_a_passage": ({"question": "A", "context": "B", "answer": "C"}, [user("A\n\nB")]),
    "input_and_output": ({"input": "A", "output": "C"}, [user("A")]),
    "prompt_and_completion": ({"prompt": "A", "completion": "C"}, "A"),
    "messages_and_completion": (
        {"prompt": [system("S"), user("A")], "completion": [say("C")]},
        [system("S"), user("A")],
    ),
    "prefill": ({"prompt": [user("A"), say("B")], "completion": [say("C")]}, [user("A"), say("B")]),
    "messages": ({"messages": [user("A"), say("C")]}, [user("A")]),
    "messages_with_system": ({"messages": [system("S"), user("A"), say("C")]}, [system("S"), user("A")]),
    "messages_of_several_turns": (
        {"messages": [user("q"), say("r"), user("A"), say("C")]},
        [user("q"), say("r"), user("A")],
    ),
    "ultrachat": (
        {"prompt": "q", "prompt_id": "x", "messages": [user("q"), say("r"), user("A"), say("C")]},
        [user("q"), say("r"), user("A")],
    ),
    "sharegpt": ({"conversations": [human("A"), gpt("C")]}, [user("A")]),
    "sharegpt_with_system": (
        {"system": "S", "conversations": [human("A"), gpt("C")], "tools": "[]"},
        [system("S"), user("A")],
    ),
    "empty_system_turn": ({"messages": [system(" "), user("A"), say("C")], "system": "S"}, [system("S"), user("A")]),
    "parts": (
        {"messages": [user([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]), say("C")]},
        [user("AB")],
    ),
    "greeting": ({"messages": [say("Hello!"), user("A"), say("C")]}, [say("Hello!"), user("A")]),
    "nulls": (
        {"id": None, "messages": [{**user("A"), "name": None}, {**say("C"), "tool_calls": None, "images": []}]},
        [user("A")],
    ),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstration_is_read_with_all_that_carries_its_task(tmp_path: Path, name: str) -> None:
    row, prompt = DEMONSTRATIONS[name]
    (taught,), drops = read_demonstrations(write(tmp_path, row | {"source": "ignored", "score": 1}))
    assert (taught.prompt, taught.response, drops) == (prompt, "C", Counter())


BASE = {"instruction": "A", "response": "C"}
TURNS = [user("A"), say("C")]
REFUSED: dict[str, tuple[Row, str]] = {
    "functions": (
        BASE | {"functions": [{"name": "f"}]},
        "the field functions is filled .*older form of OpenAI's tools",
    ),
    "images": (BASE | {"images": ["a.png"]}, "the field images is filled"),
    "image": (BASE | {"image": "a.png"}, r"the field image is filled \('a.png'\)"),
    "audio": (BASE | {"audios": ["a.wav"]}, "the field audios is filled"),
    "place_of_an_image": (BASE | {"image_path": "a.png"}, r"the field image_path is filled \('a.png'\)"),
    "image_in_capitals": (BASE | {"Img": "a.png"}, "the field Img is filled"),
    "attachments_of_a_turn": (
        {"messages": [user("A") | {"attachments": [{"name": "a.pdf"}]}, say("C")]},
        r"the field messages\[0\].attachments is filled",
    ),
    "reasoning": (BASE | {"reasoning_content": "Let me see."}, "the field reasoning_content is filled"),
    "template_settings": (BASE | {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs is filled"),
    "choices": (BASE | {"choices": ["x", "y"]}, r"the field choices is filled \(a list of 2\)"),
    "options": (BASE | {"options": {"A": "x"}}, r"the field options is filled \(an object\)"),
    "passage": (BASE | {"passage": "P"}, "the field passage is filled"),
    "document": (BASE | {"document": "P"}, "the field document is filled .* join it to the text or remove it"),
    "field_in_capitals": (BASE | {"Input": "B"}, r"the field Input is filled \('B'\), but fields are named in small"),
    "field_with_a_space": (BASE | {" context": "B"}, "the field  context is filled"),
    "answer_of_a_number": ({"instruction": "A", "response": 0}, "response: expected a text, got 0"),
    "answer_of_a_truth": ({"instruction": "A", "response": False}, "response: expected a text, got False"),
    "answer_that_spells_turns": (
        {"instruction": "A", "response": json.dumps([say("C")])},
        "response is a text that spells a list of turns: give the list itself",
    ),
    "turns_as_python": ({"messages": str(TURNS)}, "messages is a text that spells a list of turns"),
    "unwanted_answer_as_text": (BASE | {"kto_tag": "False"}, "kto_tag=false marks an unwanted answer"),
    "tool_calls": (
        {"messages": [user("A"), {**say(None), "tool_calls": [{"type": "function"}]}]},
        r"messages\[1\]\.tool_calls\[0\]: expected .*the inner object alone, got the fields type",
    ),
    "reasoning_of_a_turn": (
        {"messages": [user("A"), {**say("C"), "reasoning_content": "Let me see."}]},
        r"the field messages\[1\]\.reasoning_content is filled",
    ),
    "thinking_of_a_turn": (
        {"messages": [user("A"), {**say("C"), "thinking": "Let me see."}]},
        r"the field messages\[1\]\.thinking is filled",
    ),
    "picture_part": (
        {"messages": [user([{"type": "text", "text": "A"}, {"type": "image_url", "image_url": "u"}]), say("C")]},
        r"messages\[0\]\.content\[1\]: only parts that are text can be read; got 'image_url'",
    ),
    "tool_turn": (
        {"messages": [user("A"), {"role": "tool", "content": "3"}, say("C")]},
        "the prompt is not a conversation: a tool turn does not follow a tool call",
    ),
    "observation": (
        {"conversations": [human("A"), {"from": "observation", "value": "3"}, gpt("C")]},
        r"conversations\[1\]: a turn's role .* got 'observation'",
    ),
    "role_of_no_text": ({"messages": [{"role": ["user"], "content": "A"}, say("C")]}, r"messages\[0\]: a turn's role"),
    "turn_of_other_fields": (
        {"conversation": [{"human": "A", "assistant": "C"}]},
        r"conversation\[0\]: a turn must be an object with role and content, .*; got the fields human, assistant",
    ),
    "turn_that_is_a_text": ({"messages": ["A", "C"]}, r"messages\[0\]: a turn must be an object .*; got 'A'"),
    "turn_that_is_null": ({"messages": [None, say("C")]}, r"messages\[0\]: a turn must be an object .*; got None"),
    "turn_without_content": ({"messages": [user(None), say("C")]}, r"messages\[0\]: a turn's content must be a text"),
    "number_as_content": (
        {"messages": [user(4), say("C")]},
        r"messages\[0\]: a turn's content must be a text.*; got 4",
    ),
    "two_user_turns": (
        {"messages": [user("A"), user("B"), say("C")]},
        "the prompt is not a conversation: two user turns follow each other",
    ),
    "two_assistant_turns": (
        {"messages": [user("A"), say("B"), say("C"), user("D"), say("E")]},
        "two assistant turns follow each other",
    ),
    "late_system_turn": (
        {"messages": [user("A"), system("S"), user("B"), say("C")]},
        "a system turn comes after another turn",
    ),
    "empty_turn": ({"messages": [user("\u200b"), say("C")]}, "the prompt is not a conversation: turn 1 is empty"),
    "assistant_alone": ({"messages": [system("S"), say("C")]}, "there is no user turn"),
    "user_last": ({"messages": [user("A"), say("C"), user("B")]}, r"expected .*; found messages \(a list of 3\)"),
    "no_turn": ({"messages": []}, r"expected .*; found messages \(a list of 0\)"),
    "turns_as_text": ({"messages": json.dumps(TURNS)}, "messages is a text that spells a list of turns"),
    "other_prompt": ({"messages": TURNS, "prompt": "B"}, "prompt is a text that is not a user turn of messages"),
    "other_answer": ({"messages": TURNS, "response": "D"}, "response differs from the last turn of messages"),
    "other_system": (
        {"messages": [system("S"), *TURNS], "system": "T"},
        "the system turn and the row's system field differ",
    ),
    "two_conversations": (
        {"messages": TURNS, "conversations": [human("B"), gpt("C")]},
        "messages and conversations are different conversations; keep one",
    ),
    "input_beside_turns": ({"messages": TURNS, "input": "B"}, "the field input is filled .*no place beside messages"),
    "history_beside_turns": (
        {"messages": TURNS, "history": [["q", "r"]]},
        r"the field history is filled .* no place beside messages",
    ),
    "input_beside_a_text": (
        {"prompt": "A", "input": "B", "completion": "C"},
        "the field input is filled .* no place beside a prompt that is a text; rename prompt to instruct",
    ),
    "system_beside_a_text": ({"prompt": "A", "system": "S", "completion": "C"}, "the field system is filled .* a text"),
    "history_beside_a_text": ({"prompt": "A", "history": [["q", "r"]], "completion": "C"}, "the field history is fill"),
    "instruction_beside_a_text": (
        {"prompt": "A", "instruction": "B", "output": "C"},
        "the field instruction is filled",
    ),
    "text_and_turns": ({"prompt": "A", "completion": [say("C")]}, "prompt is a text and the answer a list of turns"),
    "text_and_turn": ({"prompt": "A", "response": say("C")}, "prompt is a text and the answer a list of turns"),
    "two_instructions": (BASE | {"question": "B"}, "instruction and question have different texts"),
    "two_inputs": (BASE | {"input": "B", "context": "D"}, "input and context have different texts"),
    "two_answers": (BASE | {"output": "D"}, "response and output are different answers"),
    "context_alone": ({"context": "B", "response": "C"}, "the field context is filled .*but there is no instruction"),
    "system_alone": ({"system": "S", "response": "C"}, "the field system is filled .*but there is no instruction"),
    "context_of_several": (BASE | {"context": ["p", "q"]}, "context: expected a text, got a list of 2"),
    "history_of_texts": (
        BASE | {"history": "a long post"},
        r"history: expected a list of \[question, answer\], got 'a ",
    ),
    "history_of_three": (BASE | {"history": [["q", "r", "s"]]}, r"history\[0\] is a list of 3"),
    "answers_of_two": ({"instruction": "A", "output": ["C", "D"]}, r"output\[0\]: a turn must be an object"),
    "unwanted_answer": (
        {"prompt": "A", "completion": "C", "label": False},
        "label=false marks an unwanted answer",
    ),
    "unwanted_conversation": ({"messages": TURNS, "kto_tag": False}, "kto_tag=false marks an unwanted answer"),
    "turn_not_to_train": (
        {"messages": [user("A"), {**say("C"), "weight": 0}]},
        r"messages\[1\]\.weight=0: the last turn",
    ),
    "number_as_answer": ({"instruction": "A", "response": 4}, "response: expected a text, got 4"),
    "nothing": ({"text": "A. C."}, r"expected instruction .* and response .*; found text \('A\. C\.'\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_demonstration_that_cannot_be_read_whole_is_refused_with_line_and_field(tmp_path: Path, name: str) -> None:
    row, message = REFUSED[name]
    with pytest.raises(SelfalignError, match=rf"a\.jsonl:2: .*{message}") as stop:
        read_demonstrations(write(tmp_path, BASE | {"response": "first"}, row))
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    "empty", [None, "", " ", "[]", "{}", "null", [], {}, [None], [""], {"bytes": None}, False, 0], ids=repr
)
def test_empty_field_is_as_absent(tmp_path: Path, empty: Any) -> None:
    fields = ["tools", "tool_calls", "functions", "images", "reasoning_content", "audio"]
    (taught,), _ = read_demonstrations(write(tmp_path, BASE | dict.fromkeys(fields, empty)))
    assert (taught.prompt, taught.response) == ([user("A")], "C")


def notable(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages, without the one that says what the fields are read as."""
    return [message for message in caplog.messages if ": read " not in message]


def test_fields_that_are_read_are_told_with_what_they_are_taken_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = write(tmp_path, {"question": "A", "context": "B", "system": "C", "output": "D"})
    read_demonstrations(path)
    assert caplog.messages == [
        f"{path}: read system as the system turn, question as the user's turn, context as the user's turn, below the "
        "instruction, output as the response"
    ]


def test_fields_that_are_passed_over_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = [BASE | {"instruction": f"A{n}", "weight": 0, "source": "s"} for n in range(3)]
    path = write(tmp_path, *rows)
    read_demonstrations(path)
    assert notable(caplog) == [f"{path}: ignored the fields source, weight"]


def test_fields_of_turns_that_are_passed_over_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    said = [
        {"role": "user", "content": "A", "weight": 1, "refusal": None},
        {"from": "gpt", "value": "B", "mask": False},
    ]
    path = write(tmp_path, {"messages": said})
    read_demonstrations(path)
    assert notable(caplog) == [f"{path}: ignored the fields messages[].mask"]
    caplog.clear()
    path = write(
        tmp_path, {"prompt": said[:1], "chosen": [said[1] | {"rating": 4}], "rejected": [{"from": "gpt", "value": "C"}]}
    )
    read_pairs(path)
    assert notable(caplog) == [f"{path}: ignored the fields chosen[].mask, chosen[].rating"]


def test_marks_of_turns_that_are_not_to_be_trained_on_are_told_in_the_answers_of_pairs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asked, again = {"role": "user", "content": "A", "weight": 0}, {"role": "user", "content": "D"}
    told = [
        {"role": "assistant", "content": "B", "weight": 0},
        again,
        {"role": "assistant", "content": "E", "weight": 1},
    ]
    other = [{"role": "assistant", "content": "C", "train": True}]
    path = write(tmp_path, {"prompt": [asked], "chosen": told, "rejected": other})
    (pair,), _ = read_pairs(path)
    assert pair.chosen_turns == [{"role": "assistant", "content": "B"}, again]
    assert notable(caplog) == [f"{path}: ignored the fields chosen[].weight"]


OF_ANOTHER_KIND = {
    "answers of pairs": (read_pairs, {"instruction": "A", "chosen": "B", "rejected": "C", "response": "B", "label": 0}),
    "scores of pairs": (read_demonstrations, {**BASE, "instruction": "A", "chosen_score": 4, "label": True}),
    "label that is a number": (read_demonstrations, {**BASE, "instruction": "A", "label": 0}),
    "label in words": (read_demonstrations, {**BASE, "instruction": "A", "label": "bad"}),
    "answer of an instruction": (lambda path: read_instructions(path, "given"), {"instruction": "A", "output": "B"}),
}


@pytest.mark.parametrize("case", OF_ANOTHER_KIND)
def test_field_that_only_another_kind_of_record_reads_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    caplog.set_level("INFO")
    read, row = OF_ANOTHER_KIND[case]
    path = write(tmp_path, row)
    read(path)
    passed = {
        "answers of pairs": "label, response",
        "scores of pairs": "chosen_score",
        "answer of an instruction": "output",
    }
    assert notable(caplog) == [f"{path}: ignored the fields {passed.get(case, 'label')}"]
    assert not [message for message in caplog.messages if "as the response" in message and read is read_pairs]


@pytest.mark.parametrize("spelled", ["nan", "None", "<noinput>", "N/A"])
def test_text_that_spells_an_absent_value_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spelled: str
) -> None:
    caplog.set_level("INFO")
    path = write(tmp_path, *(BASE | {"instruction": f"A{n}", "input": spelled if n else "B"} for n in range(3)))
    read_demonstrations(path)
    (message,) = notable(caplog)
    assert message.startswith(f"{path}: in 2 rows input is the text {spelled!r}")


def test_rows_that_are_left_out_are_named_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = write(tmp_path, BASE, BASE, BASE | {"response": " "})
    read_demonstrations(path)
    assert notable(caplog) == [f"{path}: left out 1 duplicate, 1 empty_response"]


def test_rows_that_differ_in_their_ids_alone_are_said_to_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = write(tmp_path, *(BASE | {"id": n} for n in range(3)))
    assert len(read_demonstrations(path)[0]) == 3
    assert notable(caplog) == [f"{path}: 2 rows repeat another row under another id; they are kept"]


def test_earlier_answers_that_are_not_taught_are_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = write(tmp_path, {"messages": [user("A"), say("B") | {"weight": 1}, user("C"), say("D")]}, BASE)
    assert [taught.response for taught in read_demonstrations(path)[0]] == ["D", "C"]
    said = (
        "in 1 of 2 rows only the last answer is trained on; earlier ones are part of the prompt "
        "(data.seed_data.assistant_turns=all trains on them too)"
    )
    assert notable(caplog) == [f"{path}: {said}"]


@pytest.mark.parametrize(("repeating", "refused"), [(2, False), (3, True), (5, True)])
def test_prompts_before_most_answers_are_refused(tmp_path: Path, repeating: int, refused: bool) -> None:
    """A set that keeps the prompt in front of each answer would teach to repeat it; a single answer may."""
    asked = [f"Q{n}: why?\nA:" for n in range(5)]
    answers = [(f"{text if n < repeating else ''} So{n}.", f"{text} No.") for n, text in enumerate(asked)]
    pairs = [{"prompt": x, "chosen": y, "rejected": z} for x, (y, z) in zip(asked, answers, strict=True)]
    shown = [{"instruction": x, "response": y} for x, (y, _) in zip(asked, answers, strict=True)]
    for name, rows, read in (("a", pairs, read_pairs), ("b", shown, read_demonstrations)):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, *rows)
        if not refused:
            assert len(read(path)[0]) == 5
            continue
        with pytest.raises(SelfalignError, match=rf"in {repeating} of 5 rows the answer begins with its own prompt"):
            read(path)


def test_response_without_a_visible_character_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [BASE, *({"instruction": f"Q{n}", "response": text} for n, text in enumerate(("", "\n", "\u200b\ufeff")))]
    taught, drops = read_demonstrations(write(tmp_path, *rows, {"instruction": "Q", "response": "👍"}))
    assert [one.response for one in taught] == ["C", "👍"]
    assert drops == Counter(empty_response=3)


# --- pairs -------------------------------------------------------------------------------------------------------

OPENAI = {
    "input": {"messages": [user("A")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [say("x")],
    "non_preferred_output": [say("y")],
}
WHOLE = {"chosen": [user("A"), say("x")], "rejected": [user("A"), say("y")]}
SIDES = {"chosen": "x", "rejected": "y"}
PAIRS: dict[str, tuple[Row, Any]] = {
    "alpaca_preference": ({"instruction": "A", "input": "B", **SIDES}, [user("A\n\nB")]),
    "orca": ({"system": "S", "question": "A", **SIDES}, [system("S"), user("A")]),
    "distilabel": ({"system": "S", "input": "A", **SIDES}, [system("S"), user("A")]),
    "llama_factory": (
        {"instruction": "A", "history": [["q", "r"]], **SIDES},
        [user("q"), say("r"), user("A")],
    ),
    "llama_factory_sharegpt": (
        {"conversations": [human("A")], "chosen": gpt("x"), "rejected": gpt("y"), "system": "S"},
        [system("S"), user("A")],
    ),
    "axolotl": ({"messages": [user("A")], "chosen": say("x"), "rejected": say("y")}, [user("A")]),
    "openai": (OPENAI, [user("A")]),
    "ms_swift": ({"messages": [system("S"), user("A"), say("x")], "rejected_response": "y"}, [system("S"), user("A")]),
    "ms_swift_query": ({"query": "A", "response": "x", "rejected_response": "y"}, [user("A")]),
    "list_prompt_and_texts": ({"prompt": [user("A")], **SIDES}, [user("A")]),
    "list_prompt_and_whole_conversations": ({"prompt": [user("A")], **WHOLE}, [user("A")]),
    "list_prompt_with_system_and_whole_conversations": (
        {
            "prompt": [system("S"), user("A")],
            "chosen": [system("S"), user("A"), say("x")],
            "rejected": [system("S"), user("A"), say("y")],
        },
        [system("S"), user("A")],
    ),
    "whole_conversations": (WHOLE, [user("A")]),
    "whole_conversations_with_system_beside": ({"system": "S", **WHOLE}, [system("S"), user("A")]),
    "orpo_mix": ({"prompt": "A", "question": "A", "source": "z", **WHOLE}, [user("A")]),
    "prompt_is_the_first_turn": (
        {
            "prompt": "q",
            "chosen": [user("q"), say("r"), user("A"), say("x")],
            "rejected": [user("q"), say("r"), user("A"), say("y")],
        },
        [user("q"), say("r"), user("A")],
    ),
    "chosen_a_second_time": ({"prompt": "A", "messages": WHOLE["chosen"], **WHOLE}, [user("A")]),
    "instruction_and_lists": ({"instruction": "A", "chosen": [say("x")], "rejected": [say("y")]}, [user("A")]),
    "prefill": (
        {"prompt": [user("A"), say("One,")], "chosen": [say("x")], "rejected": [say("y")]},
        [user("A"), say("One,")],
    ),
    "parts": (
        {
            "prompt": [user([{"type": "text", "text": "A"}])],
            "chosen": [say("x")],
            "rejected": [say([{"type": "text", "text": "y"}])],
        },
        [user("A")],
    ),
    "text": ({"prompt": "A", "system": "", "input": None, **SIDES}, "A"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pair_is_read_with_all_that_carries_its_task(tmp_path: Path, name: str) -> None:
    row, prompt = PAIRS[name]
    (pair,), drops = read_pairs(write(tmp_path, row))
    assert (pair.prompt, pair.chosen, pair.rejected, drops) == (prompt, "x", "y", Counter())


REFUSED_PAIRS: dict[str, tuple[Row, str]] = {
    "conversation_as_text": (
        {"prompt": "A", "chosen": json.dumps(TURNS), "rejected": json.dumps(TURNS[:1])},
        "chosen is a text that spells a list of turns: give the list itself",
    ),
    "tools": (
        {"prompt": "A", "tools": [{"name": "f"}], **SIDES},
        "tools are given, but prompt is a text, which no chat template renders; rename prompt to instruction",
    ),
    "openai_tools": (
        OPENAI | {"input": {**OPENAI["input"], "tools": [{"type": "function"}]}},
        r"tools\[0\]: expected .*the inner object alone, got the fields type",
    ),
    "system_beside_a_text": ({"system": "S", "prompt": "A", **SIDES}, "the field system is filled"),
    "input_beside_a_text": ({"input": "B", "prompt": "A", **SIDES}, "the field input is filled"),
    "context_beside_turns": ({"context": "B", **WHOLE}, "the field context is filled .*beside chosen and rejected"),
    "other_question": ({"question": "B", **WHOLE}, "question is a text that is not a user turn of chosen and rejected"),
    "other_prompt_turns": ({"prompt": [user("B")], **WHOLE}, "expected .*; found chosen of user, assistant"),
    "system_in_one_place": (
        {"prompt": [user("A")], **{k: [system("S"), *v] for k, v in WHOLE.items()}},
        "found chosen of system, user, assistant",
    ),
    "two_user_turns": ({"prompt": [user("A"), user("B")], **SIDES}, "two user turns follow each other"),
    "two_assistant_turns": (
        {"prompt": [user("A"), say("B"), say("C")], **SIDES},
        "two assistant turns follow",
    ),
    "tool_call": (
        {"prompt": [user("A")], "chosen": [{**say(None), "tool_calls": [1]}], "rejected": [say("y")]},
        r"chosen\[0\]\.tool_calls\[0\]: expected .*the inner object alone, got 1",
    ),
    "one_side": ({"prompt": "A", "chosen": "x", "rejected": None}, r"found prompt \('A'\), chosen \('x'\)"),
    "sides_of_other_names": ({"question": "A", "response_j": "x", "response_k": "y"}, r"found question .*response_j"),
    "text_score": ({"prompt": "A", "chosen_score": "four", **SIDES}, "chosen_score: expected a number, got 'four'"),
}


@pytest.mark.parametrize("name", REFUSED_PAIRS)
def test_pair_that_cannot_be_read_whole_is_refused_with_line_and_field(tmp_path: Path, name: str) -> None:
    row, message = REFUSED_PAIRS[name]
    with pytest.raises(SelfalignError, match=rf"a\.jsonl:1: .*{message}") as stop:
        read_pairs(write(tmp_path, row))
    assert "\n" not in str(stop.value)


# --- instructions, ranked answers, outputs -----------------------------------------------------------------------

ONE_TEXT: dict[str, tuple[Row, str]] = {
    "instruction": ({"instruction": "A"}, "A"),
    "alpaca": ({"instruction": "A", "input": "B"}, "A\n\nB"),
    "question": ({"question": "A", "context": "B"}, "A\n\nB"),
    "prompt": ({"prompt": "A"}, "A"),
    "prompt_of_one_turn": ({"prompt": [user("A")]}, "A"),
    "conversation_of_one_turn": ({"messages": [user([{"type": "text", "text": "A"}]), say("C")]}, "A"),
}
CONVERSATIONS: dict[str, tuple[Row, list[Any]]] = {
    "system": ({"instruction": "A", "system": "S"}, [system("S"), user("A")]),
    "history": ({"instruction": "A", "history": [["q", "r"]]}, [user("q"), say("r"), user("A")]),
    "turns": ({"messages": [user("A"), say("B"), user("C")]}, [user("A"), say("B"), user("C")]),
    "answered": ({"messages": [user("A"), say("B"), user("C"), say("D")]}, [user("A"), say("B"), user("C")]),
    "answered_once": ({"messages": [system("S"), user("A"), say("B")]}, [system("S"), user("A")]),
}
NO_INSTRUCTION: dict[str, tuple[Row, str]] = {
    "answer": (
        {"messages": [say("B")]},
        "must be a conversation that .*, but there is no user turn",
    ),
    "twice": ({"messages": [user("A"), user("B")]}, "two user turns follow each other; got user, user"),
    "late": ({"messages": [user("A"), system("S")]}, "a system turn comes after another turn"),
    "blank": ({"messages": [user("A"), say("B"), user(" ")]}, "turn 3 is empty"),
    "tools": ({"instruction": "A", "tools": [1]}, "the field tools is filled"),
    "nothing": ({"turns": ["A"]}, r"expected instruction .*; found turns \(a list of 1\)"),
}
ANSWERS = {"responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]}


@pytest.mark.parametrize("name", ONE_TEXT)
def test_instruction_is_one_text_with_what_it_is_about(tmp_path: Path, name: str) -> None:
    row, text = ONE_TEXT[name]
    ((asked,), _), ((ranked,), _) = (
        read_instructions(write(tmp_path, row), "evaluation"),
        read_ranked(write(tmp_path, row | ANSWERS)),
    )
    ((output,), _), ((pair,), _) = (
        read_outputs(write(tmp_path, row | {"output": "C"})),
        read_pairs(write(tmp_path, row | ANSWERS)),
    )
    assert [asked.text, ranked.instruction, output.instruction, pair.prompt] == [text, text, text, [user(text)]]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_instruction_may_be_a_conversation(tmp_path: Path, name: str) -> None:
    row, turns = CONVERSATIONS[name]
    ((asked,), _) = read_instructions(write(tmp_path, row), "evaluation")
    ((ranked,), _), ((pair,), _) = (
        read_ranked(write(tmp_path, row | ANSWERS)),
        read_pairs(write(tmp_path, row | ANSWERS)),
    )
    ((output,), _) = read_outputs(write(tmp_path, row | {"output": "C"}))
    assert asked.turns == asked.prompt == ranked.turns == ranked.prompt == pair.prompt == turns
    assert asked.text == ranked.instruction == output.instruction == as_text(turns)


@pytest.mark.parametrize("name", NO_INSTRUCTION)
def test_what_is_no_instruction_is_refused(tmp_path: Path, name: str) -> None:
    row, message = NO_INSTRUCTION[name]
    for read in (lambda source: read_instructions(source, "evaluation"), read_outputs):
        with pytest.raises(SelfalignError, match=rf"a\.jsonl:1: .*{message}"):
            read(write(tmp_path, row | {"output": "C"}))
    for read in (read_ranked, read_pairs):
        with pytest.raises(SelfalignError, match=rf"a\.jsonl:1: .*{message}"):
            read(write(tmp_path, row | ANSWERS))


def test_ranked_answer_with_more_than_text_is_refused(tmp_path: Path) -> None:
    answers = [{"text": "a", "rank": 1, "tool_calls": [{"name": "f"}]}, {"text": "b", "rank": 2}]
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: the field responses\[0\]\.tool_calls is filled"):
        read_ranked(write(tmp_path, {"instruction": "A", "responses": answers}))


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["Café:\r\ntea", "Cafe\u0301:\ntea", "Café:\rtea ", "\u00a0Café:\ntea"])
def test_text_is_compared_however_a_program_encodes_it(spelled: str) -> None:
    assert compared(spelled) == "Café:\ntea"
    assert texts_in(spelled) == texts_in([user(spelled)]) == {"Café:\ntea"}


def test_prompt_in_words() -> None:
    turns = [system("S"), user("A"), say("B"), user("C")]
    assert (as_text("A"), as_text([user("A")])) == ("A", "A")
    assert as_text(turns) == "system: S\n\nuser: A\n\nassistant: B\n\nuser: C"
    assert (texts_in("A"), texts_in(turns)) == ({"A"}, {"user: A\n\nassistant: B\n\nuser: C", "S", "A", "B", "C"})
    assert (instruction_of("A"), instruction_of(turns)) == ("A", "A")
