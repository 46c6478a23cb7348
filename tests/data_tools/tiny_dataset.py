"""Two tiny datasets that share images, behind the reader protocol, with known numbers.

Everything is a pure function of names, so that a subprocess sees the same data.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.datasets.protocol import Facts, Stimulus, SubjectFacts, VoxelTable
from dist_decoder.config.base import load_config
from dist_decoder.config.data import DataConfig, DatasetConfig

VOXELS = {"alpha/s1": 7, "alpha/s2": 11, "beta/p-1": 5}
SESSIONS = {"alpha/s1": 3, "alpha/s2": 2, "beta/p-1": 2}
# alpha shows coco:0 ... coco:19 and tests on 0-3; beta shows coco:2, coco:3 (tests of alpha),
# coco:18 (training of both) and its own pictures; it tests on scene:0 and scene:1.
UIDS = {
    "alpha": [f"coco:{index}" for index in range(20)],
    "beta": ["coco:2", "coco:3", "coco:18", *(f"scene:{index}" for index in range(9))],
}
TESTS = {"alpha": set(UIDS["alpha"][:4]), "beta": {"scene:0", "scene:1"}}
RUNS = 2


def seeded(*names: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(" ".join(map(str, names)).encode()))


class TinyDataset:
    """One of the two; ``shift`` moves all betas, as another preprocessing would."""

    shift = 0.0

    def __init__(self, config: DatasetConfig) -> None:
        self.name = config.name
        self._limit = config.max_sessions

    def facts(self) -> Facts:
        facts = {subject: SubjectFacts() for subject in self.subjects()}
        return Facts(self.name, facts, "arbitrary", "CC0", f"{self.name} et al.", True)

    def subjects(self) -> tuple[str, ...]:
        places = [place.split("/") for place in VOXELS]
        return tuple(subject for dataset, subject in places if dataset == self.name)

    def trials(self, subject: str) -> pd.DataFrame:
        rows: list[dict[str, object]] = []
        seen: dict[str, int] = {}
        sessions = SESSIONS[f"{self.name}/{subject}"]
        for session in range(1, (min(self._limit or sessions, sessions)) + 1):
            order = seeded("order", self.name, subject, session).permutation(len(UIDS[self.name]))
            for place, image in enumerate(order):
                name = f"{self.name}-{image}"
                uid = UIDS[self.name][image]
                imagery = self.name == "beta" and session == 2 and place < 2
                rows.append(
                    {
                        "session": session,
                        "run": 1 + place * RUNS // len(order),
                        "trial": len(rows),
                        "stimulus_id": name,
                        "repetition": seen.get(name, 0),
                        "split": "imagery"
                        if imagery
                        else "test"
                        if uid in TESTS[self.name]
                        else "train",
                        "category": f"kind {image % 3}" if self.name == "beta" else "",
                    }
                )
                seen[name] = seen.get(name, 0) + 1
        return pd.DataFrame(rows)

    def voxels(self, subject: str) -> VoxelTable:
        size = VOXELS[f"{self.name}/{subject}"]
        return VoxelTable(
            xyz_V3=np.arange(3 * size, dtype=np.float32).reshape(size, 3),
            rois={"all": np.ones(size, np.bool_), "odd": np.arange(size) % 2 == 1},
            ncsnr_V=np.linspace(0, 1, size, dtype=np.float32) if subject == "s1" else None,
            mask_fingerprint=f"mask {self.name} {subject} {size}",
        )

    def betas(self, subject: str, session: int) -> NDArray[np.float32]:
        rows = int((self.trials(subject)["session"] == session).sum())
        size = VOXELS[f"{self.name}/{subject}"]
        draw = seeded("betas", self.name, subject, session).standard_normal((rows, size))
        betas_NV = (draw * np.arange(1, size + 1) + 10 * session + self.shift).astype(np.float32)
        if (subject, session) == ("s2", 2):
            betas_NV[:, 4] = np.nan
        if subject == "s1":
            betas_NV[:, 6] = 0.1
        return betas_NV

    def stimuli(self) -> tuple[Stimulus, ...]:
        return tuple(
            Stimulus(
                f"{self.name}-{index}",
                uid,
                ("animal", f"c{index % 4}") if self.name == "alpha" else (),
                uid in TESTS[self.name],
            )
            for index, uid in enumerate(UIDS[self.name])
        )

    def has_images(self) -> bool:
        return True

    def image(self, stimulus_id: str) -> NDArray[np.uint8]:
        uid = UIDS[self.name][int(stimulus_id.rpartition("-")[2])]
        size = (6, 8) if uid.startswith("coco") else (8, 4)
        return seeded("image", uid).integers(0, 256, (*size, 3), dtype=np.uint8)

    def fingerprint(self, subject: str, session: int) -> str:
        return f"{subject} {session} {self.shift}"


def tiny_config(output: Path, *overrides: str) -> DataConfig:
    """Return a configuration of both datasets with the pixels encoder."""
    return load_config(
        DataConfig,
        None,
        [
            f"output={str(output)!r}",
            "datasets=[{name: beta, path: x}, {name: alpha, path: x}]",
            "embed={kind: pixels, grid: 2}",
            "shard.samples_per_shard=5",
            *overrides,
        ],
    )
