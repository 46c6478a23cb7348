"""Which share of the work this process does: worker processes and array tasks divide it alike.

Work is a numbered list; of n processes, process i does numbers i, i + n, i + 2n ... The list does
not depend on n, so that any division gives the same bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from data_tools.markers import MARKERS
from dist_decoder.errors import ConfigError, StorageError
from dist_decoder.storage import Storage, exclusive

ConfigT = TypeVar("ConfigT")
_PAUSE_S = 0.01
_SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")


@dataclass(frozen=True)
class Share:
    """Process ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    @property
    def is_all(self) -> bool:
        return self.count == 1

    def has(self, number: int) -> bool:
        """Return whether a piece of work is of this share."""
        return number % self.count == self.index

    def divided(self, workers: int) -> list[Share]:
        """Return the shares of the worker processes that do this share together."""
        return [
            Share(self.index * workers + worker, self.count * workers) for worker in range(workers)
        ]

    def __str__(self) -> str:
        return f"{self.index:04d}-of-{self.count:04d}"


def own_share(part: str | None, key: str) -> Share:
    """Return the share that a configuration names.

    Args:
        part: ``i/n`` with i from 0, ``slurm`` for the task of an array job, None for all.
        key: of the configuration, for messages.

    Raises:
        ConfigError: i is not below n, or the process is no task of an array job with step 1.
    """
    if part is None:
        return Share()
    if part == "slurm":
        missing = [name for name in _SLURM if not os.environ.get(name, "").isdigit()]
        if missing:
            raise ConfigError(
                f"{key}=slurm: {', '.join(missing)} is not set; submit with `sbatch --array=0-15`,"
                " or name the part as i/n"
            )
        task, first, count = (int(os.environ[name]) for name in _SLURM)
        share = Share(task - first, count)
    else:
        index, _, total = part.partition("/")
        share = Share(int(index), int(total))
    if share.index >= share.count:
        raise ConfigError(
            f"{key}={part}: part {share.index} of {share.count} does not exist; parts count from 0,"
            " and an array job from its first task in steps of 1"
        )
    return share


@contextmanager
def held(storage: Storage, share: Share, action: str) -> Iterator[None]:
    """Hold a folder, or one part of it, against other commands of this machine.

    An object store has no locks: two calls with the same inputs write the same bytes there.

    Raises:
        StorageError: another process works on the folder or on the same part of it.
    """
    if storage.path is None:
        yield
    elif share.is_all:
        with exclusive(storage.path, action):
            yield
    else:
        with (
            exclusive(storage.path, action, shared=True),
            exclusive(storage.path / MARKERS / str(share), f"{action} of part {share}"),
        ):
            yield


def write_same(storage: Storage, name: str, data: bytes) -> None:
    """Write a file that other processes may write at the same time with the same bytes.

    Raises:
        StorageError: the location is not writable.
    """
    while True:
        try:
            storage.write(name, data)
        except StorageError as error:
            # In a folder a lock keeps the writers of a file apart.
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            if storage.exists(name):
                return
            time.sleep(_PAUSE_S)
        else:
            return


def run_workers(work: Callable[[ConfigT, Share], int], config: ConfigT, shares: list[Share]) -> int:
    """Run ``work(config, share)`` in one spawned process per share and return the sum.

    The first error is raised, and the other processes are stopped.

    Spawned, not forked: clients of object stores and threads do not survive a fork.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(shares)) as pool:
        return sum(pool.starmap(work, [(config, share) for share in shares], chunksize=1))
