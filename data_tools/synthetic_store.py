"""Synthetic responses on disk, one file pair per subject.

    <store>/synthetic/<dataset>/<subject>.zarr/responses     (n, V) float32, normalised units
    <store>/synthetic/<dataset>/<subject>.zarr/residual_std  (V,) held-out residual SD
    <store>/synthetic/<dataset>/<subject>.json               uids and provenance, written last

Axes: V voxels of one subject, n augmentation images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.zarr_arrays import read_array, write_array, write_group
from dist_decoder.errors import FormatError
from dist_decoder.storage import atomic_folder, atomic_write_json, sha256_bytes

FORMAT = "dist-decoder-synthetic"
VERSION = 1
_REMEDY = "remove the folder `synthetic` of the store and run `data-tools synthesise` again"


@dataclass(frozen=True)
class Synthetic:
    """Synthetic responses of one subject."""

    uids: tuple[str, ...]
    responses_nV: NDArray[np.float32]
    """In the units of the subject's normalised responses."""
    residual_std_V: NDArray[np.float32]
    provenance: tuple[dict[str, str | int | float], ...]
    """Per row: ridge fingerprint, noise model, sigma, seed, source image."""
    ridge: dict[str, Any]
    """Penalties, held-out R^2, numbers of rows and images behind the encoding model."""


def read_synthetic(store_path: str | Path, dataset: str, subject: str) -> Synthetic:
    """Return the synthetic responses of one subject; no rows where its pool was empty.

    Raises:
        FormatError: they are missing, damaged or of another version.
    """
    header = read_header(store_path, dataset, subject)
    path, file = _places(store_path, dataset, subject)
    if header is None:
        raise FormatError(f"{file} does not exist; run `data-tools synthesise`")
    responses_nV, attributes = read_array(path / "responses")
    if attributes["sha256"] != header["responses_sha256"]:
        raise FormatError(f"{path} and {file} are not of one run; {_REMEDY}")
    return Synthetic(
        uids=tuple(row["source_image"] for row in header["rows"]),
        responses_nV=responses_nV,
        residual_std_V=read_array(path / "residual_std")[0],
        provenance=tuple(header["rows"]),
        ridge=header["ridge"],
    )


def write_synthetic(
    store_path: str | Path,
    dataset: str,
    subject: str,
    responses_nV: NDArray[np.float32],
    residual_std_V: NDArray[np.float32],
    rows: Sequence[dict[str, str | int | float]],
    ridge: dict[str, Any],
    inputs: str,
) -> dict[str, Any]:
    """Write the responses of one subject, the header last, and return the header.

    Args:
        rows: provenance of each row; ``source_image`` is its uid.
        ridge: what is known of the encoding model.
        inputs: fingerprint of everything that the responses depend on.
    """
    path, file = _places(store_path, dataset, subject)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": inputs,
        "responses_sha256": sha256_bytes(np.ascontiguousarray(responses_nV).tobytes()),
        "ridge": ridge,
        "rows": list(rows),
    }
    file.unlink(missing_ok=True)
    with atomic_folder(path, replace=True) as partial:
        write_array(partial / "responses", responses_nV)
        write_array(partial / "residual_std", residual_std_V)
        write_group(partial)
    atomic_write_json(file, header)
    return header


def _places(store_path: str | Path, dataset: str, subject: str) -> tuple[Path, Path]:
    folder = Path(store_path) / "synthetic" / dataset
    return folder / f"{subject}.zarr", folder / f"{subject}.json"


def read_header(store_path: str | Path, dataset: str, subject: str) -> dict[str, Any] | None:
    """Return the header of one subject, or None if it is not finished.

    Raises:
        FormatError: it is damaged or of another version.
    """
    file = _places(store_path, dataset, subject)[1]
    if not file.is_file():
        return None
    try:
        header = json.loads(file.read_bytes())
        found = header["format"], header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file} is damaged ({error}); {_REMEDY}") from error
    if found != (FORMAT, VERSION):
        raise FormatError(f"{file}: format {found}, expected {(FORMAT, VERSION)}; {_REMEDY}")
    return header
