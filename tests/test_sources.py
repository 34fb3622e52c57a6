"""What the user gives: every format we read, and every message a wrong row gets."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import write_records
from selfalign.core.records import Demonstration, PreferencePair
from selfalign.data.containers import identify_data
from selfalign.data.sources import read_demonstrations, read_instructions, read_outputs, read_pairs, read_ranked
from selfalign.data.turns import as_text

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
    with pytest.raises(
        SelfalignError, match=r"a\.jsonl:1: prompt is a text that is not a user turn of chosen and rejected"
    ):
        read_pairs(source)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([SYSTEM], "there is no user turn"),
        ([say("x")], "there is no user turn"),
        ([{"role": "user"}], r"prompt\[0\]: a turn's content must be a text, .*; got None"),
        (
            [{"content": "x"}],
            r"prompt\[0\]: a turn must be an object with role and content, .*; got the fields content",
        ),
    ],
    ids=["system_alone", "assistant_alone", "no_content", "no_role"],
)
def test_prompt_without_a_users_turn_is_refused_with_file_and_line(tmp_path: Path, prompt: Any, message: str) -> None:
    source = write_rows(tmp_path / "a.jsonl", CONVERSATIONAL | {"prompt": prompt})
    with pytest.raises(SelfalignError, match=rf"a\.jsonl:1: .*{message}"):
        read_pairs(source)


def test_pairs_without_an_id_are_named_by_their_content(tmp_path: Path) -> None:
    (one,), _ = read_pairs(write_rows(tmp_path / "a.jsonl", STANDARD))
    (same,), _ = read_pairs(write_rows(tmp_path / "b.jsonl", STANDARD | {"other": 1}))
    (other,), _ = read_pairs(write_rows(tmp_path / "c.jsonl", STANDARD | {"chosen": "Blue"}))
    assert one.id == same.id != other.id
    assert len(one.id) == 16


@pytest.mark.parametrize(
    "rows",
    [
        (STANDARD, STANDARD),
        (STANDARD | {"id": "x"}, STANDARD | {"id": "x"}),
        (STANDARD | {"id": 3}, STANDARD | {"id": "3"}, STANDARD | {"id": 3.0}),
        (STANDARD | {"source": "one"}, STANDARD | {"source": "other"}),
        (CONVERSATIONAL, IMPLICIT, IMPLICIT | {"prompt": "Name a colour."}),
    ],
    ids=["content", "id_and_content", "ids_of_other_types", "fields_that_are_not_read", "spellings"],
)
def test_equal_rows_are_dropped_and_counted(tmp_path: Path, rows: tuple[Any, ...]) -> None:
    (pair,), drops = read_pairs(write_rows(tmp_path / "a.jsonl", *rows))
    assert (pair.chosen, pair.rejected) == ("Red", "Dog")
    assert drops == Counter(duplicate=len(rows) - 1)


def test_rows_that_differ_only_in_what_is_read_are_both_kept(tmp_path: Path) -> None:
    rows = [STANDARD, STANDARD | {"chosen_score": 4, "rejected_score": 1}, STANDARD | {"id": "x"}]
    pairs, drops = read_pairs(write_rows(tmp_path / "a.jsonl", *rows))
    assert len({pair.id for pair in pairs}) == 3
    assert not drops


@pytest.mark.parametrize(
    "rows",
    [
        (STANDARD | {"id": "x"}, CONVERSATIONAL | {"id": "x"}),
        (STANDARD | {"id": 7}, STANDARD | {"id": "7", "chosen": "Blue"}),
    ],
)
def test_different_rows_of_one_id_are_refused_with_both_places(tmp_path: Path, rows: tuple[Any, Any]) -> None:
    source = write_rows(tmp_path / "a.jsonl", *rows)
    with pytest.raises(SelfalignError, match=r"a\.jsonl:2: has the id of .*a\.jsonl:1 \('\w'\), but other content"):
        read_pairs(source)


@pytest.mark.parametrize(("given", "read"), [(7, "7"), (0, "0"), (12.0, "12"), ("a b", "a b"), (2**70, str(2**70))])
def test_ids_of_any_type_become_texts(tmp_path: Path, given: Any, read: str) -> None:
    (pair,), _ = read_pairs(write_rows(tmp_path / "a.jsonl", STANDARD | {"id": given}))
    assert pair.id == read


@pytest.mark.parametrize("absent", [None, "", " ", float("nan")])
def test_id_that_says_nothing_is_none(tmp_path: Path, absent: Any) -> None:
    source = write_rows(tmp_path / "a.jsonl", STANDARD | {"id": absent})
    assert read_pairs(source) == read_pairs(write_rows(tmp_path / "b.jsonl", STANDARD))


@pytest.mark.parametrize("wrong", [3.5, True, ["a"], {"a": 1}])
def test_id_that_is_neither_text_nor_whole_number_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: id: expected a text or a whole number, got "):
        read_pairs(write_rows(tmp_path / "a.jsonl", STANDARD | {"id": wrong}))


NAN, INF = float("nan"), float("inf")


SCORE_NAMES = ["{}_score", "score_{}", "{}_rating", "rating_{}", "{}-rating"]


@pytest.mark.parametrize("names", [[name.format(side) for side in ("chosen", "rejected")] for name in SCORE_NAMES])
@pytest.mark.parametrize(
    ("chosen", "rejected", "kept", "drops"),
    [
        (4, 1, (4, 1), {}),
        (1.0, 4.0, None, {"scores_contradict": 1}),
        (4, 4.0, None, {"tie": 1}),
        (0, 0, None, {"tie": 1}),
        (-1, 0, None, {"scores_contradict": 1}),
        (None, 4, (None, 4), {}),
        (NAN, 2, (None, 2), {}),
        (2, NAN, (2, None), {}),
        (NAN, NAN, (None, None), {}),
        (INF, 2, (None, 2), {}),
    ],
)
def test_scores_decide_as_in_published_sets(
    tmp_path: Path, names: list[str], chosen: Any, rejected: Any, kept: Any, drops: dict[str, int]
) -> None:
    row = STANDARD | dict(zip(names, (chosen, rejected), strict=True))
    pairs, counted = read_pairs(write_rows(tmp_path / "a.jsonl", row))
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs] == ([] if kept is None else [kept])
    assert +counted == Counter(drops)


def test_two_scores_of_one_answer_are_refused_unless_they_are_equal(tmp_path: Path) -> None:
    row = STANDARD | {"chosen_score": 4, "rejected_score": 1}
    (same,), _ = read_pairs(write_rows(tmp_path / "a.jsonl", row | {"chosen_rating": 4.0}))
    assert same.chosen_score == 4
    with pytest.raises(SelfalignError, match=r"b\.jsonl:1: chosen_score and chosen_rating have different numbers"):
        read_pairs(write_rows(tmp_path / "b.jsonl", row | {"chosen_rating": 0.5}))


def test_reasons_against_a_pair_are_those_of_published_sets(tmp_path: Path) -> None:
    scores = {"chosen_score": 2, "rejected_score": 5}
    rows = [STANDARD | scores | more for more in ({"chosen": ""}, {"chosen": "Dog"}, {}, {"rejected_score": 2})]
    assert read_pairs(write_rows(tmp_path / "a.jsonl", *rows)) == ([], Counter(scores_contradict=3, tie=1))


def test_demonstrations_become_one_turn_prompts(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"id": "d", "instruction": "Hi", "response": "Hello", "category": "x"})
    (demonstration,), _ = read_demonstrations(source)
    assert demonstration.id == "d"
    assert demonstration.prompt == [{"role": "user", "content": "Hi"}]
    assert (demonstration.response, demonstration.source, demonstration.question) == ("Hello", "ift", "")


def test_instructions_keep_their_category(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "category": "x"}, {"id": "i", "instruction": "Ho"})
    (first, second), _ = read_instructions(source, "evaluation")
    assert (first.text, first.source, first.category) == ("Hi", "evaluation", "x")
    assert (second.id, second.text, second.category) == ("i", "Ho", "")


def answer(text: str, rank: float, **more: Any) -> dict[str, Any]:
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


def test_answer_that_stands_twice_is_ranked_once_as_in_published_sets(tmp_path: Path) -> None:
    twice = [answer("a", 1, score=5), answer("b", 2, score=3), answer("a", 3, score=1)]
    source = write_rows(
        tmp_path / "a.jsonl",
        {"id": "q", "instruction": "Hi", "responses": twice},
        {"id": "r", "instruction": "Ho", "responses": [answer("c", 1), answer("c", 2)]},
    )
    (question,), drops = read_ranked(source)
    assert (question.texts, question.ranks, question.scores) == (["a", "b"], [1, 2], [5, 3])
    assert question.justifications == ["", ""]
    assert drops == {"duplicate": 2, "only_answer": 1}


@pytest.mark.parametrize("ranks", [[1], [], [1, 1], [2, 1, 2]])
def test_questions_without_an_order_are_refused_with_file_and_line(tmp_path: Path, ranks: list[int]) -> None:
    answers = [answer(str(i), rank) for i, rank in enumerate(ranks)]
    source = write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "responses": answers})
    with pytest.raises(
        SelfalignError, match=r"a\.jsonl:1: expected two or more responses of different rank, got ranks"
    ):
        read_ranked(source)


@pytest.mark.parametrize(
    ("first", "second", "scores"), [(1.0, 2.0, (5.0, 3.0)), (1, 2, (4, 4)), (1, 2.0, (None, None))]
)
def test_ranks_and_scores_of_a_table_are_whole_numbers(
    tmp_path: Path, first: Any, second: Any, scores: tuple[Any, Any]
) -> None:
    """A column of whole numbers with gaps becomes one of floats."""
    answers = [answer("a", first, score=scores[0]), answer("b", second, score=scores[1])]
    (question,), _ = read_ranked(write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "responses": answers}))
    assert (question.ranks, question.scores) == ([1, 2], [s for s in scores if s is not None])
    assert all(type(number) is int for number in (*question.ranks, *question.scores))


@pytest.mark.parametrize(("rank", "score"), [(1.5, 4), (1, 3.5)])
def test_rank_between_two_is_refused(tmp_path: Path, rank: float, score: float) -> None:
    answers = [answer("a", rank, score=score), answer("b", 2, score=1)]
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: ranks and scores must be whole numbers, got ranks "):
        read_ranked(write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "responses": answers}))


def test_ranks_that_the_scores_contradict_are_dropped_and_counted(tmp_path: Path) -> None:
    wrong = [answer("a", 1, score=2), answer("b", 2, score=5), answer("c", 3, score=1)]
    right = [answer("a", 1, score=5), answer("b", 2, score=5), answer("c", 3, score=1)]
    rows = [{"instruction": "Hi", "responses": wrong}, {"instruction": "Ho", "responses": right}]
    source = write_rows(tmp_path / "a.jsonl", *rows)
    (question,), drops = read_ranked(source)
    assert (question.instruction, drops) == ("Ho", Counter(scores_contradict=3))
    (pair,), drops = read_pairs(source)
    assert (pair.chosen, pair.rejected, drops) == ("a", "c", Counter(scores_contradict=1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chosen_finished": False}, "chosen_finished is false: the answer was cut"),
        ({"rejected_thought": "Hm."}, "the field rejected_thought is filled"),
        ({"thought_prompt": "Think."}, "the field thought_prompt is filled"),
    ],
)
def test_pairs_of_a_run_are_read_unless_an_answer_was_cut_or_stands_apart_from_its_thought(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    """No given pair says so, so that a cut answer would be taught to end, and a thought left out."""
    own = PreferencePair(id="a", prompt=[USER], chosen="Red", rejected="Dog", chosen_ids=[1], rejected_ids=[2])
    write_records(tmp_path / "pairs.jsonl", [own])
    ((read,), _) = read_pairs(str(tmp_path / "pairs.jsonl"))
    assert read == replace(own, chosen_ids=[], rejected_ids=[])
    write_records(tmp_path / "pairs.jsonl", [own, replace(own, id="b", **more)])
    with pytest.raises(SelfalignError, match=rf"pairs\.jsonl:2: {message}"):
        read_pairs(str(tmp_path / "pairs.jsonl"))


def test_demonstration_of_a_run_is_not_read_without_its_thought(tmp_path: Path) -> None:
    one = Demonstration(id="a", prompt=[USER], response="Red", source="positive", thought="Hm.")
    write_records(tmp_path / "demonstrations.jsonl", [one])
    with pytest.raises(SelfalignError, match=r"jsonl:1: the field thought is filled .* with its thought before it"):
        read_demonstrations(str(tmp_path / "demonstrations.jsonl"))


def test_prompts_that_go_without_the_chat_template_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A column called prompt is what most own data have, and what a user says in most of them."""
    answers = {"chosen": "Red", "rejected": "Dog", "response": "Red"}
    plain, turn = {"prompt": "Hi", **answers}, {"instruction": "Ho", **answers}
    for read in (read_pairs, read_demonstrations):
        caplog.clear()
        read(write_rows(tmp_path / "turns.jsonl", turn))
        assert not caplog.messages
        read(write_rows(tmp_path / "mixed.jsonl", plain, turn))
        assert "mixed.jsonl: in 1 of 2 rows prompt is a text, which is fed as it stands" in caplog.text


def test_pairs_that_contradict_each_other_are_dropped_and_counted(tmp_path: Path) -> None:
    """Nobody can tell which of them is right; another prompt with the same answers says nothing against them."""
    asked = [{"role": "user", "content": "Hi"}]
    rows = [
        {"prompt": asked, "chosen": "yes", "rejected": "no"},
        {"prompt": asked, "chosen": "yes", "rejected": "maybe"},
        {"instruction": "Hi ", "chosen": " no", "rejected": "yes"},
        {"instruction": "Ho", "chosen": "no", "rejected": "yes"},
        {"instruction": "Hu", "chosen": "yes", "rejected": "yes "},
    ]
    pairs, drops = read_pairs(write_rows(tmp_path / "a.jsonl", *rows))
    assert [(as_text(pair.prompt), pair.chosen, pair.rejected) for pair in pairs] == [
        ("Hi", "yes", "maybe"), ("Ho", "no", "yes"), ("Hu", "yes", "yes "),
    ]  # fmt: skip
    assert drops == Counter(order_contradicts=2)


@pytest.mark.parametrize(("one", "other"), [("Café?", "Cafe\u0301?"), ("a\nb", "a\r\nb"), ("at 9\u00a0h", "at 9 h")])
def test_pairs_contradict_each_other_in_any_encoding_of_their_texts(tmp_path: Path, one: str, other: str) -> None:
    """As everywhere where texts are compared: two files made on two systems spell accents and line ends apart."""
    rows = [
        {"instruction": one, "chosen": f"no {one}", "rejected": "yes"},
        {"instruction": other, "chosen": "yes", "rejected": f"no {other}"},
    ]
    assert read_pairs(write_rows(tmp_path / "a.jsonl", *rows)) == ([], Counter(order_contradicts=2))


def test_published_pairs_that_contradict_each_other_are_dropped_and_counted(tmp_path: Path) -> None:
    said = [f"\n\nHuman: Hi\n\nAssistant: {answer}" for answer in ("yes", "no", "maybe")]
    sides = [(0, 1), (1, 0), (0, 2)]
    rows = [{"chosen": said[chosen], "rejected": said[rejected]} for chosen, rejected in sides]
    (pair,), drops = read_pairs(write_rows(tmp_path / "a.jsonl", *rows))
    assert (pair.chosen, pair.rejected, drops) == ("yes", "maybe", Counter(order_contradicts=2))


def test_ranked_questions_that_contradict_each_other_are_dropped_and_counted(tmp_path: Path) -> None:
    ranks = [("Hi", "abc"), ("Hi", "db"), ("Hi", "cbe"), ("Ho", "cba")]
    rows = [
        {"instruction": asked, "responses": [answer(text, rank) for rank, text in enumerate(order, start=1)]}
        for asked, order in ranks
    ]
    questions, drops = read_ranked(write_rows(tmp_path / "a.jsonl", *rows))
    assert [(question.instruction, question.texts) for question in questions] == [
        ("Hi", ["d", "b"]), ("Ho", ["c", "b", "a"]),
    ]  # fmt: skip
    assert drops == Counter(order_contradicts=6)


def test_best_and_worst_answer_that_are_the_same_are_no_pair(tmp_path: Path) -> None:
    answers = [answer("a", 1), answer("b", 2), answer("a", 3)]
    source = write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "responses": answers})
    assert read_pairs(source) == ([], Counter(identical=1))


@pytest.mark.parametrize("responses", [[None, answer("b", 2)], ["a", "b"], "a", [{"text": "a"}, answer("b", 2)]])
def test_answers_of_another_form_are_refused_with_their_place(tmp_path: Path, responses: Any) -> None:
    source = write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "responses": responses})
    with pytest.raises(SelfalignError, match=r"a\.jsonl:1: .*at `\$\.responses"):
        read_ranked(source)


def test_outputs_keep_what_alpaca_eval_keeps_and_their_place(tmp_path: Path) -> None:
    row = {"instruction": "Hi", "input": "there", "output": "Hello", "generator": "gpt", "dataset": "koala"}
    source = write_rows(tmp_path / "a.jsonl", row, {"instruction": "Ho", "output": "Hum", "generator": None}, row)
    (first, second), drops = read_outputs(source)
    assert (first.instruction, first.output, first.generator, first.dataset) == ("Hi\n\nthere", "Hello", "gpt", "koala")
    assert (second.generator, second.dataset, second.where) == ("given", "", f"{source}:2")
    assert drops == Counter(duplicate=1)


def test_empty_output_is_what_the_other_model_said(tmp_path: Path) -> None:
    (silent,), drops = read_outputs(write_rows(tmp_path / "a.jsonl", {"instruction": "Hi", "output": ""}))
    assert (silent.output, drops) == ("", Counter())


@pytest.mark.parametrize("name", ["ift", "evaluation"])
def test_shipped_instructions_are_read(name: str) -> None:
    instructions, drops = read_instructions(f"shipped:{name}", "given")
    assert not drops
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
        (lambda source: read_instructions(source, "s"), {"instruction": ""}),
        (read_ranked, {"instruction": "", "responses": [answer("a", 1), answer("b", 2)]}),
        (read_ranked, {"instruction": "Hi", "responses": [answer("a", 1), answer(" ", 2)]}),
    ],
    ids=["instruction", "bare_instruction", "ranked_instruction", "ranked_answer"],
)
def test_empty_texts_are_refused_with_file_and_line(tmp_path: Path, read: Any, row: dict[str, Any]) -> None:
    with pytest.raises(
        SelfalignError, match=r"a\.jsonl:1: (instruction: expected a text|responses: expected texts), got an empty one"
    ):
        read(write_rows(tmp_path / "a.jsonl", row))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "Hi"}\n{"instruction": "Ho"', r"a\.jsonl:2: not valid JSON: .*\(character 21\)"),
        (
            '{"instruction": "Hi"}\n{"instuction": "Ho"}',
            r"a\.jsonl:2: expected instruction .*found instuction \('Ho'\)",
        ),
        ('{"instruction": ["Hi"]}', r"a\.jsonl:1: instruction: expected a text, got a list of 1"),
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
    with pytest.raises(SelfalignError, match=r"a\.parquet row 1: expected .*; found prompt \('x'\), rejected \('y'\)"):
        read_pairs(source)


def test_empty_or_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    empty = write_parquet(tmp_path / "a.parquet", [STANDARD])
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(empty).slice(0, 0), empty)
    with pytest.raises(SelfalignError, match=r"a\.parquet(: cannot be read as a data set| has no rows)"):
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
def test_hub_id_offline_is_refused_with_what_to_check(source: str) -> None:
    for read in (read_pairs, lambda name: identify_data(name, "data.path")):
        with pytest.raises(
            SelfalignError, match=r"someone/some-data: revision main was not found on the hub .* check the name and the"
        ):
            read(source)


@pytest.mark.parametrize("source", ["ift", "/nowhere/data", "./nowhere", "a/b/c"])
def test_source_of_no_known_kind_is_refused_with_the_kinds(source: str) -> None:
    with pytest.raises(
        SelfalignError, match=r"is not a data source: give shipped:NAME, a \.jsonl or \.parquet file, or a hub id"
    ):
        read_instructions(source, "evaluation")


def test_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.json"):
        with pytest.raises(SelfalignError, match=rf"{name}: no such file"):
            read_pairs(str(tmp_path / name))
        with pytest.raises(SelfalignError, match=rf"data\.path: .*{name}: no such file"):
            identify_data(str(tmp_path / name), "data.path")


def test_data_is_identified_by_content_and_a_hub_data_set_by_its_commit(tmp_path: Path) -> None:
    first, same = write_rows(tmp_path / "a.jsonl", STANDARD), write_rows(tmp_path / "b.jsonl", STANDARD)
    other = write_rows(tmp_path / "c.jsonl", STANDARD | {"chosen": "Blue"})
    assert identify_data(first, "k") == identify_data(same, "k") != identify_data(other, "k")
    at = "someone/some-data@" + "c" * 40
    assert identify_data(f"{at}:test", "k") == f"{at}:test" != identify_data(at, "k") == f"{at}:train"
    assert identify_data("shipped:ift", "k") != identify_data("shipped:evaluation", "k")


def test_label_smoothing_of_a_given_pair_is_kept_and_stands_in_no_other_line(tmp_path: Path) -> None:
    rows = [STANDARD | {"id": "a"}, STANDARD | {"id": "b", "label_smoothing": 0.7}]
    pairs, _ = read_pairs(write_rows(tmp_path / "a.jsonl", *rows))
    write_records(tmp_path / "pairs.jsonl", pairs)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [line.get("label_smoothing") for line in lines] == [None, 0.7]
    assert "label_smoothing" not in lines[0]
    assert read_pairs(str(tmp_path / "pairs.jsonl"))[0] == pairs
    for wrong in (1.1, -0.1):
        row = STANDARD | {"label_smoothing": wrong}
        with pytest.raises(SelfalignError, match=rf"b.jsonl:1: label_smoothing must be from 0 to 1, got {wrong}"):
            read_pairs(write_rows(tmp_path / "b.jsonl", row))
    with pytest.raises(ValueError, match=r"pair c: label_smoothing must be from 0 to 1, got 1\.5"):
        PreferencePair(id="c", prompt="", chosen="a", rejected="b", label_smoothing=1.5)
