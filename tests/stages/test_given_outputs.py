import json
from pathlib import Path

import pytest
from builders import instruction, records_artifact, workspace

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import FinishReason, Response
from selfalign.stages.given_outputs import given_outputs

ROWS = [
    {"instruction": "How is tea made?", "output": "With leaves.", "generator": "other", "dataset": "mine"},
    {"instruction": "What do bees do?", "output": "They dance."},
    {"instruction": "What do bees do?", "output": "A second answer."},
    {"instruction": "Nobody asks this.", "output": "Well."},
    {"instruction": "Nobody asks this.", "output": "Well."},
]
ASKED = [instruction("tea", "How is tea made?"), instruction("bees", "What do bees do?"), instruction("sea", "Why?")]


@pytest.mark.parametrize("name", ["outputs.json", "outputs.jsonl"])
def test_answers_are_found_by_the_text_of_the_instruction(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(ROWS, indent=1) if name.endswith("json") else "\n".join(map(json.dumps, ROWS)))
    given = records_artifact(tmp_path / "asked", instructions=ASKED)
    counts = given_outputs(workspace(tmp_path / "out"), source=str(path), content="x", instructions=given)
    assert counts == {"responses": 2, "dropped": {"duplicate": 1, "second_answer": 1, "unanswered": 1}}
    tea, bees = read_records(tmp_path / "out" / "responses.jsonl", Response)
    assert (tea.id, tea.instruction_id, tea.text, tea.model) == ("tea-1", "tea", "With leaves.", "other")
    assert (bees.text, bees.model, bees.finish_reason) == ("They dance.", "given", FinishReason.EOS)


def test_answer_is_found_however_the_instruction_is_encoded(tmp_path: Path) -> None:
    given = records_artifact(tmp_path / "asked", instructions=[instruction("cafe", "Café:\ntea?")])
    path = tmp_path / "outputs.jsonl"
    path.write_text(json.dumps({"instruction": "Cafe\u0301:\r\ntea?", "output": "Yes."}))
    assert (
        given_outputs(workspace(tmp_path / "out"), source=str(path), content="x", instructions=given)["responses"] == 1
    )


def test_broken_row_and_file_of_other_questions_are_named(tmp_path: Path) -> None:
    given = records_artifact(tmp_path / "asked", instructions=ASKED)
    path = tmp_path / "o.json"
    for rows, named in (
        ([{"instruction": "How is tea made?"}], r"o\.json row 0.*output"),
        ([{"instruction": "Other?", "output": "Yes."}], "none of the 3 evaluation instructions"),
        ([], "no rows"),
    ):
        path.write_text(json.dumps(rows))
        with pytest.raises(SelfalignError, match=named):
            given_outputs(workspace(tmp_path / "out"), source=str(path), content="x", instructions=given)
    path.write_text('[{"instruction"')
    with pytest.raises(SelfalignError, match=r"o\.json"):
        given_outputs(workspace(tmp_path / "out"), source=str(path), content="x", instructions=given)
