"""Log files of ranks: one is copied to the terminal while it grows; any can be tailed."""

from __future__ import annotations

import threading
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


def tail(path: Path, offset: int, num_lines: int) -> list[str]:
    """Return the last lines of a log file written after ``offset`` bytes."""
    with path.open("rb") as log:
        end = log.seek(0, 2)
        log.seek(max(offset, end - num_lines * 4096))
        text = log.read().decode("utf-8", errors="replace")
    return text.splitlines()[-num_lines:]
