"""NSD in small: the files of the Natural Scenes Dataset with the official names and layouts.

Axes: T trials of a session, B brain voxels, V nsdgeneral voxels; both in C order over (X, Y, Z).
"""

from __future__ import annotations

from functools import cached_property, partial

import h5py
import numpy as np
from numpy.typing import NDArray

from data_tools.fabricate import coco, deterministic
from data_tools.fabricate.acquisition import acquisition, draw_num_voxels
from data_tools.fabricate.catalogue import Catalogue
from data_tools.fabricate.deterministic import Tree
from data_tools.fabricate.nsd_design import NsdDesign
from data_tools.fabricate.nsd_volumes import LABEL_NAMES, NsdVolumes, nsd_volumes
from data_tools.fabricate.subjects import FabricatedSubject
from dist_decoder.rng import numpy_generator
from dist_decoder.stats.reliability import ncsnr

_PIXDIM = (1.8, 1.8, 1.8)
_TR_S = 1.3333
BETA_VERSION = "betas_fithrf_GLMdenoise_RR"
BETAS_PER_PERCENT = 300
_INVALID_VOXELS = 3
"""nsdgeneral voxels that are zero in one session only."""
_SATURATED_VOXELS = 2
"""Brain voxels outside nsdgeneral so strong that int16 saturates."""
_SATURATED_FACTOR = 40.0


class NsdSubject:
    """One subject: volumes, responses, betas."""

    def __init__(self, number: int, design: NsdDesign) -> None:
        self.number, self.design = number, design
        catalogue = design.catalogue
        self.seed = catalogue.seed
        name = f"subj{number:02d}"
        bounds = design.config.num_voxels
        num_voxels = draw_num_voxels(self.seed, f"nsd/{name}", bounds)
        model = catalogue.world.subject(f"nsd/{name}", num_voxels)
        self.subject = FabricatedSubject("nsd", name, model, catalogue)
        self.volumes: NsdVolumes = nsd_volumes(number, num_voxels, bounds[1])
        self.sessions = design.executed_sessions(number)

    @cached_property
    def _saturated_B(self) -> NDArray[np.int64]:
        others = np.setdiff1d(np.arange(self.volumes.brain.sum()), self.volumes.general_in_brain())
        return others[-_SATURATED_VOXELS:]

    def stored(self, session: int) -> NDArray[np.int16]:
        """Return (T, B) betas as stored: int16(300 * percent signal change), saturating."""
        rows = self.design.rows(self.number, session)
        pictures = [self.design.catalogue.nsd[row] for row in rows]
        general_V = self.volumes.general_in_brain()
        key = self.subject.key
        # Brain outside nsdgeneral answers to nothing.
        noise = numpy_generator(self.seed, "brain noise", key, session)
        y_TB = noise.standard_normal((len(rows), int(self.volumes.brain.sum())))
        y_TB[:, general_V] = self.subject.respond(pictures, session)
        y_TB[:, self._saturated_B] *= _SATURATED_FACTOR
        psc_TB = acquisition(self.seed, key, y_TB.shape[1]).session(y_TB, session)
        limits = np.iinfo(np.int16)
        stored = np.clip(np.rint(BETAS_PER_PERCENT * psc_TB), limits.min, limits.max)
        stored[:, general_V[self.invalid_voxels(session)]] = 0
        return stored.astype(np.int16)

    def invalid_voxels(self, session: int) -> NDArray[np.int64]:
        """Return the nsdgeneral voxels that have no data in a session."""
        draw = numpy_generator(self.seed, "invalid voxels", self.subject.key)
        voxels = draw.choice(self.subject.model.num_voxels, size=_INVALID_VOXELS, replace=False)
        sessions = draw.integers(1, self.sessions + 1, size=_INVALID_VOXELS)
        return np.sort(voxels[sessions == session])

    def seen_rows(self) -> list[int]:
        """Return the 0-based stimulus rows that the subject saw, ascending."""
        sessions = range(1, self.sessions + 1)
        rows = [self.design.rows(self.number, session) for session in sessions]
        return [int(row) for row in np.unique(np.concatenate(rows))]

    def fill(self, values_TB: NDArray[np.int16]) -> NDArray[np.int16]:
        """Return (X, Y, Z, T): zero outside the brain."""
        volume = np.zeros((*self.volumes.shape, len(values_TB)), values_TB.dtype)
        volume[self.volumes.brain] = values_TB.T
        return volume

    def ncsnr_volume(self) -> NDArray[np.float32]:
        """Return (X, Y, Z) ncsnr by the official estimator, from the stored betas."""
        sessions = range(1, self.sessions + 1)
        rows = [self.design.rows(self.number, session) for session in sessions]
        stimuli = np.concatenate(rows)
        volume = np.zeros(self.volumes.shape, np.float32)
        if (np.unique(stimuli, return_counts=True)[1] == 3).any():
            stored = np.concatenate([self.stored(session) for session in sessions])
            session_of_trial = np.repeat(sessions, self.design.config.trials_per_session)
            values = ncsnr(stored, stimuli, session_of_trial)
            volume[self.volumes.brain] = np.nan_to_num(values)
        return volume


def nsd_subjects(catalogue: Catalogue) -> list[NsdSubject]:
    """Return the configured subjects."""
    design = NsdDesign(catalogue)
    return [NsdSubject(number, design) for number in catalogue.config.nsd.subjects]


def write_nsd(tree: Tree, subjects: list[NsdSubject]) -> None:
    """Write the tree of the ``natural-scenes-dataset`` bucket.

    Source: Allen et al. 2022 and the technical notes of the release; reference list of files in
    the docstring of the reader ``data_tools/datasets/nsd.py``.
    """
    if not subjects:
        return
    design = subjects[0].design
    tree.write("nsddata/experiments/nsd/nsd_expdesign.mat", design.expdesign)
    tree.write("nsddata/experiments/nsd/nsd_stim_info_merged.csv", design.stim_info)
    for roi, names in LABEL_NAMES.items():
        rows = [f"{number} {name}" for number, name in enumerate(("Unknown", *names))]
        path = f"nsddata/freesurfer/fsaverage/label/{roi}.mgz.ctab"
        tree.write(path, deterministic.lines(rows))
    stimuli = tree.below("nsddata_stimuli/stimuli/nsd")
    stimuli.write("nsd_stimuli.hdf5", lambda: _stimuli(subjects))
    for split in ("train2017", "val2017"):
        stimuli.write(f"annotations/instances_{split}.json", partial(_instances, design, split))
    for position, subject in enumerate(subjects):
        _write_subject(tree, subject, design.config.hdf5_sessions if position == 0 else 0)


def _write_subject(tree: Tree, subject: NsdSubject, hdf5_sessions: int) -> None:
    name = subject.subject.name
    data = tree.below(f"nsddata/ppdata/{name}")
    data.write("behav/responses.tsv", lambda: subject.design.responses(subject.number))
    volumes = subject.volumes
    data.write(
        "func1pt8mm/brainmask.nii.gz",
        lambda: deterministic.nifti_gz(volumes.brain.astype(np.int16), _PIXDIM),
    )
    for roi, labels in volumes.labels.items():
        path = f"func1pt8mm/roi/{roi}.nii.gz"
        data.write(path, partial(deterministic.nifti_gz, labels, _PIXDIM))
    betas = tree.below(f"nsddata_betas/ppdata/{name}/func1pt8mm/{BETA_VERSION}")
    for session in range(1, subject.sessions + 1):
        stem = f"betas_session{session:02d}"
        betas.write(f"{stem}.nii.gz", partial(_betas_nifti, subject, session))
        if session <= hdf5_sessions:
            betas.write(f"{stem}.hdf5", partial(_betas_hdf5, subject, session))
    betas.write("ncsnr.nii.gz", lambda: deterministic.nifti_gz(subject.ncsnr_volume(), _PIXDIM))


def _betas_nifti(subject: NsdSubject, session: int) -> bytes:
    return deterministic.nifti_gz(subject.fill(subject.stored(session)), (*_PIXDIM, _TR_S))


def _betas_hdf5(subject: NsdSubject, session: int) -> bytes:
    # MATLAB writes X x Y x Z x T; HDF5 and Python see the axes in reverse.
    values_TZYX = subject.fill(subject.stored(session)).transpose()
    chunks = (len(values_TZYX), 1, 1, 1)

    def fill(file: h5py.File) -> None:
        file.create_dataset("betas", data=values_TZYX, chunks=chunks, track_times=False)

    return deterministic.hdf5(fill)


def _stimuli(subjects: list[NsdSubject]) -> bytes:
    catalogue = subjects[0].design.catalogue
    side = catalogue.config.nsd.image_px
    rows = sorted({row for subject in subjects for row in subject.seen_rows()})
    latents = catalogue.latents([catalogue.nsd[row] for row in rows])

    def fill(file: h5py.File) -> None:
        # One chunk per picture: rows that no configured subject saw take no space.
        brick = file.create_dataset(
            "imgBrick",
            shape=(catalogue.num_nsd_images, side, side, 3),
            dtype=np.uint8,
            chunks=(1, side, side, 3),
            track_times=False,
        )
        for row, z_d in zip(rows, latents, strict=True):
            picture = catalogue.world.picture(z_d, side)
            brick.id.write_direct_chunk((row, 0, 0, 0), picture.tobytes())

    return deterministic.hdf5(fill)


def _instances(design: NsdDesign, split: str) -> bytes:
    return coco.instances_json([image for image in design.images if image.split == split])
