"""Mixtures of data sources: which records are taken, in which order, under which ids; and columns with other names."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from builders import composed

from selfalign.core.errors import SelfalignError
from selfalign.data.mixtures import DataSource, Mixture, Part, data_source, identify_source, parts_of
from selfalign.data.sources import read_demonstrations, read_instructions, read_pairs, read_ranked
from selfalign.store.key import to_key_json


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path: Path, letter: str, count: int, ids: bool = True) -> str:
    rows = [{"instruction": f"{letter}{n}", "response": "yes"} | ({"id": n} if ids else {}) for n in range(count)]
    return write(path, rows)


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return numbered(tmp_path / "a.jsonl", "a", 30), numbered(tmp_path / "b.jsonl", "b", 60)


def letters(source: DataSource) -> str:
    return "".join(demonstration.prompt[0]["content"][0] for demonstration in read_demonstrations(source)[0])  # type: ignore[index]


def taken(value: Any) -> tuple[int, int]:
    found = letters(data_source(value, "k"))
    return found.count("a"), found.count("b")


def test_parts_without_numbers_are_taken_whole(two: tuple[str, str]) -> None:
    assert taken(list(two)) == (30, 60)


def test_counts_are_exact(two: tuple[str, str]) -> None:
    a, b = two
    assert taken([{"source": a, "count": 7}, b]) == (7, 60)
    source = data_source([{"source": a, "count": 7}, {"source": b, "count": 3}], "k")
    assert +read_demonstrations(source)[1] == {"not_drawn": 80}


def test_weights_give_the_largest_mixture_without_a_repetition(two: tuple[str, str]) -> None:
    """30 of a at weight 2 allow 15 of b at weight 1; 60 of b at weight 3 allow 20 of a at weight 1."""
    a, b = two
    assert taken([{"source": a, "weight": 2}, {"source": b, "weight": 1}]) == (30, 15)
    assert taken([{"source": a, "weight": 1}, {"source": b, "weight": 3}]) == (20, 60)
    assert taken([{"source": a, "weight": 0.1}, {"source": b, "weight": 0.7}]) == (8, 60)


def test_mixture_is_shuffled_by_its_seed_alone(tmp_path: Path, two: tuple[str, str]) -> None:
    """Every stretch of it is a mixture, whatever the order of the parts and of their rows."""
    a, b = two

    def texts(*sources: str, seed: int = 0) -> list[Any]:
        parts = [{"source": source, "count": 20} for source in sources]
        return [d.prompt for d in read_demonstrations(data_source({"parts": parts, "seed": seed}, "k"))[0]]

    rows = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(rows)))
    assert texts(a, b) == texts(b, a) == texts(str(turned), b)
    other = texts(a, b, seed=1)
    assert other != texts(a, b)
    assert {str(text) for text in other} != {str(text) for text in texts(a, b)}
    first = letters(data_source([{"source": a, "count": 20}, {"source": b, "count": 20}], "k"))[:20]
    assert 4 <= first.count("a") <= 16


def test_ids_stay_unless_two_parts_share_one(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"id": 1, "instruction": "x", "response": "y"}])
    second = write(
        tmp_path / "b.jsonl",
        [{"id": 1, "instruction": "other", "response": "y"}, {"id": 2, "instruction": "third", "response": "y"}],
    )
    found, _ = read_demonstrations(data_source([first, second], "k"))
    ids = {d.prompt[0]["content"]: d.id for d in found}  # type: ignore[index]
    assert len(set(ids.values())) == 3
    assert ids["third"] == "2"
    assert len(ids["x"]) == len(ids["other"]) == 16


def test_record_of_two_parts_counts_once_and_contradictions_are_found_across_parts(tmp_path: Path) -> None:
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    one = write(tmp_path / "a.jsonl", [pair, pair | {"prompt": "R"}])
    other = write(tmp_path / "b.jsonl", [pair | {"id": "again"}, {"prompt": "R", "chosen": "b", "rejected": "a"}])
    pairs, drops = read_pairs(data_source([one, other], "k"))
    assert ([p.prompt for p in pairs], +drops) == (["Q"], {"duplicate": 1, "order_contradicts": 2})


def test_part_that_is_too_small_for_its_count_is_named(two: tuple[str, str]) -> None:
    with pytest.raises(SelfalignError, match=r"a\.jsonl: the mixture takes 31 of it, but it has 30 records"):
        read_demonstrations(data_source([{"source": two[0], "count": 31}, two[1]], "k"))


def test_every_reader_reads_mixtures_of_different_formats(tmp_path: Path) -> None:
    answers = [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]
    one = write(tmp_path / "a.jsonl", [{"instruction": "one", "responses": answers}])
    (tmp_path / "b.csv").write_text("question,responses\ntwo," + '"' + json.dumps(answers).replace('"', '""') + '"\n')
    source = data_source([one, str(tmp_path / "b.csv")], "k")
    assert {q.instruction for q in read_ranked(source)[0]} == {"one", "two"}
    assert {i.text for i in read_instructions(source, "evaluation")[0]} == {"one", "two"}
    assert {(p.chosen, p.rejected) for p in read_pairs(source)[0]} == {("a", "b")}


# --- columns -----------------------------------------------------------------------------------------------------


def test_columns_are_read_as_the_setting_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Frage,gut,schlecht,images,Note\nWarum?,Darum.,Nein.,x.png,4\n")
    columns = {"Frage": "instruction", "gut": "chosen", "schlecht": "rejected", "images": None, "Note": "chosen_score"}
    with caplog.at_level(logging.INFO):
        pairs, _ = read_pairs(data_source({"source": str(path), "columns": columns}, "k"))
    assert [(p.prompt, p.chosen, p.rejected, p.chosen_score) for p in pairs] == [
        ([{"role": "user", "content": "Warum?"}], "Darum.", "Nein.", 4.0)
    ]
    assert "read instruction as the user's turn, chosen as chosen, rejected as rejected" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"Frage": "instruktion"},
            r"k\.columns\.Frage: 'instruktion' is not a field .*; did you mean instruc",
        ),
        ({"a": "chosen", "b": "chosen"}, r"k\.columns: several columns are read as chosen"),
        ({"Frage": 3}, r"k: Expected `str \| null`, got `int` - at `\$\.columns\[\.\.\.\]`"),
    ],
)
def test_impossible_columns_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        data_source({"source": "a.csv", "columns": columns}, "k")


def test_column_that_is_missing_or_taken_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"question": "Why?", "instruction": "Why?", "response": "So."}])
    for columns, message in (
        ({"quesion": "instruction"}, r"a\.jsonl: no row has the column 'quesion', which columns names"),
        ({"question": "instruction"}, r"a\.jsonl:1: instruction is a column beside the one that is read as it"),
    ):
        with pytest.raises(SelfalignError, match=message):
            read_demonstrations(data_source({"source": source, "columns": columns}, "k"))
    columns = {"question": "instruction", "instruction": None}
    found, _ = read_demonstrations(data_source({"source": source, "columns": columns}, "k"))
    assert found[0].prompt == [{"role": "user", "content": "Why?"}]


# --- the setting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"k: expected a data source, or a list of them, got 3"),
        ([], r"k: the mixture has no part"),
        ([{"source": "a", "weight": 1}, "b"], r"k: give every part of the mixture a weight and none a count"),
        ([{"source": "a", "weight": 1, "count": 2}], r"k: give every part of the mixture a weight and none a count"),
        ([{"source": "a", "count": -1}], r"k: count and weight must be 0 or more, got -1 and 0"),
        ([{"source": "a"}, {"source": "b", "wieght": 1}], r"no k\[1\]\.wieght; did you mean k\[1\]\.weight\?"),
        ([{"count": 1}], r"k: Object missing required field `source`"),
        ({"parts": ["a"], "sed": 1}, r"no k\.sed; did you mean k\.seed\?"),
    ],
)
def test_impossible_mixture_is_refused_with_its_key(value: Any, message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        data_source(value, "k")


def test_missing_part_is_named_by_the_setting(tmp_path: Path) -> None:
    with pytest.raises(SelfalignError, match=r"data\.path: .*b\.jsonl: no such file"):
        identify_source(data_source([numbered(tmp_path / "a.jsonl", "a", 1), f"{tmp_path}/b.jsonl"], "k"), "data.path")


def test_overrides_and_yaml_give_mixtures_and_their_parts_are_in_the_key() -> None:
    listed, _, _ = composed(
        "data=pairs",
        "iterations=1",
        "data.path=[{source:a.jsonl,count:3},{source:owner/set@v1,columns:{q:instruction}}]",
    )
    first, second = Part(source="a.jsonl", count=3), Part(source="owner/set@v1", columns={"q": "instruction"})
    assert listed.data.path == Mixture(parts=(first, second))
    followed, _, _ = composed(
        "data=pairs", "iterations=1", "data.path={parts:[a.jsonl,b.jsonl],seed:${seed}}", "seed=5"
    )
    assert followed.data.path == Mixture(parts=(Part(source="a.jsonl"), Part(source="b.jsonl")), seed=5)
    keys = [
        to_key_json(data_source(value, "k"))
        for value in ("a", ["a"], ["a", "b"], [{"source": "a", "count": 1}, "b"], {"parts": ["a", "b"], "seed": 1})
    ]
    assert len({json.dumps(key) for key in keys}) == 5


def test_identity_is_that_of_every_part(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", "a", 1), numbered(tmp_path / "b.jsonl", "b", 1)
    source = data_source([a, b], "k")
    before = identify_source(source, "k")
    assert before == [identify_source(a, "k"), identify_source(b, "k")]
    assert parts_of(to_key_json(source), before) == [(a, before[0]), (b, before[1])]
    numbered(tmp_path / "b.jsonl", "c", 1)
    assert identify_source(source, "k")[0] == before[0]
    assert identify_source(source, "k")[1] != before[1]
