"""A small web server for one page: serves a job's files to it and takes the trace that it posts.

Everything lies below a secret in the path, since a phone may have to reach it over a network. The page holds one
request open; when that ends, the page is gone.
"""

from __future__ import annotations

import secrets
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Lock, Thread
from typing import IO, Literal

from calora_export.jobs import LOGITS, TRACE

# A page is there, all of its trace is, it failed (with the reason), it is gone.
Event = tuple[Literal["here", "gone", "done", "error"], str]
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}
# Isolated pages may share memory between threads, which WebAssembly needs to use more than one.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LONGEST_ERROR = 10_000


class PageServer(ThreadingHTTPServer):
    """Serves `files`, by their path, while the block lasts; `events` is what the page says. Logits and trace are
    written to `answers`."""

    daemon_threads = True

    def __init__(self, host: str, port: int, files: Mapping[str, Path], answers: Path) -> None:
        super().__init__((host, port), _Handler)
        self.files, self.answers = files, answers
        self.secret = secrets.token_hex(6)
        self.events: Queue[Event] = Queue()
        self.alone = Lock()  # held by the page
        self._connections: set[socket.socket] = set()

    @property
    def path(self) -> str:
        """Of the page, after the host and the port."""
        return f"/{self.secret}/"

    def __enter__(self) -> PageServer:
        (self.answers / LOGITS).touch()
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._connections.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that breaks is no news: the page's own says when it is gone."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self._name()
        if name == "alive":
            self._stay()
        elif name is not None and name in self.server.files:
            self._send(self.server.files[name])
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        name, length = self._name(), int(self.headers.get("Content-Length") or 0)
        if name == "logits":
            self._keep((self.server.answers / LOGITS).open("ab"), length)
        elif name == "trace":
            self._keep((self.server.answers / TRACE).open("wb"), length)
        elif name == "done":
            self.server.events.put(("done", ""))
        elif name == "error":
            said = self.rfile.read(min(length, LONGEST_ERROR)).decode(errors="replace")
            self.server.events.put(("error", " ".join(said.split())))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.NO_CONTENT)
        self.end_headers()

    def _name(self) -> str | None:
        """What is asked for, below the secret."""
        path = self.path.partition("?")[0]
        start = self.server.path
        return (path.removeprefix(start) or "index.html") if path.startswith(start) else None

    def _stay(self) -> None:
        """Until the page is gone: a second one is turned away."""
        if not self.server.alone.acquire(blocking=False):
            self.send_error(HTTPStatus.CONFLICT)
            return
        self.server.events.put(("here", ""))
        with suppress(OSError):
            self.connection.recv(1)
        self.server.events.put(("gone", ""))
        self.close_connection = True

    def _send(self, path: Path) -> None:
        with path.open("rb") as file:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile)

    def _keep(self, file: IO[bytes], length: int) -> None:
        with file:
            while length > 0 and (part := self.rfile.read(min(length, 1 << 20))):
                file.write(part)
                length -= len(part)

    def end_headers(self) -> None:
        for key, value in HEADERS.items():
            self.send_header(key, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""
