"""Writes a store; ``ingest`` alone does.

Axes: N trials, V voxels of one subject, M images of a block, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.protocol import Stimulus, VoxelTable
from data_tools.store import (
    COLUMNS,
    STORE_FORMAT,
    STORE_VERSION,
    Store,
    betas_name,
    stimuli_name,
    subject_name,
)
from data_tools.store_pictures import picture_digest, pictures_name
from data_tools.zarr_arrays import (
    read_attributes,
    read_group,
    sha256_array,
    write_array,
    write_group,
)
from dist_decoder.errors import DataError
from dist_decoder.storage import LocalStorage, Storage, atomic_folder, json_bytes

_TEXT_COLUMNS = ("stimulus_id", "split", "category", "image_uid")
_BLOCK_BYTES = 1 << 26
"""Pictures of one array, so that an interrupted ingest loses little."""


class StoreWriter(Store):
    """A store that can be written."""

    def put_subject(
        self, dataset: str, subject: str, attributes: dict[str, Any], voxels: VoxelTable
    ) -> None:
        """Write the group and the voxel table of a subject.

        Raises:
            DataError: the store holds other voxels under this name.
        """
        name = subject_name(dataset, subject)
        held = None
        if self.storage.exists(f"{name}/voxels/zarr.json"):
            held = read_group(self.storage, f"{name}/voxels")
        if held is not None and held["mask_fingerprint"] != voxels.mask_fingerprint:
            raise DataError(
                f"{dataset}/{subject}: {self.storage.describe()}/{name} holds other voxels (mask"
                f" {held['mask_fingerprint']}, now {voxels.mask_fingerprint}); remove it or use"
                " another output folder"
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
        write_group(self.storage, name, attributes)
        write_group(self.storage, f"{name}/betas")
        if held is not None:
            return
        if self.storage.path is None:
            _write_voxels(self.storage, f"{name}/voxels", voxels)
            return
        with atomic_folder(self.storage.path / name / "voxels") as partial:
            _write_voxels(LocalStorage(partial.parent), partial.name, voxels)

    def put_trials(self, dataset: str, subject: str, trials: pd.DataFrame) -> None:
        """Write the trial table (columns ``COLUMNS``) unless the same one is there."""
        name = f"{subject_name(dataset, subject)}/trials"
        labels = {column: sorted(set(trials[column])) for column in _TEXT_COLUMNS}
        codes = np.empty((len(trials), len(COLUMNS)), dtype=np.int32)
        for index, column in enumerate(COLUMNS):
            if column in labels:
                code_of = {label: code for code, label in enumerate(labels[column])}
                codes[:, index] = [code_of[label] for label in trials[column]]
            else:
                codes[:, index] = trials[column]
        attributes = {"columns": list(COLUMNS), "labels": labels}
        held = read_attributes(self.storage, name)
        digest = sha256_array(codes)
        if held is None or held != {**attributes, "sha256": digest}:
            write_array(self.storage, name, codes, attributes)
        self._tables.pop(name, None)

    def put_betas(
        self,
        dataset: str,
        subject: str,
        session: int,
        betas_NV: NDArray[np.float32],
        attributes: dict[str, Any],
    ) -> None:
        """Write a session."""
        write_array(self.storage, betas_name(dataset, subject, session), betas_NV, attributes)

    def missing_images(self, dataset: str, stimuli: Iterable[Stimulus]) -> list[Stimulus]:
        """Return the stimuli whose pictures are not in the store yet."""
        held = self._pictures.places(dataset)
        return [stimulus for stimulus in stimuli if stimulus.stimulus_id not in held]

    def put_images(self, dataset: str, pictures: Iterable[tuple[str, NDArray[np.uint8]]]) -> None:
        """Append pictures in blocks of equal size and at most 64 MiB, each block as one array.

        Args:
            dataset: its name.
            pictures: (stimulus_id, (H, W, 3) uint8), read one after the other.
        """
        write_group(self.storage, pictures_name(dataset))
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
        digests = [picture_digest(picture) for picture in pictures]
        attributes = {"stimulus_ids": names, "digests": digests}
        block = self._pictures.next_block(dataset)
        write_array(self.storage, block, np.stack(pictures), attributes, compress=True)
        self._pictures.add(dataset, names)

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
        write_group(self.storage, stimuli_name(dataset), {"stimuli": table})
        self._stimuli.pop(dataset, None)

    def put_facts(self, dataset: str, facts: dict[str, Any]) -> None:
        """Write ``dataset.json``, which makes the dataset complete."""
        values = {"format": STORE_FORMAT, "version": STORE_VERSION, "dataset": dataset, **facts}
        self.storage.write(f"{dataset}/dataset.json", json_bytes(values))
        self._tables.pop(dataset, None)


def _write_voxels(storage: Storage, name: str, voxels: VoxelTable) -> None:
    rois = list(voxels.rois)
    masks = np.zeros((len(rois), voxels.num_voxels), dtype=np.bool_)
    for row, roi in enumerate(rois):
        masks[row] = voxels.rois[roi]
    write_array(storage, f"{name}/xyz", np.asarray(voxels.xyz_V3, dtype=np.float32))
    write_array(storage, f"{name}/rois", masks, {"names": rois})
    if voxels.ncsnr_V is not None:
        write_array(storage, f"{name}/ncsnr", np.asarray(voxels.ncsnr_V, dtype=np.float32))
    attributes = {
        "mask_fingerprint": voxels.mask_fingerprint,
        "has_ncsnr": voxels.ncsnr_V is not None,
    }
    write_group(storage, name, attributes)
