"""Reading single raw files, with errors that name the file, the key and the remedy."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import pandas as pd
import scipy.io
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dist_decoder.config.base import fingerprint
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".JPEG", ".JPG", ".png", ".PNG")

KeyT = TypeVar("KeyT")


def require_file(path: Path, remedy: str) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        DataError: it is not; ``remedy`` says what to do.
    """
    if not path.is_file():
        raise DataError(f"file {path} does not exist; {remedy}")
    return path


def require_folder(path: Path, remedy: str) -> Path:
    """Return ``path`` if it is a folder.

    Raises:
        DataError: it is not; ``remedy`` says what to do.
    """
    if not path.is_dir():
        raise DataError(f"folder {path} does not exist; {remedy}")
    return path


def files_fingerprint(paths: Iterable[Path], *values: object) -> str:
    """Return 16 hex digits over names, sizes and mtimes (ns) of files, and over ``values``."""
    described: list[Any] = [str(value) for value in values]
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"file {path} cannot be read: {error}") from error
        described.append([path.name, status.st_size, status.st_mtime_ns])
    return fingerprint(described)


def chosen_subjects(config: DatasetConfig, present: Sequence[str]) -> tuple[str, ...]:
    """Return the subjects to read: those of the configuration, or all that are present.

    Raises:
        DataError: no subject is present.
        ConfigError: the configuration names a subject that is not present.
    """
    if not present:
        raise DataError(
            f"{config.dataset}: no subject found below {config.path}; "
            "compare the folder with the layout in the reader's docstring"
        )
    if config.subjects is None:
        return tuple(present)
    for subject in config.subjects:
        if subject not in present:
            raise ConfigError(
                f"{config.dataset}: subject {subject!r} is not below {config.path}; "
                f"present: {', '.join(present)}"
            )
    return config.subjects


def load_npy(path: Path, remedy: str = "export it again with numpy.save") -> NDArray[Any]:
    """Return a memory map of a .npy file; pickled objects are refused.

    Raises:
        DataError: missing, truncated, or holding Python objects.
    """
    require_file(path, remedy)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a readable .npy array ({error}); {remedy}") from error


def load_npz(path: Path, key: str, remedy: str = "write it with numpy.savez") -> NDArray[Any]:
    """Return one array of an .npz file; pickled objects are refused.

    Raises:
        DataError: missing, truncated, without ``key``, or holding Python objects.
    """
    require_file(path, remedy)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if key not in archive.files:
                raise DataError(
                    f"{path} has no array {key!r} (it has {', '.join(archive.files)}); {remedy}"
                )
            return archive[key]
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise unrelated types on damage
        raise DataError(f"{path}: array {key!r} is not readable ({error}); {remedy}") from error


def load_mat(path: Path, names: Sequence[str], remedy: str) -> dict[str, Any]:
    """Return variables of a MATLAB 5 file.

    Raises:
        DataError: missing, truncated, a MATLAB 7.3 (HDF5) file, or without one of ``names``.
    """
    require_file(path, remedy)
    if h5py.is_hdf5(path):
        raise DataError(
            f"{path} is a MATLAB 7.3 (HDF5) file; the published file is MATLAB 5: "
            "download it again or save it with -v7"
        )
    try:
        values = scipy.io.loadmat(path, variable_names=list(names))
    except Exception as error:  # scipy raises many unrelated types on damaged files
        raise DataError(f"{path} is not a readable MATLAB 5 file ({error}); {remedy}") from error
    for name in names:
        if name not in values:
            raise DataError(f"{path} has no variable {name!r}; {remedy}")
    return values


def open_hdf5(path: Path, remedy: str) -> h5py.File:
    """Return an open HDF5 file.

    Raises:
        DataError: missing, truncated, or not HDF5.
    """
    require_file(path, remedy)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is not a readable HDF5 file ({error}); {remedy}") from error


def hdf5_array(file: h5py.File, key: str) -> h5py.Dataset:
    """Return a dataset of an open HDF5 file.

    Raises:
        DataError: there is none of that name, it is a group, or it lies in another file.
    """
    link = file.get(key, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        raise DataError(f"{file.filename}: {key!r} is a link into {link.filename}; copy the data")
    item = file.get(key)
    if not isinstance(item, h5py.Dataset):
        raise DataError(f"{file.filename} has no array {key!r}; it has {', '.join(file.keys())}")
    if item.external or item.is_virtual:
        raise DataError(f"{file.filename}: {key!r} is stored outside the file; copy the data")
    return item


def load_table(path: Path, required: Sequence[str], remedy: str) -> pd.DataFrame:
    """Return a .csv or .tsv table with every cell as text (empty cells are ``""``).

    Raises:
        DataError: missing, not a table, or without a required column.
    """
    require_file(path, remedy)
    separator = "\t" if path.suffix == ".tsv" else ","
    try:
        table = pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    except (ValueError, OSError, csv.Error) as error:
        raise DataError(f"{path} is not a readable table ({error}); {remedy}") from error
    table.columns = table.columns.str.strip()
    missing = [name for name in required if name not in table.columns]
    if missing:
        raise DataError(
            f"{path} lacks the column(s) {', '.join(missing)} "
            f"(it has {', '.join(map(str, table.columns))}); {remedy}"
        )
    return table


def integer_column(table: pd.DataFrame, column: str, path: Path) -> NDArray[np.int64]:
    """Return a text column as integers.

    Raises:
        DataError: a cell is not an integer; the line of the file is named.
    """
    numbers = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~np.isfinite(numbers) | (numbers != np.rint(numbers)))
    if wrong.size:
        cell = table[column].iloc[wrong[0]]
        raise DataError(f"{path} line {wrong[0] + 2}: {column} is {cell!r}, not an integer")
    return numbers.astype(np.int64)


def read_lines(path: Path, remedy: str) -> list[str]:
    """Return the non-empty lines of a text file, stripped.

    Raises:
        DataError: missing or not text.
    """
    require_file(path, remedy)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable text file ({error}); {remedy}") from error
    return [line.strip() for line in lines if line.strip()]


def read_image(path: Path, stimulus_id: str) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 RGB pixels of an image file.

    Raises:
        DataError: missing or not an image.
    """
    require_file(path, f"it is the image of stimulus {stimulus_id!r}")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(
            f"{path}, the image of stimulus {stimulus_id!r}, cannot be decoded: {error}"
        ) from error


def repetitions(keys: Sequence[KeyT] | NDArray[Any]) -> NDArray[np.int64]:
    """Return for each entry how many equal ones stand before it."""
    seen: dict[Any, int] = {}
    counts = np.empty(len(keys), np.int64)
    for position, key in enumerate(keys):
        counts[position] = seen.get(key, 0)
        seen[key] = counts[position] + 1
    return counts


def check_finite(betas_NV: NDArray[np.float32], where: str) -> NDArray[np.float32]:
    """Return ``betas_NV``; a voxel is finite in every trial, or NaN in every trial (invalid).

    Raises:
        DataError: NaN or infinity in some trials of a voxel.
    """
    # A finite sum needs one pass and no (N, V) temporary; only damaged files need the rest.
    with np.errstate(invalid="ignore", over="ignore"):
        suspects = np.flatnonzero(~np.isfinite(betas_NV.sum(axis=0, dtype=np.float64)))
    if suspects.size == 0:
        return betas_NV
    part = betas_NV[:, suspects]
    partial = np.flatnonzero(~np.isnan(part).all(axis=0))
    if partial.size:
        column = part[:, partial[0]]
        row = int(np.flatnonzero(~np.isfinite(column))[0])
        raise DataError(
            f"{where}: {partial.size} voxel(s) hold NaN or infinity in some trials only, first "
            f"voxel {suspects[partial[0]]}, trial {row} of the session; repair the file, or set "
            "a voxel that is invalid to NaN in the whole session"
        )
    return betas_NV


def lazily(cache: dict[str, Any], key: str, make: Callable[[], Any], keep: int = 1) -> Any:
    """Return ``cache[key]``, made on first use; at most ``keep`` entries stay in memory."""
    if key not in cache:
        while len(cache) >= keep:
            cache.pop(next(iter(cache)))
        cache[key] = make()
    return cache[key]
