"""Preference pairs from rows: two answers as texts, as turns after a prompt, or as whole conversations."""

from collections import Counter
from typing import NoReturn

from selfalign.core.records import Message, PreferencePair, Prompt
from selfalign.data.rows import SCORES, SIDES, SMOOTHING, TAILS, Row
from selfalign.data.schemas import against_tails
from selfalign.data.tails import Tail, common_turns, pair_of
from selfalign.data.turns import check_prompt, listed_turns, only_answer, read_task_with_tools, read_turns, spoken

WANTED = (
    "prompt, chosen and rejected as three texts, or as lists of messages in which chosen and rejected begin and end "
    "with a turn of the assistant's behind the common prompt (which may be instruction, question, messages or "
    "conversations instead, and the answers preferred_output and non_preferred_output), or ranked responses to an "
    "instruction"
)


def read_pair(row: Row, drops: Counter[str]) -> PreferencePair | None:
    """Return the pair of a row, with an empty `id`; None if it holds no preference, which is counted by reason.

    Raises:
        SelfalignError: the row is in no known format.
    """
    row.refuse_unended()
    row = _flat(row)
    sides = next((names for names in SIDES if all(name in row.fields for name in names)), None)
    if sides is None:
        _refuse(row)
    prompt, chosen, rejected = _split(row, *sides)
    check_prompt(row, prompt)
    for tail in (chosen, rejected):
        if tail.turns and not isinstance(prompt, str):
            check_prompt(row, [*prompt, *tail.turns])
    better, worse = (row.number(*names) for names in SCORES)
    smoothing = row.number(SMOOTHING)
    if smoothing is not None and not 0 <= smoothing <= 1:
        row.refuse(f"{SMOOTHING} must be from 0 to 1, got {smoothing}")
    if reason := against_tails(chosen, rejected, better, worse):
        drops[reason] += 1
        return None
    return pair_of(prompt, chosen, rejected, (better, worse), smoothing)


def _flat(row: Row) -> Row:
    """Return the row with the fields that other formats nest inside of one field.

    OpenAI's prompt is `input.messages`. ms-swift's chosen answer is the last of `messages`, beside `rejected_response`.
    The turns of a pairs.jsonl stand beside the answers.
    """
    fields = dict(row.fields)
    if any(fields.get(name) for name in TAILS):
        for side in SIDES[0]:
            answer = {"role": "assistant", "content": row.text(side), "tool_calls": fields.pop(f"{side}_calls", [])}
            fields[side] = [*fields.pop(f"{side}_turns", []), answer]
    if isinstance(inner := fields.get("input"), dict):
        return Row.of(row.where, {name: value for name, value in fields.items() if name != "input"} | inner)
    if "rejected_response" in fields and isinstance(turns := fields.get("messages"), list) and len(turns) > 1:
        answer = read_turns(Row(row.where, {"messages": turns[-1]}), "messages")
        fields |= {"messages": turns[:-1], "response": only_answer(row, "messages", answer)}
    return Row(row.where, fields)


def _split(row: Row, chosen: str, rejected: str) -> tuple[Prompt, Tail, Tail]:
    """Return the task of a row, and the tails behind it: two texts, or turns.

    The turns that both sides begin with belong to the task, if an answer follows them on either side.

    Raises:
        SelfalignError: these are neither two texts nor two lists of turns, or no two answers to one prompt.
    """
    values = row.fields[chosen], row.fields[rejected]
    if all(isinstance(value, str) for value in values):
        prompt = read_task_with_tools(row) or _refuse(row)
        return prompt, Tail(row.text(chosen)), Tail(row.text(rejected))
    if not all(isinstance(value, list | dict) for value in values):
        _refuse(row)
    own, other = read_turns(row, chosen), read_turns(row, rejected)
    if "messages" in row.fields and read_turns(row, "messages") == own:  # Some keep the chosen conversation twice.
        row = Row(row.where, {name: value for name, value in row.fields.items() if name != "messages"})
    listed = listed_turns(row)
    begun = listed[1] if listed else own[: common_turns(own, other)]
    size = len(begun)
    if begun == own[:size] == other[:size] and min(len(own), len(other)) > size:
        own, other = own[size:], other[size:]
    given = None if listed or not (begun or row.text("prompt")) else (f"{chosen} and {rejected}", begun)
    prompt = read_task_with_tools(row, given)
    shared = _shared(own, other) if prompt and not isinstance(prompt, str) else 0
    better, worse = Tail.of(own[shared:]), Tail.of(other[shared:])
    if not prompt or better is None or worse is None:
        _refuse(row, f"{chosen} of {spoken(own)}, {rejected} of {spoken(other)} behind {spoken(begun)}")
    return prompt if isinstance(prompt, str) else [*prompt, *own[:shared]], better, worse


def _shared(own: list[Message], other: list[Message]) -> int:
    """Return how many turns two tails have in common before their first different answers."""
    begun = own[:1] == other[:1] and own and own[0]["role"] == "assistant"
    sizes = range(common_turns(own, other), 0, -1) if begun else ()
    return next((n for n in sizes if own[n]["role"] == other[n]["role"] == "assistant"), 0)


def _refuse(row: Row, found: str = "") -> NoReturn:
    row.refuse(f"expected {WANTED}; found {found or row.found()}")
