"""The fsaverage files of the fabricated NSD subjects.

Axes: T trials of a session, P vertices of a hemisphere, B brain voxels of a subject.
"""

from __future__ import annotations

import gzip
from functools import partial

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_tools.fabricate.deterministic import Tree
from data_tools.fabricate.nsd import BETA_VERSION, BETAS_PER_PERCENT, NsdSubject
from dist_decoder.rng import numpy_generator

_HEMISPHERES = ("lh", "rh")
_ROI = "nsdgeneral"
_ROI_SHARE = 0.4
"""First vertices of a hemisphere, which are labelled in all subjects alike."""


def write_surface(tree: Tree, subjects: list[NsdSubject], num_vertices: int) -> None:
    """Write labels, betas (.mgh, percent signal change) and ncsnr on fsaverage.

    A vertex has the betas of one brain voxel of its hemisphere, an nsdgeneral voxel where it is
    labelled: the mapping that the real data interpolate. All subjects share vertices and labels.
    """
    labels_P = np.zeros(num_vertices, np.int32)
    labels_P[: round(_ROI_SHARE * num_vertices)] = 1
    for side in _HEMISPHERES:
        path = f"nsddata/freesurfer/fsaverage/label/{side}.{_ROI}.mgz"
        tree.write(path, gzip.compress(_mgh(labels_P[:, None, None]), 1, mtime=0))
    for subject in subjects:
        folder = tree.below(f"nsddata_betas/ppdata/{subject.subject.name}/fsaverage/{BETA_VERSION}")
        for side in _HEMISPHERES:
            voxels_P = _voxels(subject, side, labels_P)
            for session in range(1, subject.sessions + 1):
                name = f"{side}.betas_session{session:02d}.mgh"
                folder.write(name, partial(_betas, subject, session, voxels_P))
            folder.write(f"{side}.ncsnr.mgh", partial(_ncsnr, subject, voxels_P))


def _voxels(subject: NsdSubject, side: str, labels_P: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return (P,) brain voxel of each vertex."""
    brain = subject.volumes.brain
    draw = numpy_generator(subject.seed, "vertices", subject.subject.key, side)
    # Low x is the left hemisphere.
    x_B = np.nonzero(brain)[0]
    of_side_B = x_B < brain.shape[0] // 2 if side == "lh" else x_B >= brain.shape[0] // 2
    general_B = np.zeros(len(x_B), bool)
    general_B[subject.volumes.general_in_brain()] = True
    voxels_P = np.empty(len(labels_P), np.int64)
    for label in (0, 1):
        pool = np.flatnonzero(of_side_B & (general_B == bool(label)))
        chosen = labels_P == label
        voxels_P[chosen] = draw.choice(pool, size=int(chosen.sum()))
    return voxels_P


def _betas(subject: NsdSubject, session: int, voxels_P: NDArray[np.int64]) -> bytes:
    psc_TP = subject.stored(session)[:, voxels_P] / np.float32(BETAS_PER_PERCENT)
    return _mgh(psc_TP.T.astype(np.float32)[:, None, None, :])


def _ncsnr(subject: NsdSubject, voxels_P: NDArray[np.int64]) -> bytes:
    values_B = subject.ncsnr_volume()[subject.volumes.brain]
    return _mgh(values_B[voxels_P][:, None, None])


def _mgh(data: NDArray[np.float32] | NDArray[np.int32]) -> bytes:
    return bytes(nib.MGHImage(data, np.eye(4)).to_bytes())
