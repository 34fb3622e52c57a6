"""What the user gives: every format we read, and every message a wrong row gets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from selfalign.data import identify_data, read_demonstrations, read_instructions, read_pairs, read_ranked
from selfalign.errors import SelfalignError
from selfalign.records import PreferencePair

USER = {"role": "user", "content": "Name a colour."}
SYSTEM = {"role": "system", "content": "Be brief."}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


STANDARD = {"prompt": "Name a colour.", "chosen": "Red", "rejected": "Dog"}
CONVERSATIONAL = {"prompt": [SYSTEM, USER], "chosen": [say("Red")], "rejected": [say("Dog")]}
IMPLICIT = {"chosen": [SYSTEM, USER, say("Red")], "rejected": [SYSTEM, USER, say("Dog")]}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (STANDARD, "Name a colour."),
        (CONVERSATIONAL, [SYSTEM, USER]),
        (IMPLICIT, [SYSTEM, USER]),
        (
            {
                "chosen": [USER, say("Which?"), USER, say("Red")],
                "rejected": [USER, say("Which?"), USER, say("Dog")],
            },
            [USER, say("Which?"), USER],
        ),
        (IMPLICIT | {"prompt": "Name a colour."}, [SYSTEM, USER]),
    ],
    ids=["standard", "conversational", "implicit_prompt", "implicit_prompt_of_several_turns", "repeated_prompt"],
)
def test_pairs_are_read_in_each_of_trls_formats(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    pairs, drops = read_pairs(write_rows(tmp_path / "a.jsonl", row | {"id": "own", "source": "ignored"}))
    assert pairs == [PreferencePair(id="own", prompt=prompt, chosen="Red", rejected="Dog")]
    assert not drops


@pytest.mark.parametrize("row", [STANDARD, CONVERSATIONAL, IMPLICIT], ids=["standard", "conversational", "implicit"])
def test_parquet_gives_the_same_pairs_as_jsonl(tmp_path: Path, row: dict[str, Any]) -> None:
    import datasets

    rows = [row, json.loads(json.dumps(row).replace("colour", "animal"))]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    from_parquet, drops = read_pairs(str(path))
    from_jsonl, _ = read_pairs(write_rows(tmp_path / "a.jsonl", *rows))
    assert from_parquet == from_jsonl
    assert len(from_parquet) == 2
    assert not drops


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (STANDARD | {"rejected": "Red"}, "identical"),
        (CONVERSATIONAL | {"rejected": [say("Red")]}, "identical"),
        (IMPLICIT | {"rejected": IMPLICIT["chosen"]}, "identical"),
        (STANDARD | {"rejected": " \n"}, "empty_response"),
        (STANDARD | {"chosen": ""}, "empty_response"),
    ],
    ids=["identical_texts", "identical_messages", "identical_conversations", "blank_rejected", "empty_chosen"],
)
def test_pairs_without_a_preference_are_dropped_and_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    pairs, drops = read_pairs(write_rows(tmp_path / "a.jsonl", row, STANDARD))
    assert [pair.chosen for pair in pairs] == ["Red"]
    assert drops == Counter({reason: 1})


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Red", "rejected": "Dog"},
        STANDARD | {"chosen": [say("Red")]},
        CONVERSATIONAL | {"prompt": []},
        CONVERSATIONAL | {"chosen": [say("Red"), USER]},
        CONVERSATIONAL | {"chosen": [USER]},
        CONVERSATIONAL | {"chosen": []},
        {"chosen": [USER, say("Red"), USER], "rejected": [USER, say("Dog"), USER]},
        {"chosen": [say("Red")], "rejected": [say("Dog")]},
        {"chosen": [USER, say("A"), say("B")], "rejected": [USER, say("A")]},
    ],
    ids=[
        "texts_without_prompt",
        "text_and_messages",
        "empty_prompt",
        "two_messages",
        "answer_of_the_user",
        "no_answer",
        "conversation_that_goes_on",
        "implicit_prompt_missing",
        "one_longer_than_the_other",
    ],
)
def test_row_in_no_known_format_is_refused_with_file_and_line(tmp_path: Path, row: dict[str, Any]) -> None:
    source = write_rows(tmp_path / "a.jsonl", STANDARD, row)
    with pytest.raises(SelfalignError, match=r"a\.jsonl:2: expected prompt, chosen and rejected as three texts, or"):
        read_pairs(source)


@pytest.mark.parametrize(
    "row", [IMPLICIT | {"prompt": "Name an animal."}, CONVERSATIONAL | {"prompt": "Name a colour."}]
)
def test_text_prompt_that_the_conversations_do_not_repeat_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    source = write_rows(tmp_path / "a.jsonl", row)
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: prompt is a text, but not the last user turn of chosen"):
        read_pairs(source)


@pytest.mark.parametrize("prompt", [[SYSTEM], [say("x")], [{"role": "user"}], [{"content": "x"}]])
def test_prompt_without_a_users_turn_is_refused_with_file_and_line(tmp_path: Path, prompt: Any) -> None:
    source = write_rows(tmp_path / "a.jsonl", CONVERSATIONAL | {"prompt": prompt})
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: a prompt is a list of messages with role and content"):
        read_pairs(source)


def test_pairs_without_an_id_are_named_by_their_content(tmp_path: Path) -> None:
    (one,), _ = read_pairs(write_rows(tmp_path / "a.jsonl", STANDARD))
    (same,), _ = read_pairs(write_rows(tmp_path / "b.jsonl", STANDARD | {"other": 1}))
    (other,), _ = read_pairs(write_rows(tmp_path / "c.jsonl", STANDARD | {"chosen": "Blue"}))
    assert one.id == same.id != other.id
    assert len(one.id) == 16


@pytest.mark.parametrize(
    "rows", [(STANDARD, STANDARD), (STANDARD | {"id": "x"}, CONVERSATIONAL | {"id": "x"})], ids=["content", "id"]
)
def test_duplicates_are_refused_with_both_places(tmp_path: Path, rows: tuple[Any, Any]) -> None:
    source = write_rows(tmp_path / "a.jsonl", *rows)
    with pytest.raises(SelfalignError, match=r"a\.jsonl:2: the same id or content as .*a\.jsonl:1"):
        read_pairs(source)


def test_demonstrations_become_one_turn_prompts(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"id": "d", "instruction": "Hi", "response": "Hello", "category": "x"})
    (demonstration,), _ = read_demonstrations(source)
    assert demonstration.id == "d"
    assert demonstration.prompt == [{"role": "user", "content": "Hi"}]
    assert (demonstration.response, demonstration.source, demonstration.question) == ("Hello", "ift", "")


def test_instructions_keep_their_category(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "category": "x"}, {"id": "i", "instruction": "Ho"})
    first, second = read_instructions(source, "evaluation")
    assert (first.text, first.source, first.category) == ("Hi", "evaluation", "x")
    assert (second.id, second.text, second.category) == ("i", "Ho", "")


def answer(text: str, rank: int, **more: Any) -> dict[str, Any]:
    return {"text": text, "rank": rank, **more}


def test_ranked_answers_keep_ranks_scores_and_justifications(tmp_path: Path) -> None:
    full = [answer("b", 2, score=3, justification="fair"), answer("a", 1, score=5, justification="good")]
    source = write_rows(
        tmp_path / "a.jsonl",
        {"id": "q", "instruction": "Hi", "responses": full},
        {"id": "r", "instruction": "Ho", "responses": [answer("c", 1), answer("d", 2), answer("e", 3)]},
    )
    (first, second), _ = read_ranked(source)
    assert (first.texts, first.ranks, first.scores) == (["b", "a"], [2, 1], [3, 5])
    assert first.justifications == ["fair", "good"]
    assert (second.texts, second.ranks, second.scores) == (["c", "d", "e"], [1, 2, 3], [])


@pytest.mark.parametrize("ranks", [[1], [], [1, 1], [2, 1, 2]])
def test_questions_without_an_order_are_refused_with_file_and_line(tmp_path: Path, ranks: list[int]) -> None:
    answers = [answer(str(i), rank) for i, rank in enumerate(ranks)]
    source = write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "responses": answers})
    with pytest.raises(
        SelfalignError, match=r"a\.jsonl:1: expected two or more responses of different rank, got ranks"
    ):
        read_ranked(source)


@pytest.mark.parametrize("name", ["ift", "evaluation"])
def test_shipped_instructions_are_read(name: str) -> None:
    instructions = read_instructions(f"shipped:{name}", "given")
    assert len(instructions) > 50
    assert len({instruction.id for instruction in instructions}) == len(instructions)


def test_shipped_demonstrations_and_ranked_answers_are_read() -> None:
    assert len(read_demonstrations("shipped:ift")[0]) > 100
    for question in read_ranked("shipped:ranked")[0]:
        assert len(question.scores) == len(question.texts) == len(question.justifications)
        by_rank = sorted(zip(question.ranks, question.scores, strict=True))
        assert [score for _, score in by_rank] == sorted(question.scores, reverse=True)


def test_unknown_shipped_name_is_refused() -> None:
    with pytest.raises(SelfalignError, match=r"fit\.jsonl: no such file"):
        read_instructions("shipped:fit", "evaluation")
    with pytest.raises(SelfalignError, match=r"fit\.jsonl: no such file"):
        identify_data("shipped:fit", "data.path")


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (read_demonstrations, {"instruction": " ", "response": "Hello"}),
        (read_demonstrations, {"instruction": "Hi", "response": "\n"}),
        (lambda source: read_instructions(source, "s"), {"instruction": ""}),
        (read_ranked, {"instruction": "", "responses": [answer("a", 1), answer("b", 2)]}),
        (read_ranked, {"instruction": "Hi", "responses": [answer("a", 1), answer(" ", 2)]}),
    ],
    ids=["instruction", "response", "bare_instruction", "ranked_instruction", "ranked_answer"],
)
def test_empty_texts_are_refused_with_file_and_line(tmp_path: Path, read: Any, row: dict[str, Any]) -> None:
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: expected a text, got an empty one"):
        read(write_rows(tmp_path / "a.jsonl", row))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "Hi"}\n{"instruction": "Ho"', r"a\.jsonl:2: .*truncated"),
        ('{"instruction": "Hi"}\n{"instuction": "Ho"}', r"a\.jsonl:2: .*missing required field `instruction`"),
        ('{"instruction": ["Hi"]}', r"a\.jsonl:1: Expected `str`, got `array` - at `\$\.instruction`"),
        ("", r"a\.jsonl: the file is empty"),
    ],
    ids=["broken", "missing_field", "wrong_type", "empty"],
)
def test_wrong_line_is_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SelfalignError, match=message):
        read_instructions(str(tmp_path / "a.jsonl"), "evaluation")


def test_file_that_is_not_utf_8_is_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"instruction": "Hi"}\n{"instruction": "Öl"}\n'.encode("latin-1"))
    with pytest.raises(SelfalignError, match=r"a\.jsonl:2: not UTF-8"):
        read_instructions(str(tmp_path / "a.jsonl"), "evaluation")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_wrong_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", [STANDARD, {"prompt": "x", "chosen": None, "rejected": "y"}])
    with pytest.raises(SelfalignError, match=r"a\.parquet row 1: .*missing required field `chosen`"):
        read_pairs(source)


def test_empty_or_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    empty = write_parquet(tmp_path / "a.parquet", [STANDARD])
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(empty).slice(0, 0), empty)
    with pytest.raises(SelfalignError, match=r"a\.parquet: (no rows|cannot be read as a data set)"):
        read_pairs(empty)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SelfalignError, match=r"b\.parquet: cannot be read as a data set"):
        read_pairs(str(tmp_path / "b.parquet"))
    with pytest.raises(SelfalignError, match=r"c\.parquet: no such file"):
        read_pairs(str(tmp_path / "c.parquet"))


def test_ranked_parquet_with_gaps_in_some_answers_reads_like_jsonl(tmp_path: Path) -> None:
    """Parquet has one type for all answers, so what an answer lacks comes back as null."""
    rows = [
        {
            "id": "q",
            "instruction": "Hi",
            "responses": [answer("a", 1, justification="good"), answer("b", 2)],
        }
    ]
    assert read_ranked(write_parquet(tmp_path / "a.parquet", rows)) == read_ranked(
        write_rows(tmp_path / "a.jsonl", *rows)
    )


@pytest.mark.parametrize("source", ["someone/some-data", "someone/some-data:test"])
def test_hub_id_offline_is_refused_with_what_to_check(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        SelfalignError, match=rf"{source}: cannot be read as a data set .* check the name, file and network"
    ):
        read_pairs(source)


@pytest.mark.parametrize("source", ["ift", "/nowhere/data", "./nowhere", "a/b/c"])
def test_source_of_no_known_kind_is_refused_with_the_kinds(source: str) -> None:
    with pytest.raises(
        SelfalignError, match=r"is no data: give shipped:NAME, a \.jsonl or \.parquet file, or a hub id"
    ):
        read_instructions(source, "evaluation")


def test_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.json"):
        with pytest.raises(SelfalignError, match=rf"{name}: no such file"):
            read_pairs(str(tmp_path / name))
        with pytest.raises(SelfalignError, match=rf"data\.path: .*{name}: no such file"):
            identify_data(str(tmp_path / name), "data.path")


def test_data_is_identified_by_content_and_a_hub_data_set_by_its_name(tmp_path: Path) -> None:
    first, same = write_rows(tmp_path / "a.jsonl", STANDARD), write_rows(tmp_path / "b.jsonl", STANDARD)
    other = write_rows(tmp_path / "c.jsonl", STANDARD | {"chosen": "Blue"})
    assert identify_data(first, "k") == identify_data(same, "k") != identify_data(other, "k")
    assert identify_data("someone/some-data:test", "k") == "someone/some-data:test"
    assert identify_data("shipped:ift", "k") != identify_data("shipped:evaluation", "k")
