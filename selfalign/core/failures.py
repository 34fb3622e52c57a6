"""Failures of the machine, such as a full disk or too little memory, whichever library reports them."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from selfalign.core.errors import SelfalignError, one_line

KEPT = "what was finished is kept, the same command continues from it"

ADVICE = {
    errno.ENOSPC: "make room there (selfalign-store clean removes what no run uses), or set another output_dir",
    errno.EDQUOT: "make room there (selfalign-store clean removes what no run uses), or have the quota raised",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "set an output_dir that can be written",
    errno.EIO: "the disk or its connection is failing",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
"""Advice by the system's error number."""

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors that are about a file, even if they name none."""

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""torch's wording where it raises no error of its own type."""

SMALLER = (
    "lower microbatch_tokens or max_length of train.sft and train.align, set their gradient_checkpointing=true, lower "
    "engine.max_batch_tokens, train adapters (model.lora.rank=16), or keep the base in 4 bits (model.quantization=nf4)"
)


def system_error(error: BaseException) -> OSError | None:
    """Return the OSError behind an error, also where a library written in Rust raised it; None for any other error."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(told[1]), os.strerror(int(told[1]))) if told else None


def explain_failure(error: BaseException) -> str | None:
    """Return a failure of the machine in one line: the file, the system's words, what to do. None for other errors."""
    refused = system_error(error)
    if refused is not None:
        return explain_system_error(refused)
    if is_out_of_memory(error):  # Outside of a stage, which `fits` would name.
        return f"there is no memory left ({one_line(error, 200) or type(error).__name__}); {KEPT}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        broken = ascii(error.object[max(0, error.start - 40) : error.end + 20])
        return f"{broken} is not UTF-8: rename the path or mend the text, or set LC_ALL=C.UTF-8"
    return None


def explain_system_error(error: OSError) -> str:
    """Return one line: the file, the system's words, and what to do."""
    place = f"{error.filename}: " if error.filename else ""
    advice = f"{ADVICE[error.errno]}; " if error.errno in ADVICE else ""
    return " ".join(f"{place}{error.strerror}; {advice}{KEPT}".split())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file or folder that the block writes in errors that name none, such as Python's own on a full disk.

    Raises:
        OSError: in the place of another library's error too.
    """
    try:
        yield
    except Exception as error:
        refused = system_error(error)
        if refused is None or refused.errno not in WRITING:
            raise
        refused.filename = refused.filename or str(path)
        if refused is error:
            raise
        raise refused from error


@contextmanager
def at_the_end(act: Callable[[], object]) -> Iterator[None]:
    """Call a function after the block, however the block ends.

    If the block failed, an OSError of the function is dropped: the user should read what failed first.

    Raises:
        OSError: the block went well, and this is refused.
    """
    try:
        yield
    except BaseException:
        with suppress(OSError):
            act()
        raise
    act()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory of the GPU or the machine did not suffice."""
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    return told or isinstance(error, MemoryError)


@contextmanager
def fits(label: str) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one that says what to lower.

    Raises:
        SelfalignError: it does not.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = one_line(error, 200) or "no memory left"
        raise SelfalignError(f"{label} does not fit into memory ({said}): {SMALLER}") from error
