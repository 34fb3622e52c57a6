"""Preference pairs from rows: two answers as texts, as turns after a prompt, or as whole conversations."""

from collections import Counter
from typing import NoReturn

from selfalign.core.records import PreferencePair, Prompt
from selfalign.data.rows import SCORES, SIDES, Row
from selfalign.data.schemas import against_pair
from selfalign.data.turns import check_prompt, listed_turns, only_answer, read_task, read_turns, spoken

WANTED = (
    "prompt, chosen and rejected as three texts, or as lists of messages in which chosen and rejected are one turn of "
    "the assistant's each behind the common prompt (which may be instruction, question, messages or conversations "
    "instead, and the answers preferred_output and non_preferred_output), or ranked responses to an instruction"
)


def read_pair(row: Row, drops: Counter[str]) -> PreferencePair | None:
    """Return the pair of a row, with an empty `id`; None if it holds no preference, which is counted by reason.

    Raises:
        SelfalignError: the row is in no known format.
    """
    row = _flat(row)
    sides = next((names for names in SIDES if all(name in row.fields for name in names)), None)
    if sides is None:
        _refuse(row)
    prompt, chosen, rejected = _split(row, *sides)
    check_prompt(row, prompt)
    better, worse = (row.number(*names) for names in SCORES)
    if reason := against_pair(chosen, rejected, better, worse):
        drops[reason] += 1
        return None
    return PreferencePair(
        id="", prompt=prompt, chosen=chosen, rejected=rejected, chosen_score=better, rejected_score=worse
    )


def _flat(row: Row) -> Row:
    """Return the row with the fields that other formats nest inside of one field.

    OpenAI's prompt is `input.messages`. ms-swift's chosen answer is the last of `messages`, beside `rejected_response`.
    """
    fields = dict(row.fields)
    if isinstance(inner := fields.get("input"), dict):
        return Row.of(row.where, {name: value for name, value in fields.items() if name != "input"} | inner)
    if "rejected_response" in fields and isinstance(turns := fields.get("messages"), list) and len(turns) > 1:
        answer = read_turns(Row(row.where, {"messages": turns[-1]}), "messages")
        fields |= {"messages": turns[:-1], "response": only_answer(row, "messages", answer)}
    return Row(row.where, fields)


def _split(row: Row, chosen: str, rejected: str) -> tuple[Prompt, str, str]:
    """Return the task of a row, and the two answers as texts.

    Raises:
        SelfalignError: these are neither two texts nor two lists of turns, or no two answers to one prompt.
    """
    values = row.fields[chosen], row.fields[rejected]
    if all(isinstance(value, str) for value in values):
        return read_task(row) or _refuse(row), row.text(chosen), row.text(rejected)
    if not all(isinstance(value, list | dict) for value in values):
        _refuse(row)
    own, other = read_turns(row, chosen), read_turns(row, rejected)
    if "messages" in row.fields and read_turns(row, "messages") == own:  # Some keep the chosen conversation twice.
        row = Row(row.where, {name: value for name, value in row.fields.items() if name != "messages"})
    listed = listed_turns(row)
    begun = listed[1] if listed else own[: _alike(own, other)]
    size = len(begun)
    if begun == own[:size] == other[:size] and min(len(own), len(other)) > size:
        own, other = own[size:], other[size:]
    given = None if listed or not (begun or row.text("prompt")) else (f"{chosen} and {rejected}", begun)
    prompt = read_task(row, given)
    if not prompt or any(len(turns) != 1 or turns[0]["role"] != "assistant" for turns in (own, other)):
        _refuse(row, f"{chosen} of {spoken(own)}, {rejected} of {spoken(other)} behind {spoken(begun)}")
    return prompt, own[0]["content"], other[0]["content"]


def _refuse(row: Row, found: str = "") -> NoReturn:
    row.refuse(f"expected {WANTED}; found {found or row.found()}")


def _alike(own: list[dict[str, str]], other: list[dict[str, str]]) -> int:
    """Return the number of common turns at the beginning of two conversations, without the last of the shorter one."""
    pairs = enumerate(zip(own, other, strict=False))
    return next((index for index, (one, two) in pairs if one != two), min(len(own), len(other)) - 1)
