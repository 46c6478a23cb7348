"""Log files of ranks: copied to the terminal or merged while they grow; any can be tailed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

_POLL_S = 0.1
_CHUNK_BYTES = 1 << 16


class Follower:
    """Copies what is appended to a file to a stream until ``close``."""

    def __init__(self, path: Path, offset: int, stream: BinaryIO) -> None:
        self._path = path
        self._offset = offset
        self._stream = stream
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy the rest and stop."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._path.open("rb") as log:
            log.seek(self._offset)
            while True:
                stopping = self._stop.is_set()
                while chunk := log.read(_CHUNK_BYTES):
                    try:
                        self._stream.write(chunk)
                        self._stream.flush()
                    except (BrokenPipeError, ValueError):
                        # The reader of our output went away; the log file still has it all.
                        return
                if stopping:
                    return
                self._stop.wait(_POLL_S)


class Merger:
    """Copies whole lines of the logs of several ranks into one file, with the time they came.

    A line of the merged file is ``2026-01-31T12:00:00.000 rank 3| text``.
    """

    def __init__(self, logs: Mapping[int, Path], merged: Path) -> None:
        self._logs = dict(logs)
        self._merged = merged
        self._offsets = {rank: log.stat().st_size for rank, log in self._logs.items()}
        self._rest = dict.fromkeys(self._logs, b"")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy the rest, unfinished lines included, and stop."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._merged.open("ab", buffering=0) as merged:
            while True:
                stopping = self._stop.is_set()
                for rank in self._logs:
                    if lines := self._new_lines(rank, stopping):
                        merged.write(lines)
                if stopping:
                    return
                self._stop.wait(_POLL_S)

    def _new_lines(self, rank: int, stopping: bool) -> bytes:
        with self._logs[rank].open("rb") as log:
            log.seek(self._offsets[rank])
            data = log.read()
        self._offsets[rank] += len(data)
        *lines, rest = (self._rest[rank] + data).split(b"\n")
        if stopping and rest:
            lines, rest = [*lines, rest], b""
        self._rest[rank] = rest
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        start = f"{now} rank {rank}| ".encode()
        return b"".join(start + line + b"\n" for line in lines)


def tail(path: Path, offset: int, num_lines: int) -> list[str]:
    """Return the last lines of a log file written after ``offset`` bytes."""
    with path.open("rb") as log:
        end = log.seek(0, 2)
        log.seek(max(offset, end - num_lines * 4096))
        text = log.read().decode("utf-8", errors="replace")
    return text.splitlines()[-num_lines:]
