"""An object store as a location, through obstore."""

from __future__ import annotations

import asyncio
import builtins
import os
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import StorageError
from dist_decoder.storage.attempts import Attempts
from dist_decoder.storage.client import import_obstore, open_client, submit, wait_for
from dist_decoder.storage.protocol import ByteRange, Storage, checked_name, complete

_S3_PART_BYTES = 5 << 20
"""The smallest part of an upload that S3 accepts."""
_WHOLE_AT_ONCE = 4
"""A file of up to so many parts is read by one request."""
_PIECES_AHEAD = 8

OpenClient = Callable[[bool], Any]
"""Makes an obstore client; the argument says whether the client itself asks again."""


class ObjectStorage(Storage):
    """An object-store prefix.

    Args:
        url: without secrets; also the name in messages.
        policy: retries, deadlines, hedges.
        open_store: makes a client; None opens the URL with the credentials of the environment.
    """

    def __init__(
        self, url: str, policy: StorageConfig | None = None, open_store: OpenClient | None = None
    ) -> None:
        super().__init__()
        self._obstore = import_obstore("obstore")
        self._url = url.rstrip("/")
        self._policy = policy or StorageConfig()
        self._open_store = open_store or partial(open_client, self._url, self._policy)
        self._attempts = Attempts(self._policy, self._log, self._url)
        self._part_bytes = max(int(self._policy.part_mb * (1 << 20)), 1)
        # Opened here, so that a URL that makes no client is an error at once.
        self._reader = self._open_store(False)
        self._writer = self._open_store(True)

    def __reduce__(self) -> tuple[Any, ...]:
        # A client cannot cross to another process; one that is spawned opens its own.
        return (ObjectStorage, (self._url, self._policy))

    def read(self, name: str) -> bytes:
        return wait_for(self._read_whole(checked_name(name)))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return bytes(self.read_ranges(name, [(offset, size)])[0])

    def read_ranges(self, name: str, ranges: Sequence[ByteRange]) -> builtins.list[memoryview]:
        return wait_for(self._read_ranges(checked_name(name), ranges))

    def ask_for_ranges(
        self, name: str, ranges: Sequence[ByteRange]
    ) -> Future[builtins.list[memoryview]]:
        return submit(self._read_ranges(checked_name(name), ranges))

    def stream(self, name: str, offset: int, size: int) -> Iterator[bytes]:
        name = checked_name(name)
        starts = iter(range(offset, offset + size, self._part_bytes))
        ahead: deque[Future[tuple[memoryview, str | None]]] = deque()
        version: str | None = None

        def ask_for_one_more() -> None:
            start = next(starts, None)
            if start is not None:
                part = min(self._part_bytes, offset + size - start)
                ahead.append(submit(self._read_part(name, start, part)))

        try:
            for _ in range(_PIECES_AHEAD):
                ask_for_one_more()
            while ahead:
                piece, found = ahead.popleft().result()
                version = self._same_version(name, version, found)
                ask_for_one_more()
                yield bytes(piece)
        finally:
            for future in ahead:
                future.cancel()

    def write(self, name: str, data: bytes) -> None:
        wait_for(self._put(checked_name(name), data))
        self._log.add(bytes_written=len(data))

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        # Without a name: nothing of it outlives a process that is killed.
        with tempfile.TemporaryFile() as file:
            yield file
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            wait_for(self._put(checked_name(name), file))
            self._log.add(bytes_written=size)

    def remove(self, name: str) -> None:
        name = checked_name(name)
        try:
            wait_for(self._run(name, partial(self._obstore.delete_async, self._writer, name)))
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def list(self, prefix: str = "") -> list[str]:
        return wait_for(self._run(prefix, partial(self._list, prefix.strip("/") or None)))

    def size(self, name: str) -> int:
        return wait_for(self._size(checked_name(name)))

    def describe(self) -> str:
        return self._url

    # On the event loop

    async def _run(self, name: str, attempt: Callable[[], Awaitable[Any]]) -> Any:
        return await self._attempts.run(name, attempt, hedge_bytes=None)

    async def _read_whole(self, name: str) -> bytes:
        async def attempt() -> tuple[bytes | None, int]:
            result = await self._obstore.get_async(self._reader, name)
            size = int(result.meta["size"])
            if size > _WHOLE_AT_ONCE * self._part_bytes:
                return None, size
            return bytes(_whole(await result.bytes_async(), size)), size

        data, size = await self._attempts.run(name, attempt, hedge_bytes=self._part_bytes)
        if data is None:
            return bytes((await self._read_ranges(name, [(0, size)]))[0])
        self._log.add(bytes_read=size)
        return data

    async def _read_ranges(
        self, name: str, ranges: Sequence[ByteRange]
    ) -> builtins.list[memoryview]:
        parts = [list(self._parts(offset, size)) for offset, size in ranges]
        work = [
            asyncio.ensure_future(self._read_part(name, *part)) for found in parts for part in found
        ]
        try:
            answers = iter(await asyncio.gather(*work))
        finally:
            for task in work:
                task.cancel()
        results: builtins.list[memoryview] = []
        version: str | None = None
        for found in parts:
            pieces = []
            for _ in found:
                piece, its_version = next(answers)
                version = self._same_version(name, version, its_version)
                pieces.append(piece)
            results.append(pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces)))
        return results

    def _parts(self, offset: int, size: int) -> Iterator[ByteRange]:
        for start in range(offset, offset + size, self._part_bytes):
            yield start, min(self._part_bytes, offset + size - start)

    async def _read_part(self, name: str, offset: int, size: int) -> tuple[memoryview, str | None]:
        """Return a range and what identifies the version of the object."""

        async def attempt() -> tuple[memoryview, int, str | None]:
            result = await self._obstore.get_async(
                self._reader, name, options={"range": (offset, offset + size)}
            )
            held = int(result.meta["size"])
            expected = min(size, max(held - offset, 0))
            return _whole(await result.bytes_async(), expected), held, result.meta["e_tag"]

        data, held, version = await self._attempts.run(name, attempt, hedge_bytes=size)
        complete(data, size, f"{self._url}/{name} (of {held} bytes) at byte {offset}")
        self._log.add(bytes_read=size)
        return data, version

    def _same_version(self, name: str, first: str | None, found: str | None) -> str | None:
        if first is not None and found is not None and first != found:
            raise StorageError(
                f"{self._url}/{name} was replaced while it was being read; start again"
            )
        return found if first is None else first

    async def _put(self, name: str, data: bytes | IO[bytes]) -> None:
        chunk = max(self._part_bytes, _S3_PART_BYTES)
        attempt = partial(
            self._obstore.put_async, self._writer, name, data, chunk_size=chunk, max_concurrency=8
        )
        # The client asks again by itself, part by part, and a big upload takes its time.
        await self._attempts.run_once(name, attempt)

    async def _list(self, prefix: str | None) -> builtins.list[str]:
        pages = self._obstore.list(self._reader, prefix=prefix)
        return sorted([entry["path"] async for page in pages for entry in page])

    async def _size(self, name: str) -> int:
        meta = await self._attempts.run(
            name,
            partial(self._obstore.head_async, self._reader, name),
            hedge_bytes=0,
            explain=partial(self._obstore.get_async, self._reader, name),
        )
        return int(meta["size"])


def _whole(body: Any, size: int) -> memoryview:
    """Return a body of the promised length; a shorter one was cut and is asked for again.

    The client's own memory, not a copy of it.
    """
    data = memoryview(body)
    if len(data) != size:
        raise ConnectionError(f"the body was cut after {len(data)} of {size} bytes")
    return data
