"""A server program that runs for as long as it is needed."""

import os
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

LAUNCHER = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
"""Environment variables of torchrun; a server that reads them would wait for other processes to join."""

TERMINATE_TIMEOUT = 20.0
"""Seconds that a server has to end before it is killed."""

KEEPER = f"""
trap : TERM PIPE
exec 3<&0
sh -c "$1" </dev/null 3<&- &
server=$!
(trap '' TERM; cat <&3; kill -TERM 0; sleep {TERMINATE_TIMEOUT:.0f}; kill -KILL 0) >/dev/null 2>&1 &
exec 3<&-
wait $server; code=$?; wait $server
rm -rf -- "$2"
exit $code
"""
"""Runs the command $1, ends its process group when standard input closes, and removes the folder $2 at the end."""


class ServerProcess:
    """A shell command in a process group of its own. It ends with `stop`, or with this process, however that ends.

    Args:
        command: shell command that starts the server and stays in the foreground.
        folder: the folder that the server reads; it is removed with the server.
        clean: takes secrets out of the server's output.
    """

    def __init__(self, command: str, folder: Path, clean: Callable[[str], str]) -> None:
        self._clean = clean
        self._said: deque[str] = deque(maxlen=3)
        self._process = subprocess.Popen(
            ["sh", "-c", KEEPER, "sh", command, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """End the server with everything it has started, and return when that is done."""
        with suppress(BrokenPipeError):
            cast(IO[str], self._process.stdin).close()
        self._reader.join(TERMINATE_TIMEOUT)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        self._reader.join()
        cast(IO[str], self._process.stdout).close()

    @property
    def ended(self) -> bool:
        """Whether the server has ended by itself."""
        return self._process.poll() is not None

    def last_words(self) -> str:
        """Return the end of the server's output, as one line."""
        if self.ended:
            self._reader.join(1)
        return " / ".join(self._said) or "nothing"

    def _read(self) -> None:
        """Read the server's output, so that it never waits for us, and keep the last lines."""
        for line in cast(IO[str], self._process.stdout):
            if text := " ".join(self._clean(line).split()):
                self._said.append(text[:200])
