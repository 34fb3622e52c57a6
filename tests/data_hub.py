"""A real HTTP server with the few endpoints of a hub that reading a data set needs."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
REVISIONS = {"main": COMMIT, "v1": OTHER_COMMIT}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """The rows as the bytes of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def answer(files: dict[str, bytes], name: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers of the answer to a request about the only data set there is."""
    told = {
        p: {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()
    }
    if path.startswith(f"/datasets/{name}/resolve/"):
        revision, _, file = path.split("/resolve/")[1].partition("/")
        if file in files:
            return 200, files[file], {"ETag": f'"{told[file]["oid"]}"', "X-Repo-Commit": commit_of(revision)}
        return 404, b"", {"X-Error-Code": "EntryNotFound"}
    if not path.startswith(f"/api/datasets/{name}"):
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
    what, _, rest = path.removeprefix(f"/api/datasets/{name}").strip("/").partition("/")
    if what == "tree":
        folder = rest.partition("/")[2]
        below = [entry for p, entry in told.items() if p.rpartition("/")[0] == folder]
        folders = {p.partition("/")[0] for p in files if "/" in p} if not folder else set()
        entries = [*below, *({"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(folders))]
        return 200, json.dumps(entries).encode(), {}
    if what == "paths-info":
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        return 200, json.dumps([told[p] for p in asked if p in told]).encode(), {}
    if not commit_of(revision := rest if what == "revision" else "main"):
        return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
    siblings = [{"rfilename": p} for p in files]
    said = {"id": name, "sha": commit_of(revision), "siblings": siblings, "private": False}
    return 200, json.dumps(said).encode(), {}


def commit_of(revision: str) -> str:
    """The commit of a branch, a tag or a commit; empty for another name."""
    return revision if revision in REVISIONS.values() else REVISIONS.get(revision, "")


@contextmanager
def data_hub(name: str, files: dict[str, bytes]) -> Iterator[str]:
    """A hub with one data set; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content, headers = answer(files, name, self.path.partition("?")[0], body)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_POST = do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
