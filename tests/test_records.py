"""Records: written and read back, and every way a line can be wrong, with file and line in the message."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import as_plain, read_records, read_typed_lines, write_records
from selfalign.core.records import (
    FinishReason,
    Instruction,
    Judgement,
    JudgementStatus,
    PairReference,
    PreferencePair,
    Response,
)

JUDGEMENT: dict[str, Any] = {"id": "j", "response_id": "r", "text": "Score: 4", "model": "m"}


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def instruction(name: str) -> str:
    return json.dumps({"id": name, "text": "Why?", "source": "self"})


@pytest.mark.parametrize(
    "records",
    [
        [
            Instruction(id="a", text="Wärum {x}\u2028?\n", source="self", category="c"),
            Instruction(id="b", text="", source="s"),
        ],
        [Response(id="a", instruction_id="i", text="x", finish_reason=FinishReason.LENGTH, tokens=3, model="m")],
        [
            Judgement(status=JudgementStatus.OK, score=4.5, entropy=0.1, **JUDGEMENT),
            Judgement(status=JudgementStatus.AMBIGUOUS, score=None, **JUDGEMENT | {"id": "k"}),
        ],
        [
            PreferencePair(id="a", prompt="text", chosen="x", rejected="y", chosen_finished=False),
            PreferencePair(
                id="b", prompt=[{"role": "user", "content": "q"}], chosen="x", rejected="y", chosen_score=4.0
            ),
        ],
        [PairReference(id="a", chosen=-1.25, rejected=-2.5, augmented_chosen=-3.0, augmented_rejected=None)],
    ],
    ids=lambda records: type(records[0]).__name__,
)
def test_records_come_back_as_they_were_written(tmp_path: Path, records: list[Any]) -> None:
    write_records(tmp_path / "a.jsonl", records)
    assert read_records(tmp_path / "a.jsonl", type(records[0])) == records
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["id"] for line in lines[:-1]] == [record.id for record in records]


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "", instruction("a"), "  ", instruction("b"), "")
    assert [(number, record.id) for number, record in read_typed_lines(path, Instruction)] == [(2, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "text": "x"', r"a\.jsonl:2: .*truncated"),
        ("not json", r"a\.jsonl:2: .*malformed"),
        ('{"id": "a", "text": "x"}', r"a\.jsonl:2: .*missing required field `source`"),
        ('{"id": "a", "text": 3, "source": "self"}', r"a\.jsonl:2: Expected `str`, got `int` - at `\$\.text`"),
        ('["a"]', r"a\.jsonl:2: Expected `object`, got `array`"),
        (instruction("first"), r"a\.jsonl:2: the id 'first' occurs twice"),
    ],
    ids=["broken", "no_json", "missing_field", "wrong_type", "no_object", "duplicate_id"],
)
def test_wrong_line_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", instruction("first"), line, instruction("third"))
    with pytest.raises(SelfalignError, match=message):
        read_records(path, Instruction)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SelfalignError, match=r"a\.jsonl: the file is empty; expected one JSON object a line"):
        read_records(tmp_path / "a.jsonl", Instruction)


def test_missing_and_non_utf_8_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"a\.jsonl: no such file"):
        read_records(tmp_path / "a.jsonl", Instruction)
    (tmp_path / "a.jsonl").write_bytes(instruction("a").encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(SelfalignError, match=r"a\.jsonl:2: not UTF-8"):
        read_records(tmp_path / "a.jsonl", Instruction)


@pytest.mark.parametrize("status", [status for status in JudgementStatus if status is not JudgementStatus.OK])
def test_a_score_on_a_judgement_that_failed_is_refused(tmp_path: Path, status: JudgementStatus) -> None:
    with pytest.raises(ValueError, match=f"judgement j: status {status} with score 0.0"):
        Judgement(status=status, score=0.0, **JUDGEMENT)
    path = write_lines(tmp_path / "a.jsonl", json.dumps(JUDGEMENT | {"status": status.value, "score": 0.0}))
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: judgement j: status"):
        read_records(path, Judgement)


def test_a_valid_judgement_without_a_score_is_refused() -> None:
    with pytest.raises(ValueError, match="judgement j: status ok with score None"):
        Judgement(status=JudgementStatus.OK, score=None, **JUDGEMENT)


def test_unknown_status_and_finish_reason_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", json.dumps(JUDGEMENT | {"status": "fine", "score": 1.0}))
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: Invalid enum value 'fine'"):
        read_records(path, Judgement)
    response = {"id": "a", "instruction_id": "i", "text": "x", "finish_reason": "stop", "tokens": 3, "model": "m"}
    with pytest.raises(SelfalignError, match=r"b\.jsonl:1: Invalid enum value 'stop'"):
        read_records(write_lines(tmp_path / "b.jsonl", json.dumps(response)), Response)


@pytest.mark.parametrize("reason", ["unknown", "prompt_too_long", "content_filter", "refused"])
def test_refusal_is_no_response(tmp_path: Path, reason: str) -> None:
    response = {"id": "a", "instruction_id": "i", "text": "x", "finish_reason": reason, "tokens": 3, "model": "m"}
    with pytest.raises(
        SelfalignError,
        match=rf"b\.jsonl:1: response a: finish_reason {reason}; a response is eos, length or truncated$",
    ):
        read_records(write_lines(tmp_path / "b.jsonl", json.dumps(response)), Response)


def test_a_score_that_is_not_a_number_does_not_come_back_as_one(tmp_path: Path) -> None:
    """JSON has no NaN: it is written as null, which no score and no log-probability may be."""
    write_records(tmp_path / "a.jsonl", [PairReference(id="a", chosen=float("nan"), rejected=-1.0)])
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: Expected `float`, got `null` - at `\$\.chosen`"):
        read_records(tmp_path / "a.jsonl", PairReference)
    write_records(tmp_path / "b.jsonl", [Judgement(status=JudgementStatus.OK, score=float("nan"), **JUDGEMENT)])
    with pytest.raises(SelfalignError, match=r"b\.jsonl:1: judgement j: status ok with score None"):
        read_records(tmp_path / "b.jsonl", Judgement)


def test_record_whose_writing_fails_leaves_no_file(tmp_path: Path) -> None:
    unwritable: Any = Instruction(id="b", text=object(), source="s")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_records(tmp_path / "a.jsonl", [Instruction(id="a", text="x", source="s"), unwritable])
    assert list(tmp_path.iterdir()) == []


def test_plain_records_are_json_and_come_back() -> None:
    record = Response(id="a", instruction_id="i", text="x", finish_reason=FinishReason.EOS, tokens=3, model="m")
    plain = as_plain([record])
    assert plain == json.loads(json.dumps(plain))
    assert msgspec.convert(plain, list[Response]) == [record]
