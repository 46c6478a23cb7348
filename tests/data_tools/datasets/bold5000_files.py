"""A tiny BOLD5000 tree written with numpy, scipy, h5py and nibabel directly."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
from nsd_files import write_nii
from PIL import Image

ROIS = [side + area for area in ("EarlyVis", "LOC", "OPA", "PPA", "RSC") for side in ("LH", "RH")]
WIDTHS = dict(zip(ROIS, (5, 3, 2, 4, 1, 2, 3, 1, 2, 6), strict=True))
GENUINE = Path(__file__).with_name("genuine")
# One image of every source is repeated; extensions vary as in the real set.
REPEATED = ["COCO_train2014_000000420713.jpg", "n01930112_19568.JPEG", "concert5.jpg"]
ONCE = ["n02127052_7986.JPEG", "brewery4.jpg", "chickenCoop3.jpeg", "ice_rink10.jpg", "ATM2.jpg"]
RUNS = {(1, 1): 3, (1, 2): 4, (2, 1): 2, (2, 2): 2, (2, 3): 3}
"""(session, run) -> lines."""
NUM_TRIALS = sum(RUNS.values())
SESSION_ROWS = {1: slice(0, 7), 2: slice(7, 14)}


def folder_of(name: str) -> str:
    return "COCO" if name.startswith("COCO") else "ImageNet" if name[1].isdigit() else "Scene"


def genuine_orders() -> dict[str, list[str]]:
    orders: dict[str, list[str]] = {}
    for line in lzma.decompress((GENUINE / "bold5000_trial_orders.txt.xz").read_bytes()).split():
        name = line.decode()
        if name.startswith("CSI"):
            names = orders.setdefault(name, [])
        elif name != "#":
            names.append(name)
    return orders


def write_roi_npy(root: Path, subject: str, num_trials: int, seed: int) -> dict[str, np.ndarray]:
    folder = root / "BOLD5000_GLMsingle_ROI_betas" / "py"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    arrays = {}
    for roi in ROIS:
        arrays[roi] = rng.normal(size=(num_trials, WIDTHS[roi]))
        name = f"{subject}_GLMbetas-TYPED-FITHRF-GLMDENOISE-RR_allses_{roi}.npy"
        np.save(folder / name, arrays[roi])
    return arrays


class BOLD5000Files:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = [*REPEATED, *ONCE, *REPEATED, *REPEATED]
        self.names = [self.names[i] for i in np.random.default_rng(3).permutation(NUM_TRIALS)]
        self.stimuli = root / "BOLD5000_Stimuli"
        self.write_run_lists()
        (self.stimuli / "Scene_Stimuli").mkdir(parents=True)
        listing = self.stimuli / "Scene_Stimuli" / "repeated_stimuli_113_list.txt"
        listing.write_text("\n".join(REPEATED) + "\n\n")
        for number, name in enumerate([*REPEATED, *ONCE]):
            path = self.stimuli / "Scene_Stimuli" / "Presented_Stimuli" / folder_of(name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((6, 9, 3), 10 * number, np.uint8)
            Image.fromarray(pixels).save(path, "PNG")
        (self.stimuli / "Image_Labels").mkdir()
        labels = self.stimuli / "Image_Labels" / "imagenet_final_labels.txt"
        labels.write_text("n01930112 nematode, roundworm\n")
        self.arrays = write_roi_npy(root, "CSI1", NUM_TRIALS, seed=1)

    def lines(self) -> list[str]:
        return [("rep_" if name in REPEATED else "") + name for name in self.names]

    def write_run_lists(self) -> None:
        lines = iter(self.lines())
        for (session, run), count in RUNS.items():
            folder = self.stimuli / f"Stimuli_Presentation_Lists/CSI1/CSI1_sess{session:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"CSI_sess{session:02d}_run{run:02d}.txt"
            path.write_text("".join(next(lines) + "\n" for _ in range(count)))

    def write_volumes(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(9)
        data = rng.normal(size=(3, 5, 7, NUM_TRIALS)).astype(np.float32)
        mask = (rng.uniform(size=(3, 5, 7)) < 0.2).astype(np.uint8)
        write_nii(self.root / "masks" / "CSI1.nii.gz", mask)
        for session, rows in SESSION_ROWS.items():
            name = f"CSI1_GLMbetas-TYPED-FITHRF-GLMDENOISE-RR_ses-{session:02d}.nii.gz"
            write_nii(self.root / "betas" / name, data[..., rows])
        return data, mask
