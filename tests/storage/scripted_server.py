"""An HTTP server on loopback that misbehaves by script, for protocol errors only.

It speaks the reads of S3 and checks no signature: what needs a server that does, runs against a
real one (tests/object_store).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer."""

    status: int | None = None
    code: str | None = None
    """The <Code> of the error document."""
    delay_s: float = 0.0
    cut_after: int | None = None
    """Bytes of the body until the connection is closed."""
    etag: str | None = None
    ignore_range: bool = False


@dataclass
class Scripted:
    """A running server: its objects, its script and the requests that came."""

    port: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    """By path, for example ``/bucket/name``."""
    script: Callable[[int, str, str], Fault | None] = lambda number, method, path: None
    """(number of the request, method, path) -> fault."""
    requests: list[tuple[str, str, float]] = field(default_factory=list)
    """(method, path, time)."""
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def scripted_server() -> Iterator[Scripted]:
    """Run a server in a thread."""
    state = Scripted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            with state.lock:
                number = len(state.requests)
                state.requests.append((self.command, path, time.monotonic()))
                state.headers.append({k.title(): v for k, v in self.headers.items()})
                state.in_flight += 1
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
            try:
                fault = state.script(number, self.command, path) or Fault()
                time.sleep(fault.delay_s)
                self._answer(path, fault)
            except OSError:
                # The client has given this request up.
                self.close_connection = True
            finally:
                with state.lock:
                    state.in_flight -= 1

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            path = self.path.partition("?")[0]
            data = self.rfile.read(int(self.headers["Content-Length"]))
            with state.lock:
                number = len(state.requests)
                state.requests.append((self.command, path, time.monotonic()))
                state.headers.append({k.title(): v for k, v in self.headers.items()})
            fault = state.script(number, self.command, path) or Fault()
            if fault.status is None:
                state.objects[path] = data
            self._error(fault) if fault.status else self._send(200, {"ETag": '"1"'}, b"")

        def _answer(self, path: str, fault: Fault) -> None:
            if fault.status is not None:
                self._error(fault)
            elif path not in state.objects:
                self._error(Fault(404, "NoSuchKey"))
            else:
                self._object(state.objects[path], fault)

        def _object(self, data: bytes, fault: Fault) -> None:
            headers = {
                "ETag": f'"{fault.etag or "1"}"',
                "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
            }
            wanted = self.headers.get("Range")
            if wanted is None or fault.ignore_range:
                self._send(200, headers, data, fault.cut_after)
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            if start >= len(data):
                self._error(Fault(416, "InvalidRange"))
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._send(206, headers, data[start:stop], fault.cut_after)

        def _error(self, fault: Fault) -> None:
            body = f"<Error><Code>{fault.code}</Code><Message>m</Message></Error>"
            self._send(fault.status or 500, {}, body.encode() if fault.code else b"")

        def _send(
            self, status: int, headers: dict[str, str], body: bytes, cut_after: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body if cut_after is None else body[:cut_after])
            self.wfile.flush()
            self.close_connection = cut_after is not None or self.close_connection

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
