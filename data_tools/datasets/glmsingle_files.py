"""Single-trial betas as GLMsingle saves them: ``<model>.hdf5``, ``.mat`` or ``.npy``.

======= ================= ==================== ===============================================
file    variable          axes in Python       written by
======= ================= ==================== ===============================================
.hdf5   betasmd           (X, Y, Z, T), (V, T)  GLMsingle for Python with ``wanthdf5=1``
.mat    modelmd           the same, or reversed GLMsingle for MATLAB (7.3 files are reversed)
.npy    the array itself  (X, Y, Z, T), (V, T)  ``numpy.save(path, results["typed"]["betasmd"])``
======= ================= ==================== ===============================================

(V, 1, 1, T) is (V, T). Without ``wanthdf5`` GLMsingle for Python saves a pickled dictionary as
.npy; a pickle can run code when opened, and is refused.

Axes: X, Y, Z of a volume, V voxels, T trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
from numpy.typing import NDArray

from data_tools.datasets.raw_files import hdf5_array, load_mat, load_npy, open_hdf5, require_file
from dist_decoder.errors import DataError

SUFFIXES = (".hdf5", ".mat", ".npy")
VARIABLES = ("betasmd", "modelmd")
_REMEDY = "run GLMsingle again with wanthdf5=1, or save the array alone with numpy.save"


@dataclass(frozen=True)
class GlmBetas:
    """One file. Nothing but headers is read until ``read``, except from MATLAB 5 files."""

    path: Path
    variable: str | None
    """None in .npy files."""
    reversed_axes: bool
    """MATLAB 7.3: (T, Z, Y, X) in Python."""
    space: tuple[int, ...]
    """(X, Y, Z) or (V,)."""
    num_trials: int

    def read(self, cells: tuple[NDArray[np.int64], ...], start: int, stop: int) -> NDArray[Any]:
        """Return (T, V) of trials ``start`` to ``stop`` at voxel indices (one array per axis).

        Slabs of a volume are read one after the other: memory is the result plus one slab.

        Raises:
            DataError: the file is truncated.
        """
        try:
            if self.path.suffix == ".npy":
                return self._read(load_npy(self.path, _REMEDY), cells, start, stop)
            if h5py.is_hdf5(self.path):
                with open_hdf5(self.path, _REMEDY) as file:
                    source = hdf5_array(file, str(self.variable))
                    return self._read(source, cells, start, stop)
            values = load_mat(self.path, [str(self.variable)], _REMEDY)[str(self.variable)]
            return self._read(values, cells, start, stop)
        except OSError as error:
            raise DataError(f"{self.path} is truncated or damaged ({error}); {_REMEDY}") from error

    def _read(
        self, source: Any, cells: tuple[NDArray[np.int64], ...], start: int, stop: int
    ) -> NDArray[Any]:
        if len(self.space) == 1:
            if self.reversed_axes:
                part = np.asarray(source[start:stop]).reshape(stop - start, -1)
                return part[:, cells[0]]
            part = np.asarray(source[..., start:stop]).reshape(self.space[0], stop - start)
            return part[cells[0]].T
        values_TV = np.empty((stop - start, len(cells[0])), source.dtype.newbyteorder("="))
        x_V, y_V, z_V = cells
        for slab in np.unique(z_V if self.reversed_axes else x_V):
            if self.reversed_axes:
                here = z_V == slab
                block = np.asarray(source[start:stop, slab])
                values_TV[:, here] = block[:, y_V[here], x_V[here]]
            else:
                here = x_V == slab
                block = np.asarray(source[slab, :, :, start:stop])
                values_TV[:, here] = block[y_V[here], z_V[here]].T
        return values_TV


def open_glm_betas(path: Path) -> GlmBetas:
    """Return the betas of one GLMsingle file.

    Raises:
        DataError: missing, damaged, a pickle, or without an array of betas.
    """
    if path.suffix == ".npy":
        return _described(path, None, load_npy(path, _REMEDY), False)
    if path.suffix == ".mat" and not h5py.is_hdf5(path):
        require_file(path, _REMEDY)
        try:
            names = [name for name, _, _ in scipy.io.whosmat(path)]
        except Exception as error:  # scipy raises many unrelated types on damaged files
            raise DataError(f"{path} is not a readable .mat file ({error}); {_REMEDY}") from error
        variable = _variable(path, names)
        return _described(path, variable, load_mat(path, [variable], _REMEDY)[variable], False)
    with open_hdf5(path, _REMEDY) as file:
        variable = _variable(path, file)
        return _described(path, variable, hdf5_array(file, variable), path.suffix == ".mat")


def _variable(path: Path, present: Any) -> str:
    for name in VARIABLES:
        if name in present:
            return name
    known = ", ".join(name for name in present if not name.startswith("__"))
    raise DataError(f"{path} has neither {' nor '.join(VARIABLES)}; it has {known}; {_REMEDY}")


def _described(path: Path, variable: str | None, source: Any, is_reversed: bool) -> GlmBetas:
    shape = tuple(source.shape[::-1] if is_reversed else source.shape)
    if len(shape) not in (2, 4) or source.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: betas are {source.dtype} of shape {source.shape}, expected numbers with the"
            f" axes (x, y, z, trials) or (voxels, trials); {_REMEDY}"
        )
    space = shape[:-1]
    if space[1:] == (1, 1):
        space = space[:1]
    return GlmBetas(path, variable, is_reversed, space, shape[-1])
