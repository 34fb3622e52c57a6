"""The store's inventory: what is used, directly and through links, and that nothing used is ever removed."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from builders import Killed
from mutation import assert_caught

from selfalign.core.errors import SelfalignError
from selfalign.runs.labels import Label
from selfalign.runs.ledger import Ledger
from selfalign.runs.runner import Runner
from selfalign.store import inventory
from selfalign.store.artifacts import Artifact, Counts, StageOutput, Store, lock_of
from selfalign.store.inventory import ArtifactState, remove, remove_locks, scan_store, total_size


def policy(out: StageOutput, *, text: str, base: Artifact | None = None) -> Counts:
    """Weights of its own, or beside an adapter a link to those of its base, as models.py leaves them."""
    if base is None:
        (out.path / "weights").mkdir()
        (out.path / "weights" / "model.safetensors").write_text(text)
    else:
        (out.path / "adapter.safetensors").write_text(text)
        (out.path / "weights").symlink_to((base.path / "weights").resolve())
    return {}


def run_of(output: Path, name: str = "a") -> Runner:
    (output / name).mkdir(parents=True, exist_ok=True)
    return Runner(Store(output / "store"), ledger=Ledger(output / name))


def lora_run(output: Path, name: str = "a", text: str = "adapter") -> tuple[Artifact, Artifact]:
    """A run with a base of its own name and an adapter of it."""
    run = run_of(output, name)
    base = run.make(Label.parse("M0"), policy, text=f"base of {name}")
    return base, run.make(Label.parse("M1"), policy, text=text, base=base)


def names(kept: Any) -> set[str]:
    return {one.key for one in kept}


def clean(output: Path) -> set[str]:
    """The keys of what is removed when nobody changes his mind."""
    return names(remove(output, scan_store(output).unused(scan_store(output).in_progress)))


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[None]:
    """Another process holds the lock of an artifact."""
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(lock_of(folder))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        yield


# --- what is used ------------------------------------------------------------------------------------------------


def test_artifacts_of_runs_are_used_and_those_of_a_deleted_run_are_not(tmp_path: Path) -> None:
    base, adapter = lora_run(tmp_path)
    again = run_of(tmp_path, "sweeps/b")
    again.make(Label.parse("M0"), policy, text="base of a")
    other = again.make(Label.parse("M1"), policy, text="other")
    found = scan_store(tmp_path)
    uses = {name: {(use.run, use.label) for use in uses} for name, uses in found.uses.items()}
    assert uses == {
        f"policy/{base.key}": {("a", "M0"), ("sweeps/b", "M0")},
        f"policy/{adapter.key}": {("a", "M1")},
        f"policy/{other.key}": {("sweeps/b", "M1")},
    }
    assert {(one.state, one.stage) for one in found.kept.values()} == {(ArtifactState.DONE, "policy")}
    assert found.unused([]) == found.broken == found.foreign == found.locks == []
    shutil.rmtree(tmp_path / "a")
    assert clean(tmp_path) == {adapter.key}
    assert clean(tmp_path) == set()
    assert (other.path / "weights" / "model.safetensors").exists()


def test_base_that_only_an_adapter_links_to_stays(tmp_path: Path) -> None:
    base, adapter = lora_run(tmp_path)
    (tmp_path / "a" / "artifacts" / "M0").unlink()
    found = scan_store(tmp_path)
    assert found.kept[f"policy/{adapter.key}"].links == {f"policy/{base.key}"}
    assert found.users() == {f"policy/{base.key}": [f"policy/{adapter.key}"]}
    assert clean(tmp_path) == set()
    assert (adapter.path / "weights" / "model.safetensors").read_text() == "base of a"


def test_any_link_below_the_output_folder_counts(tmp_path: Path) -> None:
    _, adapter = lora_run(tmp_path)
    (tmp_path / "best").symlink_to(adapter.path / "adapter.safetensors")
    shutil.rmtree(tmp_path / "a")
    assert clean(tmp_path) == set()


def test_the_output_folder_may_itself_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = lora_run(tmp_path / "disk")
    (tmp_path / "outputs").symlink_to("disk")
    monkeypatch.chdir(tmp_path / "disk")
    for output in (tmp_path / "outputs", Path(), Path("../outputs")):
        assert {name for name in scan_store(output).uses} == {f"policy/{base.key}", f"policy/{adapter.key}"}
        assert clean(output) == set()


def test_folder_of_a_stage_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    base, adapter = lora_run(tmp_path / "outputs")
    shutil.move(tmp_path / "outputs/store/policy", tmp_path / "moved")
    (tmp_path / "outputs/store/policy").symlink_to(tmp_path / "moved")
    (tmp_path / "outputs/store/twice").symlink_to(tmp_path / "moved")
    assert scan_store(tmp_path / "outputs").kept.keys() == {f"policy/{base.key}", f"policy/{adapter.key}"}
    assert clean(tmp_path / "outputs") == set()
    shutil.rmtree(tmp_path / "outputs/a")
    assert clean(tmp_path / "outputs") == {base.key, adapter.key}


def test_killed_run_keeps_what_it_will_continue(tmp_path: Path) -> None:
    def stage(out: StageOutput) -> Counts:
        (out.scratch / "journal-0.jsonl").write_text("{}\n")
        raise Killed

    run = run_of(tmp_path)
    with pytest.raises(Killed):
        run.make(Label.parse("M1"), stage)
    (kept,) = scan_store(tmp_path).kept.values()
    size = len("{}\n") + len("0.00")  # and the seconds it has taken so far
    assert (kept.state, kept.seconds, total_size([kept])) == (ArtifactState.UNFINISHED, None, size)
    assert clean(tmp_path) == set()
    (tmp_path / "a" / "artifacts" / "M1").unlink()
    assert clean(tmp_path) == {kept.key}
    assert list((tmp_path / "store" / "stage").iterdir()) == []


def test_bytes_of_hard_links_count_once_and_those_behind_links_not_at_all(tmp_path: Path) -> None:
    base, adapter = lora_run(tmp_path)
    before = {name: total_size([one]) for name, one in scan_store(tmp_path).kept.items()}
    assert before[f"policy/{adapter.key}"] == sum(
        path.stat().st_size for path in adapter.path.iterdir() if not path.is_symlink()
    )
    os.link(base.path / "weights" / "model.safetensors", base.path / "weights" / "same.safetensors")
    os.link(base.path / "weights" / "model.safetensors", adapter.path / "same.safetensors")
    after = scan_store(tmp_path).kept
    assert total_size([after[f"policy/{base.key}"]]) == before[f"policy/{base.key}"]
    assert total_size([after[f"policy/{adapter.key}"]]) == before[f"policy/{adapter.key}"] + len("base of a")
    assert total_size(after.values()) == sum(before.values())


# --- hostile stores ----------------------------------------------------------------------------------------------


def test_no_store_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    for output in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SelfalignError, match=r"no store in this folder.*--output"):
            scan_store(output)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_is_no_artifact_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("mine")
    stage = tmp_path / "outputs" / "store" / "align"
    stage.mkdir(parents=True)
    (stage / ("0" * 20)).symlink_to(precious)
    (stage / ("1" * 20)).write_text("a file")
    (stage / "notes").mkdir()
    (stage / "notes.lock").touch()
    (stage.parent / "two words").mkdir()
    (stage.parent / "readme").write_text("x")
    (tmp_path / "outputs" / "a\n\x1b[2J").mkdir()
    (tmp_path / "outputs" / os.fsdecode(b"\xff\xfe")).mkdir()
    found = scan_store(tmp_path / "outputs")
    assert (found.kept, found.locks) == ({}, [])
    assert found.foreign == [f"align/{'0' * 20}", f"align/{'1' * 20}", "align/notes", "align/notes.lock",
                             "readme", "two words"]  # fmt: skip
    assert clean(tmp_path / "outputs") == set()
    assert (precious / "data").read_text() == "mine"


def test_loops_and_broken_links_are_reported_and_not_fatal(tmp_path: Path) -> None:
    base, adapter = lora_run(tmp_path)
    artifacts = tmp_path / "a" / "artifacts"
    (artifacts / "loop").symlink_to("loop")
    (artifacts / "iteration_1").mkdir()
    (artifacts / "iteration_1" / "gone").symlink_to("../../../store/pair/00000000000000000000")
    (artifacts / "up").symlink_to("..")
    (adapter.path / "self").symlink_to(adapter.path)
    (adapter.path / "loop").symlink_to("loop")
    (base.path / "back").symlink_to(adapter.path)
    found = scan_store(tmp_path)
    assert found.broken == ["a/artifacts/iteration_1/gone", "a/artifacts/loop"]
    assert clean(tmp_path) == set()
    shutil.rmtree(tmp_path / "a")
    assert clean(tmp_path) == {base.key, adapter.key}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "null", '{"seconds": null}', '{"seconds": NaN}', "\udcff"], ids=repr
)
def test_damaged_manifest_is_said_to_be_damaged(tmp_path: Path, content: str) -> None:
    base, adapter = lora_run(tmp_path)
    (adapter.path / "manifest.json").write_bytes(os.fsencode(content))
    kept = scan_store(tmp_path).kept
    assert {one.key: one.state for one in kept.values()} == {
        base.key: ArtifactState.DONE,
        adapter.key: ArtifactState.DAMAGED,
    }
    assert clean(tmp_path) == set()
    (tmp_path / "a" / "artifacts" / "M1").unlink()
    assert clean(tmp_path) == {adapter.key}


def test_manifest_that_is_a_folder_can_be_removed(tmp_path: Path) -> None:
    _, adapter = lora_run(tmp_path)
    (adapter.path / "manifest.json").unlink()
    (adapter.path / "manifest.json").mkdir()
    assert scan_store(tmp_path).kept[f"policy/{adapter.key}"].state is ArtifactState.DAMAGED
    (tmp_path / "a" / "artifacts" / "M1").unlink()
    assert clean(tmp_path) == {adapter.key}


def test_nothing_is_removed_when_not_every_folder_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever cannot be asked may be the one who uses it."""
    _, adapter = lora_run(tmp_path)
    shutil.rmtree(tmp_path / "a")
    unused = scan_store(tmp_path).unused([])
    (tmp_path / "secret").mkdir()
    original = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        for attempt in (lambda: scan_store(tmp_path), lambda: remove(tmp_path, unused)):
            with pytest.raises(PermissionError):
                attempt()
    assert (adapter.path / "manifest.json").exists()


# --- removal beside running processes ----------------------------------------------------------------------------


def test_what_another_process_makes_stays_with_the_base_it_links_to(tmp_path: Path) -> None:
    base, adapter = lora_run(tmp_path)
    (adapter.path / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "a")
    with held_elsewhere(adapter.path):
        found = scan_store(tmp_path)
        assert found.in_progress == {f"policy/{adapter.key}"}
        assert clean(tmp_path) == set()
    assert scan_store(tmp_path).in_progress == set()
    assert clean(tmp_path) == {base.key, adapter.key}


def test_what_is_locked_only_when_it_should_go_stays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the base it links to is locked and looked at after it, in another batch."""
    monkeypatch.setattr(inventory, "LOCKED_AT_ONCE", 1)
    base, adapter = lora_run(tmp_path)
    shutil.rmtree(tmp_path / "a")
    unused = scan_store(tmp_path).unused([])
    assert [one.key for one in unused] == [adapter.key, base.key]
    with held_elsewhere(adapter.path):
        assert remove(tmp_path, unused) == []
    assert (adapter.path / "weights" / "model.safetensors").exists()
    assert names(remove(tmp_path, unused)) == {base.key, adapter.key}


def test_run_that_started_after_the_question_keeps_its_artifacts(tmp_path: Path) -> None:
    base, adapter = lora_run(tmp_path)
    lora_run(tmp_path, "b")
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    unused = scan_store(tmp_path).unused([])
    assert len(unused) == 4
    again = run_of(tmp_path, "again")
    again.make(Label.parse("M1"), policy, text="adapter", base=base)
    assert names(remove(tmp_path, unused)) == names(unused) - {base.key, adapter.key}
    assert (adapter.path / "weights" / "model.safetensors").exists()


def test_only_what_was_shown_is_removed(tmp_path: Path) -> None:
    _, adapter = lora_run(tmp_path)
    (tmp_path / "a" / "artifacts" / "M1").unlink()
    unused = scan_store(tmp_path).unused([])
    shutil.rmtree(tmp_path / "a")
    assert names(remove(tmp_path, unused)) == {adapter.key}


def test_killed_removal_leaves_nothing_that_looks_finished_and_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = lora_run(tmp_path)
    inputs: list[dict[str, Any]] = [{"text": "base of a"}, {"text": "adapter", "base": base}]
    shutil.rmtree(tmp_path / "a")

    def rmtree(path: Path) -> None:
        for file in path.rglob("*.safetensors"):
            file.unlink()
        raise Killed

    unused = scan_store(tmp_path).unused([])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            remove(tmp_path, unused)
    store = Store(tmp_path / "store")
    assert [store.find("policy", one) for one in inputs] == [None, None]
    assert [one.digest for one in lora_run(tmp_path)] == [base.digest, adapter.digest]
    shutil.rmtree(tmp_path / "a")
    assert clean(tmp_path) == {base.key, adapter.key}


def test_removing_while_a_run_comes_and_goes_never_takes_what_it_uses(tmp_path: Path) -> None:
    lora_run(tmp_path)
    stop, rounds = threading.Event(), list[Artifact]()

    def come_and_go() -> None:
        while not stop.is_set():
            _, adapter = lora_run(tmp_path)
            assert (adapter.path / "weights" / "model.safetensors").read_text() == "base of a"
            shutil.rmtree(tmp_path / "a")
            rounds.append(adapter)

    with ThreadPoolExecutor(1) as pool:
        runner, gone = pool.submit(come_and_go), 0
        try:
            while not runner.done() and (len(rounds) < 20 or gone < 6):
                gone += len(clean(tmp_path))
        finally:
            stop.set()
        runner.result()


def test_run_that_vanishes_while_it_is_looked_at_uses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lora_run(tmp_path)
    read = os.readlink

    def remove_and_read(path: str) -> str:
        if path.startswith(f"{tmp_path}/a/"):
            shutil.rmtree(tmp_path / "a")
        return read(path)

    monkeypatch.setattr(os, "readlink", remove_and_read)
    found = scan_store(tmp_path)
    assert (found.uses, found.broken) == ({}, [])
    assert names(found.unused(found.in_progress)) == {artifact.key for artifact in made}


def test_locks_without_an_artifact_are_removed_unless_they_are_held(tmp_path: Path) -> None:
    lora_run(tmp_path)
    stage = tmp_path / "store" / "policy"
    abandoned, held = (stage / (digit * 20) for digit in "ab")
    for folder in (abandoned, held):
        lock_of(folder).touch()
    found = scan_store(tmp_path)
    assert sorted(found.locks) == [lock_of(abandoned), lock_of(held)]
    with held_elsewhere(held):
        assert remove_locks(found.locks) == 1
        assert lock_of(held).exists()
    assert remove_locks(found.locks) == 1
    assert len(list(stage.glob("*.lock"))) == 2


def test_looking_writes_nothing(tmp_path: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))

    _, adapter = lora_run(tmp_path)
    (adapter.path / "manifest.json").unlink()
    with suppress(FileNotFoundError):
        lock_of(adapter.path).unlink()
    before = state()
    scan_store(tmp_path)
    assert state() == before


# --- mutants -----------------------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[str, str, Callable[..., None]]] = {
    "use through another artifact's links does not count": (
        "waiting += self.kept[name].links",
        "waiting += ()",
        test_base_that_only_an_adapter_links_to_stays,
    ),
    "only links of runs count": ("        if owner:\n", "        if owner and label:\n",
        test_any_link_below_the_output_folder_counts),
    "not looked again once it is locked": (
        "going = [kept for kept in scan_store(output).unused(busy) if kept.name in held]",
        "going = [kept for kept in candidates if kept.name in held]",
        test_run_that_started_after_the_question_keeps_its_artifacts,
    ),
    "all that is unused by now is removed": (
        " if kept.name in held]", " if kept.name in held or not kept.links]", test_only_what_was_shown_is_removed,
    ),
    "locks of others are ignored": (
        "(held if locked else busy).add(kept.name)",
        "held.add(kept.name)",
        test_what_is_locked_only_when_it_should_go_stays_too,
    ),
    "what others hold does not keep its base": (
        "[*self.uses, *busy]", "[*self.uses]", test_what_another_process_makes_stays_with_the_base_it_links_to,
    ),
    "base goes before the policy that links to it": (
        "key=lambda kept: not kept.links",
        "key=lambda kept: bool(kept.links)",
        test_what_is_locked_only_when_it_should_go_stays_too,
    ),
    "manifests go with their folders": (
        "(kept.path / MANIFEST).unlink()", "pass", test_killed_removal_leaves_nothing_that_looks_finished_and_is_not,
    ),
    "links of the store's folders are followed": (
        "entry.is_dir(follow_symlinks=False):\n                names", "entry.is_dir():\n                names",
        test_what_is_no_artifact_is_left_alone,
    ),
    "every name of a file counts": (
        "files[seen.st_dev, seen.st_ino] =", "files[seen.st_dev, len(files)] =",
        test_bytes_of_hard_links_count_once_and_those_behind_links_not_at_all,
    ),
    "unreadable folders are passed over": (
        "suppress(FileNotFoundError), os.scandir", "suppress(OSError), os.scandir",
        test_nothing_is_removed_when_not_every_folder_can_be_read,
    ),
    "locks are removed unasked": (
        "if lock.exists() and _lock_now(stack, lock) and not", "if lock.exists() and not",
        test_locks_without_an_artifact_are_removed_unless_they_are_held,
    ),
    "looking takes locks that are not there": (
        "lock_of(path).exists() and not", "not", test_looking_writes_nothing,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, check = MUTANTS[mutant]
    fixtures = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    assert_caught(inventory, sys.modules[__name__], old, new, check, fixtures)
