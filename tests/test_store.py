"""The store: made once, found again, continued after a kill, never half there."""

import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import file_limit

from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_folder, read_json
from selfalign.core.records import FinishReason
from selfalign.store.artifacts import Artifact, StageOutput, Store, locked
from selfalign.store.key import FORMAT, key_of, to_key_json
from selfalign.store.source_code import SOURCE, source_code


class Killed(Exception):
    """Stands for a kill."""


@dataclass
class Settings:
    rate: float = 0.1
    name: str = "a"
    speed: int = field(default=1, metadata={"keyed": False})


@dataclass
class Others:
    rate: float = 0.1
    name: str = "a"


def writing(text: str, calls: list[str] | None = None) -> Callable[[StageOutput], dict[str, Any]]:
    """A stage that writes one file."""

    def build(out: StageOutput) -> dict[str, Any]:
        if calls is not None:
            calls.append(text)
        (out.path / "result.txt").write_text(text)
        return {"written": len(text)}

    return build


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_artifact_is_made_once_and_found_again(store: Store) -> None:
    calls: list[str] = []
    made = store.make("stage", {"x": 1}, writing("one", calls))
    again = store.make("stage", {"x": 1}, writing("two", calls))
    assert calls == ["one"]
    assert again == made == store.find("stage", {"x": 1}) == Store(store.root).find("stage", {"x": 1})
    assert (made.stage, made.counts, made.path.name) == ("stage", {"written": 3}, made.key)
    assert (made.path / "result.txt").read_text() == "one"
    assert store.find("stage", {"x": 2}) is None
    assert store.find("other", {"x": 1}) is None


def artifact(digest: str, **options: Any) -> Artifact:
    return Artifact(
        **{"stage": "s", "key": "k", "path": Path("/p"), "digest": digest, "counts": {}, "seconds": 1.0, **options}
    )


BASE: dict[str, Any] = {
    "artifact": artifact("aaa"),
    "settings": Settings(),
    "list": [1, 2],
    "reason": FinishReason.EOS,
    "seed": 1,
    "nothing": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"artifact": artifact("bbb")},
        {"artifact": artifact("aaa", stage="other")},
        {"artifact": None},
        {"settings": Settings(rate=0.2)},
        {"settings": Settings(name="b")},
        {"settings": Others()},
        {"list": [2, 1]},
        {"list": [1, 2, 3]},
        {"reason": FinishReason.LENGTH},
        {"seed": 2},
        {"seed": 1.5},
        {"seed": "1"},
        {"seed": True},
        {"nothing": 0},
        {"more": 1},
    ],
    ids=repr,
)
def test_key_changes_with_each_input(change: dict[str, Any]) -> None:
    assert key_of("stage", BASE | change) != key_of("stage", BASE)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": Settings(speed=9)},
        {"artifact": artifact("aaa", path=Path("/elsewhere"), seconds=7.0, key="other", counts={"n": 1})},
        {"list": (1, 2)},
    ],
    ids=repr,
)
def test_key_stays_with_what_does_not_change_the_result(change: dict[str, Any]) -> None:
    assert key_of("stage", BASE | change) == key_of("stage", BASE)
    assert key_of("stage", dict(reversed(BASE.items()))) == key_of("stage", BASE)


def test_key_depends_on_the_stage_and_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("stage", BASE)
    assert key_of("other", BASE) != before
    monkeypatch.setattr("selfalign.store.key.FORMAT", FORMAT + 1)
    assert key_of("stage", BASE) != before


def test_nested_settings_are_canonical_json() -> None:
    value = to_key_json({"a": [Settings(), {"b": artifact("x")}], 3: FinishReason.EOS})
    assert value == {
        "a": [
            {"class": "Settings", SOURCE: source_code(Settings), "rate": 0.1, "name": "a"},
            {"b": {"artifact": "s", "digest": "x"}},
        ],
        "3": "eos",
    }
    assert json.loads(json.dumps(value)) == value


@pytest.mark.parametrize(
    "value", [object(), Path("/x"), {1, 2}, b"x", Settings, lambda: 1], ids=lambda value: type(value).__name__
)
def test_inputs_that_are_not_plain_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be part of an artifact's key"):
        key_of("stage", {"x": value})


def test_enums_count_as_their_values() -> None:
    class Colour(Enum):
        RED = "red"

    assert key_of("stage", {"x": Colour.RED}) == key_of("stage", {"x": "red"})


def batches(log: list[int], kill_at: int | None = None) -> Callable[[StageOutput], dict[str, Any]]:
    """A stage of four journalled batches that is killed in one of them."""

    def build(out: StageOutput) -> dict[str, Any]:
        def work(number: int) -> list[int]:
            if number == kill_at:
                raise Killed
            log.append(number)
            return [number * number]

        with out.journal(4, "things") as journal:
            results = list(journal.batches((str(n), 1, partial(work, n)) for n in range(4)))
        (out.path / "result.json").write_text(json.dumps(results))
        return {"batches": len(results)}

    return build


def test_killed_stage_goes_on_and_does_not_repeat_finished_batches(store: Store) -> None:
    log: list[int] = []
    with pytest.raises(Killed):
        store.make("stage", {"x": 1}, batches(log, kill_at=2))
    assert store.find("stage", {"x": 1}) is None
    made = store.make("stage", {"x": 1}, batches(log))
    assert log == [0, 1, 2, 3]
    assert json.loads((made.path / "result.json").read_text()) == [[0], [1], [4], [9]]
    whole = Store(store.root.parent / "whole").make("stage", {"x": 1}, batches([]))
    assert whole.digest == made.digest
    assert whole.counts == made.counts


def test_scratch_is_gone_when_the_stage_is_done_and_was_there_before(store: Store) -> None:
    def build(out: StageOutput) -> dict[str, Any]:
        assert out.scratch.is_dir()
        (out.scratch / "checkpoint").write_text("large")
        return {}

    made = store.make("stage", {}, build)
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json"]


def test_scratch_that_a_kill_left_behind_the_manifest_is_removed_later(store: Store) -> None:
    made = store.make("stage", {}, writing("x"))
    (made.path / "scratch").mkdir()
    (made.path / "scratch" / "old").write_text("x")
    assert store.make("stage", {}, writing("y")) == made
    assert not (made.path / "scratch").exists()


def test_digest_depends_on_the_files_and_not_on_log_scratch_key_or_counts(store: Store) -> None:
    def logging(seconds: float) -> Callable[[StageOutput], dict[str, Any]]:
        def build(out: StageOutput) -> dict[str, Any]:
            out.log({"step": 1, "seconds": seconds})
            (out.scratch / "x").write_text(str(seconds))
            (out.path / "result.txt").write_text("same")
            return {"seconds": seconds}

        return build

    first, second = (store.make("stage", {"n": n}, logging(n)) for n in (1.0, 2.0))
    assert first.digest == second.digest
    assert first.key != second.key
    assert store.make("stage", {"n": 3}, writing("other")).digest != first.digest


def test_file_that_a_kill_left_half_written_is_no_part_of_the_artifact(store: Store) -> None:
    """An atomic write that was killed leaves its temporary file; its name has the process's number in it."""

    def killed(out: StageOutput) -> dict[str, Any]:
        (out.path / ".result.txt.4711.tmp").write_text("ha")
        raise Killed

    with pytest.raises(Killed):
        store.make("stage", {}, killed)
    made = store.make("stage", {}, writing("whole"))
    assert made.digest == Store(store.root.parent / "other").make("stage", {}, writing("whole")).digest
    assert list(digest_folder(made.path, without=("manifest.json",))) == ["result.txt"]


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_damaged_artifact_is_refused_with_what_to_delete(store: Store, damage: str) -> None:
    made = store.make("stage", {"x": 1}, writing("content"))
    path = made.path / "result.txt"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("cont" if damage == "shorter" else "content and more")
    for attempt in (store.find, lambda *a: store.make(*a, writing("content"))):
        with pytest.raises(SelfalignError, match=rf"result\.txt: missing or not .* delete {made.path} to have it made"):
            attempt("stage", {"x": 1})


@pytest.mark.parametrize("content", ["", '{"stage": "st', "[]", "{}", '{"stage": "stage", "files": {"a": 1}}'])
def test_damaged_manifest_is_refused_with_what_to_delete(store: Store, content: str) -> None:
    made = store.make("stage", {"x": 1}, writing("content"))
    (made.path / "manifest.json").write_text(content)
    for attempt in (store.find, lambda *a: store.make(*a, writing("content"))):
        with pytest.raises(SelfalignError, match=rf"manifest\.json: damaged; delete {made.path} to have it made again"):
            attempt("stage", {"x": 1})


def test_artifact_that_is_removed_while_it_is_read_is_not_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store.make("stage", {"x": 1}, writing("content"))

    def removed_behind(path: Path) -> Any:
        content = read_json(path)
        path.unlink()
        (path.parent / "result.txt").unlink()
        return content

    with monkeypatch.context() as patch:
        patch.setattr("selfalign.store.artifacts.read_json", removed_behind)
        assert store.find("stage", {"x": 1}) is None
    assert store.make("stage", {"x": 1}, writing("content")).digest == made.digest


def test_stage_that_fails_leaves_no_manifest_and_frees_the_lock(store: Store) -> None:
    def build(out: StageOutput) -> dict[str, Any]:
        (out.path / "result.txt").write_text("half")
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            store.make("stage", {}, build)
    assert store.find("stage", {}) is None
    assert (store.make("stage", {}, writing("whole")).path / "result.txt").read_text() == "whole"


def test_manifest_says_what_was_made_from_what(store: Store) -> None:
    made = store.make("stage", BASE, writing("x"))
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["stage"] == "stage"
    assert manifest["inputs"] == to_key_json(BASE)
    assert manifest["files"]["result.txt"][1] == 1
    assert manifest["counts"] == {"written": 1}
    assert manifest["digest"] == made.digest


def test_counts_that_are_no_json_numbers_do_not_make_an_artifact(store: Store) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.make("stage", {}, lambda out: {"mean": float("nan")})
    assert store.find("stage", {}) is None


def test_rows_are_passed_on_at_once_and_kept(store: Store) -> None:
    heard: list[dict[str, Any]] = []

    def build(out: StageOutput) -> dict[str, Any]:
        out.log({"step": 1, "λ": "ü"})
        assert heard == [{"step": 1, "λ": "ü"}]
        out.log({"step": 2})
        return {}

    made = store.make("stage", {}, build, on_row=heard.append)
    assert made.rows() == heard == [{"step": 1, "λ": "ü"}, {"step": 2}]
    assert store.make("stage", {"no": "rows"}, writing("x")).rows() == []


def test_rewound_log_keeps_the_rows_before_and_drops_a_torn_line(tmp_path: Path) -> None:
    first = StageOutput(tmp_path, "label", lambda row: None)
    for step in (1, 2, 3):
        first.log({"step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    heard: list[dict[str, Any]] = []
    second = StageOutput(tmp_path, "label", heard.append)
    second.rewind_log(lambda row: row["step"] <= 2)
    assert heard == [{"step": 1}, {"step": 2}]
    second.log({"step": 3})
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3},
    ]


def test_log_that_cannot_be_rewound_keeps_its_rows(tmp_path: Path) -> None:
    """Rows that were lost here would be missing from the curves, and nobody would be told."""
    first = StageOutput(tmp_path, "label", lambda row: None)
    for step in range(1, 41):
        first.log({"step": step})
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(OSError, match="File too large"), file_limit(100):
        StageOutput(tmp_path, "label", lambda row: None).rewind_log(lambda row: row["step"] <= 30)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def _make_in_another_process(root: str, barrier: Any, results: Any) -> None:
    def build(out: StageOutput) -> dict[str, Any]:
        with (Path(root).parent / "builds").open("a") as file:
            file.write("x")
        time.sleep(0.8)
        (out.path / "result.txt").write_text("made")
        return {}

    barrier.wait(timeout=60)
    results.put(Store(Path(root)).make("stage", {"x": 1}, build).digest)


def test_two_processes_that_need_an_artifact_at_once_build_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_make_in_another_process, args=(str(tmp_path / "store"), barrier, results))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    digests = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert digests[0] == digests[1]
    assert (tmp_path / "builds").read_text() == "x"


def test_waiting_for_a_lock_says_so_once_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import threading

    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "x.lock", "held"):
            entered.set()
            leave.wait(timeout=30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(timeout=30)
    threading.Timer(1.2, leave.set).start()
    with caplog.at_level("WARNING"), locked(tmp_path / "x.lock", "M1 is being made by another process"):
        assert leave.is_set()
    holder.join()
    assert [record.message for record in caplog.records] == ["M1 is being made by another process: waiting for it"]


def test_seconds_are_those_of_every_attempt_however_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("selfalign.store.artifacts.time.monotonic", lambda: clock[0])
    store, place = Store(tmp_path), Store(tmp_path).path_of("stage", {})

    def killed(seconds: float, noting: Callable[[StageOutput], object]) -> None:
        """Nothing is written at the end, so it has to be with every batch and every row."""
        out = StageOutput(place, "stage", lambda row: None)
        clock[0] += seconds
        noting(out)
        clock[0] += 1000

    def batch(out: StageOutput) -> None:
        with out.journal(1, "things") as journal:
            assert list(journal.batches([("a", 1, lambda: 1)])) == [1]

    def interrupted(out: StageOutput) -> dict[str, Any]:
        clock[0] += 7
        raise KeyboardInterrupt

    def done(out: StageOutput) -> dict[str, Any]:
        clock[0] += 2
        return {}

    killed(3, batch)
    killed(5, lambda out: out.log({"step": 1}))
    with pytest.raises(KeyboardInterrupt):
        store.make("stage", {}, interrupted)
    assert store.make("stage", {}, done).seconds == 3 + 5 + 7 + 2
