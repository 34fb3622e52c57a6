"""Artifacts in a store: which runs use them, and removal of those that nobody uses.

An artifact is in use when a link below the output folder leads into it: those of runs below `<run>/artifacts/`, and
any other; or when a used artifact's own links do, as those of a LoRA policy lead to the weights of its base.
"""

import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from filelock import FileLock, Timeout

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.store.artifacts import MANIFEST, lock_of

LOCKED_AT_ONCE = 500
"""Artifacts checked at a time for new uses; a process may open about a thousand files."""


class ArtifactState(StrEnum):
    """Whether an artifact can be used."""

    DONE = "done"
    UNFINISHED = "unfinished"
    IN_PROGRESS = "being made"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """The folder of an artifact, finished or not.

    Attributes:
        stage: that made it.
        key: its name in the store.
        path: its real path.
        state: whether it can be used; nobody makes an unfinished one at the moment.
        seconds: what making it took; None where no manifest says so.
        changed: when one of its files was last written, in seconds since 1970.
        files: {(device, inode): bytes} of its files, so that one of several names counts once; links count nothing.
        links: the other artifacts its links lead into.
    """

    stage: str
    key: str
    path: Path
    state: ArtifactState
    seconds: float | None
    changed: float
    files: dict[tuple[int, int], int]
    links: frozenset[str]

    @property
    def name(self) -> str:
        """`<stage>/<key>`, as in provenance.json."""
        return f"{self.stage}/{self.key}"


@dataclass(frozen=True, slots=True)
class ArtifactUse:
    """A link of a run that leads into an artifact."""

    run: str
    label: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """The content of a store.

    Attributes:
        kept: {name: artifact}.
        uses: {name: the runs' links that lead into it}.
        broken: links of runs that lead nowhere, below the output folder.
        foreign: what lies in the store but is no artifact and no lock; it is left alone.
        locks: locks that belong to no artifact.
    """

    kept: dict[str, StoredArtifact]
    uses: dict[str, list[ArtifactUse]]
    broken: list[str]
    foreign: list[str]
    locks: list[Path]

    def reached(self, roots: Iterable[str]) -> set[str]:
        """Return these artifacts and those that their links lead into, directly or through others."""
        found: set[str] = set()
        waiting = list(roots)
        while waiting:
            name = waiting.pop()
            if name in self.kept and name not in found:
                found.add(name)
                waiting += self.kept[name].links
        return found

    def users(self) -> dict[str, list[str]]:
        """Return {artifact: the others whose links lead into it}."""
        found: dict[str, list[str]] = {}
        for kept in self.kept.values():
            for name in kept.links:
                found.setdefault(name, []).append(kept.name)
        return found

    def unused(self, busy: Iterable[str]) -> list[StoredArtifact]:
        """Return the artifacts that no run and no kept artifact refers to.

        Adapters come before the base they link to, so they are deleted first.

        Args:
            busy: artifacts that stay because a process works on them.
        """
        used = self.reached([*self.uses, *busy])
        # Links of policies are resolved when they are made: what they lead into has no links into the store itself.
        return sorted((k for k in self.kept.values() if k.name not in used), key=lambda kept: not kept.links)

    @property
    def in_progress(self) -> set[str]:
        """The artifacts that are being made."""
        return {kept.name for kept in self.kept.values() if kept.state is ArtifactState.IN_PROGRESS}


def scan_store(output: Path) -> Inventory:
    """Scan the store of an output folder. Writes nothing.

    Raises:
        SelfalignError: there is no store.
        OSError: a folder cannot be read, so who uses what cannot be known.
    """
    output = Path(os.path.realpath(output))
    root = Path(os.path.realpath(output / "store"))
    if not root.is_dir():
        raise SelfalignError(f"{output}: no store in this folder; give the output folder of the runs with --output")
    names, foreign, locks = _entries(root)
    uses: dict[str, list[ArtifactUse]] = {}
    broken: list[str] = []
    for link in _links(output, without=(str(output / "store"), str(root))):
        owner = _owner(link, names)
        run, _, label = os.path.relpath(link, output).partition("/artifacts/")
        if owner:
            uses.setdefault(owner, []).append(ArtifactUse(run, label))
        elif label and Path(link).is_symlink() and not Path(link).exists():
            broken.append(f"{run}/artifacts/{label}")
    found = [_inspect(path, names) for path in names]
    kept = {one.name: one for one in found if one is not None}
    return Inventory(kept, uses, sorted(broken), foreign, [lock for lock in locks if not _made_for(lock)])


def total_size(kept: Iterable[StoredArtifact]) -> int:
    """Return the bytes of some artifacts together."""
    files: dict[tuple[int, int], int] = {}
    for one in kept:
        files |= one.files
    return sum(files.values())


def remove(output: Path, candidates: Sequence[StoredArtifact]) -> list[StoredArtifact]:
    """Remove artifacts and return those that are gone.

    Each is locked, and then it is looked again whether a run that started meanwhile uses it. Manifests go first: a
    kill in between leaves unfinished artifacts, which count as not made.

    Args:
        output: the output folder.
        candidates: in the order of `Inventory.unused`; those that are locked, or used by now, stay.
    """
    gone: list[StoredArtifact] = []
    busy: set[str] = set()
    for start in range(0, len(candidates), LOCKED_AT_ONCE):
        with ExitStack() as stack:
            held: set[str] = set()
            for kept in candidates[start : start + LOCKED_AT_ONCE]:
                locked = _lock_now(stack, lock_of(kept.path))
                (held if locked else busy).add(kept.name)
            going = [kept for kept in scan_store(output).unused(busy) if kept.name in held]
            for kept in going:
                with suppress(FileNotFoundError, IsADirectoryError):
                    (kept.path / MANIFEST).unlink()
            for kept in going:
                shutil.rmtree(kept.path)
                lock_of(kept.path).unlink()
            gone += going
    return gone


def remove_locks(locks: Iterable[Path]) -> int:
    """Remove locks that nobody holds and that belong to no artifact. Return how many."""
    gone = 0
    for lock in locks:
        with ExitStack() as stack:
            if lock.exists() and _lock_now(stack, lock) and not _made_for(lock):
                lock.unlink()
                gone += 1
    return gone


def _lock_now(stack: ExitStack, path: Path) -> bool:
    """Take a lock until the stack is closed, unless another process holds it or only another user may take it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, PermissionError):
        return False
    stack.callback(lock.release)
    return True


def _made_for(lock: Path) -> bool:
    """Whether the artifact of a lock is there."""
    return lock.with_suffix("").exists()


def _entries(root: Path) -> tuple[dict[str, str], list[str], list[Path]]:
    """Return ({real path: name} of artifacts, foreign names, locks). A stage's folder may be a link to another disk."""
    names: dict[str, str] = {}
    foreign: list[str] = []
    locks: list[Path] = []
    for stage in sorted(root.iterdir()):
        if not (stage.is_dir() and stage.name.isidentifier()):
            foreign.append(stage.name)
            continue
        place = Path(os.path.realpath(stage))
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if re.fullmatch(r"[0-9a-f]{20}", entry.name) and entry.is_dir(follow_symlinks=False):
                names.setdefault(entry.path, f"{stage.name}/{entry.name}")
            elif re.fullmatch(r"[0-9a-f]{20}\.lock", entry.name):
                locks.append(place / entry.name)
            else:
                foreign.append(f"{stage.name}/{entry.name}")
    return names, foreign, locks


def _inspect(folder: str, names: dict[str, str]) -> StoredArtifact | None:
    """Read the state of an artifact; None where another process has just removed it."""
    path, (stage, _, key) = Path(folder), names[folder].partition("/")
    files: dict[tuple[int, int], int] = {}
    links: set[str] = set()
    try:
        changed = path.stat().st_mtime
    except FileNotFoundError:
        return None
    for entry in _walk(path):
        if entry.is_symlink():
            links.add(_owner(entry.path, names))
            continue
        with suppress(FileNotFoundError):  # Those who make it also remove files.
            seen = entry.stat(follow_symlinks=False)
            files[seen.st_dev, seen.st_ino] = seen.st_size
            changed = max(changed, seen.st_mtime)
    state, seconds = _state(path)
    return StoredArtifact(stage, key, path, state, seconds, changed, files, frozenset(links - {"", names[folder]}))


def _state(path: Path) -> tuple[ArtifactState, float | None]:
    """Return whether an artifact can be used, and the seconds it took."""
    try:
        seconds = float(read_json(path / MANIFEST)["seconds"])
        return (ArtifactState.DONE, seconds) if math.isfinite(seconds) else (ArtifactState.DAMAGED, None)
    except FileNotFoundError:
        with ExitStack() as stack:
            in_work = lock_of(path).exists() and not _lock_now(stack, lock_of(path))
        return ArtifactState.IN_PROGRESS if in_work else ArtifactState.UNFINISHED, None
    except (IsADirectoryError, ValueError, KeyError, TypeError):
        return ArtifactState.DAMAGED, None


def _links(folder: Path, without: tuple[str, ...]) -> Iterator[str]:
    """Yield every link below a folder."""
    return (entry.path for entry in _walk(folder, without) if entry.is_symlink())


def _walk(folder: Path, without: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """Yield everything below a folder that is not a folder. Links are not followed; what vanishes is left out."""
    waiting = [str(folder)]
    while waiting:
        with suppress(FileNotFoundError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    yield entry
                elif entry.path not in without:
                    waiting.append(entry.path)


def _owner(link: str, names: dict[str, str]) -> str:
    """Return the name of the artifact that a link leads into; "" where there is none, or the link has vanished."""
    try:
        path = os.path.realpath(link)
    except FileNotFoundError:
        return ""
    while path and path not in names:
        path = path.rpartition(os.sep)[0]
    return names.get(path, "")
