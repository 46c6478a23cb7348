"""Attempts of a run: only the newest may publish checkpoints.

A scheduler may start a run again while an old attempt still lives: on a node that lost its
network, or in a process that ignores signals. Every start takes the next number and writes it to
``ATTEMPT``; before a checkpoint is published or removed the number is compared, on a file system
under a lock, so that a newer attempt begins either before (and the old one stops) or after (and
sees the checkpoint). Attempts write files in folders of their own, so that even without locks,
on an object store, an old attempt can publish nothing but a whole checkpoint of the same run.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dist_decoder.errors import StorageError, SupersededError
from dist_decoder.storage import Storage, explained, json_bytes

ATTEMPT_NAME = "ATTEMPT"
_LOCK_NAME = ".attempt-lock"
_LOCK_WAIT_S = 60.0


@dataclass(frozen=True)
class Fence:
    """The right of one attempt to publish below a place."""

    storage: Storage
    """The folder of checkpoints."""
    number: int
    """1 for the first start of the run."""
    token: str

    @classmethod
    def claim(cls, storage: Storage) -> Fence:
        """Begin a new attempt; older ones may publish nothing from now on.

        Raises:
            StorageError: the place cannot be written, or another start holds its lock.
        """
        token = uuid.uuid4().hex
        with _locked(storage):
            number = int(_current(storage).get("attempt", 0)) + 1
            document = {
                "attempt": number,
                "token": token,
                "host": platform.node(),
                "pid": os.getpid(),
                "started": round(time.time(), 3),
            }
            storage.write(ATTEMPT_NAME, json_bytes(document))
        return cls(storage, number, token)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep newer attempts from beginning while something is published or removed.

        Raises:
            SupersededError: a newer attempt has begun.
        """
        with _locked(self.storage):
            self.check()
            yield

    def check(self) -> None:
        """Raise if a newer attempt has begun.

        Raises:
            SupersededError: so it is.
        """
        current = _current(self.storage)
        if current.get("token") != self.token:
            raise SupersededError(
                f"{self.storage.describe()}: attempt {current.get('attempt')} on "
                f"{current.get('host')} (process {current.get('pid')}) has taken this run over; "
                f"attempt {self.number} publishes no checkpoint and stops. Nothing is to be done "
                "unless it was started by mistake"
            )


def _current(storage: Storage) -> dict[str, Any]:
    if not storage.exists(ATTEMPT_NAME):
        return {}
    try:
        document: dict[str, Any] = json.loads(storage.read(ATTEMPT_NAME))
    except ValueError as error:
        raise StorageError(
            f"{storage.describe()}/{ATTEMPT_NAME} is damaged: delete it when no training runs there"
        ) from error
    return document


@contextmanager
def _locked(storage: Storage) -> Iterator[None]:
    if storage.path is None:
        yield
        return
    path = storage.path / _LOCK_NAME
    with explained(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() - begun > _LOCK_WAIT_S:
                    raise StorageError(
                        f"{path} is locked by another attempt for more than {_LOCK_WAIT_S:.0f} s: "
                        "end it, and start again"
                    ) from error
                time.sleep(0.05)
        yield
