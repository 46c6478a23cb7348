"""A tiny NSD tree written with nibabel, h5py and scipy directly, by the published layout."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import scipy.io

SHAPES = {"subj01": (5, 7, 11), "subj03": (7, 3, 13)}
EXECUTED = {"subj01": 3, "subj03": 2}
PLANNED_SESSIONS, RUN_LENGTHS = 4, (5, 4)
TRIALS = sum(RUN_LENGTHS)
NUM_IDS, NUM_SHARED, NUM_IMAGES = 12, 4, 71
SHARED_73K = np.array([3, 20, 41, 66])  # 1-based
VERSION = "betas_fithrf_GLMdenoise_RR"


def write_nii(path: Path, data: np.ndarray, slope: float = 0.0) -> None:
    """As NSD does: no scaling, which on disk is slope 0 (nibabel itself would write NaN)."""
    raw = bytearray(nib.Nifti1Image(data, np.eye(4)).to_bytes())
    struct.pack_into("<ff", raw, 112, slope, 0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(raw), 1))


class NSDFiles:
    """Holds the arrays that were written, as oracles."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(5)
        self.order = rng.permutation(np.repeat(np.arange(1, NUM_IDS + 1), 3)).astype(np.uint16)
        others = np.setdiff1d(np.arange(1, NUM_IMAGES + 1), SHARED_73K)
        own = rng.permutation(others)[: 8 * (NUM_IDS - NUM_SHARED)].reshape(8, -1)
        shared = np.tile(SHARED_73K, (8, 1))
        self.subjectim = np.hstack([shared, np.sort(own, axis=1)]).astype(np.int32)
        self.betas: dict[tuple[str, int], np.ndarray] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.write_expdesign()
        self.write_stimuli()
        self.write_annotations()
        for subject in SHAPES:
            self.write_subject(subject, rng)

    def betas_path(self, subject: str, session: int, suffix: str = "nii.gz") -> Path:
        folder = self.root / f"nsddata_betas/ppdata/{subject}/func1pt8mm/{VERSION}"
        return folder / f"betas_session{session:02d}.{suffix}"

    def roi_folder(self, subject: str) -> Path:
        return self.root / f"nsddata/ppdata/{subject}/func1pt8mm/roi"

    def write_expdesign(self, order: np.ndarray | None = None) -> None:
        pattern = np.zeros((PLANNED_SESSIONS, len(RUN_LENGTHS), 75), np.uint8)
        for run, length in enumerate(RUN_LENGTHS):
            pattern[:, run, 3 : 3 + 2 * length : 2] = 1
        path = self.root / "nsddata/experiments/nsd/nsd_expdesign.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(
            path,
            {
                "masterordering": (self.order if order is None else order)[None],
                "subjectim": self.subjectim,
                "sharedix": SHARED_73K[None].astype(np.int32),
                "stimpattern": pattern,
            },
        )

    def write_stimuli(self) -> None:
        folder = self.root / "nsddata/experiments/nsd"
        self.coco_ids = 1000 + 7 * np.arange(NUM_IMAGES)
        columns: dict[str, object] = {
            "cocoId": self.coco_ids,
            "cocoSplit": ["val2017" if i % 2 else "train2017" for i in range(NUM_IMAGES)],
            "cropBox": [
                "(0, 0, 0.5, 0.0)" if i % 3 == 0 else "(0.0, 0.0, 0, 0)" for i in range(NUM_IMAGES)
            ],
            "nsdId": np.arange(NUM_IMAGES),
            "shared1000": np.isin(np.arange(1, NUM_IMAGES + 1), SHARED_73K),
        }
        for subject in range(1, 9):
            shown = self.subjectim[subject - 1][self.order - 1]
            for repetition in range(3):
                listed = np.zeros(NUM_IMAGES, int)
                for image in np.unique(shown):
                    listed[image - 1] = np.flatnonzero(shown == image)[repetition] + 1
                columns[f"subject{subject}_rep{repetition}"] = listed
        self.stim_info = folder / "nsd_stim_info_merged.csv"
        pd.DataFrame(columns).to_csv(self.stim_info)
        path = self.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
        path.parent.mkdir(parents=True)
        brick = np.zeros((NUM_IMAGES, 6, 6, 3), np.uint8)
        brick[:, :, :, 0] = np.arange(NUM_IMAGES)[:, None, None]
        brick[:, :, :, 1] = np.arange(6)[None, :, None]
        with h5py.File(path, "w") as file:
            file["imgBrick"] = brick

    def write_annotations(self) -> None:
        """A person on the left half and a smaller dog (category id 18: gapped) on the right."""
        folder = self.root / "nsddata_stimuli/stimuli/nsd/annotations"
        folder.mkdir(parents=True)
        for parity, split in enumerate(("train", "val")):
            ids = [int(c) for i, c in enumerate(self.coco_ids) if i % 2 == parity]
            tree = {
                "images": [{"id": i, "width": 100, "height": 80} for i in ids],
                "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
                "annotations": [
                    box
                    for i in ids
                    for box in (
                        {"image_id": i, "category_id": 1, "bbox": [0, 0, 45, 80]},
                        {"image_id": i, "category_id": 18, "bbox": [60, 10, 20, 20]},
                    )
                ],
            }
            (folder / f"instances_{split}2017.json").write_text(json.dumps(tree))

    def write_subject(self, subject: str, rng: np.random.Generator) -> None:
        shape = SHAPES[subject]
        mask = rng.choice([-1.0, 0.0, 1.0], shape, p=[0.5, 0.3, 0.2])
        self.masks[subject] = mask
        streams = np.where(mask > 0, rng.integers(1, 4, shape), np.minimum(mask, 0))
        write_nii(self.roi_folder(subject) / "nsdgeneral.nii.gz", mask)
        write_nii(self.roi_folder(subject) / "streams.nii.gz", streams)
        self.streams = streams
        labels = self.root / "nsddata/freesurfer/fsaverage/label"
        labels.mkdir(parents=True, exist_ok=True)
        (labels / "streams.mgz.ctab").write_text("0 Unknown\n1 early\n2 midventral\n3 lateral\n")
        for session in range(1, EXECUTED[subject] + 1):
            data = rng.integers(-3000, 3000, (*shape, TRIALS)).astype(np.int16)
            self.write_betas(subject, session, data)
        ncsnr = rng.uniform(0, 1, shape).astype(np.float32)
        write_nii(self.betas_path(subject, 1).with_name("ncsnr.nii.gz"), ncsnr)
        self.ncsnr = ncsnr
        self.write_responses(subject)

    def write_betas(self, subject: str, session: int, data: np.ndarray) -> None:
        self.betas[subject, session] = data
        write_nii(self.betas_path(subject, session), data)
        with h5py.File(self.betas_path(subject, session, "hdf5"), "w") as file:
            turned = data.transpose(3, 2, 1, 0)
            file.create_dataset("betas", data=turned, chunks=(data.shape[3], 1, 1, 1))

    def write_responses(self, subject: str, offset: int = 0) -> None:
        count = EXECUTED[subject] * TRIALS
        shown = self.subjectim[int(subject[-1]) - 1][self.order - 1]
        run = np.tile(np.repeat([1, 2], RUN_LENGTHS), PLANNED_SESSIONS)
        table = pd.DataFrame(
            {
                "SUBJECT": int(subject[-1]),
                "SESSION": np.repeat(np.arange(PLANNED_SESSIONS) + 1, TRIALS)[:count],
                "RUN": run[:count],
                "73KID": shown[:count] - offset,
                "10KID": self.order[:count],
                "RT": [np.nan if i % 4 == 0 else 812.5 for i in range(count)],
            }
        )
        path = self.root / f"nsddata/ppdata/{subject}/behav/responses.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, sep="\t", index=False)

    def selected(self, subject: str, session: int, wanted: np.ndarray | None = None) -> np.ndarray:
        """Slow oracle: voxel by voxel in C order."""
        wanted = self.masks[subject] == 1 if wanted is None else wanted
        data = self.betas[subject, session]
        columns = []
        for x in range(data.shape[0]):
            for y in range(data.shape[1]):
                for z in range(data.shape[2]):
                    if wanted[x, y, z]:
                        columns.append([int(v) / 300 for v in data[x, y, z]])
        return np.array(columns, np.float32).T
