"""The store: raw datasets as zarr 3, in their own unit, one array per session.

    <store>/<dataset>/dataset.json                 facts and counts, written last
    <store>/<dataset>/<subject>.zarr/betas/<n>     (N, V) float32 of session n
    <store>/<dataset>/<subject>.zarr/trials        (N, columns) int32, text columns as codes
    <store>/<dataset>/<subject>.zarr/voxels/...    xyz (V, 3), rois (ROI, V), ncsnr (V,)
    <store>/stimuli/<dataset>.zarr/images/<block>  (M, H, W, 3) uint8, equal sizes in a block
    <store>/embeddings, synthetic, split.json      see their modules

Axes: N trials, V voxels of one subject, M images of a block, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.protocol import TRIAL_COLUMNS, Stimulus, VoxelTable
from data_tools.zarr_arrays import (
    open_array,
    read_array,
    read_attributes,
    read_group,
    read_rows,
    write_array,
    write_group,
)
from dist_decoder.config.base import fingerprint
from dist_decoder.errors import DataError, FormatError
from dist_decoder.storage import atomic_folder, atomic_write_json, sha256_bytes

if TYPE_CHECKING:
    from data_tools.embedding_store import EmbeddingStore

STORE_FORMAT = "dist-decoder-store"
STORE_VERSION = 1
COLUMNS = (*TRIAL_COLUMNS, "image_uid")
_TEXT_COLUMNS = ("stimulus_id", "split", "category", "image_uid")
_BLOCK_BYTES = 1 << 26
"""Pictures of one array, so that an interrupted ingest loses little."""


class Store:
    """Reads a store; the ``put_`` methods write it and are called by ``ingest`` only."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._blocks: dict[str, dict[str, tuple[Path, int]]] = {}
        self._stimuli: dict[str, tuple[Stimulus, ...]] = {}
        self._opened: dict[Path, tuple[Any, dict[str, Any]]] = {}
        # Neighbouring pictures share a chunk: the last one is kept.
        self._chunk: tuple[tuple[Path, int], NDArray[Any]] = ((Path(), -1), np.empty(0))

    # Reading

    def datasets(self) -> tuple[str, ...]:
        """Return the names of the completely ingested datasets, sorted."""
        return tuple(sorted(path.parent.name for path in self.path.glob("*/dataset.json")))

    def require(self, datasets: Iterable[str]) -> tuple[str, ...]:
        """Return ``datasets`` sorted; all of them when empty.

        Raises:
            DataError: one of them, or every one, is missing or was not ingested completely.
        """
        held = self.datasets()
        wanted = tuple(sorted(datasets)) or held
        missing = [name for name in wanted if name not in held]
        if missing or not wanted:
            raise DataError(
                f"{self.path}: dataset {', '.join(missing) or '(any)'} is missing or incomplete"
                f" (complete: {', '.join(held) or 'none'}); run `data-tools ingest` first"
            )
        return wanted

    def facts(self, dataset: str) -> dict[str, Any]:
        """Return ``dataset.json``: unit, licence, citation, has_images, counts per subject.

        Raises:
            DataError: the dataset is missing or was not ingested completely.
            FormatError: it was written in another format.
        """
        self.require([dataset])
        path = self.path / dataset / "dataset.json"
        try:
            facts = json.loads(path.read_bytes())
        except ValueError as error:
            raise FormatError(f"{path} is not JSON ({error}); ingest the dataset again") from error
        if (facts.get("format"), facts.get("version")) != (STORE_FORMAT, STORE_VERSION):
            raise FormatError(
                f"{path}: format {facts.get('format')!r} version {facts.get('version')}; this"
                f" program reads {STORE_FORMAT!r} version {STORE_VERSION}; ingest again"
            )
        return facts

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
        codes, attributes = read_array(self.subject_path(dataset, subject) / "trials")
        table = {}
        for index, name in enumerate(attributes["columns"]):
            values: NDArray[Any] = codes[:, index].astype(np.int64)
            if name in attributes["labels"]:
                values = np.array([*attributes["labels"][name], ""], dtype=object)[values]
            table[name] = values
        return pd.DataFrame(table, columns=list(attributes["columns"]))

    def betas(self, dataset: str, subject: str, session: int) -> NDArray[np.float32]:
        """Return (N, V) responses of a session in the dataset's own unit.

        A voxel that is invalid in the session is NaN in every row.

        Raises:
            FormatError: the session is missing, or a chunk is missing, truncated or damaged.
        """
        return read_array(self.betas_path(dataset, subject, session))[0]

    def voxels(self, dataset: str, subject: str) -> VoxelTable:
        """Return the voxel table.

        Raises:
            FormatError: it is missing or damaged.
        """
        path = self.subject_path(dataset, subject) / "voxels"
        attributes = read_group(path)
        masks, names = read_array(path / "rois")
        has_ncsnr = attributes["has_ncsnr"]
        return VoxelTable(
            xyz_V3=read_array(path / "xyz")[0],
            rois=dict(zip(names["names"], masks, strict=True)),
            ncsnr_V=read_array(path / "ncsnr")[0] if has_ncsnr else None,
            mask_fingerprint=attributes["mask_fingerprint"],
        )

    def stimuli(self, dataset: str) -> tuple[Stimulus, ...]:
        """Return the unique stimuli in the order of the reader.

        Raises:
            FormatError: the table is missing or damaged.
        """
        if dataset not in self._stimuli:
            table = read_group(self._stimuli_path(dataset))["stimuli"]
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
        blocks = self._image_blocks(dataset)
        if stimulus_id not in blocks:
            raise DataError(f"{dataset}: no picture of stimulus {stimulus_id!r} in {self.path}")
        path, row = blocks[stimulus_id]
        if path not in self._opened:
            self._opened[path] = open_array(path)
        stored, attributes = self._opened[path]
        first = row - row % stored.chunks[0]
        if self._chunk[0] != (path, first):
            rows = read_rows(path, stored, slice(first, first + stored.chunks[0]))
            self._chunk = ((path, first), rows)
        picture = self._chunk[1][row - first]
        if _picture_digest(picture) != attributes["digests"][row]:
            raise FormatError(
                f"{path}: picture {row} ({stimulus_id}) differs from what was written; remove the"
                " folder and run `data-tools ingest` again"
            )
        return picture

    def content(self, dataset: str, subject: str) -> str:
        """Return 16 hex digits that identify trials and betas by the checksums of their arrays.

        Raises:
            FormatError: a session that the trial table names is missing.
        """
        parts = [self.subject_path(dataset, subject) / "trials"]
        parts += [
            self.betas_path(dataset, subject, session)
            for session in self.sessions(dataset, subject)
        ]
        return fingerprint([open_array(path)[1].get("sha256") for path in parts])

    def embeddings(self, encoder_id: str) -> EmbeddingStore:
        """Return the embeddings of one frozen encoder.

        Raises:
            FormatError: they are missing or incomplete.
        """
        from data_tools.embedding_store import EmbeddingStore

        return EmbeddingStore.open(self.path, encoder_id)

    # Places

    def subject_path(self, dataset: str, subject: str) -> Path:
        """Return the folder of one subject."""
        return self.path / dataset / f"{subject}.zarr"

    def betas_path(self, dataset: str, subject: str, session: int) -> Path:
        """Return the folder of one session's array."""
        return self.subject_path(dataset, subject) / "betas" / str(session)

    def _stimuli_path(self, dataset: str) -> Path:
        return self.path / "stimuli" / f"{dataset}.zarr"

    def _image_blocks(self, dataset: str) -> dict[str, tuple[Path, int]]:
        if dataset not in self._blocks:
            root = self._stimuli_path(dataset) / "images"
            blocks = sorted(path for path in root.glob("[0-9]*") if path.is_dir())
            found: dict[str, tuple[Path, int]] = {}
            for path in blocks:
                names = (read_attributes(path) or {"stimulus_ids": ()})["stimulus_ids"]
                found.update({name: (path, row) for row, name in enumerate(names)})
            self._blocks[dataset] = found
        return self._blocks[dataset]

    # Writing

    def put_subject(
        self, dataset: str, subject: str, attributes: dict[str, Any], voxels: VoxelTable
    ) -> None:
        """Write the group and the voxel table of a subject.

        Raises:
            DataError: the store holds other voxels under this name.
        """
        path = self.subject_path(dataset, subject)
        held = read_group(path / "voxels") if (path / "voxels" / "zarr.json").is_file() else None
        if held is not None and held["mask_fingerprint"] != voxels.mask_fingerprint:
            raise DataError(
                f"{dataset}/{subject}: {path} holds other voxels (mask {held['mask_fingerprint']},"
                f" now {voxels.mask_fingerprint}); remove it or use another output folder"
            )
        attributes = {
            **attributes,
            "format": STORE_FORMAT,
            "version": STORE_VERSION,
            "dataset": dataset,
            "subject": subject,
            "num_voxels": voxels.num_voxels,
            "mask_fingerprint": voxels.mask_fingerprint,
        }
        write_group(path, attributes)
        write_group(path / "betas")
        if held is None:
            _write_voxels(path / "voxels", voxels)

    def put_trials(self, dataset: str, subject: str, trials: pd.DataFrame) -> None:
        """Write the trial table (columns ``COLUMNS``) unless the same one is there."""
        path = self.subject_path(dataset, subject) / "trials"
        labels = {name: sorted(set(trials[name])) for name in _TEXT_COLUMNS}
        codes = np.empty((len(trials), len(COLUMNS)), dtype=np.int32)
        for index, name in enumerate(COLUMNS):
            if name in labels:
                code_of = {label: code for code, label in enumerate(labels[name])}
                codes[:, index] = [code_of[label] for label in trials[name]]
            else:
                codes[:, index] = trials[name]
        attributes = {"columns": list(COLUMNS), "labels": labels}
        held = read_attributes(path)
        digest = sha256_bytes(codes.tobytes())
        if held is None or held != {**attributes, "sha256": digest}:
            write_array(path, codes, attributes)

    def held_session(self, dataset: str, subject: str, session: int) -> dict[str, Any] | None:
        """Return the attributes of a complete session array, or None."""
        return read_attributes(self.betas_path(dataset, subject, session))

    def put_betas(
        self,
        dataset: str,
        subject: str,
        session: int,
        betas_NV: NDArray[np.float32],
        attributes: dict[str, Any],
    ) -> None:
        """Write a session."""
        write_array(self.betas_path(dataset, subject, session), betas_NV, attributes)

    def missing_images(self, dataset: str, stimuli: Iterable[Stimulus]) -> list[Stimulus]:
        """Return the stimuli whose pictures are not in the store yet."""
        held = self._image_blocks(dataset)
        return [stimulus for stimulus in stimuli if stimulus.stimulus_id not in held]

    def put_images(self, dataset: str, pictures: Iterable[tuple[str, NDArray[np.uint8]]]) -> None:
        """Append pictures in blocks of equal size and at most 64 MiB, each block as one array.

        Args:
            dataset: its name.
            pictures: (stimulus_id, (H, W, 3) uint8), read one after the other.
        """
        write_group(self._stimuli_path(dataset) / "images")
        names: list[str] = []
        block: list[NDArray[np.uint8]] = []
        for name, picture in pictures:
            full = (len(block) + 1) * picture.nbytes > _BLOCK_BYTES
            if block and (full or block[0].shape != picture.shape):
                self._put_block(dataset, names, block)
                names, block = [], []
            names.append(name)
            block.append(picture)
        if block:
            self._put_block(dataset, names, block)

    def _put_block(self, dataset: str, names: list[str], pictures: list[NDArray[np.uint8]]) -> None:
        root = self._stimuli_path(dataset) / "images"
        number = len([path for path in root.glob("[0-9]*") if path.is_dir()])
        path = root / f"{number:05d}"
        digests = [_picture_digest(picture) for picture in pictures]
        attributes = {"stimulus_ids": names, "digests": digests}
        write_array(path, np.stack(pictures), attributes, compress=True)
        held = self._image_blocks(dataset)
        held.update({name: (path, row) for row, name in enumerate(names)})

    def put_stimuli(self, dataset: str, stimuli: Iterable[Stimulus]) -> None:
        """Write the table of stimuli; their pictures must be complete before."""
        table = [
            {
                "stimulus_id": stimulus.stimulus_id,
                "image_uid": stimulus.image_uid,
                "categories": list(stimulus.categories),
                "is_test": stimulus.is_test,
                "extra": dict(stimulus.extra),
            }
            for stimulus in stimuli
        ]
        write_group(self._stimuli_path(dataset), {"stimuli": table})
        self._stimuli.pop(dataset, None)

    def put_facts(self, dataset: str, facts: dict[str, Any]) -> None:
        """Write ``dataset.json``, which makes the dataset complete."""
        values = {"format": STORE_FORMAT, "version": STORE_VERSION, "dataset": dataset, **facts}
        atomic_write_json(self.path / dataset / "dataset.json", values)


def _write_voxels(path: Path, voxels: VoxelTable) -> None:
    with atomic_folder(path) as partial:
        names = list(voxels.rois)
        masks = np.zeros((len(names), voxels.num_voxels), dtype=np.bool_)
        for row, name in enumerate(names):
            masks[row] = voxels.rois[name]
        write_array(partial / "xyz", np.asarray(voxels.xyz_V3, dtype=np.float32))
        write_array(partial / "rois", masks, {"names": names})
        if voxels.ncsnr_V is not None:
            write_array(partial / "ncsnr", np.asarray(voxels.ncsnr_V, dtype=np.float32))
        attributes = {
            "mask_fingerprint": voxels.mask_fingerprint,
            "has_ncsnr": voxels.ncsnr_V is not None,
        }
        write_group(partial, attributes)


def _picture_digest(picture: NDArray[np.uint8]) -> str:
    return sha256_bytes(np.ascontiguousarray(picture).tobytes())[:16]
