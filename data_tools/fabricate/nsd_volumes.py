"""Geometry of a fabricated NSD subject: brain, cortex and ROI labels in a small volume."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
_SMALL_PRIMES = (3, 5, 7, 11)
_VOLUME_PER_VOXEL = 2.2
_BRAIN_SHARE = 0.75
_CORTEX_SHARE = 0.75
VISUAL_ROIS = ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4")
STREAMS = ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal")
LABEL_NAMES = {"nsdgeneral": ("nsdgeneral",), "prf-visualrois": VISUAL_ROIS, "streams": STREAMS}


@dataclass(frozen=True)
class NsdVolumes:
    """Masks and label volumes, each (X, Y, Z)."""

    brain: NDArray[np.bool_]
    labels: dict[str, NDArray[np.float64]]
    """-1 not cortex, 0 cortex without a label, 1..N label; by ROI name, and by ``lh.`` and
    ``rh.`` + name, where the other hemisphere is -1 too."""

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.brain.shape
        return x, y, z

    def general_in_brain(self) -> NDArray[np.int64]:
        """Return where the nsdgeneral voxels stand among the brain voxels (C order both)."""
        return np.flatnonzero(self.labels["nsdgeneral"][self.brain] == 1)


def volume_shape(subject: int, max_voxels: int) -> tuple[int, int, int]:
    """Return three different primes; no two of the eight subjects have the same shape.

    With a mask transposed, or of another subject, nothing fits by chance.
    """
    wanted = _VOLUME_PER_VOXEL * max_voxels
    # The least volume holds a hundred voxels: full trial counts then fit in little space.
    primes = _SMALL_PRIMES if wanted <= np.prod(_SMALL_PRIMES[:3]) else _PRIMES
    triples = [t for t in itertools.combinations(primes, 3) if np.prod(t) >= wanted]
    smallest = sorted(triples, key=lambda triple: (np.prod(triple), triple))[:2]
    shapes = [shape for triple in smallest for shape in itertools.permutations(triple)]
    # A step coprime to the 12 shapes gives every subject its own.
    x, y, z = shapes[(subject - 1) * 5 % len(shapes)]
    return x, y, z


def nsd_volumes(subject: int, num_voxels: int, max_voxels: int) -> NsdVolumes:
    """Return the volumes of a subject with ``num_voxels`` voxels in nsdgeneral.

    The brain is an ellipsoid, cortex its outer part, nsdgeneral the back of the cortex.
    """
    shape = volume_shape(subject, max_voxels)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = x**2 + y**2 + z**2
    brain = _lowest(radius, np.ones(shape, bool), round(_BRAIN_SHARE * radius.size))
    cortex = _lowest(-radius, brain, round(_CORTEX_SHARE * brain.sum()))
    general = _lowest(y, cortex, num_voxels)
    around = _lowest(y, cortex, min(int(1.2 * num_voxels), int(cortex.sum())))
    early = _lowest(y, general, num_voxels // 2)
    labels = {
        "nsdgeneral": np.where(general, 1.0, 0.0),
        "prf-visualrois": np.where(early, _bands(early, z, len(VISUAL_ROIS)), 0.0),
        "streams": np.where(around, _bands(around, y + 0.1 * z, len(STREAMS)), 0.0),
    }
    volumes = {}
    for name, values in labels.items():
        volumes[name] = np.where(cortex, values, -1.0)
        # The first voxel is left-posterior-inferior: low x is the left hemisphere.
        volumes[f"lh.{name}"] = np.where(cortex & (x < 0), values, -1.0)
        volumes[f"rh.{name}"] = np.where(cortex & (x >= 0), values, -1.0)
    return NsdVolumes(brain, volumes)


def _lowest(
    values: NDArray[np.float64], within: NDArray[np.bool_], count: int
) -> NDArray[np.bool_]:
    candidates = np.flatnonzero(within)
    chosen = candidates[np.argsort(values.ravel()[candidates], kind="stable")[:count]]
    mask = np.zeros(values.size, bool)
    mask[chosen] = True
    return mask.reshape(values.shape)


def _bands(
    within: NDArray[np.bool_], values: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """Number equal shares of a mask 1..count by increasing value."""
    cells = np.flatnonzero(within)
    ranks = np.argsort(np.argsort(values.ravel()[cells], kind="stable"), kind="stable")
    labels = np.zeros(values.size)
    labels[cells] = 1 + ranks * count // max(len(cells), 1)
    return labels.reshape(values.shape)
