"""Whole sessions of 4-D volumes, read once, keeping only the voxels of a mask.

Voxels come in C order over (X, Y, Z): the order of ``numpy.nonzero`` on the mask. The on-disk
order of NIfTI (x fastest) and of HDF5 written by MATLAB (T, Z, Y, X) is another one, so every
reader here goes through explicit voxel indices; a transposed or flattened mask never appears.

Axes: X, Y, Z voxels of the volume, T volumes (trials) of a file, V selected voxels.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.raw_files import hdf5_array, open_hdf5, require_file
from dist_decoder.errors import DataError

_BLOCK_BYTES = 32 * 2**20
_MOST_EMPTY = 0.25
"""Part of the selected voxels that may be invalid in one session."""


@dataclass(frozen=True)
class Nifti:
    """Header of a NIfTI file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    """Byte of the first voxel in the uncompressed file."""
    slope: float
    inter: float
    """stored * slope + inter is the value; 1 and 0 where the file states no scaling."""


def read_nifti_header(path: Path, remedy: str = "download it again") -> Nifti:
    """Return shape, dtype and scaling of a .nii or .nii.gz file.

    Raises:
        DataError: missing or not NIfTI.
    """
    require_file(path, remedy)
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel, zlib and struct raise unrelated types on damage
        raise DataError(f"{path} is not a readable NIfTI file ({error}); {remedy}") from error
    if not isinstance(image, nib.nifti1.Nifti1Pair):
        raise DataError(f"{path} is {type(image).__name__}, not NIfTI; {remedy}")
    proxy: Any = image.dataobj
    slope = float(proxy.slope) if np.isfinite(proxy.slope) else 1.0
    inter = float(proxy.inter) if np.isfinite(proxy.inter) else 0.0
    return Nifti(path, tuple(image.shape), np.dtype(proxy.dtype), int(proxy.offset), slope, inter)


def read_volume(path: Path, remedy: str = "download it again") -> NDArray[Any]:
    """Return a 3-D volume (a trailing axis of length 1 is dropped) with its scaling applied.

    Raises:
        DataError: missing, truncated, or not 3-D.
    """
    require_file(path, remedy)
    try:
        image: Any = nib.load(path)
        volume = np.asanyarray(image.dataobj)
    except Exception as error:  # see read_nifti_header
        raise DataError(f"{path} is not a readable volume ({error}); {remedy}") from error
    if volume.ndim == 4 and volume.shape[3] == 1:
        volume = volume[..., 0]
    if volume.ndim != 3:
        raise DataError(f"{path} has shape {volume.shape}, a 3-D volume is expected; {remedy}")
    return volume


def read_masked_nifti(
    header: Nifti, xyz_V3: NDArray[np.int64], remedy: str = "download it again"
) -> NDArray[Any]:
    """Return the stored values (T, V) of a 4-D file at ``xyz_V3``; scaling is left to the caller.

    The file is streamed in blocks of volumes: memory is (T, V) plus one block.

    Raises:
        DataError: truncated, or a checksum of the gzip stream fails.
    """
    size_x, size_y, size_z, num_volumes = header.shape
    x_V, y_V, z_V = xyz_V3.T
    # NIfTI stores x fastest; indices into one volume as it lies in the file.
    flat_V = x_V + size_x * (y_V + size_y * z_V)
    volume_size = size_x * size_y * size_z
    block = max(1, min(num_volumes, _BLOCK_BYTES // (volume_size * header.dtype.itemsize)))
    buffer: NDArray[Any] = np.empty((block, volume_size), header.dtype)
    values_TV = np.empty((num_volumes, len(flat_V)), header.dtype.newbyteorder("="))
    try:
        with _open_stream(header.path) as stream:
            stream.seek(header.offset)
            for start in range(0, num_volumes, block):
                count = min(block, num_volumes - start)
                _read_exactly(stream, memoryview(buffer[:count].data).cast("B"))
                for index in range(count):
                    values_TV[start + index] = buffer[index][flat_V]
            # Reading past the last byte makes gzip compare length and CRC.
            if stream.read(1):
                raise DataError(f"{header.path} is longer than its header says; {remedy}")
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{header.path} is truncated or damaged ({error}); {remedy}") from error
    return values_TV


def read_masked_hdf5(
    path: Path,
    key: str,
    shape_xyzt: tuple[int, int, int, int],
    dtype: np.dtype[Any],
    xyz_V3: NDArray[np.int64],
    remedy: str = "download it again",
) -> NDArray[Any]:
    """Return the stored values (T, V) of an HDF5 array of Python shape (T, Z, Y, X).

    Raises:
        DataError: missing, truncated, of another shape or dtype, or transposed.
    """
    _, size_y, _, num_volumes = shape_xyzt
    with open_hdf5(path, remedy) as file:
        source = hdf5_array(file, key)
        check_hdf5_layout(source, path, key, shape_xyzt, dtype, remedy)
        values_TV = np.empty((num_volumes, len(xyz_V3)), dtype)
        # The published chunks hold all trials of one voxel: rows along x between the first and
        # the last wanted voxel touch few unwanted chunks. Other chunkings are read by slabs.
        by_row = source.chunks is not None and source.chunks[1:] == (1, 1, 1)
        group_V = xyz_V3[:, 2] * size_y + xyz_V3[:, 1] if by_row else xyz_V3[:, 2]
        order_V = np.argsort(group_V, kind="stable")
        starts = np.flatnonzero(np.diff(group_V[order_V], prepend=-1))
        try:
            for start, stop in zip(starts, [*starts[1:], len(order_V)], strict=True):
                voxels = order_V[start:stop]
                x, y, z = xyz_V3[voxels].T
                x0, y0 = x.min(), y.min()
                slab = source[:, z[0], y0 : y.max() + 1, x0 : x.max() + 1]
                values_TV[:, voxels] = slab[:, y - y0, x - x0]
        except OSError as error:
            raise DataError(f"{path} is truncated or damaged ({error}); {remedy}") from error
    return values_TV


def check_mask_fits(values_TV: NDArray[Any], betas: Path, mask: str) -> None:
    """Refuse betas that are zero throughout in more than a quarter of the selected voxels.

    Published betas are zero outside the brain of their own subject. A mask of another subject
    whose volume happens to have the same shape can only be seen so.

    Args:
        values_TV: stored values of a session.
        betas: their file.
        mask: what selected the voxels, for the message.

    Raises:
        DataError: both files are named.
    """
    empty = int((~values_TV.any(axis=0)).sum())
    if empty > _MOST_EMPTY * values_TV.shape[1]:
        raise DataError(
            f"{betas} is zero in every trial in {empty} of {values_TV.shape[1]} voxels that "
            f"{mask} selects: mask and betas are of different subjects or spaces. Compare both "
            "with the download page, or choose an ROI inside the scanned volume"
        )


def check_hdf5_layout(
    source: h5py.Dataset,
    path: Path,
    key: str,
    shape_xyzt: tuple[int, int, int, int],
    dtype: np.dtype[Any],
    remedy: str,
) -> None:
    """Compare an HDF5 array with the layout (T, Z, Y, X) that MATLAB writes.

    Raises:
        DataError: another shape or dtype, or transposed.
    """
    expected = tuple(reversed(shape_xyzt))
    if source.shape == shape_xyzt and source.shape != expected:
        raise DataError(
            f"{path}: {key!r} has shape {source.shape} = (X, Y, Z, T), published files have "
            f"{expected} = (T, Z, Y, X): it was transposed when it was copied; {remedy}"
        )
    if source.shape != expected:
        raise DataError(f"{path}: {key!r} has shape {source.shape}, expected {expected}; {remedy}")
    if source.dtype != dtype:
        raise DataError(f"{path}: {key!r} is {source.dtype}, expected {dtype}; {remedy}")


def _open_stream(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_exactly(stream: IO[bytes], target: memoryview) -> None:
    filled = 0
    while filled < len(target):
        got = stream.readinto(target[filled:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError(f"{len(target) - filled} bytes are missing")
        filled += got
