"""What instructions say is right, and whether a response is. Rows and records carry it as plain JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import msgspec

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Instruction
from selfalign.data.checks import ANSWERS, CONSTRAINTS, Answer, Check
from selfalign.data.rows import Row, is_blank


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of all checks of a response: the share of their weights that passed, and a line for each."""

    score: float
    lines: list[str]


def verify(instruction: Instruction, text: str, *, cut: bool = False) -> Outcome | None:
    """Check a response to an instruction; None if the instruction does not say what is right.

    An empty response fails every check.

    Args:
        instruction: with `answer`, `constraints` or both.
        text: the response, without a thought.
        cut: whether it was cut at the token limit.
    """
    checks = checks_of(instruction)
    if not checks:
        return None
    answer = Answer(text, cut)
    faults = ["it is empty" if is_blank(text) else check.fault(answer) for _, check in checks]
    passed = math.fsum(check.weight for (_, check), fault in zip(checks, faults, strict=True) if not fault)
    lines = [f"{kind}: {fault or 'passed'}" for (kind, _), fault in zip(checks, faults, strict=True)]
    return Outcome(passed / math.fsum(check.weight for _, check in checks), lines)


def checks_of(instruction: Instruction) -> list[tuple[str, Check]]:
    """Return (kind, check) of all that an instruction says is right.

    Raises:
        SelfalignError: a check is of no known kind, or its settings are wrong.
    """
    made = [check_from(ANSWERS, instruction.answer, "answer")] if instruction.answer else []
    constraints = enumerate(instruction.constraints or [])
    return made + [check_from(CONSTRAINTS, item, f"constraints[{index}]") for index, item in constraints]


def read_checks(row: Row) -> dict[str, Any]:
    """Return what a row says is right: `answer` and `constraints` where it has them, as fields of an instruction.

    A field `answer` that is no object is another's answer, and `constraints` of another form are another's too: both
    are passed over.

    Raises:
        SelfalignError: a check is of no known kind, or its settings are wrong; the place is named.
    """
    found: dict[str, Any] = {}
    if isinstance(answer := _unspelled(row.fields.get("answer")), dict):
        found["answer"] = _whole_numbers(answer)
    constraints = _unspelled(row.fields.get("constraints"))
    listed = [constraints] if isinstance(constraints, dict) else constraints
    if isinstance(listed, list) and listed and all(isinstance(item, dict) for item in listed):
        found["constraints"] = [_whole_numbers(item) for item in listed]
    try:
        checks_of(Instruction(id="", text="", source="", **found))
    except SelfalignError as error:
        row.refuse(str(error))
    return found


def check_from(kinds: Mapping[str, type[Check]], item: Mapping[str, Any], place: str) -> tuple[str, Check]:
    """Return (kind, check) of what an object describes.

    Raises:
        SelfalignError: its kind is unknown, or a setting is missing, unknown or out of range.
    """
    kind, settings = item.get("kind"), {name: value for name, value in item.items() if name != "kind"}
    if not isinstance(kind, str) or kind not in kinds:
        raise SelfalignError(f"{place}.kind: {_unknown(str(kind), kinds) if kind else _there_are(kinds)}")
    known = [one.name for one in fields(kinds[kind])]
    for name in settings:
        if name not in known:
            raise SelfalignError(f"{place}.{name}: {_unknown(name, known)}")
    try:
        return kind, msgspec.convert(settings, kinds[kind])
    except (msgspec.ValidationError, SelfalignError) as error:
        raise SelfalignError(f"{place} ({kind}): {error}") from error


def _unknown(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"{name!r} is unknown; {f'did you mean {near[0]}?' if near else _there_are(known)}"


def _there_are(known: Iterable[str]) -> str:
    return f"there are {', '.join(known)}"


def _unspelled(value: Any) -> Any:
    """Return the checks that a JSON text spells, as tables hold them; any other value as it is."""
    if not isinstance(value, str) or '"kind"' not in value:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _whole_numbers(item: dict[str, Any]) -> dict[str, Any]:
    """Return settings with 3.0 as 3, because tables turn whole numbers with gaps into the former."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in item.items()
    }
