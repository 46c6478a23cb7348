"""An HTTP proxy that spoils what passes through it, in a process of its own.

GET requests are spoiled at random, by seed: refused with 500 or 503, held up, cut in the middle
of the body, or answered with a wrong byte. Everything else passes as it is.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import urllib.request
from dataclasses import asdict, dataclass

_STATISTICS = "/_faults"
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Faults:
    """Shares of the GET requests that are spoiled."""

    fail_prob: float = 0.0
    """Answered with 500 or 503."""
    stall_prob: float = 0.0
    stall_s: float = 5.0
    """Held up for so long in the middle of the body."""
    reset_prob: float = 0.0
    """Connection reset in the middle of the body."""
    wrong_prob: float = 0.0
    """One byte of the body inverted."""
    seed: int = 0


class FaultProxy:
    """A running proxy; ``close`` it, or use it in a ``with`` statement."""

    def __init__(self, upstream_port: int, faults: Faults) -> None:
        command = [sys.executable, __file__, str(upstream_port), json.dumps(asdict(faults))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def injected(self) -> dict[str, int]:
        """Return how often each fault happened, and the number of GET requests."""
        with urllib.request.urlopen(self.endpoint + _STATISTICS, timeout=10) as answer:
            counts: dict[str, int] = json.load(answer)
        return counts

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server:
    def __init__(self, upstream_port: int, faults: Faults) -> None:
        self._upstream_port = upstream_port
        self._faults = faults
        self._random = random.Random(faults.seed)
        self._counts = dict.fromkeys(("gets", "fail", "stall", "reset", "wrong"), 0)

    def _draw(self) -> str | None:
        self._counts["gets"] += 1
        at = self._random.random()
        for name in ("fail", "stall", "reset", "wrong"):
            at -= getattr(self._faults, f"{name}_prob")
            if at < 0:
                self._counts[name] += 1
                return name
        return None

    async def serve(self, client_in: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        server: asyncio.StreamWriter | None = None
        try:
            while head := await _head(client_in):
                method, path = head.split(b" ", 2)[:2]
                if path == _STATISTICS.encode():
                    await _answer(client, 200, json.dumps(self._counts).encode())
                    continue
                fault = self._draw() if method == b"GET" else None
                if fault == "fail":
                    await _answer(client, self._random.choice((500, 503)), b"injected")
                    continue
                if server is None:
                    server_in, server = await asyncio.open_connection(
                        "127.0.0.1", self._upstream_port
                    )
                server.write(head)
                await _relay(client_in, server, head, has_body=b"expect:" not in head.lower())
                await self._respond(server_in, client, method, fault)
        except (OSError, asyncio.IncompleteReadError):
            # The client went away, the server was killed, or this is the injected reset: the
            # other side sees its connection end.
            client.transport.abort()
        finally:
            client.close()
            if server is not None:
                server.close()

    async def _respond(
        self,
        server_in: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        method: bytes,
        fault: str | None,
    ) -> None:
        head = await _head(server_in)
        if not head:
            raise ConnectionResetError
        client.write(head)
        status = int(head.split(b" ", 2)[1])
        if method == b"HEAD" or status in (204, 304) or 100 <= status < 200:
            await client.drain()
            return
        length = _length(head)
        if fault is None or length is None or length < 2:
            await _relay(server_in, client, head)
            return
        half = length // 2
        await _copy(server_in, client, half)
        if fault == "reset":
            raise ConnectionResetError
        if fault == "stall":
            await asyncio.sleep(self._faults.stall_s)
        if fault == "wrong":
            byte = await server_in.readexactly(1)
            client.write(bytes([byte[0] ^ 0xFF]))
            half += 1
        await _copy(server_in, client, length - half)


async def _head(source: asyncio.StreamReader) -> bytes:
    try:
        return await source.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return None


def _length(head: bytes) -> int | None:
    found = _header(head, b"content-length")
    return None if found is None else int(found)


async def _relay(
    source: asyncio.StreamReader, target: asyncio.StreamWriter, head: bytes, has_body: bool = True
) -> None:
    if has_body and (_header(head, b"transfer-encoding") or b"").lower() == b"chunked":
        size = 1
        while size:
            line = await source.readuntil(b"\r\n")
            target.write(line)
            size = int(line.split(b";")[0], 16)
            await _copy(source, target, size + 2)
    else:
        await _copy(source, target, _length(head) or 0 if has_body else 0)


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, size: int) -> None:
    while size:
        block = await source.read(min(size, _BLOCK))
        if not block:
            raise ConnectionResetError
        size -= len(block)
        target.write(block)
        await target.drain()
    await target.drain()


async def _answer(client: asyncio.StreamWriter, status: int, body: bytes) -> None:
    client.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)
    await client.drain()


async def _main(upstream_port: int, faults: Faults) -> None:
    server = await asyncio.start_server(
        _Server(upstream_port, faults).serve, "127.0.0.1", 0, limit=4 * _BLOCK
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), Faults(**json.loads(sys.argv[2]))))
