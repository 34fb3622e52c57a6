"""Files that are walked through side by side."""

from pathlib import Path

import pytest
from builders import instruction, response

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import chunks, count_records, join_sorted, stream_records, write_records
from selfalign.core.records import Instruction

FILE = Path("responses.jsonl")


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (3, [3]), (7, [3, 3, 1])])
def test_chunks_hold_all_records_in_their_order(count: int, sizes: list[int]) -> None:
    made = list(chunks(iter(range(count)), 3))
    assert [len(chunk) for chunk in made] == sizes
    assert [number for chunk in made for number in chunk] == list(range(count))


def joined(leaders: str, followers: list[str]) -> list[tuple[str, list[str]]]:
    families = join_sorted(map(instruction, leaders), map(response, followers), lambda r: r.instruction_id, FILE)
    return [(leader.id, [follower.id for follower in own]) for leader, own in families]


def test_followers_come_with_their_leader_and_some_leaders_have_none() -> None:
    assert joined("abcd", ["a-1", "a-2", "c-1"]) == [("a", ["a-1", "a-2"]), ("b", []), ("c", ["c-1"]), ("d", [])]
    assert joined("a", []) == [("a", [])]


@pytest.mark.parametrize(
    "followers", [["b-1", "a-1"], ["a-1", "b-1", "a-2"], ["a-1", "z-1"]], ids=["turned", "apart", "unknown"]
)
def test_follower_that_no_leader_waits_for_is_refused(followers: list[str]) -> None:
    with pytest.raises(SelfalignError, match=r"responses\.jsonl: record for '[az]' is missing or out of order"):
        joined("abc", followers)


def test_record_is_there_before_the_next_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, [instruction("a"), instruction("b")])
    with path.open("a") as file:
        file.write("broken\n")
    records = stream_records(path, Instruction)
    assert [next(records).id, next(records).id] == ["a", "b"]
    with pytest.raises(SelfalignError, match=r"a\.jsonl:3"):
        next(records)
    assert count_records(path) == 3


def test_ids_that_only_share_a_hash_are_two_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, [instruction("a"), instruction("b")])
    monkeypatch.setattr("builtins.hash", lambda value: 1)
    assert [record.id for record in stream_records(path, Instruction)] == ["a", "b"]
