"""Natural Scenes Dataset (NSD): volume space func1pt8mm, or the fsaverage surface.

Source: Allen et al. 2022 and the released tree ``natural-scenes-dataset``. Read below ``path``:

    nsddata/experiments/nsd/nsd_expdesign.mat, nsd_stim_info_merged.csv
    nsddata/ppdata/subjXX/behav/responses.tsv                             (compared by ``check``)
    nsddata/ppdata/subjXX/func1pt8mm/roi/<name>.nii.gz, brainmask.nii.gz
    nsddata/freesurfer/fsaverage/label/<name>.mgz.ctab                    (names of labels)
    nsddata_betas/ppdata/subjXX/func1pt8mm/<version>/betas_sessionYY.{nii.gz,hdf5}, ncsnr.nii.gz
    nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5
    nsddata_stimuli/stimuli/nsd/annotations/instances_{train,val}2017.json

Surface files are listed in ``nsd_surface.py`` (options.space). The rest holds for volumes.

Voxels come in C order over (X, Y, Z), from NIfTI and HDF5 alike. Betas are int16 in units of
1/300 percent signal change and have no scaling in the header. A voxel that is 0 in every trial of
a session was invalid there and comes out NaN. Trials are the planned ones whose session has a
file: the plan lists 40 sessions for everybody, and four subjects stopped earlier.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets import nsd_design, nsd_facts
from data_tools.datasets.coco import Instances, read_instances
from data_tools.datasets.identity import coco_uid
from data_tools.datasets.nsd_design import DOWNLOAD, StimulusTable
from data_tools.datasets.nsd_surface import NSDSurface
from data_tools.datasets.nsd_tree import NSDOptions, NSDTree
from data_tools.datasets.options import read_options
from data_tools.datasets.protocol import Facts, Finding, Stimulus, VoxelTable
from data_tools.datasets.raw_files import (
    chosen_subjects,
    files_fingerprint,
    hdf5_array,
    open_hdf5,
    repetitions,
    require_folder,
)
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import DataError

STIMULI = Path("nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5")
PICTURE_PX = 425


class NSDReader:
    """NSD behind the reader protocol. ROI selections: ``name`` or ``name:label``; ``nsdgeneral``
    is the default and ``brainmask`` the whole brain."""

    def __init__(self, config: DatasetConfig) -> None:
        self.config = config
        self.name = config.dataset
        self.options = read_options(NSDOptions, config)
        surface = self.options.space == "fsaverage"
        self.tree = (NSDSurface if surface else NSDTree)(config, self.options)

    def facts(self) -> Facts:
        roi = self.config.roi
        return nsd_facts.facts(
            self.config.max_sessions,
            default_roi=roi in (None, "nsdgeneral", "nsdgeneral:1")
            and self.options.space == "func1pt8mm",
        )

    def subjects(self) -> tuple[str, ...]:
        folder = self.config.path / "nsddata_betas" / "ppdata"
        require_folder(folder, f"{DOWNLOAD}, or correct the path of dataset {self.name!r}")
        pattern = re.compile(r"subj0[1-8]$")
        present = [
            entry.name
            for entry in sorted(folder.iterdir())
            if pattern.match(entry.name) and self.tree.betas_folder(entry.name).is_dir()
        ]
        return chosen_subjects(self.config, present)

    def trials(self, subject: str) -> pd.DataFrame:
        design = self.tree.design
        number = _subject_number(subject)
        sessions = self.tree.sessions(subject)
        nsd_ids_T = design.nsd_ids(number)
        categories = self._first_categories
        table = pd.DataFrame(
            {
                "session": design.session_T,
                "run": design.run_T,
                "trial": np.arange(len(nsd_ids_T)),
                "stimulus_id": [str(nsd_id) for nsd_id in nsd_ids_T],
                # Counted over the plan: an unread session in between was still seen.
                "repetition": repetitions(nsd_ids_T),
                "split": np.where(design.image_10k_T < design.num_shared, "test", "train"),
            }
        )
        table = table[np.isin(design.session_T, sessions)].reset_index(drop=True)
        table["category"] = [categories.get(stimulus, "") for stimulus in table["stimulus_id"]]
        return table

    def voxels(self, subject: str) -> VoxelTable:
        return self.tree.voxels(subject)

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        return self.tree.betas(subject, session)

    def stimuli(self) -> tuple[Stimulus, ...]:
        return self._stimuli

    @cached_property
    def _stimuli(self) -> tuple[Stimulus, ...]:
        seen = sorted({int(text) for subject in self.subjects() for text in self._seen(subject)})
        instances = self._instances
        stimuli = []
        for nsd_id in seen:
            info = self._stimulus_table.row(nsd_id)
            categories = instances.categories(info.coco_id, info.crop) if instances else ()
            stimuli.append(
                Stimulus(
                    str(nsd_id),
                    coco_uid(info.coco_id),
                    categories,
                    info.shared,
                    {"coco_split": info.coco_split, "crop_box": repr(info.crop)},
                )
            )
        return tuple(stimuli)

    def has_images(self) -> bool:
        return True

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        path = self.config.path / STIMULI
        with open_hdf5(path, DOWNLOAD) as file:
            brick = hdf5_array(file, "imgBrick")
            self._check_brick(brick.shape, brick.dtype)
            try:
                return np.asarray(brick[int(stimulus_id)])
            except OSError as error:
                raise DataError(
                    f"{path}: image {stimulus_id} is damaged ({error}); {DOWNLOAD}"
                ) from error

    def fingerprint(self, subject: str, session: int) -> str:
        files = [*self.tree.files(subject, session), self.config.path / nsd_design.EXPDESIGN]
        return files_fingerprint(files, self.config.roi, self.options)

    def consistency(self, subject: str) -> tuple[Finding, ...]:
        number = _subject_number(subject)
        sessions = self.tree.sessions(subject)
        for session in sessions:
            self.tree.check_header(subject, session)
        findings = [Finding("beta headers", True, f"{len(sessions)} sessions of the mask's shape")]
        responses = self.config.path / f"nsddata/ppdata/{subject}/behav/responses.tsv"
        if responses.is_file():
            problem = nsd_design.compare_responses(
                responses, self.tree.design, number, np.asarray(sessions)
            )
            detail = problem or "agrees with nsd_expdesign.mat"
            findings.append(Finding("responses.tsv", not problem, detail))
        else:
            complete = self.config.expect != "consistent"
            findings.append(Finding("responses.tsv", not complete, f"{responses} is not there"))
        findings.append(self._compare_planned_positions(number))
        findings.append(self._own_voxels(subject))
        with open_hdf5(self.config.path / STIMULI, DOWNLOAD) as file:
            brick = hdf5_array(file, "imgBrick")
            self._check_brick(brick.shape, brick.dtype)
            findings.append(Finding("imgBrick", True, f"shape {brick.shape}"))
        return tuple(findings)

    def _own_voxels(self, subject: str) -> Finding:
        """No two people have the same voxels: equal ones are a copied mask."""
        fact = "own mask"
        if self.options.space == "fsaverage":
            return Finding(fact, True, "the surface is common to all subjects")
        for other in self.subjects():
            if other != subject and self._same_voxels(subject, other):
                name = self.config.roi or "nsdgeneral"
                folders = [self.tree.roi_folder(one) for one in (subject, other)]
                return Finding(
                    fact,
                    False,
                    f"{name} selects the same voxels in {folders[0]} and {folders[1]}: one is a "
                    f"copy of the other; {DOWNLOAD}",
                )
        return Finding(fact, True, "no other subject has the same voxels")

    def _same_voxels(self, subject: str, other: str) -> bool:
        own_V3 = self.tree.xyz(subject)
        try:
            shapes = [self.tree.volume_shape(one) for one in (subject, other)]
            return shapes[0] == shapes[1] and np.array_equal(own_V3, self.tree.xyz(other))
        except DataError:
            return False  # the files of the other subject are reported where it is checked

    @cached_property
    def _stimulus_table(self) -> StimulusTable:
        return StimulusTable(self.config.path, self.tree.design)

    @cached_property
    def _instances(self) -> Instances | None:
        if self.options.categories == "none":
            return None
        folder = self.config.path / self.options.annotations
        paths = [folder / f"instances_{split}2017.json" for split in ("train", "val")]
        if self.options.categories == "auto" and not all(path.is_file() for path in paths):
            return None
        seen = {int(text) for subject in self.subjects() for text in self._seen(subject)}
        return read_instances(paths, (self._stimulus_table.row(i).coco_id for i in sorted(seen)))

    @cached_property
    def _first_categories(self) -> dict[str, str]:
        if self._instances is None:
            return {}
        return {s.stimulus_id: s.categories[0] for s in self.stimuli() if s.categories}

    def _seen(self, subject: str) -> list[str]:
        ids_T = self.tree.design.nsd_ids(_subject_number(subject))
        executed = np.isin(self.tree.design.session_T, self.tree.sessions(subject))
        return [str(nsd_id) for nsd_id in np.unique(ids_T[executed])]

    def _check_brick(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        rows = len(self._stimulus_table)
        sides = {PICTURE_PX} if self.config.expect == "published" else set(shape[1:2])
        square = len(shape) == 4 and {shape[1], shape[2]} == sides
        if not square or shape[3] != 3 or shape[0] != rows or dtype != np.uint8:
            raise DataError(
                f"{self.config.path / STIMULI}: imgBrick is {dtype} of shape {shape}, expected "
                f"uint8 ({rows}, side, side, 3), and a side of {PICTURE_PX} in the published "
                f"file; {DOWNLOAD}"
            )

    def _compare_planned_positions(self, number: int) -> Finding:
        """Compare subjectN_repM of the CSV (1-based planned trials) with the design."""
        fact = "repetition columns"
        listed = self._stimulus_table.planned_positions(number)
        if listed is None:
            return Finding(fact, True, "the table has none")
        nsd_ids_T = self.tree.design.nsd_ids(number)
        planned = np.zeros_like(listed)
        which = repetitions(nsd_ids_T)
        if which.max() >= planned.shape[1]:
            return Finding(fact, False, f"an image is planned {which.max() + 1} times")
        planned[nsd_ids_T, which] = np.arange(1, len(nsd_ids_T) + 1)
        wrong = np.flatnonzero((np.sort(listed, axis=1) != np.sort(planned, axis=1)).any(axis=1))
        if wrong.size:
            return Finding(
                fact,
                False,
                f"nsdId {wrong[0]}: the table lists trials {listed[wrong[0]].tolist()}, the "
                f"design plans {planned[wrong[0]].tolist()} (both count from 1)",
            )
        return Finding(fact, True, "agree with nsd_expdesign.mat")


def _subject_number(subject: str) -> int:
    return int(subject.removeprefix("subj"))
