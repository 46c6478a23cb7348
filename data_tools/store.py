"""The store: raw datasets as zarr 3, in their own unit, one array per session.

    <store>/<dataset>/dataset.json                 facts and counts, written last
    <store>/<dataset>/<subject>.zarr/betas/<n>     (N, V) float32 of session n
    <store>/<dataset>/<subject>.zarr/trials        (N, columns) int32, text columns as codes
    <store>/<dataset>/<subject>.zarr/voxels/...    xyz (V, 3), rois (ROI, V), ncsnr (V,)
    <store>/stimuli/<dataset>.zarr/images/<block>  (M, H, W, 3) uint8, equal sizes in a block
    <store>/embeddings, synthetic, split.json      see their modules

It lies in a folder or in an object store. ``store_writer`` writes it.

Axes: N trials, V voxels of one subject, M images of a block, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.protocol import TRIAL_COLUMNS, Stimulus, VoxelTable
from data_tools.store_pictures import Pictures
from data_tools.zarr_arrays import (
    open_array,
    read_array,
    read_attributes,
    read_group,
    read_rows,
)
from dist_decoder.config.base import fingerprint
from dist_decoder.config.data import DataConfig
from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import DataError, FormatError, StorageError
from dist_decoder.storage import open_location

if TYPE_CHECKING:
    from data_tools.embedding_store import EmbeddingStore

STORE_FORMAT = "dist-decoder-store"
STORE_VERSION = 1
COLUMNS = (*TRIAL_COLUMNS, "image_uid")


class Store:
    """Reads a store.

    Args:
        place: a folder, or a URL of an object store. Nothing is listed there unless all datasets
            of the store are asked for, and tables are read once.
        policy: of requests to an object store.
    """

    def __init__(self, place: str | Path, policy: StorageConfig | None = None) -> None:
        self.place = place
        self.policy = policy
        self.storage = open_location(place, policy)
        self._pictures = Pictures(self.storage)
        self._stimuli: dict[str, tuple[Stimulus, ...]] = {}
        # Of an object store only; who waits for a folder?
        self._tables: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        """The folder.

        Raises:
            StorageError: the store lies in an object store.
        """
        if self.storage.path is None:
            raise StorageError(f"{self.storage.describe()} is not a folder; name a local store")
        return self.storage.path

    def datasets(self) -> tuple[str, ...]:
        """Return the names of the completely ingested datasets, sorted."""
        if self.storage.path is not None:
            found = [path.parent.name for path in self.storage.path.glob("*/dataset.json")]
        else:
            parts = [name.split("/") for name in self.storage.list()]
            found = [part[0] for part in parts if part[1:] == ["dataset.json"]]
        return tuple(sorted(found))

    def require(self, datasets: Iterable[str]) -> tuple[str, ...]:
        """Return ``datasets`` sorted; all of them when empty.

        Raises:
            DataError: one of them, or every one, is missing or was not ingested completely.
        """
        wanted = tuple(sorted(datasets)) or self.datasets()
        missing = [name for name in wanted if not self._is_complete(name)]
        if missing or not wanted:
            held = ""
            if self.storage.path is not None:
                held = f" (complete: {', '.join(self.datasets()) or 'none'})"
            raise DataError(
                f"{self.storage.describe()}: dataset {', '.join(missing) or '(any)'} is missing or"
                f" incomplete{held}; run `data-tools ingest` first"
            )
        return wanted

    def _is_complete(self, dataset: str) -> bool:
        return dataset in self._tables or self.storage.exists(f"{dataset}/dataset.json")

    def facts(self, dataset: str) -> dict[str, Any]:
        """Return ``dataset.json``: unit, licence, citation, has_images, counts per subject.

        Raises:
            DataError: the dataset is missing or was not ingested completely.
            FormatError: it was written in another format.
        """
        if dataset in self._tables:
            return dict(self._tables[dataset])
        self.require([dataset])
        where = f"{self.storage.describe()}/{dataset}/dataset.json"
        try:
            facts = json.loads(self.storage.read(f"{dataset}/dataset.json"))
        except ValueError as error:
            raise FormatError(f"{where} is not JSON ({error}); ingest the dataset again") from error
        if (facts.get("format"), facts.get("version")) != (STORE_FORMAT, STORE_VERSION):
            raise FormatError(
                f"{where}: format {facts.get('format')!r} version {facts.get('version')}; this"
                f" program reads {STORE_FORMAT!r} version {STORE_VERSION}; ingest again"
            )
        if self.storage.path is None:
            self._tables[dataset] = facts
        return dict(facts)

    def subjects(self, dataset: str) -> tuple[str, ...]:
        """Return the subjects of a dataset, in the order of the reader.

        Raises:
            DataError: the dataset is missing or was not ingested completely.
        """
        return tuple(entry["subject"] for entry in self.facts(dataset)["subjects"])

    def sessions(self, dataset: str, subject: str) -> tuple[int, ...]:
        """Return the 1-based sessions that the trial table names."""
        return tuple(sorted(set(self.trials(dataset, subject)["session"].tolist())))

    def trials(self, dataset: str, subject: str) -> pd.DataFrame:
        """Return one row per trial in recording order, columns ``COLUMNS``.

        Raises:
            FormatError: the table is missing or damaged.
        """
        place = f"{subject_name(dataset, subject)}/trials"
        if place in self._tables:
            return self._tables[place].copy()
        codes, attributes = read_array(self.storage, place)
        table = {}
        for index, name in enumerate(attributes["columns"]):
            values: NDArray[Any] = codes[:, index].astype(np.int64)
            if name in attributes["labels"]:
                values = np.array([*attributes["labels"][name], ""], dtype=object)[values]
            table[name] = values
        trials = pd.DataFrame(table, columns=list(attributes["columns"]))
        if self.storage.path is None:
            self._tables[place] = trials.copy()
        return trials

    def betas(self, dataset: str, subject: str, session: int) -> NDArray[np.float32]:
        """Return (N, V) responses of a session in the dataset's own unit.

        A voxel that is invalid in the session is NaN in every row.

        Raises:
            FormatError: the session is missing, or a chunk is missing, truncated or damaged.
        """
        return read_array(self.storage, betas_name(dataset, subject, session))[0]

    def betas_rows(
        self, dataset: str, subject: str, session: int, rows: slice | NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Return (n, V) some rows of a session; only their chunks are read, and not checked.

        Args:
            dataset: its name.
            subject: its name.
            session: from 1 on.
            rows: within the session.

        Raises:
            FormatError: the session is missing, or a chunk is truncated or damaged.
        """
        name = betas_name(dataset, subject, session)
        stored, _ = open_array(self.storage, name)
        return read_rows(f"{self.storage.describe()}/{name}", stored, rows)

    def voxels(self, dataset: str, subject: str) -> VoxelTable:
        """Return the voxel table.

        Raises:
            FormatError: it is missing or damaged.
        """
        name = f"{subject_name(dataset, subject)}/voxels"
        attributes = read_group(self.storage, name)
        masks, names = read_array(self.storage, f"{name}/rois")
        has_ncsnr = attributes["has_ncsnr"]
        return VoxelTable(
            xyz_V3=read_array(self.storage, f"{name}/xyz")[0],
            rois=dict(zip(names["names"], masks, strict=True)),
            ncsnr_V=read_array(self.storage, f"{name}/ncsnr")[0] if has_ncsnr else None,
            mask_fingerprint=attributes["mask_fingerprint"],
        )

    def mask_fingerprint(self, dataset: str, subject: str) -> str:
        """Return what identifies the voxels of a subject.

        Raises:
            FormatError: the voxel table is missing or damaged.
        """
        table = read_group(self.storage, f"{subject_name(dataset, subject)}/voxels")
        return str(table["mask_fingerprint"])

    def stimuli(self, dataset: str) -> tuple[Stimulus, ...]:
        """Return the unique stimuli in the order of the reader.

        Raises:
            FormatError: the table is missing or damaged.
        """
        if dataset not in self._stimuli:
            table = read_group(self.storage, stimuli_name(dataset))["stimuli"]
            self._stimuli[dataset] = tuple(
                Stimulus(**{**row, "categories": tuple(row["categories"])}) for row in table
            )
        return self._stimuli[dataset]

    def image_sources(self, datasets: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
        """Return image_uid -> (dataset, stimulus_id) of a picture, each uid once.

        Where datasets share an image, the first dataset by name gives the picture. The order is
        that of the files: reading pictures in this order reads each chunk once.
        """
        found: dict[str, tuple[str, str]] = {}
        for dataset in self.require(datasets):
            if self.facts(dataset)["has_images"]:
                for stimulus in self.stimuli(dataset):
                    found.setdefault(stimulus.image_uid, (dataset, stimulus.stimulus_id))
        return found

    def image(self, dataset: str, stimulus_id: str) -> NDArray[np.uint8]:
        """Return (H, W, 3) uint8 RGB pixels.

        Raises:
            DataError: the stimulus is unknown or the dataset has no pictures.
            FormatError: its chunk is missing, truncated or damaged.
        """
        return self._pictures.read([(dataset, stimulus_id)])[0]

    def images(self, places: Sequence[tuple[str, str]]) -> list[NDArray[np.uint8]]:
        """Return the pixels of several (dataset, stimulus_id); chunks are asked for together.

        Raises: as ``image``.
        """
        return self._pictures.read(places)

    def content(self, dataset: str, subject: str) -> str:
        """Return 16 hex digits that identify trials and betas by the checksums of their arrays.

        Raises:
            FormatError: a session that the trial table names is missing.
        """
        parts = [f"{subject_name(dataset, subject)}/trials"]
        parts += [
            betas_name(dataset, subject, session) for session in self.sessions(dataset, subject)
        ]
        return fingerprint([open_array(self.storage, name)[1].get("sha256") for name in parts])

    def held_session(self, dataset: str, subject: str, session: int) -> dict[str, Any] | None:
        """Return the attributes of a complete session array, or None."""
        return read_attributes(self.storage, betas_name(dataset, subject, session))

    def embeddings(self, encoder_id: str) -> EmbeddingStore:
        """Return the embeddings of one frozen encoder.

        Raises:
            FormatError: they are missing or incomplete.
        """
        from data_tools.embedding_store import EmbeddingStore

        return EmbeddingStore.open(self.place, encoder_id, self.policy)

    def subject_path(self, dataset: str, subject: str) -> Path:
        """Return the folder of one subject in a local store."""
        return self.path / subject_name(dataset, subject)

    def betas_path(self, dataset: str, subject: str, session: int) -> Path:
        """Return the folder of one session's array in a local store."""
        return self.path / betas_name(dataset, subject, session)


def open_store(config: DataConfig) -> Store:
    """Return the store of a configuration."""
    return Store(config.store_location, config.storage)


def subject_name(dataset: str, subject: str) -> str:
    """Return the name of a subject's group in a store."""
    return f"{dataset}/{subject}.zarr"


def betas_name(dataset: str, subject: str, session: int) -> str:
    """Return the name of a session's array in a store."""
    return f"{subject_name(dataset, subject)}/betas/{session}"


def stimuli_name(dataset: str) -> str:
    """Return the name of the group of a dataset's stimuli in a store."""
    return f"stimuli/{dataset}.zarr"
