"""A worker program of a stage: started, asked over pipes, and gone when it is stopped.

It reads a line of JSON for each question from its standard input, and answers each with a line on its standard output.
Its log goes to its standard error. It has to end when its input ends, so that none is left behind, however this process
dies.
"""

import json
import logging
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Any, cast

from selfalign.core.errors import SelfalignError

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT = 30.0
"""Seconds that an idle worker has to end by itself."""

RAISED = re.compile(r"[\w.]+(Error|Exception)\b")
"""Beginning of the last part of a traceback, which may have more lines."""

SHOWN_LINES = 40
"""Lines of a failed worker's output that go to the log; its last exception goes into the error."""


class Worker:
    """A worker program, with all processes that it starts."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._unanswered = 0
        self._messages = cast(IO[bytes], TemporaryFile())  # noqa: SIM115 - closed by `stop`
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                start_new_session=True,  # Ctrl-C is for this process, which then stops the worker.
            )
        except OSError as error:
            self._messages.close()
            raise SelfalignError(f"{name}: {command[0]} cannot be run ({error.strerror})") from error

    def send(self, question: Any) -> None:
        """Send a question. Several workers can be asked before one answers.

        Raises:
            SelfalignError: it has ended.
        """
        try:
            stream = cast(IO[bytes], self._process.stdin)
            stream.write(json.dumps(question).encode() + b"\n")
            stream.flush()
            self._unanswered += 1
        except BrokenPipeError as error:
            raise self._failure() from error

    def receive(self) -> Any:
        """Return the answer to the oldest question without one.

        Raises:
            SelfalignError: it has ended (the message has the end of its output), or its answer is not JSON.
        """
        line = cast(IO[bytes], self._process.stdout).readline()
        if not line.endswith(b"\n"):
            raise self._failure()
        self._unanswered -= 1
        try:
            return json.loads(line)
        except ValueError as error:
            raise SelfalignError(f"{self._name} sent a line that is not JSON: {line[:200]!r}") from error

    @property
    def idle(self) -> bool:
        """Whether it has answered everything it was asked."""
        return not self._unanswered

    def close_stdin(self) -> None:
        """Close the worker's input, which tells it to end."""
        with suppress(BrokenPipeError):
            cast(IO[bytes], self._process.stdin).close()

    def terminate(self, seconds: float) -> None:
        """Wait until the worker and all that it started are gone. What is left after `seconds` is killed."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        cast(IO[bytes], self._process.stdout).close()
        self._messages.close()

    def _failure(self) -> SelfalignError:
        """Return an error with the reason why the worker has ended, as far as it printed one."""
        code = self._process.wait()
        self._messages.seek(0)
        said = self._messages.read().decode(errors="replace").split("\n")
        lines = [line.rstrip() for line in said if line.strip()][-SHOWN_LINES:]
        logger.warning("%s ended with exit code %d; the last it said:\n%s", self._name, code, "\n".join(lines))
        start = max((number for number, line in enumerate(lines) if RAISED.match(line)), default=-1)
        last = " ".join(" ".join(lines[start:]).split())[:500] or "it said nothing"
        return SelfalignError(f"{self._name} ended with exit code {code}: {last}")


def ask_each(workers: Sequence[Worker], questions: Sequence[Any]) -> list[Any]:
    """Return the answers of workers that work at the same time, each to a question of its own.

    Raises:
        SelfalignError: one has ended.
    """
    for worker, question in zip(workers, questions, strict=True):
        worker.send(question)
    return [worker.receive() for worker in workers]


def stop(workers: Sequence[Worker], seconds: float) -> None:
    """End all workers. Those that are still there after so many seconds are killed."""
    for worker in workers:
        worker.close_stdin()
    for worker in workers:
        worker.terminate(seconds)
