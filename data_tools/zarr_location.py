"""zarr over an object-store location: its requests are those of ``dist_decoder.storage``.

zarr's own ``ObjectStore`` takes a bare obstore client. Here the retries, hedges, deadlines,
counters and messages of the configuration hold for arrays too, and all arrays share one client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from dist_decoder.errors import StorageError
from dist_decoder.storage import Storage

ResultT = TypeVar("ResultT")

NODE = "zarr.json"
"""Describes an array or a group."""
_THREADS = 32
"""They wait for answers, no more."""
_threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="zarr")


class LocationStore(Store):
    """A place in a location, for zarr.

    Args:
        storage: the location.
        prefix: relative name of the array or group.
        node_last: keep what describes the array back until ``release``, so that an array whose
            writer was killed does not look whole.
        read_only: refuse to write.
    """

    def __init__(
        self, storage: Storage, prefix: str, node_last: bool = False, read_only: bool = False
    ) -> None:
        super().__init__(read_only=read_only)
        self._storage = storage
        self._prefix = prefix
        self._node_last = node_last
        self._node: Buffer | None = None

    def release(self) -> None:
        """Write what was kept back.

        Raises:
            StorageError: the location is not writable.
        """
        if self._node is not None:
            self._storage.write(self._name(NODE), self._node.to_bytes())
            self._node, self._node_last = None, False

    def with_read_only(self, read_only: bool = False) -> LocationStore:
        return LocationStore(self._storage, self._prefix, self._node_last, read_only)

    def __eq__(self, value: object) -> bool:
        return (
            isinstance(value, LocationStore)
            and self._storage is value._storage
            and self._prefix == value._prefix
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"{self._storage.describe()}/{self._prefix}"

    @property
    def supports_writes(self) -> bool:
        return True

    @property
    def supports_deletes(self) -> bool:
        return True

    @property
    def supports_listing(self) -> bool:
        return True

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if key == NODE and self._node is not None:
            return self._node
        try:
            data = await _in_thread(self._read, key, byte_range)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return prototype.buffer.from_bytes(data)

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes:
        name, storage = self._name(key), self._storage
        if byte_range is None:
            return storage.read(name)
        if isinstance(byte_range, RangeByteRequest):
            return storage.read_range(name, byte_range.start, byte_range.end - byte_range.start)
        held = storage.size(name)
        if isinstance(byte_range, SuffixByteRequest):
            size = min(byte_range.suffix, held)
            return storage.read_range(name, held - size, size)
        assert isinstance(byte_range, OffsetByteRequest)
        return storage.read_range(name, byte_range.offset, held - byte_range.offset)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        return list(
            await asyncio.gather(*(self.get(key, prototype, one) for key, one in key_ranges))
        )

    async def exists(self, key: str) -> bool:
        if key == NODE and self._node is not None:
            return True
        return await _in_thread(self._storage.exists, self._name(key))

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        if key == NODE and self._node_last:
            self._node = value
            return
        # The client takes any buffer; a copy of each file would cost a tenth of the time.
        data = cast(bytes, value.as_buffer_like())
        await _in_thread(self._storage.write, self._name(key), data)

    async def delete(self, key: str) -> None:
        self._check_writable()
        await _in_thread(self._storage.remove, self._name(key))

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for name in await _in_thread(self._storage.list, self._prefix):
            key = name.removeprefix(f"{self._prefix}/")
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        shown = set()
        async for key in self.list_prefix(folder):
            shown.add(key.removeprefix(folder).partition("/")[0])
        for name in sorted(shown):
            yield name

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{key}"


async def _in_thread(work: Callable[..., ResultT], *arguments: Any) -> ResultT:
    return await asyncio.get_running_loop().run_in_executor(_threads, work, *arguments)
