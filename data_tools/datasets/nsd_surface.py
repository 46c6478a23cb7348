"""NSD betas on the fsaverage surface, behind the interface of ``NSDTree``.

    nsddata_betas/ppdata/subjXX/fsaverage/<version>/{lh,rh}.betas_sessionYY.mgh, {lh,rh}.ncsnr.mgh
    nsddata/freesurfer/fsaverage/label/{lh,rh}.<name>.mgz, <name>.mgz.ctab

The files are float32 in percent signal change already: no division by 300. All subjects share the
vertices. Voxels of the protocol are vertices here: left hemisphere first, ascending.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.nsd_design import DOWNLOAD
from data_tools.datasets.nsd_tree import NSDOptions, NSDTree
from data_tools.datasets.protocol import VoxelTable
from data_tools.datasets.raw_files import check_finite, lazily, require_file
from data_tools.datasets.roi import (
    check_label_volume,
    label_number,
    mask_fingerprint,
    read_colour_table,
    roi_masks,
)
from data_tools.datasets.volumes import read_volume
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError

HEMISPHERES = ("lh", "rh")
_LABELS = Path("nsddata/freesurfer/fsaverage/label")


class NSDSurface(NSDTree):
    """Where the surface files of a subject are, and which sessions and vertices are read."""

    def __init__(self, config: DatasetConfig, options: NSDOptions) -> None:
        super().__init__(config, options)
        if options.source != "nii":
            raise ConfigError(
                f"{self.name}: options.source={options.source} is for space func1pt8mm; betas on "
                "fsaverage are .mgh files only: leave options.source out"
            )

    def betas_folder(self, subject: str) -> Path:
        base = self.config.path / f"nsddata_betas/ppdata/{subject}/fsaverage"
        return base / self.options.beta_version

    def betas_path(self, subject: str, session: int) -> Path:
        return self._hemisphere_path(subject, session, "lh")

    @property
    def _file_parts(self) -> tuple[str, str]:
        return "lh.betas_session", ".mgh"

    def files(self, subject: str, session: int) -> list[Path]:
        betas = [self._hemisphere_path(subject, session, side) for side in HEMISPHERES]
        names = {choice.name for choice in self.roi_choices}
        return betas + [self._label_path(side, name) for name in names for side in HEMISPHERES]

    def check_header(self, subject: str, session: int) -> None:
        for side in HEMISPHERES:
            self._mapped(subject, session, side)

    def voxels(self, subject: str) -> VoxelTable:
        sides_vertices = self._vertices()
        volumes: dict[str, NDArray[Any]] = {}
        tables = {}
        for path in sorted((self.config.path / _LABELS).glob("lh.*.mgz")):
            name = path.name.removeprefix("lh.").removesuffix(".mgz")
            volumes[name] = np.concatenate([self._labels(side, name) for side in HEMISPHERES])
            if (colours := self.colour_table_path(name)).is_file():
                tables[name] = read_colour_table(colours)
        vertex_V = np.concatenate(sides_vertices)
        sizes = [len(self._labels(side, self.roi_choices[0].name)) for side in HEMISPHERES]
        side_V = np.repeat([0, 1], [len(part) for part in sides_vertices])
        xyz_V3 = np.stack([side_V, vertex_V, np.zeros_like(vertex_V)], axis=1)
        row_V = vertex_V + side_V * sizes[0]
        lines = {name: labels[:, None, None] for name, labels in volumes.items()}
        rows_V3 = np.stack([row_V, np.zeros_like(row_V), np.zeros_like(row_V)], axis=1)
        return VoxelTable(
            xyz_V3.astype(np.float32),
            roi_masks(lines, tables, rows_V3),
            self._ncsnr(subject, sides_vertices),
            mask_fingerprint("fsaverage", np.asarray(sizes), xyz_V3),
        )

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        parts = []
        for side, vertices in zip(HEMISPHERES, self._vertices(), strict=True):
            mapped_TP = self._mapped(subject, session, side)
            if mapped_TP.shape[1] != len(self._labels(side, self.roi_choices[0].name)):
                raise DataError(
                    f"{self._hemisphere_path(subject, session, side)} has {mapped_TP.shape[1]} "
                    f"vertices, the labels of {side} have another number; {DOWNLOAD}"
                )
            parts.append(mapped_TP[:, vertices].astype(np.float32))
        betas_NV = np.concatenate(parts, axis=1)
        # Not any(): a NaN counts as a value here, and is then refused.
        betas_NV[:, (betas_NV == 0).all(axis=0)] = np.nan
        return check_finite(betas_NV, f"{self.name}/{subject} session {session}, fsaverage")

    def _vertices(self) -> list[NDArray[np.int64]]:
        """Return the selected vertices of each hemisphere, ascending."""

        def select() -> list[NDArray[np.int64]]:
            found = []
            for side in HEMISPHERES:
                wanted: NDArray[np.bool_] | None = None
                for choice in self.roi_choices:
                    labels = self._labels(side, choice.name)
                    part = labels > 0
                    if choice.label is not None:
                        table = self.colour_table_path(choice.name)
                        names = read_colour_table(table) if table.is_file() else {}
                        where = f"{self.name}: fsaverage ROI {choice.name}"
                        part = labels == label_number(choice.label, names, where)
                    wanted = part if wanted is None else wanted | part
                assert wanted is not None
                found.append(np.flatnonzero(wanted).astype(np.int64))
            if not sum(len(vertices) for vertices in found):
                raise DataError(f"{self.name}: ROI {self.config.roi} selects no vertex")
            return found

        chosen: list[NDArray[np.int64]] = lazily(self._cache, "vertices", select, keep=64)
        return chosen

    def _labels(self, side: str, name: str) -> NDArray[np.int64]:
        def read() -> NDArray[np.int64]:
            path = self._label_path(side, name)
            there = sorted(
                entry.name[3:].removesuffix(".mgz") for entry in path.parent.glob("lh.*.mgz")
            )
            require_file(path, f"ROIs on fsaverage: {', '.join(there) or 'none'}")
            return check_label_volume(read_volume(path, DOWNLOAD), path).ravel()

        labels: NDArray[np.int64] = lazily(self._cache, f"labels {side} {name}", read, keep=64)
        return labels

    def _label_path(self, side: str, name: str) -> Path:
        return self.config.path / _LABELS / f"{side}.{name}.mgz"

    def _ncsnr(
        self, subject: str, sides_vertices: list[NDArray[np.int64]]
    ) -> NDArray[np.float32] | None:
        folder = self.betas_folder(subject)
        paths = [folder / f"{side}.ncsnr.mgh" for side in HEMISPHERES]
        if not all(path.is_file() for path in paths):
            return None
        values = [read_volume(path, DOWNLOAD).ravel() for path in paths]
        parts = [value[chosen] for value, chosen in zip(values, sides_vertices, strict=True)]
        return np.concatenate(parts).astype(np.float32)

    def _hemisphere_path(self, subject: str, session: int, side: str) -> Path:
        return self.betas_folder(subject) / f"{side}.betas_session{session:02d}.mgh"

    def _mapped(self, subject: str, session: int, side: str) -> NDArray[Any]:
        """Return a (trials, vertices) memory map of a hemisphere's session.

        Raises:
            DataError: missing, truncated, of another shape, dtype or number of trials.
        """
        path = require_file(self._hemisphere_path(subject, session, side), DOWNLOAD)
        try:
            image: Any = nib.load(path)
            shape, dtype = tuple(image.shape), np.dtype(image.dataobj.dtype)
            offset = int(image.dataobj.offset)
        except Exception as error:  # nibabel and struct raise unrelated types on damage
            raise DataError(f"{path} is not a readable .mgh file ({error}); {DOWNLOAD}") from error
        trials = int((self.design.session_T == session).sum())
        if len(shape) != 4 or shape[1:] != (1, 1, trials) or dtype != np.dtype(">f4"):
            raise DataError(
                f"{path} is {dtype} of shape {shape}, expected big-endian float32 "
                f"(vertices, 1, 1, {trials}): session {session} has {trials} trials; {DOWNLOAD}"
            )
        if path.stat().st_size < offset + shape[0] * trials * dtype.itemsize:
            raise DataError(f"{path} is truncated; {DOWNLOAD}")
        # The first axis varies fastest in the file: a row is one trial.
        return np.memmap(path, dtype, "r", offset, (trials, shape[0]))
