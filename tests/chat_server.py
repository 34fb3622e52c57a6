"""A real HTTP server that speaks chat and text completions, and misbehaves as it is told to."""

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What one request gets instead of an answer; `hangs` holds it back, `resets` breaks the connection off."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    resets: bool = False


def chat(text: str, finish: str = "stop", usage: bool = True) -> bytes:
    """The body of a good answer: 10 tokens read, 3 written."""
    answer: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    if usage:
        answer["usage"] = {"prompt_tokens": 10, "completion_tokens": 3}
    return json.dumps(answer).encode()


def continuation(text: str, read: int, finish: str = "stop") -> bytes:
    """The body of a text completion: so many tokens read, 3 written."""
    usage = {"prompt_tokens": read, "completion_tokens": 3}
    return json.dumps({"choices": [{"text": text, "finish_reason": finish}], "usage": usage}).encode()


class ChatServer:
    """Answers `says(body)`; the first requests get `faults` instead, one each, where there is one."""

    def __init__(self, says: Callable[[dict[str, Any]], bytes], faults: Sequence[Fault | None]) -> None:
        self.says = says
        self.faults = list(faults)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.most_at_once = 0
        self.at_once = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fault = outer._enter(body, self.headers.get("Authorization", ""), self.path)
                try:
                    if fault.resets:
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    if fault.hangs:
                        outer._end.wait(5)
                    self.send_response(fault.status)
                    for name, value in fault.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(fault.body)))
                    self.end_headers()
                    self.wfile.write(fault.body)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # The client did not wait for it.
                finally:
                    with outer._lock:
                        outer.at_once -= 1

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def _enter(self, body: dict[str, Any], key: str, path: str) -> Fault:
        assert path == ("/v1/completions" if "prompt" in body else "/v1/chat/completions")
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            if self.faults and (fault := self.faults.pop(0)):
                return fault
        return Fault(body=self.says(body))

    def stop(self) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@contextmanager
def chat_server(
    says: Callable[[dict[str, Any]], bytes] | str = "Fine.\nScore: 4", faults: Sequence[Fault | None] = ()
) -> Iterator[ChatServer]:
    """A server that always says this, or what the function makes of a request's body."""
    server = ChatServer((lambda body: chat(says)) if isinstance(says, str) else says, faults)
    server.start()
    try:
        yield server
    finally:
        server.stop()
