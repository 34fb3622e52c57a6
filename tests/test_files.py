"""Files whole or not at all, digests of their content, and messages that name the line."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfalign.core.errors import SelfalignError
from selfalign.core.files import (
    derive_seed,
    digest_file,
    digest_folder,
    digest_json,
    digest_text,
    path_of,
    read_json,
    read_lines,
    read_text,
    text_or_file,
    write_atomically,
    write_json,
)


def breaking() -> Iterator[bytes]:
    yield b"half"
    raise RuntimeError("the writer broke")


def test_writer_that_raises_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the writer broke"):
        write_atomically(tmp_path / "a.jsonl", breaking())
    assert list(tmp_path.iterdir()) == []


def test_writer_that_raises_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.jsonl", [b"old"])
    with pytest.raises(RuntimeError, match="the writer broke"):
        write_atomically(tmp_path / "a.jsonl", breaking())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.jsonl", b"old")]


def test_nobody_sees_a_file_before_it_is_whole(tmp_path: Path) -> None:
    seen = []

    def chunks() -> Iterator[bytes]:
        yield b"one "
        seen.append((tmp_path / "a").read_bytes())
        yield b"two"

    (tmp_path / "a").write_bytes(b"before")
    with (tmp_path / "a").open("rb") as reader:
        write_atomically(tmp_path / "a", chunks())
        assert reader.read() == b"before", "the old file was overwritten instead of replaced"
    assert seen == [b"before"]
    assert (tmp_path / "a").read_bytes() == b"one two"


def test_json_is_readable_and_comes_back(tmp_path: Path) -> None:
    value = {"λ": [1, 2.5, None, "ü\n"], "a": {"b": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert '"λ"' in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_that_is_not_a_number_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_lines_are_numbered_from_one_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\n\n \t\nü\u2028x\r\nlast".encode())
    assert [(number, line.rstrip("\r\n")) for number, line in read_lines(path)] == [
        (1, "a"),
        (4, "ü\u2028x"),
        (5, "last"),
    ]
    assert read_text(path) == "a\n\n \t\nü\u2028x\r\nlast"


def test_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\xe9t\xe9\n")
    with pytest.raises(SelfalignError, match=r"a\.txt:2: not UTF-8 \(.*\); save the file as UTF-8"):
        list(read_lines(path))
    with pytest.raises(SelfalignError, match=r"a\.txt:2: not UTF-8"):
        read_text(path)


def test_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffGrade.\n\ufeffx".encode())
    assert list(read_lines(tmp_path / "a.txt")) == [(1, "Grade.\n"), (2, "\ufeffx")]
    assert read_text(tmp_path / "a.txt") == "Grade.\n\ufeffx"
    assert text_or_file(f"file:{tmp_path / 'a.txt'}", "judge.prompt") == "Grade.\n\ufeffx"


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SelfalignError, match=r": no such file"):
        read_text(tmp_path / name)


def test_digests_are_sha256() -> None:
    # printf abc | sha256sum
    assert digest_text("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_digest_of_json_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    digests = [
        digest_json(value) for value in ({"a": [1, 2]}, {"a": [2, 1]}, {"a": [1.5, 2]}, {"a": "[1, 2]"}, {"b": [1, 2]})
    ]
    assert len(set(digests)) == len(digests)


def test_digest_of_a_file_follows_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert digest_file(path) == digest_text("abc")
    path.write_bytes(b"abcd")
    assert digest_file(path) == digest_text("abcd")


def test_digest_notices_a_change_that_size_and_time_do_not_show(tmp_path: Path) -> None:
    """Clocks tick: two writes within one tick leave the same modification time."""
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    state = path.stat()
    assert digest_file(path) == digest_text("abc")
    path.write_bytes(b"xyz")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest_file(path) == digest_text("xyz")


def test_digest_of_a_folder_names_every_file_but_those_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/c.txt", "sub/log.jsonl", "scratch/x/y", "log.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert digest_folder(tmp_path, without=("log.jsonl", "scratch")) == {
        name: digest_text(name) for name in ("b.txt", "sub/c.txt", "sub/log.jsonl")
    }
    assert list(digest_folder(tmp_path)) == sorted(digest_folder(tmp_path))


def test_seeds_differ_by_purpose_and_stay_the_same() -> None:
    seeds = [derive_seed(*parts) for parts in ((1, "a"), (1, "b"), (2, "a"), ("1a",), (1, "a", 0))]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "a") == seeds[0]
    # Written down, so that a change that would re-draw every published run is noticed.
    assert derive_seed(0, "order", 0) == int(digest_text(json.dumps(["0", "order", "0"]))[:16], 16) >> 1


def test_home_folder_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/data") == tmp_path / "data"
    assert path_of("data/~x") == Path("data/~x")
    with pytest.raises(SelfalignError, match=r"^~nobody-of-this-name/data: there is no such home folder$"):
        path_of("~nobody-of-this-name/data")
