"""The task of a row, in the ways of instruction and chat data: as a text, or as the turns of a conversation."""

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from selfalign.core.records import Message, Prompt
from selfalign.data.rows import BESIDE, CONVERSATIONS, INPUTS, INSTRUCTIONS, SYSTEM, UNREAD, Row, is_blank, shown

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
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
    return prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def compared(text: str) -> str:
    """Return a text in the form in which texts are compared: encodings of accents, line ends and spaces are unified."""
    text = unicodedata.normalize("NFC", text.replace("\u00a0", " "))
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def compared_prompt(prompt: Prompt) -> str:
    """Return a prompt in the form in which prompts are compared: its text, or its turns without the system turn."""
    return compared(as_text(prompt if isinstance(prompt, str) else _without_system(prompt)))


def texts_in(prompt: Prompt) -> set[str]:
    """Return the texts of a prompt in the form in which they are compared: the whole, and each turn of it."""
    turns = [] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return {compared_prompt(prompt), *map(compared, turns)}


def _without_system(turns: Sequence[Message]) -> list[Message]:
    return [turn for turn in turns if turn["role"] != "system"]


def instruction_of(prompt: Prompt) -> str:
    """Return the instruction that a prompt begins with: the first user turn, or the text."""
    if isinstance(prompt, str):
        return prompt
    return next(message["content"] for message in prompt if message["role"] == "user")


def read_task(row: Row, begun: tuple[str, list[Message]] | None = None) -> Prompt:
    """Return the task of a row; no turn if it has none.

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
    return [turn for turn in turns if turn["role"] != "system" or not is_blank(turn["content"])]


def _read_turn(row: Row, place: str, item: Any) -> Message:
    if not isinstance(item, dict) or not {"role", "from"} & item.keys():
        found = f"the fields {', '.join(item)}" if isinstance(item, dict) else shown(item)
        row.refuse(f"{place}: a turn must be an object with role and content, or from and value; got {found}")
    row.refuse_filled((*UNREAD, "reasoning"), item, f"{place}.")
    speaker = item.get("role", item.get("from"))
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        row.refuse(
            f"{place}: a turn's role must be system, user (or human) or assistant (or gpt); got {shown(speaker)}"
        )
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "".join(_read_part(row, f"{place}.content[{n}]", part) for n, part in enumerate(content))
    if not isinstance(content, str):
        row.refuse(f"{place}: a turn's content must be a text, or a list of parts with text; got {shown(content)}")
    return {"role": role, "content": content}


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
        SelfalignError: these are not one turn of the assistant's.
    """
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        row.refuse(f"{name}: expected one assistant turn after the prompt, got {spoken(turns)}")
    return turns[0]["content"]


def _with_system(row: Row, turns: list[Message], system: str) -> list[Message]:
    """Return the turns after the row's system turn, which may be the first of them already.

    Raises:
        SelfalignError: they begin with another one.
    """
    if not system or turns[:1] == [{"role": "system", "content": system}]:
        return turns
    if turns and turns[0]["role"] == "system":
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
    the response then continues it.
    """
    roles = [turn["role"] for turn in turns]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    if "user" not in roles:
        return "there is no user turn"
    if "system" in roles:
        return "a system turn comes after another turn"
    if twice := [first for first, second in pairwise(roles) if first == second]:
        return f"two {twice[0]} turns follow each other"
    empty = [index for index, turn in enumerate(turns) if is_blank(turn["content"])]
    return f"turn {empty[0] + 1} is empty" if empty else None
