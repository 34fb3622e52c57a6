import json
from pathlib import Path

import pytest
from builders import workspace

from selfalign.errors import SelfalignError
from selfalign.records import Instruction, read_records
from selfalign.stages.questions import questions

ROWS = [{"id": f"q{n}", "instruction": f"Question {n}?", "category": "some"} for n in range(5)]


def asked(folder: Path, count: int) -> list[Instruction]:
    source = folder / "asked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    counts = questions(workspace(folder / "out"), source=str(source), count=count, content="d")
    kept = read_records(folder / "out/instructions.jsonl", Instruction)
    assert counts == {"instructions": len(kept)}
    return kept


@pytest.mark.parametrize(
    ("count", "ids"), [(2, ["q0", "q1"]), (0, ["q0", "q1", "q2", "q3", "q4"]), (5, ["q0", "q1", "q2", "q3", "q4"])]
)
def test_first_so_many_instructions_are_taken(tmp_path: Path, count: int, ids: list[str]) -> None:
    kept = asked(tmp_path, count)
    assert [record.id for record in kept] == ids
    assert kept[0] == Instruction(id="q0", text="Question 0?", source="evaluation", category="some")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"nowhere\.jsonl"):
        questions(workspace(tmp_path / "out"), source=str(tmp_path / "nowhere.jsonl"), count=0, content="d")


def test_shipped_instructions_are_found_by_name(tmp_path: Path) -> None:
    assert questions(workspace(tmp_path), source="shipped:evaluation", count=7, content="d") == {"instructions": 7}
