"""Tasks that are made from a seed: each can be solved, and none is on both sides."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from selfalign.core.errors import SelfalignError
from selfalign.core.records import Instruction
from selfalign.data.containers import identify_data, read_rows
from selfalign.data.sources import read_instructions
from selfalign.data.tasks import KINDS, TaskSource
from selfalign.data.text_filters import is_fragment, words_of
from selfalign.data.verifiable import verify
from selfalign.stages.instruct import InstructConfig, phrases


def rows(source: str) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(source)]


def test_same_source_gives_the_same_tasks_and_a_larger_count_more() -> None:
    few, more = rows("shipped:verifiable:50"), rows("shipped:verifiable:80")
    assert few == rows("shipped:verifiable:50:0") == more[:50]
    assert len(more) == 80
    assert len(rows("shipped:verifiable")) == 1000
    assert rows("shipped:verifiable:50:1") != few
    assert identify_data("shipped:verifiable:50", "k") == identify_data("shipped:verifiable:50:0", "k")
    assert len({identify_data(f"shipped:verifiable{s}:50", "k") for s in ("", "_test")}) == 2
    assert few[0] == {
        "category": "number",
        "instruction": "What is 3 times 8? Reply with the number only.",
        "answer": {"kind": "number", "value": 24},
    }


def test_no_task_to_train_on_is_one_to_test_on() -> None:
    sides = [
        {
            tuple(words_of(row["instruction"]))
            for seed in range(4)
            for row in rows(f"shipped:verifiable{side}:400:{seed}")
        }
        for side in ("", "_test")
    ]
    assert all(len(side) > 800 for side in sides)
    assert not sides[0] & sides[1]


NAMES = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def solved(row: dict[str, Any]) -> str:
    """A response that was worked out from the words of the task alone."""
    text, category = row["instruction"], row["category"]
    if category == "number":
        words = text.replace(",", "").replace("?", "").split()
        a, b = [int(word) for word in words if word.isdigit()]
        return str({"plus": a + b, "minus": a - b, "times": a * b}.get(words[3], max(a, b)))
    if category == "choice":
        question, *options, _ = text.splitlines()
        [right] = [one for one in options if one[3:] in KINDS[question.removeprefix("Which of these is ").rstrip("?")]]
        return right
    return text.partition(": ")[2] if category == "exact" else written(text, category)


def written(text: str, category: str) -> str:
    words, quoted = text.rstrip(".").split(), text.split('"')[1::2]
    count = next((NAMES[word] for word in words if word in NAMES), 0)
    keys = text.partition("key")[2].removeprefix("s ").strip().partition(". ")[0].replace(" and ", ", ").split(", ")
    said: dict[str, Callable[[], str]] = {
        "words": lambda: f"{quoted[0]}, yes. {quoted[1]}" if quoted else "x " * int(words[2]),
        "sentences": lambda: "Yes. " * count,
        "excludes": lambda: "Yes. " * count,
        "paragraphs": lambda: "Yes.\n\n" * count,
        "list_items": lambda: "- Yes\n" * count,
        "contains": lambda: f"{words[-3]} {words[-1]}",
        "starts_with": lambda: f"{quoted[0]}, yes.",
        "ends_with": lambda: f"Yes. {quoted[0]}",
        "lower_case": lambda: "yes",
        "upper_case": lambda: "YES",
        "json": lambda: json.dumps(dict.fromkeys(keys, 1)),
    }
    return said[category]()


def test_every_task_can_be_solved_from_its_text_and_passes_the_filters() -> None:
    instructions, drops = read_instructions("shipped:verifiable_test:850", "evaluation")
    assert not +drops
    assert len({one.id for one in instructions}) == len(instructions) == 850
    by_kind: Counter[str] = Counter()
    config = InstructConfig()
    for row, instruction in zip(rows("shipped:verifiable_test:850"), instructions, strict=True):
        verdict, wrong = verify(instruction, solved(row)), verify(instruction, "I do not know")
        assert verdict is not None
        assert verdict.score == 1, (row, verdict)
        assert wrong is not None
        assert wrong.score == 0 or "constraints" in row
        by_kind[row["category"]] += 1
        said = f" {' '.join(words_of(instruction.text))} "
        assert not any(f" {word}{plural} " in said for word in phrases(config) for plural in ("", "s"))
        assert not is_fragment(instruction.text)
        assert config.min_words <= len(words_of(instruction.text)) <= config.max_words
    assert by_kind["number"] > 150
    assert min(by_kind.values()) >= 10
    assert len(by_kind) == 14


@pytest.mark.parametrize("source", ["shipped:verifiable:many", "shipped:verifiables", "shipped:verifiable:1:2:3"])
def test_other_names_are_refused(source: str) -> None:
    with pytest.raises(SelfalignError, match=r"^data\.path: shipped:verif.*expected shipped:verifiable or "):
        identify_data(source, "data.path")


def test_count_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "selfalign.data.tasks.TEMPLATES", (lambda draw: {"instruction": f"Count to {draw.number(1, 9)}"},)
    )
    with pytest.raises(SelfalignError, match=r"^there are only \d verifiable tasks of this seed, not 10$"):
        _ = TaskSource(test=False, count=10, seed=0).rows


def test_records_carry_what_is_right() -> None:
    first = read_instructions("shipped:verifiable:1", "given")[0][0]
    assert isinstance(first, Instruction)
    assert (first.answer, first.category) == ({"kind": "number", "value": 24}, "number")
