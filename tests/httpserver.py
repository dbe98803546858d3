"""A web server on this machine that answers as told, faults included.

It speaks HTTP/1.1 by itself, byte for byte, so that it can break off, lie about lengths, and never
end. Each path has a script: what to do for the first request of it, for the second, and so on; the
last one serves for all that follow.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import BinaryIO


@dataclass(frozen=True)
class Answer:
    """What the server sends.

    Args:
        length: that it announces; -1 is the body's, None announces none, and ends by closing.
        delay, pause: seconds before the first byte, and after each piece.
        pieces: make the body, which may be endless.
        cut, reset: close the connection after the body, politely or not.
        raw: makes what is sent in the place of all else.
        gate: opens before the first byte is sent.
        has_parts: whether a part of the body is given to whoever asks for one.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = -1
    delay: float = 0.0
    pause: float = 0.0
    pieces: Callable[[], Iterator[bytes]] | None = None
    cut: bool = False
    reset: bool = False
    raw: Callable[[], Iterator[bytes]] | None = None
    gate: threading.Event | None = None
    has_parts: bool = False

    def asked_for(self, span: str) -> Answer:
        """Return the answer to a request with this `Range` header, if any."""
        if not self.has_parts or not span:
            return self
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(self.body))
        if start >= len(self.body):
            return replace(self, body=b"", status=416)
        told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(self.body)}"}
        headers = {**self.headers, **told}
        return replace(self, body=self.body[start:stop], status=206, headers=headers)

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} Whatever"]
        if self.length is not None:
            lines.append(f"Content-Length: {len(self.body) if self.length < 0 else self.length}")
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def stream(self) -> Iterator[bytes]:
        if self.raw:
            yield from self.raw()
            return
        yield self.head()
        yield from self.pieces() if self.pieces else [self.body]


class HttpServer:
    """The server; `requests` counts by path, `headers` has those of the last request of a path."""

    def __init__(self, context: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((address, 0), backlog=512)
        self._context = context
        self._scripts: dict[str, list[Answer]] = {}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_closed = threading.Event()
        self.requests: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        self.on_request: Callable[[], None] = lambda: None
        self.otherwise = Answer(status=404)
        self.n_connections = 0
        self.n_now = self.n_most = 0  # requests that are being answered
        scheme = "https" if context else "http"
        self.port = self._listener.getsockname()[1]
        self.url = f"{scheme}://{address}:{self.port}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def put(self, path: str, *answers: Answer | bytes) -> str:
        """Say what is at a path. Returns its URL."""
        self._scripts[path] = [a if isinstance(a, Answer) else Answer(a) for a in answers]
        return self.url + path

    def close(self) -> None:
        """Break everything off."""
        self._is_closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(connection)
            self.n_connections += 1
            thread = threading.Thread(target=self._serve, args=[connection], daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        try:
            if self._context:
                connection = self._context.wrap_socket(plain, server_side=True)
                with self._lock:
                    self._open.add(connection)
            with connection, connection.makefile("rb") as lines:
                while self._answer(connection, lines):
                    pass
        except (OSError, ValueError):
            pass
        finally:
            plain.close()
            with self._lock:
                self._open -= {plain, connection}

    def _answer(self, connection: socket.socket, lines: BinaryIO) -> bool:
        """Answer one request. Returns whether the connection stays."""
        request = lines.readline().split()
        if len(request) < 2:
            return False
        path, headers = request[1].decode(), {}
        while line := lines.readline().strip():
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        answer = self._next(path, headers).asked_for(headers.get("range", ""))
        try:
            self._is_closed.wait(answer.delay)
            while answer.gate and not answer.gate.wait(0.05) and not self._is_closed.is_set():
                pass
            for piece in answer.stream():
                connection.sendall(piece)
                if answer.pause and self._is_closed.wait(answer.pause):
                    return False
        finally:
            with self._lock:
                self.n_now -= 1
        if answer.reset:
            no_linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        return not (answer.cut or answer.reset or answer.length is None or answer.raw)

    def _next(self, path: str, headers: dict[str, str]) -> Answer:
        with self._lock:
            self.requests[path] += 1
            self.headers[path] = headers
            self.n_now += 1
            self.n_most = max(self.n_most, self.n_now)
            self.on_request()
            script = self._scripts.get(path, [self.otherwise])
            return script[min(self.requests[path], len(script)) - 1]


@contextmanager
def serving(
    context: ssl.SSLContext | None = None, address: str = "127.0.0.1"
) -> Iterator[HttpServer]:
    """Run a server for a while."""
    server = HttpServer(context, address)
    try:
        yield server
    finally:
        server.close()
