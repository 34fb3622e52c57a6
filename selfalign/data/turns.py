"""The task of a row, in the ways of instruction and chat data: as a text, or as the turns of a conversation."""

import json
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from msgspec import UnsetType

from selfalign.core.records import Message, Prompt
from selfalign.data.rows import (
    BESIDE,
    CONVERSATIONS,
    INPUTS,
    INSTRUCTIONS,
    SYSTEM,
    TOOLS,
    Row,
    is_blank,
    is_filled,
    shown,
)

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool",
}  # fmt: skip
"""{speaker's name in data: role}."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are read; their texts are joined without a space."""


def as_prompt(instruction: str) -> list[Message]:
    """Return an instruction as a conversation of one user turn."""
    return [{"role": "user", "content": instruction}]


def as_text(prompt: Prompt) -> str:
    """Return a prompt to read: its only message, or its turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    return turn_text(prompt[0]) if len(prompt) == 1 else "\n\n".join(f"{m['role']}: {turn_text(m)}" for m in prompt)


def turn_text(turn: Message) -> str:
    """Return a turn to read: its content, and its tool calls or the definitions of tools below it."""
    return said(turn["content"], [*turn.get("tool_calls", ()), *turn.get("tools", ())])


def said(text: str, calls: Sequence[Any] | UnsetType) -> str:
    """Return an answer to read: its text, and a line for each tool call."""
    lines = [json.dumps(call.get("function", call), ensure_ascii=False) for call in calls or ()]
    return "\n".join([*([text] if text or not lines else []), *lines])


def compared(text: str) -> str:
    """Return a text in the form in which texts are compared: encodings of accents, line ends and spaces are unified."""
    text = unicodedata.normalize("NFC", text.replace("\u00a0", " "))
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def compared_prompt(prompt: Prompt) -> str:
    """Return a prompt in the form in which prompts are compared: its text, or its turns without the system turn."""
    return compared(as_text(prompt if isinstance(prompt, str) else without_system(prompt)))


def texts_in(prompt: Prompt) -> set[str]:
    """Return the texts of a prompt in the form in which they are compared.

    They are the whole, each turn of it, and of a conversation the shorter ones within it that a user's turn ends.
    """
    if isinstance(prompt, str):
        return {compared_prompt(prompt)}
    begun = [prompt[: at + 1] for at, turn in enumerate(prompt) if turn["role"] == "user"]
    return {*map(compared_prompt, [prompt, *begun]), *map(compared, map(turn_text, prompt))}


def without_system(turns: Sequence[Message]) -> list[Message]:
    """Return the turns of a conversation but its system turn."""
    return [turn for turn in turns if turn["role"] != "system"]


def instruction_of(prompt: Prompt) -> str:
    """Return the instruction that a prompt begins with: the first user turn, or the text."""
    if isinstance(prompt, str):
        return prompt
    return next(message["content"] for message in prompt if message["role"] == "user")


def read_task(row: Row) -> Prompt:
    """Return the task of a row where no tools can be used; no turn if it has none.

    Raises:
        SelfalignError: two fields contradict each other, one has no place, or there are tools.
    """
    row.refuse_filled(("tools",), row.fields, why="which only demonstrations and pairs can have")
    task = read_task_with_tools(row)
    if not isinstance(task, str) and any(turn["role"] == "tool" or turn.keys() & TOOLS for turn in task):
        row.refuse("there are tool calls, which only demonstrations and pairs can have")
    return task


def read_task_with_tools(row: Row, begun: tuple[str, list[Message]] | None = None) -> Prompt:
    """Return the task of a row; no turn if it has none. The definitions of its tools stand in its system turn.

    Args:
        row: the row.
        begun: turns that stand in other fields, with these fields' name; None looks for a field with turns.

    Raises:
        SelfalignError: two fields contradict each other, or one has no place.
    """
    task, tools = _task_of(row, begun), read_tools(row, row.fields.get("tools"))
    if not tools:
        return task
    if isinstance(task, str):
        row.refuse(
            "tools are given, but prompt is a text, which no chat template renders; rename prompt to instruction, "
            "which becomes a user turn, or give prompt as a list of messages"
        )
    first = task[:1] if task[:1] and task[0]["role"] == "system" else [{"role": "system", "content": ""}]
    if first[0].get("tools", tools) != tools:
        row.refuse("the system turn and the row's tools field have different tools; keep one")
    return [first[0] | {"tools": tools}, *(task[1:] if task[:1] == first else task)] if task else []


def _task_of(row: Row, begun: tuple[str, list[Message]] | None = None) -> Prompt:
    """Return the task of a row without its `tools`; no turn if it has none.

    A text in `prompt` stays as it is (TRL's standard format), so nothing can be joined to it. An instruction becomes a
    user turn, with its input after it, the turns of `history` before it, and `system` before all. Turns are kept as
    they are, with the row's system turn first; a text beside them must be one of their user turns.

    Args:
        row: the row.
        begun: turns that stand in other fields, with these fields' name; None looks for a field with turns.

    Raises:
        SelfalignError: two fields contradict each other, or one has no place.
    """
    system, listed = row.one_text(SYSTEM), begun or listed_turns(row)
    if listed:
        name, turns = listed
        row.refuse_filled((*INPUTS, "history"), row.fields, why=f"which has no place beside {name}")
        said = [turn["content"] for turn in turns if turn["role"] == "user"]
        for other in ("prompt", *INSTRUCTIONS):
            text = row.fields.get(other)
            if isinstance(text, str) and not is_blank(text) and text not in said:
                row.refuse(f"{other} is a text that is not a user turn of {name}")
        return _with_system(row, turns, system)
    if row.text("prompt"):
        row.refuse_filled(
            (*INSTRUCTIONS, *BESIDE),
            row.fields,
            why="which has no place beside a prompt that is a text; rename prompt to instruction, which becomes a user "
            "turn, or give prompt as a list of messages",
        )
        return row.text("prompt")
    instruction = row.one_text(INSTRUCTIONS)
    about = row.one_text(INPUTS) if instruction else row.text("context")
    instruction = instruction or row.text("input")
    if not instruction:
        row.refuse_filled((*SYSTEM, "context", "history"), row.fields, why="but there is no instruction")
        for name in ("prompt", *INSTRUCTIONS):
            if isinstance(row.fields.get(name), str):
                row.refuse(f"{name}: expected a text, got an empty one")
        return []
    asked = f"{instruction}\n\n{about}" if about else instruction
    return _with_system(row, [*_past_turns(row), *as_prompt(asked)], system)


def listed_turns(row: Row) -> tuple[str, list[Message]] | None:
    """Return the field with a list of turns, and the turns; None if there is no such field.

    Raises:
        SelfalignError: two fields have different ones, or one has a text instead.
    """
    fields = row.fields
    names = [name for name in ("prompt", *CONVERSATIONS) if isinstance(fields.get(name), list | dict) and fields[name]]
    for name in CONVERSATIONS:
        if isinstance(fields.get(name), str) and row.text(name):
            row.refuse(f"{name}: expected a list of turns, got a text")
    found = {name: read_turns(row, name) for name in names}
    if any(turns != found[names[0]] for turns in found.values()):
        row.refuse(f"{' and '.join(names)} are different conversations; keep one")
    return (names[0], found[names[0]]) if names else None


def read_turns(row: Row, name: str) -> list[Message]:
    """Return the turns in a field: messages with role and content, or from and value. A blank system turn is dropped.

    Raises:
        SelfalignError: one is no turn, of an unknown role, or has anything but text in it.
    """
    value = row.fields[name]
    items = [value] if isinstance(value, dict) else value
    turns = [_read_turn(row, f"{name}[{index}]", item) for index, item in enumerate(items)]
    _name_results(turns)
    return [turn for turn in turns if turn["role"] != "system" or turn.get("tools") or not is_blank(turn["content"])]


def _name_results(turns: list[Message]) -> None:
    """Give the turns of tools the names of the tools that were called: by the call's id, else in the calls' order."""
    calls: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] == "assistant":
            calls = list(turn.get("tool_calls", ()))
        elif turn["role"] == "tool" and calls:
            place = next((at for at, call in enumerate(calls) if call.get("id") == turn.get("tool_call_id")), 0)
            turn.setdefault("name", calls.pop(place)["function"]["name"])


def _read_turn(row: Row, place: str, item: Any) -> Message:
    if not isinstance(item, dict) or not {"role", "from"} & item.keys():
        found = f"the fields {', '.join(item)}" if isinstance(item, dict) else shown(item)
        row.refuse(f"{place}: a turn must be an object with role and content, or from and value; got {found}")
    row.refuse_unread(item, TOOLS, f"{place}.")
    row.refuse_filled(("reasoning",), item, f"{place}.")
    speaker = item.get("role", item.get("from"))
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        row.refuse(
            f"{place}: a turn's role must be system, user (or human), assistant (or gpt) or tool; got {shown(speaker)}"
        )
    if role != "assistant":
        row.refuse_filled(("tool_calls",), item, f"{place}.", "but only the assistant calls tools")
    if role != "system":
        row.refuse_filled(("tools",), item, f"{place}.", "which stand beside the turns, in a field tools of the row")
    calls = read_calls(row, f"{place}.tool_calls", item.get("tool_calls"))
    tools = read_tools(row, item.get("tools"), f"{place}.")
    content = item.get("content", item.get("value"))
    content = "" if content is None and (calls or tools or role == "tool") else content
    if isinstance(content, list):
        content = "".join(_read_part(row, f"{place}.content[{n}]", part) for n, part in enumerate(content))
    if not isinstance(content, str):
        row.refuse(f"{place}: a turn's content must be a text, or a list of parts with text; got {shown(content)}")
    turn: Message = {"role": role, "content": content}
    names = [name for name in ("name", "tool_call_id") if role == "tool" and isinstance(item.get(name), str)]
    turn |= {name: item[name] for name in names}
    return turn | ({"tool_calls": calls} if calls else {}) | ({"tools": tools} if tools else {})


def read_tools(row: Row, value: Any, place: str = "") -> list[dict[str, Any]]:
    """Return the definitions of tools in a field: a list of them, or its JSON text; none if it is empty.

    Each becomes {"type": "function", "function": {"name", …}}, also where only the inner object is given.

    Raises:
        SelfalignError: one is no definition.
    """
    listed = _unspelled(row, f"{place}tools", value)
    tools = [_wrapped(row, f"{place}tools[{index}]", tool) for index, tool in enumerate(listed)]
    names = [tool["function"]["name"] for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        row.refuse(f"{place}tools: two tools have the name {twice[0]!r}")
    return tools


def read_calls(row: Row, place: str, value: Any) -> list[dict[str, Any]]:
    """Return the tool calls in a field: a list of them, or its JSON text; none if it is empty.

    Each becomes {"type": "function", "function": {"name", "arguments"}} with its `id` if it has one. Arguments that are
    given as a JSON text become the object that it spells.

    Raises:
        SelfalignError: one is no call, or its arguments are no object.
    """
    calls: list[dict[str, Any]] = []
    for index, call in enumerate(_unspelled(row, place, value)):
        where = f"{place}[{index}]"
        made = _wrapped(row, where, call)
        arguments = made["function"].get("arguments", {})
        if isinstance(arguments, str):
            arguments = _spelled(row, f"{where}.arguments", arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            row.refuse(f"{where}.arguments: expected an object or its JSON text, got {shown(arguments)}")
        function = {"name": made["function"]["name"], "arguments": arguments}
        named = {"id": made["id"]} if isinstance(made.get("id"), str) else {}
        calls.append({"type": "function", **named, "function": function})
    return calls


def _unspelled(row: Row, place: str, value: Any) -> list[Any]:
    """Return a list, the list that a JSON text spells, or the object alone as a list."""
    if isinstance(value, str) and is_filled(value):
        value = _spelled(row, place, value)
    if not is_filled(value):
        return []
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list):
        row.refuse(f"{place}: expected a list or its JSON text, got {shown(value)}")
    return listed


def _spelled(row: Row, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        row.refuse(f"{place}: the text is not JSON: {error}")


def _wrapped(row: Row, place: str, value: Any) -> dict[str, Any]:
    """Return a definition or a call of a function, {"type": "function", "function": {"name", …}}."""
    whole = value if isinstance(value, dict) and "function" in value else {"function": value}
    inner, kind = whole["function"], whole.get("type", "function")
    if kind != "function" or not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        row.refuse(
            f'{place}: expected {{"type": "function", "function": {{"name": …}}}} or the inner object alone, got '
            f"{shown(value) if not isinstance(value, dict) else 'the fields ' + ', '.join(value)}"
        )
    return {"type": "function", **whole}


def _read_part(row: Row, place: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS:
        part = part.get("text")
    if not isinstance(part, str):
        kind = part.get("type") if isinstance(part, dict) else part
        row.refuse(f"{place}: only parts that are text can be read; got {shown(kind)}")
    return part


def _past_turns(row: Row) -> list[Message]:
    """Return the turns of `history`, a list of [question, answer]."""
    past = row.fields.get("history") or []
    wanted = "history: expected a list of [question, answer]"
    if not isinstance(past, list):
        row.refuse(f"{wanted}, got {shown(past)}")
    turns: list[Message] = []
    for index, pair in enumerate(past):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            row.refuse(f"{wanted}; history[{index}] is {shown(pair)}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def spoken(turns: Sequence[Message]) -> str:
    """Return the roles turn by turn, for messages."""
    return ", ".join(turn["role"] for turn in turns) or "no turn"


def only_answer(row: Row, name: str, turns: Sequence[Message]) -> str:
    """Return the text of an answer that is given as turns.

    Raises:
        SelfalignError: these are not one turn of the assistant's, or it calls a tool.
    """
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        row.refuse(f"{name}: expected one assistant turn after the prompt, got {spoken(turns)}")
    if "tool_calls" in turns[0]:
        row.refuse(f"{name}: an answer with tool calls has no place here; give a conversation with it as messages")
    return turns[0]["content"]


def _with_system(row: Row, turns: list[Message], system: str) -> list[Message]:
    """Return the turns after the row's system turn, which may be the first of them already.

    Raises:
        SelfalignError: they begin with another one.
    """
    if not system or (turns and turns[0]["role"] == "system" and turns[0]["content"] == system):
        return turns
    if turns and turns[0]["role"] == "system":
        if not turns[0]["content"]:  # It holds nothing but tools.
            return [turns[0] | {"content": system}, *turns[1:]]
        row.refuse("the system turn and the row's system field differ; keep one")
    return [{"role": "system", "content": system}, *turns]


def check_prompt(row: Row, prompt: Prompt) -> None:
    """Check that a prompt is a conversation so far, as `fault_of` defines it.

    Raises:
        SelfalignError: it is not.
    """
    if not isinstance(prompt, str) and (fault := fault_of(prompt)):
        row.refuse(f"the prompt is not a conversation: {fault}")


def fault_of(turns: Sequence[Message]) -> str | None:
    """Return why turns are not a conversation so far, or None if they are.

    A system turn may stand first; user and assistant follow each other in turn. The last turn may be the assistant's:
    the response then continues it. Behind an assistant's turn with tool calls stand the tools' turns.
    """
    rest = list(turns[1:] if turns and turns[0]["role"] == "system" else turns)
    roles = [turn["role"] for turn in rest]
    if "user" not in roles:
        return "there is no user turn"
    if "system" in roles:
        return "a system turn comes after another turn"
    for before, turn in pairwise([{"role": ""}, *rest]):
        role, called = turn["role"], before["role"] == "tool" or "tool_calls" in before
        if role == "tool" and not called:
            return "a tool turn does not follow a tool call"
        if role == before["role"] != "tool":
            return f"two {role} turns follow each other"
        if role == "user" and before["role"] == "tool":
            return "a user turn follows a tool turn"
    if "tool_calls" in turns[-1]:
        return "its last turn is a tool call, which no response can continue"
    empty = [index for index, turn in enumerate(turns) if not _says_something(turn)]
    return f"turn {empty[0] + 1} is empty" if empty else None


def _says_something(turn: Message) -> bool:
    """Whether a turn has a text, or something in its place. A tool may return nothing."""
    return turn["role"] == "tool" or bool(turn.keys() & TOOLS) or not is_blank(turn["content"])
