"""Files that are written whole or not at all, and digests of their content."""

import gzip
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from selfalign.core.errors import SelfalignError
from selfalign.core.failures import naming

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package `selfalign`."""


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file beside its name and rename it, so that no reader ever sees half of it."""
    with atomic_file(path) as file:
        file.writelines(chunks)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to. It gets its name when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read and `diff` can compare."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, [text.encode()])


def read_json(path: Path) -> Any:
    """Read a JSON file that selfalign wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_text(path: Path) -> str:
    """Read a text file that the user named.

    Raises:
        SelfalignError: the file is missing or not UTF-8.
    """
    return "".join(line for _, line in read_lines(path, skip_blank=False))


def read_lines(path: Path, *, skip_blank: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of a UTF-8 text file, without the byte order mark that some editors put first.

    A file whose name ends in ".gz" is decompressed.

    Raises:
        SelfalignError: the file is missing, not UTF-8 (the line is named), or not compressed as its name says.
    """
    if not path.is_file():
        raise SelfalignError(f"{path}: no such file")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in _numbered(path, file):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise SelfalignError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
            text = text.removeprefix("\ufeff") if number == 1 else text
            if text.strip() or not skip_blank:
                yield number, text


def _numbered(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, compressed or not, with their numbers."""
    try:
        yield from enumerate(file, start=1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SelfalignError(f"{path}: cannot be unpacked as gzip ({error})") from error


def path_of(text: str) -> Path:
    """Return a path as a user writes it, with `~` as the home folder and `~name` as that of another user.

    Raises:
        SelfalignError: there is no such folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise SelfalignError(f"{text}: there is no such home folder") from error


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, the same for equal values whatever the order of their keys."""
    return digest_text(json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False))


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal. A file is read again only if it changed."""
    state = path.stat()
    # A file as young as its clock's tick could change again without ordered it.
    settled = time.time_ns() - state.st_mtime_ns > 2_000_000_000
    digest = _digest_once if settled else _digest_once.__wrapped__
    return digest(path, state.st_size, state.st_mtime_ns)


def digest_folder(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return {path below the folder: SHA-256} of its files, sorted by name, without the top entries in `without`."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {name.as_posix(): digest_file(folder / name) for name in files if name.parts[0] not in without}


@cache
def _digest_once(path: Path, size: int, mtime_ns: int) -> str:
    """Return the digest of a file in this state."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derive_seed(*parts: object) -> int:
    """Derive a seed for one purpose: 63 bits of the digest of its parts, so no two purposes share random numbers."""
    return int(digest_json([str(part) for part in parts])[:16], 16) >> 1


def text_or_file(value: str, key: str) -> str:
    """Return a setting that is a text, or the text of a file for "file:PATH".

    Raises:
        SelfalignError: there is no such file; the message names the setting, `key`.
    """
    if not value.startswith("file:"):
        return value
    try:
        return read_text(path_of(value.removeprefix("file:")))
    except SelfalignError as error:
        raise SelfalignError(f"{key}: {error}") from error
