"""Where data lie: the same rows from every kind of file, folder and hub, and a message for what is not read."""

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT
from data_hub import COMMIT, OTHER_COMMIT, data_hub, parquet

from selfalign.core.errors import SelfalignError
from selfalign.core.records import PreferencePair
from selfalign.data.containers import identify_data, read_rows
from selfalign.data.sources import read_demonstrations, read_instructions, read_outputs, read_pairs, read_ranked

Rows = list[dict[str, Any]]
NAN = float("nan")


# --- containers --------------------------------------------------------------------------------------------------


def as_lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_jsonl(folder: Path, rows: Rows) -> str:
    path = folder / "a.jsonl"
    path.write_text(as_lines(rows))
    return str(path)


def write_marked(folder: Path, rows: Rows) -> str:
    """With a byte order mark, Windows line ends and blank lines, as editors there leave it."""
    path = folder / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + as_lines(rows).replace("\n", "\r\n\r\n").encode())
    return str(path)


def write_list(folder: Path, rows: Rows) -> str:
    path = folder / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode())
    return str(path)


def write_packed(folder: Path, rows: Rows) -> str:
    path = folder / "a.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines(rows).encode()))
    return str(path)


def write_parquet(folder: Path, rows: Rows) -> str:
    path = folder / "a.parquet"
    path.write_bytes(parquet(rows))
    return str(path)


def as_table(rows: Rows, delimiter: str) -> str:
    """As a spreadsheet: lists in the cells as JSON, nothing where a value is absent, commas and line breaks quoted."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    table = csv.writer(buffer, delimiter=delimiter)
    table.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        table.writerow(["" if c is None else json.dumps(c) if isinstance(c, list) else c for c in cells])
    return buffer.getvalue()


def write_csv(folder: Path, rows: Rows) -> str:
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbf" + as_table(rows, ",").encode())
    return str(folder / "a.csv")


def write_tsv(folder: Path, rows: Rows) -> str:
    (folder / "a.tsv.gz").write_bytes(gzip.compress(as_table(rows, "\t").encode()))
    return str(folder / "a.tsv.gz")


def write_stream(folder: Path, rows: Rows) -> str:
    """As the cache of `datasets` holds it."""
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return str(folder / "a.arrow")


def write_feather(folder: Path, rows: Rows) -> str:
    import pyarrow as pa
    import pyarrow.feather

    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(folder / "a.feather"))
    return str(folder / "a.feather")


def write_mixed(folder: Path, rows: Rows) -> str:
    """As `datasets` writes values of several types: packed as JSON texts."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


def save(folder: Path, rows: Rows) -> str:
    """Saved by `datasets`, in another order than it was made."""
    import datasets

    turned = datasets.Dataset.from_list(rows[::-1]).select(range(len(rows) - 1, -1, -1))
    turned.save_to_disk(folder / "saved")
    return str(folder / "saved")


def save_splits(folder: Path, rows: Rows) -> str:
    import datasets

    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"test": whole, "train": whole.select([0])}).save_to_disk(folder / "saved")
    return f"{folder / 'saved'}:test"


def write_folder(folder: Path, rows: Rows) -> str:
    """A folder with a file for each split."""
    (folder / "set").mkdir()
    write_jsonl(folder / "set", rows)
    (folder / "set/a.jsonl").rename(folder / "set/train.jsonl")
    (folder / "set/test.jsonl").write_text("never read")
    (folder / "set/README.md").write_text("# A set")
    return str(folder / "set")


def write_shards(folder: Path, rows: Rows) -> str:
    """A split in several files, as a hub lays them out."""
    (folder / "set/data").mkdir(parents=True)
    for number, part in enumerate((rows[:1], rows[1:])):
        (folder / f"set/data/test-0000{number}-of-00002-0a1b2c.parquet").write_bytes(parquet(part))
        (folder / f"set/data/test_other-0000{number}-of-00002.parquet").write_bytes(b"never read")
    return f"{folder / 'set'}:test"


CONTAINERS: dict[str, Callable[[Path, Rows], str]] = {
    "jsonl": write_jsonl, "bom_and_crlf": write_marked, "list": write_list, "gzip": write_packed,
    "parquet": write_parquet, "mixed_types": write_mixed, "saved": save, "saved_split": save_splits,
    "folder": write_folder, "shards": write_shards, "csv": write_csv, "tsv": write_tsv, "stream": write_stream,
    "feather": write_feather,
}  # fmt: skip

PAIR: dict[str, Any] = {"prompt": "Name a river.", "chosen": "The Nile.", "rejected": "A dog."}
ANSWERS = [{"text": "a", "rank": 1, "score": 5}, {"text": "b", "rank": 2, "score": 1}]
READERS: dict[str, tuple[Callable[[str], Any], Rows]] = {
    "pairs": (read_pairs, [PAIR, PAIR | {"rejected": "A hen."}]),
    "demonstrations": (
        read_demonstrations,
        [{"instruction": "Hi", "response": "Hello"}, {"instruction": "Ho", "response": "Hum"}],
    ),
    "instructions": (
        lambda source: read_instructions(source, "evaluation"),
        [{"instruction": "Hi", "category": "x"}, {"instruction": "Ho", "category": "y"}],
    ),
    "ranked": (
        read_ranked,
        [{"instruction": asked, "responses": ANSWERS} for asked in ("Hi", "Ho")],
    ),
    "outputs": (
        read_outputs,
        [{"instruction": asked, "output": "Well.", "dataset": "d"} for asked in ("Hi", "Ho")],
    ),
}  # fmt: skip


def told(read: tuple[list[Any], Counter[str]]) -> tuple[list[Any], dict[str, int]]:
    """What was read, without the places."""
    records, drops = read
    return [{n: v for n, v in as_fields(record).items() if n != "where"} for record in records], dict(+drops)


def as_fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_reader_gives_the_same_from_every_container(tmp_path: Path, container: str, kind: str) -> None:
    """With nulls for what is not there, numbers for ids, no numbers for scores, and a row that stands twice."""
    read, rows = READERS[kind]
    plain = [{"id": str(number), **row} for number, row in enumerate(rows, start=7)]
    gaps = {"chosen_score": NAN, "rejected_score": NAN, "source": "any", "score": None, "tools": None, "images": []}
    given = [{**row, **gaps, "id": int(row["id"])} for row in plain]
    given = [*given, given[0]]
    (tmp_path / "plain").mkdir()
    expected, _ = told(read(write_jsonl(tmp_path / "plain", plain)))
    assert told(read(CONTAINERS[container](tmp_path, given))) == (expected, {"duplicate": 1})
    assert len(expected) == 2


@pytest.mark.parametrize("container", CONTAINERS)
def test_message_names_the_file_and_the_row(tmp_path: Path, container: str) -> None:
    rows = [PAIR, PAIR | {"rejected": "A hen.", "images": ["a.png"]}]
    where = {
        "jsonl": r"a\.jsonl:2", "bom_and_crlf": r"a\.jsonl:3", "list": r"a\.json row 1", "gzip": r"a\.jsonl\.gz:2",
        "saved": r"saved row 1", "saved_split": r"saved/test row 1", "folder": r"set/train\.jsonl:2",
        "shards": r"set/data/test-00001-of-00002-0a1b2c\.parquet row 0", "csv": r"a\.csv:3", "tsv": r"a\.tsv\.gz:3",
        "stream": r"a\.arrow row 1", "feather": r"a\.feather row 1",
    }  # fmt: skip
    source = CONTAINERS[container](tmp_path, [{"images": None, **row} for row in rows])
    with pytest.raises(
        SelfalignError, match=rf"{where.get(container, r'a.parquet row 1')}: the field images is filled"
    ):
        read_pairs(source)


def test_turns_of_mixed_types_are_unpacked(tmp_path: Path) -> None:
    """`datasets` keeps a content that is now a text, now a list of parts, as JSON texts."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    (taught,), _ = read_demonstrations(write_mixed(tmp_path, [{"messages": turns}]))
    assert (taught.prompt, taught.response) == ([{"role": "user", "content": "Hi"}], "Hello")


def test_single_object_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(PAIR, indent=2))
    assert list(read_rows(str(tmp_path / "a.json"))) == [(f"{tmp_path}/a.json:1", PAIR)]


def test_rows_of_any_length_are_read(tmp_path: Path) -> None:
    long = PAIR | {"chosen": "so it went " * 500_000}
    (pair,), _ = read_pairs(write_jsonl(tmp_path, [long]))
    assert pair.chosen == long["chosen"]


def test_pictures_of_a_table_are_refused_and_not_unpacked(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({**dict.fromkeys(PAIR, datasets.Value("string")), "image": datasets.Image()})
    rows = [{**PAIR, "image": {"bytes": b"no picture at all", "path": None}}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(SelfalignError, match=r"saved row 0: the field image is filled \(an object\)"):
        read_pairs(str(tmp_path / "saved"))


# --- what is not read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 1,}\n', r"a\.jsonl:2: not valid JSON: .* \(character [89]\)"),
        ('{"a": 1} {"a": 2}\n', r"a\.jsonl:1: not valid JSON: Extra data \(character 10\)"),
        ('{"a": 1}\n{"a": 1, "a": 2}\n', r"a\.jsonl:2: .*the field 'a' occurs twice in a row"),
        ('{"a": {"b": 1, "b": 1}}\n', r"a\.jsonl:1: .*the field 'b' occurs twice in a row"),
        ('{"a": "\\ud83d"}\n', r"a\.jsonl:1: not valid JSON: a \\ud… escape is half of a character"),
        ('{"a": 1}\n"a text"\n', r"a\.jsonl:2: a row must be an object with named fields, got str"),
        ("[1]", r"a\.jsonl row 0: a row must be an object with named fields, got int"),
        ('[{"a": 1},\n {"a": }]', r"a\.jsonl: not valid JSON: Expecting value \(line 2, character 8\)"),
        ("[" * 100_000, r"a\.jsonl: not valid JSON: maximum recursion depth"),
        ("[]", r"a\.jsonl has no rows"),
        (" \n\n", r"a\.jsonl: the file is empty; expected one JSON object a line, or a list of them"),
    ],
    ids=["trailing_comma", "two_rows_a_line", "key_twice", "inner_key_twice", "half_a_character", "text", "number",
         "broken_list", "deep", "empty_list", "blank"],
)  # fmt: skip
def test_broken_json_is_named_by_line_and_character(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SelfalignError, match=message):
        list(read_rows(str(tmp_path / "a.jsonl")))


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert [row for _, row in read_rows(str(tmp_path / "a.jsonl"))] == [{"a": "😀"}]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.gz", "a.xlsx", "a.csv.zip"])
def test_kinds_of_files_that_are_not_read_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompt,chosen,rejected\n")
    with pytest.raises(SelfalignError, match=rf"{name}: \.\w+ files cannot be read; save it as \.jsonl or \.parquet"):
        read_pairs(str(tmp_path / name))
    with pytest.raises(SelfalignError, match=rf"data\.path: .*{name}: \.\w+ files cannot be read"):
        identify_data(str(tmp_path / name), "data.path")


def test_file_that_is_not_packed_as_its_name_says_is_named(tmp_path: Path) -> None:
    for content in (b'{"a": 1}\n', gzip.compress(b'{"a": 1}\n' * 1000)[:-20]):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(SelfalignError, match=r"a\.jsonl\.gz: cannot be unpacked as gzip"):
            list(read_rows(str(tmp_path / "a.jsonl.gz")))


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ([], "", r"none of its files could be the split 'train'. .* \(the folder holds nothing\)"),
        (["a.jsonl", "b.jsonl"], "", r"Name one file, or .*:SPLIT \(the folder holds a\.jsonl, b\.jsonl\)"),
        (["train.jsonl", "train.parquet"], "", r"files of several kinds could be the split 'train'"),
        (["train.jsonl", "data/train.jsonl"], "", r"files of several kinds could be the split 'train'"),
        (["train.jsonl"], ":test", r"none of its files could be the split 'test'. .*\(the folder holds train\.jsonl\)"),
        (["train_prefs.jsonl", "x.txt"], ":train", r"none of its files could be the split 'train'"),
    ],
    ids=["empty", "several", "two_kinds", "two_places", "other_split", "longer_name"],
)
def test_folder_without_the_split_says_what_it_holds(
    tmp_path: Path, files: list[str], split: str, message: str
) -> None:
    for name in files:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(as_lines([PAIR]))
    (tmp_path / "set").mkdir(exist_ok=True)
    with pytest.raises(SelfalignError, match=rf"^data\.path: .*set: .*{message}"):
        identify_data(f"{tmp_path / 'set'}{split}", "data.path")
    with pytest.raises(SelfalignError, match=message):
        read_pairs(f"{tmp_path / 'set'}{split}")


@pytest.mark.parametrize("there", [(0, 2), (1, 2), (2,)])
def test_part_that_is_missing_is_named(tmp_path: Path, there: tuple[int, ...]) -> None:
    """A download that was broken off must not be read as the whole."""
    for number in there:
        (tmp_path / f"train-0000{number}-of-00003.jsonl").write_text('{"instruction": "A", "response": "B"}\n')
    first = min({0, 1, 2} - set(there))
    message = f"{tmp_path}: {3 - len(there)} of 3 parts are missing, the first is number {first}"
    with pytest.raises(SelfalignError, match=re.escape(message)):
        read_demonstrations(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
        ["train-00000-of-00001-0a", "train-00000-of-00001-0b"],
        ["train-00000-of-00001", "train"],
        ["train-1000", "train"],
    ],
)
def test_split_that_was_written_twice_is_not_read_as_one(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": name, "response": "a"}))
    with pytest.raises(SelfalignError, match=rf"parts of several data sets \(.*{names[0]}.jsonl, {names[1]}.jsonl"):
        identify_data(str(tmp_path), "data.path")


def test_table_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array([text]) for text in ("Why?", "So.", "Not so.")]
    table = pyarrow.Table.from_arrays(columns, names=["instruction", "response", "response"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(SelfalignError, match=r"twice.parquet: the column 'response' stands twice"):
        read_demonstrations(str(tmp_path / "twice.parquet"))


def test_value_of_a_table_that_no_text_or_date_is_refused_with_its_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    latin = pa.Array.from_buffers(pa.utf8(), 1, pa.array([b"Caf\xe9."], pa.binary()).buffers())
    late = pa.array([2**60], pa.timestamp("us"))
    asked = {"instruction": ["Name a place."], "response": ["Rome."]}
    for columns in ({**asked, "response": latin}, {**asked, "written_at": late}):
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(SelfalignError, match=r"a\.parquet: cannot be read as a data set"):
            read_demonstrations(str(tmp_path / "a.parquet"))


def test_only_data_file_of_a_folder_is_taken_whatever_its_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [PAIR])
    (tmp_path / "README.md").write_text("# A set")
    assert read_pairs(str(tmp_path)) == read_pairs(str(tmp_path / "a.jsonl"))


def test_saved_set_says_which_splits_it_has(tmp_path: Path) -> None:
    source = save_splits(tmp_path, [PAIR, PAIR | {"chosen": "Rhine"}])
    folder = source.removesuffix(":test")
    assert len(read_pairs(folder)[0]) == 1, "train, where nothing is said"
    with pytest.raises(SelfalignError, match=r"saved has no split 'dev': set .*:SPLIT to one of \['test', 'train'"):
        read_pairs(f"{folder}:dev")
    with pytest.raises(SelfalignError, match=r"saved/test is one saved data set, without splits: remove :dev"):
        read_pairs(f"{folder}/test:dev")


def test_damaged_saved_set_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path, [PAIR])
    for file in Path(source).glob("*.arrow"):
        file.unlink()
    with pytest.raises(SelfalignError, match=r"saved: cannot be read as a data set"):
        read_pairs(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,rejected\na,b\n", r"a\.csv:2: 2 cells, but the first line names 3 columns"),
        ('prompt,chosen,rejected\na,b,c\n"x\ny",b,c,d\n', r"a\.csv:3: 4 cells, but"),
        (
            "prompt,chosen,rejected\na,b,c\nprompt,chosen,rejected\n",
            r"a\.csv:3: the line with the columns' names stands twice",
        ),
        ("prompt,chosen,chosen\na,b,c\n", r"a\.csv: the column 'chosen' stands twice"),
        ('prompt,chosen,rejected\na,"b" b,c\n', r"a\.csv:2: not valid CSV"),
        ("prompt;chosen;rejected\na;b;c\n", r"a\.csv:2: expected prompt, chosen and rejected .* found prompt;chosen;r"),
        ("prompt,chosen,rejected\n", r"a\.csv has no rows"),
        ("prompt,chosen,rejected,chosen_score\na,b,c,good\n", r"a\.csv:2: chosen_score: expected a number, got 'good'"),
    ],
    ids=["short", "long", "names_again", "twice", "quotes", "semicolons", "no_row", "score"],
)
def test_broken_table_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(SelfalignError, match=message):
        read_pairs(str(tmp_path / "a.csv"))


def test_cells_of_a_table_are_what_they_are_in_json(tmp_path: Path) -> None:
    """Texts stay texts, numbers or not; scores are numbers; turns are a list, spelled by JSON or by Python."""
    turns = [{"role": "user", "content": 'He said "a,\nb".'}]
    rows = [
        {"id": "007", "prompt": json.dumps(turns), "chosen": "4", "rejected": "null", "chosen_score": "4.5"},
        {"id": "8", "prompt": str(turns), "chosen": '[{"a": 1}]', "rejected": "{}", "chosen_score": "3"},
        {"id": "9", "prompt": "1e3", "chosen": " yes", "rejected": "[1]", "chosen_score": "nan"},
    ]
    (tmp_path / "a.csv").write_bytes(as_table([{**row, "rejected_score": "1"} for row in rows], ",").encode())
    pairs, _ = read_pairs(str(tmp_path / "a.csv"))
    assert [(p.id, p.prompt, p.chosen, p.rejected, p.chosen_score, p.rejected_score) for p in pairs] == [
        ("007", turns, "4", "null", 4.5, 1.0), ("8", turns, '[{"a": 1}]', "{}", 3.0, 1.0),
        ("9", "1e3", " yes", "[1]", None, 1.0),
    ]  # fmt: skip


# --- identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["saved", "saved_split", "folder", "shards"])
def test_folder_is_identified_by_what_is_read_of_it(tmp_path: Path, container: str) -> None:
    digests = []
    for name, rows in (("a", [PAIR, PAIR]), ("b", [PAIR, PAIR]), ("c", [PAIR, PAIR | {"chosen": "Rhine"}])):
        (tmp_path / name).mkdir()
        digests.append(identify_data(CONTAINERS[container](tmp_path / name, rows), "k"))
    if container.startswith("saved"):  # What `datasets` writes beside the rows is different every time.
        assert digests[0] != digests[2]
    else:
        assert digests[0] == digests[1] != digests[2]


def test_other_splits_do_not_change_a_folder_s_identity(tmp_path: Path) -> None:
    source = write_folder(tmp_path, [PAIR])
    before = identify_data(source, "k")
    (tmp_path / "set/test.jsonl").write_text("changed")
    assert identify_data(source, "k") == before == identify_data(f"{source}:train", "k")


# --- the hub -----------------------------------------------------------------------------------------------------

README = b"""---
configs:
- config_name: one
  data_files:
  - {split: train, path: one/train-*}
  - {split: test, path: one/test-*}
- config_name: two
  data_files:
  - {split: train, path: two/train-*}
---
"""
READ_ALL = """
import json, sys
from selfalign.data.sources import read_pairs
from selfalign.data.mixtures import identify_source
from selfalign.core.errors import SelfalignError
for source in sys.argv[1:]:
    try:
        identity = identify_source(source, "data.path")
        pairs, drops = read_pairs(source)
        print(json.dumps([identity] + [[pair.id, pair.prompt] for pair in pairs] + [dict(+drops)]))
    except SelfalignError as error:
        print(json.dumps(str(error)))
"""


def test_config_and_split_of_a_hub_set_are_read_like_any_file(tmp_path: Path) -> None:
    def part(*prompts: str) -> bytes:
        return parquet([PAIR | {"id": 3, "prompt": p, "tools": None, "chosen_score": NAN} for p in prompts])

    files = {
        "README.md": README, "one/train-00000-of-00001.parquet": part("1"),
        "one/test-00000-of-00001.parquet": part("t", "t"), "two/train-00000-of-00001.parquet": part("2"),
    }  # fmt: skip
    sources = [
        "owner/set:one:train", "owner/set:one:test", "owner/set:two:train", "owner/set", "owner/set:one:dev",
        "owner/set@v1:two:train", "owner/set@nowhere:one:train",
    ]  # fmt: skip
    with data_hub("owner/set", files) as address:
        given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        given |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", READ_ALL, *sources]
        done = subprocess.run(command, cwd=ROOT, env=given, check=True, capture_output=True, text=True)
        offline = subprocess.run(
            [*command[:3], sources[0], "owner/set@v1:one:train"], cwd=ROOT, env={**given, "HF_HUB_OFFLINE": "1"},
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    first, second, third, without, wrong, tagged, gone = map(json.loads, done.stdout.splitlines())
    at = f"owner/set@{COMMIT}"
    assert first == [f"{at}:one:train", ["3", "1"], {}]
    assert second == [f"{at}:one:test", ["3", "t"], {"duplicate": 1}]
    assert third == [f"{at}:two:train", ["3", "2"], {}]
    assert tagged == [f"owner/set@{OTHER_COMMIT}:two:train", ["3", "2"], {}]
    assert gone.startswith("data.path: owner/set: revision nowhere was not found on the hub")
    again, other = map(json.loads, offline.stdout.splitlines())
    assert again == first
    assert f"the cache holds commit {COMMIT} instead of {OTHER_COMMIT}" in other
    assert "owner/set: cannot be read as a data set (Config name is missing" in without
    assert "'one', 'two'" in without
    assert "owner/name:config:split" in without
    assert 'Unknown split "dev"' in wrong
    assert "['train', 'test']" in wrong


@pytest.mark.parametrize("source", ["owner/set:a:b:c", "owner/set:", "owner/set::train", "../set"])
def test_name_that_is_no_hub_id_is_refused_with_the_kinds(source: str) -> None:
    with pytest.raises(SelfalignError, match=r"is not a data source: give shipped:NAME, .* hub id owner/name"):
        identify_data(source, "data.path")


def test_row_of_a_table_without_a_value_is_a_row_without_the_field(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, [PAIR | {"id": None}, PAIR | {"id": 3, "chosen": "Rhine"}])
    pairs, _ = read_pairs(source)
    assert [type(pair) for pair in pairs] == [PreferencePair] * 2
    assert (len(pairs[0].id), pairs[1].id) == (16, "3")
