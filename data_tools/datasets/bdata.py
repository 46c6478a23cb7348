"""The Kamitani lab's file format: one matrix, and metadata that say what each column is.

``.mat`` (MATLAB 5) holds ``dataSet`` and ``metaData.{key,description,value}``; ``.h5`` (bdpy)
holds ``/dataset`` and ``/metadata/{key,description,value}``, in older files ``/dataSet`` and
``/metaData``. ``value`` is (keys, columns): 1 where a key applies and NaN (not 0) elsewhere, or
the number itself (coordinates).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.raw_files import hdf5_array, load_mat, open_hdf5, require_file
from dist_decoder.errors import DataError

DOWNLOAD = "download it again from the dataset's figshare page"


@dataclass(frozen=True)
class BData:
    """One opened file. ``matrix_NC`` is the array in memory, or the HDF5 dataset's path."""

    path: Path
    keys: tuple[str, ...]
    value_KC: NDArray[np.float64]
    """NaN where a key does not apply to a column."""
    dtype: np.dtype[Any]
    num_rows: int
    matrix_NC: NDArray[Any] | None
    """None for .h5 files, whose columns are read when asked for."""
    matrix_key: str

    def columns(self, key: str) -> NDArray[np.int64]:
        """Return the columns to which a key applies (its value is 1).

        Raises:
            DataError: the file has no such key, or it applies to no column.
        """
        found = np.flatnonzero(self.row(key) == 1)
        if found.size == 0:
            raise DataError(f"{self.path}: metadata key {key!r} applies to no column; {DOWNLOAD}")
        return found

    def row(self, key: str) -> NDArray[np.float64]:
        """Return the metadata of a key over all columns.

        Raises:
            DataError: the file has no such key.
        """
        if key not in self.keys:
            raise DataError(
                f"{self.path} has no metadata key {key!r}; it has {', '.join(self.keys)}"
            )
        values: NDArray[np.float64] = self.value_KC[self.keys.index(key)]
        return values

    def read(self, columns_V: NDArray[np.int64]) -> NDArray[Any]:
        """Return (rows, V) of the given columns in the stored dtype.

        Raises:
            DataError: the file is truncated.
        """
        if self.matrix_NC is not None:
            return self.matrix_NC[:, columns_V]
        # One contiguous hyperslab; h5py's own column lists cost seconds per thousand columns.
        first, last = int(columns_V.min()), int(columns_V.max())
        with open_hdf5(self.path, DOWNLOAD) as file:
            try:
                slab = hdf5_array(file, self.matrix_key)[:, first : last + 1]
            except OSError as error:
                raise DataError(f"{self.path} is truncated ({error}); {DOWNLOAD}") from error
        return slab[:, columns_V - first]

    def column(self, key: str) -> NDArray[Any]:
        """Return the one column of a key, in the stored dtype.

        Raises:
            DataError: the key applies to none or to several columns.
        """
        columns = self.columns(key)
        if columns.size != 1:
            raise DataError(f"{self.path}: {key!r} applies to {columns.size} columns, expected 1")
        values: NDArray[Any] = self.read(columns)[:, 0]
        return values


def open_bdata(path: Path) -> BData:
    """Return a .mat or .h5 file of the format.

    Raises:
        DataError: missing, damaged, or of another layout.
    """
    require_file(path, DOWNLOAD)
    opened = _open_mat(path) if path.suffix == ".mat" else _open_h5(path)
    expected = (len(opened.keys), opened.value_KC.shape[1])
    if opened.value_KC.shape != expected:
        raise DataError(
            f"{path}: metadata values have shape {opened.value_KC.shape}, expected {expected} "
            f"(keys, columns); {DOWNLOAD}"
        )
    return opened


def _open_mat(path: Path) -> BData:
    values = load_mat(path, ("dataSet", "metaData"), DOWNLOAD)
    matrix_NC = values["dataSet"]
    try:
        meta = values["metaData"][0, 0]
        keys = tuple(str(cell.item() if cell.size else "") for cell in meta["key"].ravel())
        value_KC = np.asarray(meta["value"], np.float64)
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: metaData is not as published ({error}); {DOWNLOAD}") from error
    _compare_columns(path, value_KC, matrix_NC.shape)
    return BData(
        path, keys, value_KC, matrix_NC.dtype, len(matrix_NC), matrix_NC, matrix_key="dataSet"
    )


def _open_h5(path: Path) -> BData:
    with open_hdf5(path, DOWNLOAD) as file:
        matrix_key = "dataset" if "dataset" in file else "dataSet"
        meta_key = "metadata" if "metadata" in file else "metaData"
        matrix = hdf5_array(file, matrix_key)
        keys = tuple(_text(item) for item in hdf5_array(file, f"{meta_key}/key")[...].ravel())
        value_KC = np.asarray(hdf5_array(file, f"{meta_key}/value")[...], np.float64)
        _compare_columns(path, value_KC, matrix.shape)
        return BData(path, keys, value_KC, matrix.dtype, len(matrix), None, matrix_key)


def _compare_columns(path: Path, value_KC: NDArray[Any], shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or value_KC.ndim != 2 or value_KC.shape[1] != shape[1]:
        turned = (
            "; it looks transposed" if len(shape) == 2 and value_KC.shape[-1] == shape[0] else ""
        )
        raise DataError(
            f"{path}: the matrix has shape {shape}, its metadata {value_KC.shape}; expected "
            f"(rows, columns) and (keys, columns){turned}; {DOWNLOAD}"
        )


def _text(item: Any) -> str:
    if isinstance(item, h5py.Reference):
        raise DataError("metadata keys are references (a MATLAB 7.3 file); use the published .h5")
    return item.decode() if isinstance(item, bytes) else str(item)
