"""The normalisation statistics of a subject, computed once for all processes that need them.

Fitting them takes all betas of the subject. The processes that pack shards together therefore leave
them beside the shards until everything is finished. The checksums of the rows go with them: who
reads some rows later need not read whole sessions to know that they are right.

Axes: N trials, V voxels of one subject, U units.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from data_tools.markers import MARKERS
from data_tools.normalise import VoxelStatistics, fit_statistics
from data_tools.share import Share, write_same
from data_tools.split_file import Split
from data_tools.store import Store
from dist_decoder.config.data import ShardConfig
from dist_decoder.config.progress import progress
from dist_decoder.errors import FormatError, StorageError
from dist_decoder.manifest import encode_npz
from dist_decoder.storage import Storage


@dataclass(frozen=True)
class FittedSubject:
    """What the betas of a subject were found to be."""

    statistics: VoxelStatistics
    crc32_N: NDArray[np.uint32]
    """Of the bytes of every row of raw betas."""


def row_checksums(values_NV: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return (N,) the CRC-32 of the bytes of every row."""
    values_NV = np.ascontiguousarray(values_NV)
    return np.array([crc32(row.data) for row in values_NV], dtype=np.uint32)


def fit_subjects(
    store: Store,
    split: Split,
    dataset: str,
    config: ShardConfig,
    storage: Storage,
    recipe: str,
    share: Share,
) -> dict[str, FittedSubject]:
    """Return the statistics of all subjects of a dataset.

    Every process begins with another subject and takes what others have left by then, so that
    processes that start together divide the reading.

    Args:
        store: the betas, whose checksums are compared.
        split: training rows.
        dataset: its name.
        config: of the normalisation.
        storage: where the shards are written.
        recipe: identifies everything that the shards are made from.
        share: of this process.

    Raises:
        DataError: too few training rows.
        FormatError: the store is damaged, or what another process left.
        SplitError: the split does not fit the trials.
    """
    subjects = store.subjects(dataset)
    first = share.index * len(subjects) // share.count
    fitted = {}
    with progress(f"statistics {dataset}", len(subjects)) as counter:
        for subject in (*subjects[first:], *subjects[:first]):
            name = f"{MARKERS}/statistics-{recipe}/{dataset}-{subject}.npz"
            held = _left_by_others(storage, name)
            if held is None:
                held = _fit(store, split, dataset, subject, config)
                write_same(storage, name, _encode(held))
            fitted[subject] = held
            counter.advance()
    return {subject: fitted[subject] for subject in subjects}


def _fit(
    store: Store, split: Split, dataset: str, subject: str, config: ShardConfig
) -> FittedSubject:
    trials = store.trials(dataset, subject)
    split_N = split.row_splits(dataset, subject, trials)
    betas = _Sessions(store, dataset, subject, trials)
    where = f"{dataset}/{subject}"
    statistics = fit_statistics(trials, betas, split_N == "train", config, where)
    return FittedSubject(statistics, betas.crc32_N)


class _Sessions(Mapping[int, NDArray[np.float32]]):
    """Session -> (n, V) raw betas, read when asked for; their checksums are kept."""

    def __init__(self, store: Store, dataset: str, subject: str, trials: pd.DataFrame) -> None:
        self._store, self._dataset, self._subject = store, dataset, subject
        self._session_N = trials["session"].to_numpy()
        self.crc32_N: NDArray[np.uint32] = np.zeros(len(trials), dtype=np.uint32)

    def __getitem__(self, session: int) -> NDArray[np.float32]:
        values_NV = self._store.betas(self._dataset, self._subject, session)
        self.crc32_N[self._session_N == session] = row_checksums(values_NV)
        return values_NV

    def __iter__(self) -> Iterator[int]:
        return iter(self._store.sessions(self._dataset, self._subject))

    def __len__(self) -> int:
        return len(self._store.sessions(self._dataset, self._subject))


def _encode(fitted: FittedSubject) -> bytes:
    found = fitted.statistics
    return encode_npz(
        {
            "normalise": np.array(found.normalise),
            "units": _texts(found.units),
            "mean_UV": found.mean_UV,
            "std_UV": found.std_UV,
            "subject_mean_V": found.subject_mean_V,
            "subject_std_V": found.subject_std_V,
            "fallback": _texts(found.fallback),
            "crc32_N": fitted.crc32_N,
        }
    )


def _texts(values: Sequence[str]) -> NDArray[np.str_]:
    return np.array(values, dtype=np.str_) if values else np.empty(0, dtype="<U1")


def _left_by_others(storage: Storage, name: str) -> FittedSubject | None:
    try:
        data = storage.read(name)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            statistics = VoxelStatistics(
                normalise=str(held["normalise"]),
                units=tuple(held["units"].tolist()),
                mean_UV=held["mean_UV"],
                std_UV=held["std_UV"],
                subject_mean_V=held["subject_mean_V"],
                subject_std_V=held["subject_std_V"],
                fallback=tuple(held["fallback"].tolist()),
            )
            return FittedSubject(statistics, held["crc32_N"])
    except Exception as error:  # numpy and zipfile raise their own types
        raise FormatError(
            f"{storage.describe()}/{name} is damaged ({error}); remove it and run the command again"
        ) from error
