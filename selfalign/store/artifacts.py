"""Artifacts keyed by content: made once, found again, never half there.

An artifact is the folder a stage wrote. Its key is the digest of everything the stage depends on: its name, its
settings, its seed and the *content* of the artifacts it reads. The manifest is written last, so an artifact is
done exactly when its manifest exists; until then the folder holds what a killed stage left, and the same stage
continues from it.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.failures import at_the_end, fits, naming
from selfalign.core.files import digest_folder, digest_json, read_json, write_atomically, write_json
from selfalign.core.progress import progress_bar
from selfalign.store.journal import Journal
from selfalign.store.key import FORMAT, key_of, to_key_json

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
SCRATCH = "scratch"
SECONDS = "seconds"
MANIFEST = "manifest.json"

Counts = dict[str, Any]
"""Counts of a stage, drops by reason, and measurements: JSON numbers, texts, lists of them."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished folder of the store. `digest` is the digest of its files' content."""

    stage: str
    key: str
    path: Path
    digest: str
    counts: Counts
    seconds: float

    def to_key_json(self) -> dict[str, str]:
        """Return what the artifact counts as in the key of a stage that reads it: its content."""
        return {"artifact": self.stage, "digest": self.digest}

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that the stage logged while it ran, one for each logging step."""
        log = self.path / LOG
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


@dataclass(frozen=True)
class Content:
    """What data or weights outside the store hold; looked at when a stage that reads them is looked for."""

    identify: Callable[[], Any]

    @cached_property
    def digest(self) -> Any:
        """Digests, as plain JSON."""
        return self.identify()

    def to_key_json(self) -> Any:
        """Return the digests, for the key."""
        return self.digest


class StageOutput:
    """The folder a stage writes to, with a scratch folder that is removed when the stage is done.

    The main process writes to the folder itself. The other processes write the same files to folders of their own,
    which are thrown away. The scratch folder is common to all.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        on_row: Callable[[dict[str, Any]], None],
        later_seconds: float | None = None,
    ) -> None:
        self.label = label
        self.later_seconds = later_seconds
        self.scratch = folder / SCRATCH
        self.path = folder
        if not distributed.is_main():
            self.path = self.scratch / f"process_{distributed.rank()}"
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        self._on_row = on_row
        self._started, self._before = time.monotonic(), _seconds_in(self.scratch / SECONDS)

    @property
    def seconds(self) -> float:
        """How long the stage has been worked on, earlier killed attempts included."""
        return self._before + time.monotonic() - self._started

    def note_time(self) -> None:
        """Save that time, in case the stage is killed."""
        if distributed.is_main():
            (self.scratch / SECONDS).write_text(f"{self.seconds:.2f}", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to the stage's log and pass it on to the run's metrics at once."""
        with naming(self.path / LOG), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.note_time()
        self._on_row(row)

    def rewind_log(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows that a resumed stage will log again, and pass the kept ones on."""
        log = self.path / LOG
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        rows = [row for row in map(_parse_or_none, lines) if row is not None and keep(row)]
        write_atomically(log, [json.dumps(row).encode() + b"\n" for row in rows])
        for row in rows:
            self._on_row(row)

    def progress(self, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar with `total` units, which the main process shows."""
        shown = distributed.is_main()
        return progress_bar(self.label, total, unit, shown=shown, later_seconds=self.later_seconds)

    @contextmanager
    def journal(self, total: int, unit: str) -> Iterator[Journal]:
        """Open the journal of finished batches, which survives a kill, and show a progress bar with `total` units."""
        with self.progress(total, unit) as advance:

            def done(size: int) -> None:
                advance(size)
                self.note_time()

            yield Journal(self.scratch, done)


class Store:
    """The folder of all artifacts, shared by every run below one output folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, stage: str, inputs: dict[str, Any]) -> Path:
        """Return the folder of the artifact for these inputs, whether it is there or not."""
        return self.root / stage / key_of(stage, inputs)

    def find(self, stage: str, inputs: dict[str, Any]) -> Artifact | None:
        """Return the finished artifact for these inputs, or None.

        Raises:
            SelfalignError: the manifest is there but a file it lists is missing or has another size.
        """
        folder = self.path_of(stage, inputs)
        try:
            return open_artifact(folder)
        except (FileNotFoundError, SelfalignError):
            if (folder / MANIFEST).exists():
                raise
            return None  # Not made, or removed while it was read: the manifest goes first.

    def make(
        self,
        stage: str,
        inputs: dict[str, Any],
        build: Callable[[StageOutput], Counts],
        *,
        label: str = "",
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
        all_ranks: bool = False,
        later_seconds: float | None = None,
    ) -> Artifact:
        """Find the artifact or build it. Two runs that need it at once build it once.

        All processes of a run call this with the same inputs, and get the same artifact.

        Args:
            stage: the stage's name.
            inputs: everything the result depends on: artifacts, settings, seeds.
            build: writes the files into the workspace and returns the counts.
            label: what the progress bar calls the work.
            on_row: receives each row the stage logs, those of an earlier, killed attempt included.
            all_ranks: whether all processes of a run build it, or the main one without the others.
            later_seconds: how long the stages behind it take, for the progress bar; None if that is not known.

        Raises:
            SelfalignError: the processes of the run ask for different ones.
        """
        folder, label = self.path_of(stage, inputs), label or stage
        if len(set(distributed.gather(folder.name))) > 1:
            raise SelfalignError(
                f"{label}: the processes of this run read different data. Check that all see the same files."
            )
        with ExitStack() as stack:
            if distributed.is_main():
                folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(lock_of(folder), f"{label} is being made by another run"))
            if distributed.broadcast((folder / MANIFEST).exists()):
                shutil.rmtree(folder / SCRATCH, ignore_errors=True)
            elif all_ranks:
                with distributed.translate_peer_errors():
                    output = StageOutput(folder, label, on_row, later_seconds)
                    self._build(folder, stage, inputs, build, output)
            elif distributed.is_main():
                with distributed.single_process():
                    output = StageOutput(folder, label, on_row, later_seconds)
                    self._build(folder, stage, inputs, build, output)
            made = open_artifact(folder) if distributed.is_main() else None
        return cast(Artifact, distributed.broadcast(made))

    def _build(
        self,
        folder: Path,
        stage: str,
        inputs: dict[str, Any],
        build: Callable[[StageOutput], Counts],
        workspace: StageOutput,
    ) -> None:
        _clear(folder)
        with at_the_end(workspace.note_time):
            try:
                with naming(folder), fits(workspace.label):
                    counts = build(workspace)
            except OSError:
                _clear(folder)  # What is half written would go on filling a disk that is full.
                raise
        distributed.wait_for_all()
        if not distributed.is_main():
            return
        files = digest_folder(folder, without=(LOG, SCRATCH))
        write_json(
            folder / MANIFEST,
            {
                "stage": stage,
                "format": FORMAT,
                "inputs": to_key_json(inputs),
                "files": {name: [digest, (folder / name).stat().st_size] for name, digest in files.items()},
                "digest": digest_json(files),
                "counts": counts,
                "seconds": round(workspace.seconds, 2),
            },
        )
        shutil.rmtree(workspace.scratch)


def lock_of(folder: Path) -> Path:
    """Return the lock of an artifact, beside its folder."""
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def locked(path: Path, reason: str) -> Iterator[None]:
    """Hold a file lock. If it has to wait, say so once, with the reason. The lock of a killed process is free."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        logger.warning("%s: waiting for it", reason)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def open_artifact(folder: Path) -> Artifact:
    """Return the finished artifact in a folder.

    Raises:
        SelfalignError: the manifest is damaged, or a file it lists is missing or has another size.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        known = {name: manifest[name] for name in ("stage", "digest", "counts", "seconds")}
        sizes = {name: size for name, (_, size) in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SelfalignError(f"{folder / MANIFEST}: damaged; delete {folder} to have it made again") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise SelfalignError(f"{path}: missing or not of its recorded size; delete {folder} to have it made again")
    return Artifact(key=folder.name, path=folder, **known)


def _clear(folder: Path) -> None:
    """Delete what an attempt has left behind and the next one cannot use: files, links and folders."""
    for path in folder.iterdir() if distributed.is_main() else ():
        if path.name in (LOG, SCRATCH):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _seconds_in(file: Path) -> float:
    """Return the saved seconds, or 0 where the file is missing or torn."""
    try:
        return float(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _parse_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
