"""Errors of a command: one line for an error that the user can correct, a traceback for a bug."""

import os
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from selfalign.cli.environment import conf_folder
from selfalign.core import distributed


@contextmanager
def report_errors(interrupted: str) -> Iterator[None]:
    """End a command that fails with one line for each problem, and with a traceback if it is a bug.

    With HYDRA_FULL_ERROR=1 every error is raised unchanged.

    Args:
        interrupted: the message after Ctrl-C.
    """
    full_error = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    try:
        yield
        sys.stdout.flush()  # A closed pipe is noticed here, inside the block.
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if full_error:
            raise
        message = _nobody_reads() if isinstance(error, BrokenPipeError) else None
        message = message or explain(error)
        if message is None:
            traceback.print_exc()
            message = "this is a bug in selfalign; please report it with the traceback above"
        where = f" in process {rank}" if (rank := distributed.rank()) else ""
        for line in message.splitlines():  # Several problems have a line each.
            print(f"error{where}: {line}", file=sys.stderr, flush=True)
        sys.exit(1)


def explain(error: BaseException) -> str | None:
    """Return the message of an error that the user can correct; None for a bug."""

    from selfalign.config.overrides import Refusal, explain_override
    from selfalign.core.errors import SelfalignError
    from selfalign.core.failures import explain_failure

    if isinstance(error, SelfalignError):
        return str(error)
    if isinstance(error, Refusal):
        return explain_override(error, conf_folder())
    return explain_failure(error)


def _nobody_reads() -> str | None:
    """Return the message for an output that has lost its reader, as in `selfalign … | head`; None for another pipe."""
    from selfalign.core.failures import KEPT

    output = select.poll()
    output.register(1, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout again at exit.
    return f"the output is not read any more; {KEPT}"
