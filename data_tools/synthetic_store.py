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
from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import FormatError
from dist_decoder.storage import (
    LocalStorage,
    Storage,
    atomic_folder,
    join_location,
    json_bytes,
    open_location,
)

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


def read_synthetic(
    place: str | Path, dataset: str, subject: str, policy: StorageConfig | None = None
) -> Synthetic:
    """Return the synthetic responses of one subject; no rows where its pool was empty.

    Raises:
        FormatError: they are missing, damaged or of another version.
    """
    header = read_header(place, dataset, subject, policy)
    storage = _location(place, dataset, policy)
    if header is None:
        raise FormatError(
            f"{storage.describe()}/{subject}.json does not exist; run `data-tools synthesise`"
        )
    responses_nV, attributes = read_array(storage, f"{subject}.zarr/responses")
    if attributes["sha256"] != header["responses_sha256"]:
        raise FormatError(
            f"{storage.describe()}: {subject}.zarr and {subject}.json are not of one run; {_REMEDY}"
        )
    return Synthetic(
        uids=tuple(row["source_image"] for row in header["rows"]),
        responses_nV=responses_nV,
        residual_std_V=read_array(storage, f"{subject}.zarr/residual_std")[0],
        provenance=tuple(header["rows"]),
        ridge=header["ridge"],
    )


def write_synthetic(
    place: str | Path,
    dataset: str,
    subject: str,
    responses_nV: NDArray[np.float32],
    residual_std_V: NDArray[np.float32],
    rows: Sequence[dict[str, str | int | float]],
    ridge: dict[str, Any],
    inputs: str,
    policy: StorageConfig | None = None,
) -> dict[str, Any]:
    """Write the responses of one subject, the header last, and return the header.

    Args:
        place: folder or URL that holds ``synthetic``; the store, unless it is named.
        rows: provenance of each row; ``source_image`` is its uid.
        ridge: what is known of the encoding model.
        inputs: fingerprint of everything that the responses depend on.
        policy: of requests to an object store.
    """
    storage = _location(place, dataset, policy)
    storage.remove(f"{subject}.json")
    if storage.path is not None:
        with atomic_folder(storage.path / f"{subject}.zarr", replace=True) as partial:
            sha256 = _write_arrays(
                LocalStorage(partial.parent), partial.name, responses_nV, residual_std_V
            )
    else:
        sha256 = _write_arrays(storage, f"{subject}.zarr", responses_nV, residual_std_V)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": inputs,
        "responses_sha256": sha256,
        "ridge": ridge,
        "rows": list(rows),
    }
    storage.write(f"{subject}.json", json_bytes(header))
    return header


def _write_arrays(
    storage: Storage,
    name: str,
    responses_nV: NDArray[np.float32],
    residual_std_V: NDArray[np.float32],
) -> str:
    """Return the sha256 of the responses."""
    sha256 = write_array(storage, f"{name}/responses", responses_nV)
    write_array(storage, f"{name}/residual_std", residual_std_V)
    write_group(storage, name)
    return sha256


def _location(place: str | Path, dataset: str, policy: StorageConfig | None) -> Storage:
    return open_location(join_location(place, "synthetic", dataset), policy)


def read_header(
    place: str | Path, dataset: str, subject: str, policy: StorageConfig | None = None
) -> dict[str, Any] | None:
    """Return the header of one subject, or None if it is not finished.

    Raises:
        FormatError: it is damaged or of another version.
    """
    storage = _location(place, dataset, policy)
    file = f"{storage.describe()}/{subject}.json"
    if not storage.exists(f"{subject}.json"):
        return None
    try:
        header = json.loads(storage.read(f"{subject}.json"))
        found = header["format"], header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file} is damaged ({error}); {_REMEDY}") from error
    if found != (FORMAT, VERSION):
        raise FormatError(f"{file}: format {found}, expected {(FORMAT, VERSION)}; {_REMEDY}")
    return header
