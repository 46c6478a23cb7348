"""Betas of sessions -> store, here or in parallel processes. Complete sessions are kept.

A session is read whole, checked and written by one process; nothing but its name and its outcome
passes between processes. Memory is thus one session per process.

Axes: N trials of one session, V voxels of one subject.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.protocol import Dataset
from data_tools.store_writer import StoreWriter
from dist_decoder.config.data import DatasetConfig
from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import DataError

OpenReader = Callable[[DatasetConfig], Dataset]


@dataclass(frozen=True)
class Outcome:
    """What became of one session."""

    session: int
    state: Literal["written", "kept", "replaced"]
    invalid_voxels: int
    """Voxels without a value in the whole session."""


@dataclass(frozen=True)
class _Task:
    subject: str
    session: int
    wanted: dict[str, Any]
    """What identifies the array: source, rows, voxels."""
    state: Literal["written", "replaced"]


class SessionIngest:
    """Brings the sessions of one dataset into the store.

    A context manager: processes are started when two sessions or more are to be read, and end with
    the block.
    """

    def __init__(
        self,
        store: StoreWriter,
        config: DatasetConfig,
        open_reader: OpenReader,
        reader: Dataset,
        workers: int,
    ) -> None:
        self._store, self._config, self._open_reader = store, config, open_reader
        self._reader, self._workers = reader, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> SessionIngest:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, subject: str, rows: Mapping[int, int], num_voxels: int) -> Iterator[Outcome]:
        """Yield the outcome of every session, in the order in which they are done.

        Args:
            subject: its name.
            rows: session -> number of trials.
            num_voxels: of the subject.

        Raises:
            DataError: a session does not hold what the tables say, or a process was killed.
        """
        dataset = self._config.dataset
        tasks = []
        for session, count in rows.items():
            source = self._reader.fingerprint(subject, session)
            wanted = {"source": source, "rows": count, "voxels": num_voxels}
            held = self._store.held_session(dataset, subject, session)
            if held is not None and {key: held.get(key) for key in wanted} == wanted:
                yield Outcome(session, "kept", int(held["invalid_voxels"]))
            else:
                state: Literal["written", "replaced"] = "written" if held is None else "replaced"
                tasks.append(_Task(subject, session, wanted, state))
        if self._workers == 1 or len(tasks) < 2:
            for task in tasks:
                yield _ingest(self._store, self._reader, dataset, task)
        else:
            yield from self._parallel(tasks)

    def _parallel(self, tasks: list[_Task]) -> Iterator[Outcome]:
        if self._pool is None:
            # Not forked: libraries behind zarr have threads, whose locks a fork would copy.
            self._pool = ProcessPoolExecutor(
                self._workers,
                multiprocessing.get_context("spawn"),
                _start,
                (self._store.place, self._store.policy, self._config, self._open_reader),
            )
        try:
            for future in as_completed([self._pool.submit(_ingest_here, task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{self._config.dataset}: a process of ingest was killed, perhaps for want of "
                f"memory; set ingest.workers below {self._workers} and call again: finished "
                "sessions are kept"
            ) from error


_worker: tuple[StoreWriter, Dataset, str] | None = None


def _start(
    place: str | Path, policy: StorageConfig | None, config: DatasetConfig, open_reader: OpenReader
) -> None:
    global _worker
    _worker = StoreWriter(place, policy), open_reader(config), config.dataset
    # A killed parent closes no queue that the workers wait on: without this they stay for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ingest_here(task: _Task) -> Outcome:
    assert _worker is not None
    store, reader, dataset = _worker
    return _ingest(store, reader, dataset, task)


def _ingest(store: StoreWriter, reader: Dataset, dataset: str, task: _Task) -> Outcome:
    betas_NV = reader.betas(task.subject, task.session)
    shape = (task.wanted["rows"], task.wanted["voxels"])
    where = f"{dataset}/{task.subject} session {task.session}"
    count = int(_invalid_voxels(where, betas_NV, shape).sum())
    attributes = {**task.wanted, "invalid_voxels": count}
    store.put_betas(dataset, task.subject, task.session, betas_NV, attributes)
    return Outcome(task.session, task.state, count)


def _invalid_voxels(
    where: str, betas_NV: NDArray[np.float32], shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Return (V,) voxels that are NaN in every trial.

    Raises:
        DataError: another dtype or shape, NaN in some trials of a voxel, or infinity.
    """
    if betas_NV.dtype != np.float32:
        raise DataError(f"{where}: betas are {betas_NV.dtype}; the reader must give float32")
    if betas_NV.shape != shape:
        raise DataError(
            f"{where}: betas have shape {betas_NV.shape}; trial and voxel table say {shape}"
            " (trials, voxels)"
        )
    missing_NV = np.isnan(betas_NV)
    invalid_V = np.asarray(missing_NV.all(axis=0))
    if invalid_V.all():
        raise DataError(
            f"{where}: every value of the session is NaN; repair the file, or leave the session out"
        )
    for wrong_NV, what in (
        (missing_NV & ~invalid_V, "NaN"),
        (np.isinf(betas_NV), "infinite"),
    ):
        if wrong_NV.any():
            trial, voxel = np.argwhere(wrong_NV)[0]
            raise DataError(
                f"{where}: beta of trial {trial} (within the session), voxel {voxel} is {what};"
                f" {int(wrong_NV.sum())} such values. Only a voxel that is NaN in every trial of a"
                " session is allowed: mend the file or exclude the voxel by an ROI"
            )
    return invalid_V
