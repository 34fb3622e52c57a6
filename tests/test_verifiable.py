"""Checks of responses, each by cases worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Instruction
from selfalign.data.sources import read_instructions
from selfalign.data.verifiable import verify


def asked(answer: dict[str, Any] | None = None, *constraints: dict[str, Any]) -> Instruction:
    given = {"answer": answer} if answer else {}
    return Instruction(
        id="i", text="?", source="given", **given, **({"constraints": [*constraints]} if constraints else {})
    )


def passes(text: str, answer: dict[str, Any] | None = None, *constraints: dict[str, Any], cut: bool = False) -> bool:
    verdict = verify(asked(answer, *constraints), text, cut=cut)
    assert verdict is not None
    assert verdict.score in (0, 1)
    return verdict.score == 1


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "42", "It is 42.", "The answer is 42.", "First 40, then 42", "Answer: 42 apples", r"so \boxed{42}", "**42**",
        "$42$", "#### 42", "+42", "42.0", "84/2", r"\boxed{\frac{84}{2}}", "4.2e1", "the answer is 6 * 7 = 42",
        "forty-two: 42!",
        r"The answer is 7? No: \boxed{42}, as \boxed{42.00} says", "10 − 4 is no use, 42", "answer = 42, I think.",
        "The answer is not 41. The answer is 42.", "Answer:\n42", "costs $42", "1 + 41 = 42 (sum)",
        r"\boxed{42\text{ cm}^2}", "The answer is 42 m^2.", "４２", "x^2 + 7 is 42",
        "The answer isn't 41, it is 42. The answer is 42.",
    ],
)  # fmt: skip
def test_number_is_found(text: str) -> None:
    assert passes(text, {"kind": "number", "value": 42})


@pytest.mark.parametrize(
    "text",
    [
        "", "forty-two", "-42", "41", "The answer is 42, or 43", "The answer is 41. No, the answer is 42.", "420",
        "4,2", r"\boxed{41} 42", r"\boxed{42} or \boxed{43}", "42 and then 7", "x42", "4.2.0", "42.1",
        "The answer is not 42",
        r"\boxed{}", "1e999", "9" * 5000, "42/0", "4 2", "Answer: none. 42 is nothing.",
        "The answer isn't 42.", "The answer isn’t 42.", "The answer is never 42", "–42", "－42", "42^2", "2^42",
        r"\boxed{2^{42}}",
        r"\boxed{\sqrt{42}}", r"\boxed{42\pi}", "√42", "42√2", "42²", r"\boxed{\frac{\pi}{42}}", r"\log 42",
        "42 million",
        "3 042", "3\u00a0042", "3\u202f042", "3'042", "5٫42", "5．42", "1 1/42", r"\boxed{41\frac{1}{42}}",
    ],
)  # fmt: skip
def test_another_number_none_or_several_are_wrong(text: str) -> None:
    assert not passes(text, {"kind": "number", "value": 42})


def test_numbers_are_exact_and_tolerance_is_counted_in() -> None:
    assert passes("0.3", {"kind": "number", "value": 0.3})
    assert not passes("0.30000001", {"kind": "number", "value": 0.3})
    assert passes("0.35", {"kind": "number", "value": 0.3, "tolerance": 0.05})
    assert not passes("0.351", {"kind": "number", "value": 0.3, "tolerance": 0.05})
    assert passes("1,234,567.5", {"kind": "number", "value": 1234567.5})
    assert not passes("12,34", {"kind": "number", "value": 1234})
    assert passes("9007199254740993", {"kind": "number", "value": 9007199254740993})
    assert not passes("9007199254740992", {"kind": "number", "value": 9007199254740993})
    assert passes("1" + "0" * 50, {"kind": "number", "value": 10**50})
    assert passes("-3", {"kind": "number", "value": -3})
    assert passes("5-3", {"kind": "number", "value": 3})
    assert passes("5–3", {"kind": "number", "value": 3})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{1\frac{1}{2}}", 1.5), (r"$-1 \tfrac12$", -1.5), ("It is 1 1/2.", 1.5), (r"\dfrac34", 0.75),
        ("The answer is –3", -3), ("－3", -3), ("Fr. 1'234.50", 1234.5), ("1\u00a0234\u00a0567", 1234567),
        ("1\u202f234", 1234), ("٣٫٥", 3.5), ("It is 1 3/2", None), ("1 234", None),
    ],
)  # fmt: skip
def test_whole_number_is_read_or_none_of_it(text: str, value: float | None) -> None:
    parts = (0.5, 1, 2, 3, 4, 34, 234, 567, -0.5, 5.5, 5, 0.75, 1.5, -1.5, 2.5, -3, 1234, 1234.5, 1234567, 3.5)
    assert [part for part in parts if passes(text, {"kind": "number", "value": part})] == ([value] if value else [])


@pytest.mark.parametrize(
    "text",
    [
        "Answer: " + "a. " * 20_000,
        r"\boxed{" * 20_000,
        "a. " * 20_000,
        "x" * 100_000 + " ",
        "{" * 100_000,
        "-" * 100_000,
    ],
)
@pytest.mark.timeout(60)  # A pattern that tries every beginning would take hours.
def test_degenerate_response_is_checked_at_once(text: str) -> None:
    constraints = [{"kind": "sentences", "at_least": 100_000}, {"kind": "paragraphs", "at_least": 9}, {"kind": "json"}]
    for cut in (False, True):
        assert not passes(text, {"kind": "number", "value": 42}, *constraints, cut=cut)


def test_last_word_of_a_cut_response_is_no_answer() -> None:
    kind = {"kind": "number", "value": 4}
    assert passes("It is 4 and", kind, cut=True)
    assert not passes("It is 4", kind, cut=True)
    assert not passes("The answer is 4", kind, cut=True)
    assert not passes("Paris and", {"kind": "exact", "value": "Paris"}, cut=True)
    assert not passes("B", {"kind": "choice", "value": "B"}, cut=True)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True), ("(B)", True), ("b", True), ("B) Rome", True), ("**B.** Rome", True), ("The answer is B.", True),
        ("The answer is (B) because A is not", True), ("Answer: option B", True), (r"\boxed{\text{B}}", True),
        ("I think so.\nB", True), ("The answer is B - Rome", True), ("Both.\n\nb.", True),
        ("A", False), ("Both", False), ("B is best", False), ("A) Paris\nB) Rome", False), ("A or B", False),
        ("", False),
        ("The answer is B. The answer is A.", False), ("The answer is Bonn", False), ("A cat\nB", True),
        ("B, A and C are wrong", False), ("Answer: B, C", False), (r"\boxed{B, C}", False),
        ("The answer is B/C.", False),
        ("The answer is B, a city", True), ("（Ｂ）", True), ("B、Rome", True), ("The answer isn't B.", False),
    ],
)  # fmt: skip
def test_choice_is_a_letter_that_stands_as_options_do(text: str, right: bool) -> None:
    assert passes(text, {"kind": "choice", "value": "B"}) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Paris", True), ("paris.", True), ("  **Paris**!\n", True), ("Answer: Paris", True), (r"\boxed{Paris}", True),
        ("The answer is 'Paris'. It is big.", True), ("city of light", True), ("The capital is Paris", False),
        ("Paris, France", False), ("Answer: Paris. Answer: Rome", False), ("Answer: Paris. Answer: PARIS", True),
        ("Answer: St. Louis", True), ("The answer is J. K. Rowling. She wrote it.", True), ("Answer: St. Paul", False),
        ("The answer isn't Paris.", False),
    ],
)  # fmt: skip
def test_exact_answer_is_stated_or_the_whole_response(text: str, right: bool) -> None:
    assert passes(text, {"kind": "exact", "value": ["Paris", "City of  Light", "St. Louis", "J. K. Rowling"]}) == right


def test_regular_expression_is_searched_for() -> None:
    kind = {"kind": "regex", "pattern": r"\b[Rr]om(e|a)\b"}
    assert passes("It is Roma.", kind)
    assert not passes("It is Romania.", kind)


# --- constraints -------------------------------------------------------------------------------------------------

PROSE = "Dr. Hill sees bees, e.g. here. They fly! Do they dance?\n\nYes - they do"
LISTED = "Some bees:\n- one. Or two.\n* three\n2. four\nb) five\n-six\n- \n\nThe end."


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [
        ("one two-three don't 4 - !", "words", 4),
        ("茶は熱い", "words", 4),
        ("", "words", 0),
        (PROSE, "words", 14),
        (PROSE, "sentences", 4),
        (PROSE, "paragraphs", 2),
        (LISTED, "sentences", 7),
        (LISTED, "list_items", 4),
        (LISTED, "paragraphs", 2),
        ("Pi is 3.14. 好。很好。", "sentences", 3),
        ("Wait... what?!\nA wrapped\nline.", "sentences", 3),
        ("a\n\n \n\n***\n\nb", "paragraphs", 2),
        ("1. a\n   - b", "list_items", 2),
        ("a\r\n\r\nb\n\u00a0\nc", "paragraphs", 3),
        ("यह चाय है। यह गरम है।", "sentences", 2),
        ("هل هذا شاي؟ نعم.", "sentences", 2),
    ],
)
def test_counts(text: str, kind: str, count: int) -> None:
    text = text or "!"
    assert passes(text, None, {"kind": kind, "at_least": count, "at_most": count})
    assert not passes(text, None, {"kind": kind, "at_least": count + 1})
    assert count == 0 or not passes(text, None, {"kind": kind, "at_most": count - 1})


@pytest.mark.parametrize(
    ("text", "constraint", "right"),
    [
        ("Bees make Honey, they do", {"kind": "contains", "phrases": ["honey", "they  do"]}, True),
        ("Bees make honeycomb", {"kind": "contains", "phrases": ["honey"]}, False),
        ("tea, Tea and teas", {"kind": "contains", "phrases": ["tea"], "at_least": 2}, True),
        ("tea, Tea and teas", {"kind": "contains", "phrases": ["tea"], "at_least": 3}, False),
        ("熱い茶です", {"kind": "contains", "phrases": ["茶"]}, True),
        ("Two\nlines here", {"kind": "contains", "phrases": ["two lines"]}, True),
        ("Not _tea_ but **hot** `water`", {"kind": "contains", "phrases": ["tea", "hot water"]}, True),
        ("He doesn’t", {"kind": "contains", "phrases": ["doesn't"]}, True),
        ("He doesn’t", {"kind": "excludes", "phrases": ["doesn't"]}, False),
        ("Drink _tea_ **all** day", {"kind": "excludes", "phrases": ["tea all day"]}, False),
        ("Drink t\u00ade\u200ba", {"kind": "excludes", "phrases": ["tea"]}, False),
        ("Drink *tea*", {"kind": "excludes", "phrases": ["*"]}, False),
        ("the tea_pot, `the_tea`", {"kind": "excludes", "phrases": ["tea", "pot"]}, True),
        ("call __init__ or _f", {"kind": "contains", "phrases": ["__init__", "_f"]}, True),
        ("That’s all", {"kind": "ends_with", "text": "that's all"}, True),
        ("No commas here", {"kind": "excludes", "phrases": [","]}, True),
        ("One, two", {"kind": "excludes", "phrases": [","]}, False),
        ("The cathedral", {"kind": "excludes", "phrases": ["cat"]}, True),
        ("The Cat", {"kind": "excludes", "phrases": ["dog", "cat"]}, False),
        ('"Well, it is."', {"kind": "starts_with", "text": "well"}, True),
        ("Wellness", {"kind": "starts_with", "text": "Well"}, False),
        ("Oh well", {"kind": "starts_with", "text": "Well"}, False),
        ("So it is. *That is all!*", {"kind": "ends_with", "text": "That is all."}, True),
        ("So that is all and more", {"kind": "ends_with", "text": "That is all"}, False),
        ("So be it: overall", {"kind": "ends_with", "text": "all"}, False),
        ("only small letters, 3 of them", {"kind": "lower_case"}, True),
        ("Only small letters", {"kind": "lower_case"}, False),
        ("123", {"kind": "lower_case"}, False),
        ("LOUD, 3", {"kind": "upper_case"}, True),
        ("LOUDLy", {"kind": "upper_case"}, False),
        ('{"a": [1, {"b": null}]}', {"kind": "json", "keys": ["a"]}, True),
        ('```json\n{"a": 1}\n```', {"kind": "json", "keys": ["a"]}, True),
        ('Here: {"a": 1}', {"kind": "json"}, False),
        ('{"a": NaN}', {"kind": "json"}, False),
        ("[" * 100_000, {"kind": "json"}, False),
        ('["a"]', {"kind": "json", "keys": ["a"]}, False),
        ('["a"]', {"kind": "json"}, True),
        ('{"b": 1}', {"kind": "json", "keys": ["a"]}, False),
        ("Это чай OK?", {"kind": "script", "scripts": ["CYRILLIC"]}, False),
        ("Это чай, и он очень горячий, OK?", {"kind": "script", "scripts": ["CYRILLIC"]}, True),
        ("これは茶です", {"kind": "script", "scripts": ["HIRAGANA", "KATAKANA", "CJK"]}, True),
        ("123", {"kind": "script", "scripts": ["LATIN"]}, False),
        ("サーバーエラー", {"kind": "script", "scripts": ["KATAKANA"]}, True),
        ("ｻｰﾊﾞｰ", {"kind": "script", "scripts": ["KATAKANA"]}, True),
        ("らーめん", {"kind": "script", "scripts": ["HIRAGANA"]}, True),
        ("人々", {"kind": "script", "scripts": ["CJK"]}, True),
        ("Ｔｅａ", {"kind": "script", "scripts": ["LATIN"]}, True),
    ],
)
def test_constraint_is_kept_or_not(text: str, constraint: dict[str, Any], right: bool) -> None:
    assert passes(text, None, constraint) == right


def test_score_is_the_share_of_the_weights_that_passed() -> None:
    instruction = asked(
        {"kind": "number", "value": 4, "weight": 2},
        {"kind": "words", "at_most": 2},
        {"kind": "lower_case", "weight": 0.5},
        {"kind": "excludes", "phrases": ["five"], "weight": 0.5},
    )
    verdict = verify(instruction, "Sum: 4")
    assert verdict is not None
    assert verdict.score == 3.5 / 4
    assert verdict.lines == [
        "number: passed",
        "words: passed",
        "lower_case: it is not in small letters",
        "excludes: passed",
    ]


@pytest.mark.parametrize("text", ["", " \n", "\u200b"])
def test_empty_response_passes_nothing(text: str) -> None:
    assert not passes(text, None, {"kind": "words", "at_most": 5}, {"kind": "excludes", "phrases": ["x"]})


def test_instruction_without_checks_has_no_verdict() -> None:
    assert verify(asked(), "anything") is None


# --- rows --------------------------------------------------------------------------------------------------------


def read(folder: Path, *rows: dict[str, Any]) -> list[Instruction]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_instructions(str(folder / "rows.jsonl"), "given")[0]


def test_rows_say_what_is_right_as_objects_or_as_their_json_texts(tmp_path: Path) -> None:
    number, words = {"kind": "number", "value": 4.5}, {"kind": "words", "at_least": 3}
    plain, spelled, table = read(
        tmp_path,
        {"instruction": "a", "answer": number, "constraints": [words]},
        {"instruction": "b", "answer": json.dumps(number), "constraints": json.dumps([words])},
        {
            "instruction": "c",
            "answer": number | {"pattern": None},
            "constraints": [words | {"at_least": 3.0, "text": None}],
        },
    )
    for one in (plain, spelled, table):
        assert (one.answer, one.constraints) == (number, [words])
    write_records(tmp_path / "out.jsonl", [plain])
    assert read_records(tmp_path / "out.jsonl", Instruction) == [plain]


def test_rows_without_it_are_the_records_that_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = [{"instruction": "a"}, {"instruction": "b", "answer": "a text", "constraints": ["be brief"]}]
    assert read(tmp_path, rows[1] | {"answer": '{"name": "weather"}'}) == read(tmp_path, rows[1])
    records = read(tmp_path, *rows)
    assert [one.id for one in records] == ["92ef557cceb6b6ab", "04c1cdb8d7471bdc"]
    write_records(tmp_path / "out.jsonl", records)
    assert [set(json.loads(line)) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"id", "text", "source", "category", "turns"}
    ] * 2
    assert "ignored the fields answer, constraints" in caplog.text
    assert "read answer" not in caplog.text


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"constraints": [{"kind": "words", "at_most": 3}, {"kind": "wrods"}]},
         r"constraints\[1\]\.kind: 'wrods' is unknown; did you mean words\?"),
        ({"constraints": [{"kind": "rhymes"}]}, r"constraints\[0\]\.kind: 'rhymes' is unknown; there are words, sent"),
        ({"constraints": [{"at_most": 3}]}, r"constraints\[0\]\.kind: there are words, "),
        ({"constraints": [{"kind": "words", "atmost": 3}]}, r"constraints\[0\]\.atmost: .* mean at_most"),
        ({"constraints": [{"kind": "words"}]}, r"constraints\[0\] \(words\): give at_least, at_most or both"),
        ({"constraints": [{"kind": "words", "at_least": 3, "at_most": 2}]}, r"got 3 and 2"),
        ({"constraints": [{"kind": "words", "at_most": "3"}]}, r"\(words\): Expected `int"),
        ({"constraints": [{"kind": "contains", "phrases": []}]}, r"phrases must be a list of words"),
        ({"constraints": [{"kind": "ends_with", "text": " . "}]}, r"text must be a text"),
        ({"constraints": [{"kind": "script", "scripts": ["ELVISH"]}]}, r"scripts must be some of ARABIC"),
        ({"constraints": [{"kind": "json", "weight": 0}]}, r"weight must be a finite number above 0, got 0"),
        ({"answer": {"kind": "words", "at_most": 3}}, r"answer\.kind: 'words' is unknown; there are exact"),
        ({"answer": {"kind": "choice", "value": "b"}}, r"answer \(choice\): value must be a capital letter, got 'b'"),
        ({"answer": {"kind": "regex", "pattern": "("}}, r"answer \(regex\): pattern is no regular expression"),
        ({"answer": {"kind": "number"}}, r"answer \(number\): Object missing required field `value`"),
        ({"answer": {"kind": "number", "value": 1, "tolerance": -1}}, r"tolerance must be 0 or more, got -1"),
        ({"answer": {"kind": "exact", "value": ["a", ""]}}, r"value must be a text, got ''"),
    ],
)  # fmt: skip
def test_check_that_cannot_be_is_refused_with_its_place(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(SelfalignError, match=rf"rows\.jsonl:2: .*{problem}"):
        read(tmp_path, {"instruction": "a"}, {"instruction": "b", **row})
