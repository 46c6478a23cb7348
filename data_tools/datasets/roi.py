"""Voxel selection by ROI: label volumes, colour tables, boolean masks, fingerprints.

A selection is written ``name``, ``name:label`` (a number, or a name of the colour table), or
several of these joined by ``+`` (their union, each voxel once).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.datasets.raw_files import read_lines
from dist_decoder.errors import ConfigError, DataError


@dataclass(frozen=True)
class RoiChoice:
    """One part of a selection."""

    name: str
    label: str | None


def parse_roi(spec: str) -> tuple[RoiChoice, ...]:
    """Return the parts of ``name[:label][+name[:label]...]``.

    Raises:
        ConfigError: a part is empty.
    """
    choices = []
    for part in spec.split("+"):
        name, separator, label = part.strip().partition(":")
        if not name or (separator and not label):
            raise ConfigError(f"roi {spec!r} is not of the form name[:label][+name[:label]...]")
        choices.append(RoiChoice(name.strip(), label.strip() or None))
    return tuple(choices)


def read_colour_table(path: Path) -> dict[int, str]:
    """Return label number -> name of a FreeSurfer colour table; label 0 is left out.

    Raises:
        DataError: a line does not start with a number and a name.
    """
    names = {}
    for line in read_lines(path, "download it again"):
        if line.startswith("#"):
            continue
        fields = line.split()
        if len(fields) < 2 or not fields[0].isdigit():
            raise DataError(f"{path}: line {line!r} is not 'number name ...'")
        if int(fields[0]) > 0:
            names[int(fields[0])] = fields[1]
    return names


def check_label_volume(labels: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """Return a label volume as integers.

    Raises:
        DataError: a value is not an integer >= -1 (-1: not cortex, 0: no label, 1..N: label).
    """
    if not (np.isfinite(labels).all() and (labels == np.rint(labels)).all()):
        raise DataError(f"{path} holds values that are not label numbers; is it a ROI volume?")
    whole = labels.astype(np.int64)
    if whole.size and whole.min() < -1:
        raise DataError(f"{path} holds label {whole.min()}; labels are -1, 0, 1, ...")
    return whole


def label_number(label: str, names: Mapping[int, str], where: str) -> int:
    """Return the number of a label that is given by number or by name.

    Raises:
        ConfigError: the name is unknown, or the number is below 1 (-1 and 0 mean "no label").
    """
    if label.lstrip("-").isdigit():
        if int(label) < 1:
            raise ConfigError(f"{where}: label {label} means 'no label'; labels start at 1")
        return int(label)
    for number, name in names.items():
        if name == label:
            return number
    known = ", ".join(names.values()) or "none, the colour table (.mgz.ctab) is missing"
    raise ConfigError(f"{where}: no label named {label!r}; named labels: {known}")


def roi_masks(
    volumes: Mapping[str, NDArray[np.int64]],
    tables: Mapping[str, Mapping[int, str]],
    xyz_V3: NDArray[np.int64],
) -> dict[str, NDArray[np.bool_]]:
    """Return boolean masks over V: ``name`` (any label) and ``name:label`` for every label.

    A mask that is empty within the selection is left out.
    """
    x_V, y_V, z_V = xyz_V3.T
    masks = {}
    for name in sorted(volumes):
        labels_V = volumes[name][x_V, y_V, z_V]
        present = [int(number) for number in np.unique(labels_V) if number > 0]
        if present:
            masks[name] = labels_V > 0
        if len(present) > 1 or name in tables:
            for number in present:
                text = tables.get(name, {}).get(number, str(number))
                masks[f"{name}:{text}"] = labels_V == number
    return masks


def union_of_masks(
    masks: Mapping[str, NDArray[np.bool_]], names: Sequence[str], where: str
) -> NDArray[np.bool_]:
    """Return the union of named masks, each voxel once.

    Raises:
        ConfigError: a name is unknown; the known ones are listed.
        DataError: no voxel is selected.
    """
    total: NDArray[np.bool_] | None = None
    for name in names:
        if name not in masks:
            raise ConfigError(f"{where}: no ROI {name!r}; it has {', '.join(sorted(masks))}")
        total = masks[name] if total is None else total | masks[name]
    if total is None or not total.any():
        raise DataError(f"{where}: ROI {'+'.join(names)} selects no voxel")
    return total


def mask_fingerprint(*arrays: NDArray[Any] | str) -> str:
    """Return 16 hex digits for which voxels are selected, in which order."""
    digest = hashlib.sha256()
    for array in arrays:
        if isinstance(array, str):
            digest.update(array.encode())
        else:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
