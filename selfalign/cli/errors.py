"""How a command ends that fails: one line for what the user can mend, a traceback for a bug."""

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
    """Ends a command that fails with one line, a bug's with its traceback too; HYDRA_FULL_ERROR=1 lets all through."""
    full_error = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    try:
        yield
        sys.stdout.flush()  # Here, where it is noticed if nobody reads it any more.
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
        for line in message.splitlines():  # Where several things are missing, each has its own.
            print(f"error{where}: {line}", file=sys.stderr, flush=True)
        sys.exit(1)


def explain(error: BaseException) -> str | None:
    """One line for an error the user can mend, or None for a bug."""

    from selfalign.config.overrides import Refusal, explain_override
    from selfalign.core.errors import SelfalignError
    from selfalign.core.failures import explain_failure

    if isinstance(error, SelfalignError):
        return str(error)
    if isinstance(error, Refusal):
        return explain_override(error, conf_folder())
    return explain_failure(error)


def _nobody_reads() -> str | None:
    """The end of a command whose output has lost its reader, as in `selfalign … | head`; None if it is another pipe."""
    from selfalign.core.failures import KEPT

    output = select.poll()
    output.register(1, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again when it ends.
    return f"nobody reads the output any more; {KEPT}"
