"""The criteria of an instruction in a row of given data."""

import re
from typing import Any

from msgspec import UNSET

from selfalign.core.records import Criteria, Criterion
from selfalign.data.rows import CRITERIA, Row, shown

TEXTS = ("criterion", "text", "description")
"""Fields of a criterion with its statement."""

WEIGHTS = ("weight", "points")
"""Fields of a criterion with its weight, which is 1 where there is none."""


def read_criteria(row: Row) -> Criteria:
    """Return the criteria in a row's field `criteria` or `rubric`: texts, or objects with a text and a weight.

    Raises:
        SelfalignError: they are something else, or stand in several fields.
    """
    names = [name for name in CRITERIA if row.fields.get(name)]
    if len(names) > 1:
        row.refuse(f"{' and '.join(names)} are both criteria; keep one")
    if not names:
        return UNSET
    [name] = names
    items = row.fields[name]
    if not isinstance(items, list):
        row.refuse(f"{name}: expected a list of texts, or of objects with {' or '.join(TEXTS)}, got {shown(items)}")
    return [_criterion(row, f"{name}[{index}]", item) for index, item in enumerate(items)]


def _criterion(row: Row, place: str, item: Any) -> Criterion:
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        row.refuse(f"{place}: expected a text or an object, got {shown(item)}")
    part = Row(f"{row.where}: {place}", item)
    weight = part.number(*WEIGHTS)
    if weight is None and (others := [name for name, value in item.items() if _may_weigh(name, value)]):
        part.refuse(f"no {' or '.join(WEIGHTS)}, but a number in {others[0]}: call it weight, or leave it out")
    try:
        return Criterion(text=part.one_text(TEXTS).strip(), weight=1.0 if weight is None else float(weight))
    except ValueError:
        part.refuse(f"expected a text in {' or '.join(TEXTS)} and a weight other than 0; found {part.found()}")


def _may_weigh(name: str, value: Any) -> bool:
    """Whether a field may be meant as the weight: it has a number, and does not count or name the criteria."""
    counts = re.search(r"id$|index|number|^n$", name.casefold())
    return isinstance(value, int | float) and not isinstance(value, bool) and name not in WEIGHTS and not counts
