"""A real HTTP server with the few endpoints of a model hub that a push needs; it keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_theSecretOfTheUser"


@dataclass
class Hub:
    """Takes pushes of those who know the token; files go into commits whole, as a hub lets small ones.

    Attributes:
        refuses: {path's beginning: (status, message)} of requests that are not answered otherwise.
        files: {owner/name: {path: content}}; the name of a data set is datasets/owner/name, as in its URL.
        private: {owner/name: as it was made}.
        commits: their messages.
    """

    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str, body: bytes, key: str) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        for start, (status, message) in self.refuses.items():
            if path.startswith(start):
                return status, {"error": message}
        if key != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        _, _, kind, owner, name, what, *_ = path.split("/")
        full = f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"
        files = self.files[full]
        if what == "tree":
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]}
        return self._commit(full, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        name = f"datasets/{name}" if asked["type"] == "dataset" else name
        if name in self.files:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.files[name], self.private[name] = {}, asked["visibility"] == "private"
        return 200, {"url": f"{self.url}/{name}"}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[name][value["path"]]
        number = f"{len(self.commits):040x}"
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{number}", "commitOid": number, "success": True}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """An empty hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, told = hub.answer(self.path.split("?")[0], body, self.headers.get("Authorization", ""))
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
