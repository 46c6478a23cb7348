"""BOLD5000's responses as release 1 and the volumes of release 2 lay them out.

Axes: N trials of a subject, V voxels in the order of the ten ROI arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import h5py
import numpy as np
from numpy.typing import NDArray

from data_tools.fabricate import deterministic
from data_tools.fabricate.deterministic import Tree

RELEASE1_SCALE = 12.0
"""Release 1 is in the scanner's unit, release 2 in percent signal change."""
_RESPONSE = {"1": 0.15, "2": 0.6, "3": 1.0, "4": 1.0, "5": 0.5}
"""Part of the response in each volume (TR of 2 s) after onset; 34 is the mean of 3 and 4."""
_VOLUME_NOISE = 0.5
_PIXDIM = (2.0, 2.0, 2.0, 2.0)


def write_release1(
    tree: Tree,
    subject: str,
    betas_NV: NDArray[np.float32],
    rois: Mapping[str, slice],
    draw: np.random.Generator,
) -> None:
    """Write ``ROIs/CSIk/{mat,h5}/CSIk_ROIs_TR*.{mat,h5}``, ten arrays (N, voxels) in each file.

    Source: the release 1 package. TR34 holds the betas times ``RELEASE1_SCALE``.
    """
    noise_NV = _VOLUME_NOISE * draw.standard_normal(betas_NV.shape)
    for name in (*_RESPONSE, "34"):
        # Opposite noise in 3 and 4, so that their mean is the response itself.
        sign = {"3": 1.0, "4": -1.0, "34": 0.0}.get(name)
        own_NV = noise_NV if sign is None else sign * noise_NV
        values_NV = RELEASE1_SCALE * (_RESPONSE.get(name, 1.0) * betas_NV + own_NV)
        arrays = {roi: values_NV[:, voxels] for roi, voxels in rois.items()}
        folder = tree.below(f"ROIs/{subject}")
        folder.write(f"mat/{subject}_ROIs_TR{name}.mat", deterministic.mat(arrays))
        folder.write(f"h5/{subject}_ROIs_TR{name}.h5", _hdf5(arrays))


def write_volumes(
    tree: Tree,
    subject: str,
    betas: str,
    sessions: Sequence[NDArray[np.float32]],
    shape: tuple[int, int, int],
    draw: np.random.Generator,
) -> None:
    """Write one float32 (X, Y, Z, trials) volume per session and ``masks/CSIk.nii.gz``.

    Source: release 2.0; the published package has no mask of the ROI voxels.
    Differs: voxels outside the mask are noise in a few voxels and zero elsewhere.
    """
    num_voxels = sessions[0].shape[1]
    cells = np.sort(draw.choice(int(np.prod(shape)), size=2 * num_voxels, replace=False))
    chosen = np.sort(draw.choice(cells, size=num_voxels, replace=False))
    mask = np.zeros(shape, np.uint8)
    mask.ravel()[chosen] = 1
    tree.write(f"masks/{subject}.nii.gz", deterministic.nifti_gz(mask, _PIXDIM[:3]))
    for number, betas_NV in enumerate(sessions, 1):
        volumes = np.zeros((int(np.prod(shape)), len(betas_NV)), np.float32)
        volumes[cells] = draw.standard_normal((len(cells), len(betas_NV)))
        volumes[chosen] = betas_NV.T
        content = deterministic.nifti_gz(volumes.reshape(*shape, -1), _PIXDIM)
        tree.write(f"{subject}_{betas}_ses-{number:02d}.nii.gz", content)


def _hdf5(arrays: Mapping[str, NDArray[np.float64]]) -> bytes:
    def fill(file: h5py.File) -> None:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)

    return deterministic.hdf5(fill)
