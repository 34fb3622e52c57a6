"""Batches are made once, kept through a kill, and shared among processes."""

import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import Killed
from mutation import Check, assert_caught
from team import Team

from selfalign.core import distributed
from selfalign.store import journal as journal_module
from selfalign.store.journal import WINDOW, Journal, Task


def tasks(log: list[tuple[int, int]], count: int, kill_at: int | None = None) -> Iterator[Task]:
    """Squares; the log has (process, number) of each that was worked out."""

    def work(number: int) -> list[int]:
        if number == kill_at:
            raise Killed
        log.append((distributed.rank(), number))
        return [number * number]

    return ((str(n), 1, partial(work, n)) for n in range(count))


def squares(folder: Path, given: Iterator[Task]) -> list[list[int]]:
    return list(Journal(folder, lambda size: None).batches(given))


@pytest.mark.parametrize("torn", [b'{"batch": "2", "resu', b'{"batch": "2", "result": [4]}', b"\0\0\0"])
def test_torn_end_is_dropped(tmp_path: Path, torn: bytes) -> None:
    log: list[tuple[int, int]] = []
    with pytest.raises(Killed):
        squares(tmp_path, tasks(log, 4, kill_at=2))
    with (tmp_path / "journal-0.jsonl").open("ab") as file:
        file.write(torn)
    assert squares(tmp_path, tasks(log, 4)) == [[0], [1], [4], [9]]
    assert [number for _, number in log] == [0, 1, 2, 3]


def test_torn_line_does_not_swallow_the_batch_written_behind_it(tmp_path: Path) -> None:
    """Killed, torn, continued, killed again: the line made after the torn one must be read back."""
    log: list[tuple[int, int]] = []
    with pytest.raises(Killed):
        squares(tmp_path, tasks(log, 4, kill_at=1))
    with (tmp_path / "journal-0.jsonl").open("a") as file:
        file.write('{"batch": "1", "res')
    with pytest.raises(Killed):
        squares(tmp_path, tasks(log, 4, kill_at=3))
    squares(tmp_path, tasks(log, 4))
    assert [number for _, number in log] == [0, 1, 2, 3]


def test_what_is_stored_comes_back_and_the_work_is_counted(tmp_path: Path) -> None:
    """A tuple becomes a list whether it was just made or read back, so both attempts see the same."""
    amounts: list[int] = []
    results: list[Any] = []
    for _ in range(2):
        results += Journal(tmp_path, amounts.append).batches([("a", 5, lambda: [("x\u2028", 1.5, None)])])
    assert results == [[["x\u2028", 1.5, None]]] * 2
    assert amounts == [5, 5]


def test_a_batch_that_fails_is_not_written(tmp_path: Path) -> None:
    def fail() -> None:
        raise Killed

    with pytest.raises(Killed):
        list(Journal(tmp_path, lambda size: None).batches([("a", 1, fail)]))
    assert list(Journal(tmp_path, lambda size: None).batches([("a", 1, lambda: 3)])) == [3]


def test_one_process_asks_for_a_batch_when_it_has_the_result_before(tmp_path: Path) -> None:
    """So that a batch may depend on the one before, and few lie in memory."""
    asked: list[int] = []

    def endless() -> Iterator[Task]:
        while True:
            asked.append(len(asked))
            yield str(asked[-1]), 1, lambda: asked[-1]

    results = Journal(tmp_path, lambda size: None).batches(endless())
    assert [next(results) for _ in range(3)] == asked == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 1, 5, 2 * WINDOW * 3 + 1])
def test_all_processes_have_all_results_and_each_batch_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    log: list[tuple[int, int]] = []
    results = Team(3, monkeypatch).run(lambda rank: squares(tmp_path, tasks(log, count)))
    assert results == [[[n * n] for n in range(count)]] * 3
    assert sorted(number for _, number in log) == list(range(count))
    if count > 1:
        shares = [sum(rank == one for rank, _ in log) for one in range(3)]
        assert max(shares) - min(shares) <= 1


def test_results_of_all_processes_outlive_a_kill_and_go_on_with_another_number_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 processes, one is killed; 2 go on, one is killed; 1 ends it: nothing is made twice, nothing is missing."""
    log: list[tuple[int, int]] = []
    total = 3 * WINDOW + 9
    for count, kill_at in ((3, total - 5), (2, total - 2)):
        with monkeypatch.context() as patch:
            results = Team(count, patch).run(lambda rank, at=kill_at: squares(tmp_path, tasks(log, total, kill_at=at)))
            assert all(isinstance(ended, Killed | threading.BrokenBarrierError) for ended in results)
        before = len(log)
        assert before < total
    assert squares(tmp_path, tasks(log, total)) == [[n * n] for n in range(total)]
    assert sorted(number for _, number in log) == list(range(total))


def test_processes_agree_what_is_there_before_one_of_them_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that came late and found the batch of a quick one would wait for other exchanges than the rest."""
    quick = threading.Event()

    def work(rank: int) -> list[Any]:
        if rank == 1:
            quick.wait(0.3)
        given = tasks([], 4)
        journal = Journal(tmp_path, lambda size: None)
        made = list(journal.batches(given))
        quick.set()
        return made

    assert Team(2, monkeypatch).run(work) == [[[0], [1], [4], [9]]] * 2


def test_what_one_process_keeps_all_can_read_after_the_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> Any:
        journal = Journal(tmp_path, lambda size: None)
        if rank == 0:
            journal.keep("a", ["said", rank])
        journal.share()
        return "a" in journal and journal.read("a")

    assert Team(2, monkeypatch).run(work) == [["said", 0]] * 2


SHARED = test_all_processes_have_all_results_and_each_batch_is_made_once
ALL, FEW = partial(SHARED, count=2 * WINDOW * 3 + 1), partial(SHARED, count=5)
OUTLIVE = test_results_of_all_processes_outlive_a_kill_and_go_on_with_another_number_of_them
LATE = test_processes_agree_what_is_there_before_one_of_them_writes
TORN = partial(test_torn_end_is_dropped, torn=b'{"batch": "2", "result": [4]}')
TORN_TWICE = test_torn_line_does_not_swallow_the_batch_written_behind_it
# (what, old text, new text, the test that notices)
MUTANTS: list[tuple[str, str, str, Check]] = [
    ("everybody makes everything", "missing[distributed.rank() :: many]", "missing", ALL),
    ("shares in blocks", "missing[distributed.rank() :: many]", "missing[distributed.rank() * WINDOW :][:WINDOW]", FEW),
    ("what has been made is not told", "                self.share()\n", "                pass\n", ALL),
    ("the others' files are not read", 'glob("journal-*.jsonl")', 'glob("journal-0.jsonl")', OUTLIVE),
    ("everybody sees for himself what is there", "distributed.on_main(lambda: read_all_places(folder))",
     "read_all_places(folder)", LATE),
    ("torn lines stay", "os.truncate(path, whole)", "", TORN_TWICE),
    ("a line without its end counts", ' if line.endswith(b"\\n") else None', "", TORN),
    ("batches are asked for ahead", "1 if many == 1 else WINDOW * many", "WINDOW * many",
     test_one_process_asks_for_a_batch_when_it_has_the_result_before),
]  # fmt: skip


@pytest.mark.parametrize(("what", "old", "new", "check"), MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_broken_journal_is_noticed(
    what: str, old: str, new: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_caught(
        journal_module, sys.modules[__name__], old, new, check, {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    )
