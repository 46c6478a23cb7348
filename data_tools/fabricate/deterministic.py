"""File contents that depend on the arguments alone, and a tree that writes each file once.

Most formats put a time, a file name or a program version into their header. The encoders here set
such fields to constants, so that one seed gives the same bytes on every call.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import scipy.io
from numpy.typing import NDArray
from PIL import Image

from dist_decoder.storage import atomic_write_bytes

_MAT_HEADER_SIZE = 116
_MAT_HEADER = b"MATLAB 5.0 MAT-file, fabricated by dist-decoder"
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
_GZIP_LEVEL = 1
_JPEG_QUALITY = 98


class Tree:
    """A folder in which every file appears whole, and is not written a second time."""

    def __init__(self, root: Path, on_file: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self._on_file = on_file

    def below(self, name: str) -> Tree:
        """Return the tree of a folder below this one."""
        return Tree(self.root / name, self._on_file)

    def write(self, name: str, content: bytes | Callable[[], bytes]) -> None:
        """Write ``root/name`` unless it exists; a callable is called only if it is needed.

        Raises:
            StorageError: the disk is full or the folder is not writable.
        """
        path = self.root / name
        if not path.exists():
            atomic_write_bytes(path, content() if callable(content) else content)
        self._on_file()


def nifti_gz(volume: NDArray[Any], pixdim: tuple[float, ...]) -> bytes:
    """Return a .nii.gz file without scaling (scl_slope 0) and with its origin at the centre.

    Args:
        volume: (X, Y, Z) or (X, Y, Z, T); x grows to the right, y to the front, z upwards.
        pixdim: voxel size in mm, then seconds per volume.
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(volume.dtype)
    header.set_data_shape(volume.shape)
    header.set_zooms(pixdim)
    header.set_xyzt_units("mm", "sec")
    affine = np.diag([*pixdim[:3], 1.0])
    affine[:3, 3] = -(np.asarray(volume.shape[:3]) - 1) / 2 * pixdim[:3]
    header.set_sform(affine, code=1)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    # nibabel would write 1: the published files hold 0, "no scaling", and readers must not scale.
    header["scl_slope"] = 0
    header["scl_inter"] = 0
    return gzip.compress(
        header.binaryblock + bytes(4) + volume.tobytes(order="F"), _GZIP_LEVEL, mtime=0
    )


def mat(variables: Mapping[str, Any]) -> bytes:
    """Return a MATLAB 5 file; its header text holds neither date nor platform."""
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, dict(variables), format="5", oned_as="row")
    return _MAT_HEADER.ljust(_MAT_HEADER_SIZE) + buffer.getvalue()[_MAT_HEADER_SIZE:]


def hdf5(fill: Callable[[h5py.File], None]) -> bytes:
    """Return an HDF5 file filled by a function; its datasets must have ``track_times=False``."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="earliest") as file:
        fill(file)
    return buffer.getvalue()


def jpeg(pixels_HW3: NDArray[np.uint8]) -> bytes:
    """Return a JPEG that keeps colours in full resolution, so that block means survive."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(
        buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=False
    )
    return buffer.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    """Return a .npy file."""
    buffer = io.BytesIO()
    # Not ascontiguousarray, which gives scalars an axis.
    contiguous = np.asarray(array, order="C")
    np.lib.format.write_array(buffer, contiguous, allow_pickle=False)
    return buffer.getvalue()


def npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return an .npz file with fixed member dates (``numpy.savez`` writes the clock)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _ZIP_DATE), npy(np.asarray(array)))
    return buffer.getvalue()


def table(frame: pd.DataFrame, separator: str, index: bool = False) -> bytes:
    """Return a CSV or TSV file with a header line; missing values are ``NaN``."""
    text = frame.to_csv(sep=separator, index=index, na_rep="NaN", lineterminator="\n")
    return str(text).encode()


def lines(entries: list[str]) -> bytes:
    """Return a text file of one entry a line."""
    return "".join(f"{entry}\n" for entry in entries).encode()
