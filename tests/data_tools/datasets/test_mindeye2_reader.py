"""MindEye2's package: joins through column 5 only, both test folders, and damaged files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest

from data_tools.datasets.mindeye2 import IMAGES, MindEye2Reader
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError

SUBJECT, VOXELS, PER_SESSION, SESSIONS, NUM_IMAGES = "subj02", 7, 9, 3, 23
SHARED = (2, 5, 11)
SHOWN = np.random.default_rng(4).permutation(np.repeat([2, 5, 11, 0, 7, 8, 13, 19, 22], 3))


class Package:
    """Written sample by sample from the published layout; holds the arrays as oracles."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(9)
        self.betas = rng.standard_normal((len(SHOWN), VOXELS)).astype(np.float32)
        self.images = rng.integers(0, 256, (NUM_IMAGES, 3, 6, 6)).astype(np.uint8)
        with h5py.File(self.betas_path, "w") as file:
            file["betas"] = self.betas
        with h5py.File(root / IMAGES, "w") as file:
            file["images"] = (self.images / 255).astype(np.float16)
        shared = np.isin(np.arange(NUM_IMAGES), SHARED)
        np.save(root / "shared1000.npy", shared)
        table = pd.DataFrame({"nsdId": range(NUM_IMAGES), "cocoId": self.coco_ids})
        table.to_csv(root / "nsd_stim_info_merged.csv")
        is_shared = np.isin(SHOWN, SHARED)
        session = np.arange(len(SHOWN)) // PER_SESSION + 1
        for number in range(SESSIONS):
            self.tar(f"train/{number}", np.flatnonzero(~is_shared & (session == number + 1)))
        self.tar("new_test/0", np.flatnonzero(is_shared))
        self.tar("test/0", np.flatnonzero(is_shared & (session < 3)))

    coco_ids = 1000 + 3 * np.arange(NUM_IMAGES)

    @property
    def betas_path(self) -> Path:
        return self.root / f"betas_all_{SUBJECT}_fp32_renorm.hdf5"

    def tar(self, name: str, rows: np.ndarray, **changes: float) -> None:
        """Write samples in shuffled order: neither order nor name tells the trial."""
        path = self.root / f"wds/{SUBJECT}/{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for number, row in enumerate(np.random.default_rng(1).permutation(rows)):
                behaviour = np.full((1, 17), -1.0)
                image, subject = SHOWN[row], 2
                behaviour[0, :6] = [image, subject, row // PER_SESSION + 1, 1 + row % 2, 1, row]
                behaviour[0, 16] = image in SHARED
                for column, value in changes.items():
                    behaviour[0, int(column[1:])] = value
                decoy = np.full((15, 17), 3.0)
                for part, values in (("past_behav", decoy), ("behav", behaviour)):
                    content = io.BytesIO()
                    np.save(content, values)
                    member = tarfile.TarInfo(f"sample{number:09d}.{part}.npy")
                    member.size = len(content.getvalue())
                    archive.addfile(member, io.BytesIO(content.getvalue()))


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package(tmp_path)


def reader(package: Package, **values: Any) -> MindEye2Reader:
    entry = {"name": "mindeye2", "path": package.root, **values}
    return MindEye2Reader(DatasetConfig.model_validate(entry))


def test_trials_join_betas_through_column_five(package: Package) -> None:
    me2 = reader(package)
    trials = me2.trials(SUBJECT)
    assert trials["trial"].tolist() == list(range(27))
    assert trials["stimulus_id"].tolist() == [str(image) for image in SHOWN]
    assert [split == "test" for split in trials["split"]] == np.isin(SHOWN, SHARED).tolist()
    assert trials["repetition"].tolist() == [list(SHOWN[:i]).count(s) for i, s in enumerate(SHOWN)]
    for session in (1, 2, 3):
        rows = slice((session - 1) * PER_SESSION, session * PER_SESSION)
        np.testing.assert_array_equal(me2.betas(SUBJECT, session), package.betas[rows])
    assert me2.voxels(SUBJECT).num_voxels == VOXELS


def test_stimuli_have_coco_identities_and_pictures(package: Package) -> None:
    me2 = reader(package)
    stimuli = me2.stimuli()
    assert [int(s.stimulus_id) for s in stimuli] == sorted(set(SHOWN.tolist()))
    for stimulus in stimuli:
        row = int(stimulus.stimulus_id)
        assert stimulus.image_uid == f"coco:{1000 + 3 * row}"
        assert stimulus.is_test == (row in SHARED)
        picture = me2.image(stimulus.stimulus_id)  # float16 keeps all 256 grey values
        np.testing.assert_array_equal(picture, package.images[row].transpose(1, 2, 0))
    assert all(finding.ok for finding in me2.consistency(SUBJECT))


def test_the_older_test_folder_leaves_gaps_in_the_trials(package: Package) -> None:
    old = reader(package, options={"test": "test"})
    trials = old.trials(SUBJECT)
    is_shared = np.isin(SHOWN, SHARED)
    expected = np.flatnonzero(~is_shared | (np.arange(27) < 18))
    assert trials["trial"].tolist() == expected.tolist()
    last = expected[expected >= 18]
    np.testing.assert_array_equal(old.betas(SUBJECT, 3), package.betas[last])
    assert reader(package, max_sessions=1).trials(SUBJECT)["session"].max() == 1


def test_declared_facts_follow_the_folder(package: Package) -> None:
    new = reader(package).facts().subjects["subj01"]
    assert (new.test_trials, new.train_trials, new.voxels) == (3000, 27000, 15724)
    old = reader(package, options={"test": "test"}).facts().subjects
    assert [old[s].test_trials for s in ("subj01", "subj03", "subj08")] == [2770, 2113, 1985]


def test_missing_coco_ids_are_said_not_guessed(package: Package) -> None:
    (package.root / "nsd_stim_info_merged.csv").unlink()
    with pytest.raises(DataError, match="without_coco_ids"):
        reader(package).stimuli()
    stimuli = reader(package, options={"without_coco_ids": True}).stimuli()
    assert {s.image_uid for s in stimuli} == {f"nsd:{image}" for image in SHOWN}
    with pytest.raises(ConfigError, match="nsdgeneral only"):
        reader(package, roi="V1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c1": 5}, r"column 1 \(subject\) is 5"),
        ({"c2": 2}, r"column 2 \(session\) is 2"),
        ({"c16": 1}, r"column 16 \(is_shared1000\) is 1"),
        ({"c5": 4}, "stands in two samples"),
        ({"c5": -1}, "global_trial is -1"),
        ({"c0": 2.5}, "not integers"),
    ],
)
def test_wrong_samples_are_refused(package: Package, changes: dict, message: str) -> None:
    unshared = np.flatnonzero(~np.isin(SHOWN[:PER_SESSION], SHARED))
    package.tar("train/0", unshared, **changes)
    with pytest.raises(DataError, match=message):
        reader(package).trials(SUBJECT)


def test_ids_of_another_base_are_found(package: Package) -> None:
    np.save(package.root / "shared1000.npy", np.roll(np.load(package.root / "shared1000.npy"), 1))
    wrong = [finding for finding in reader(package).consistency(SUBJECT) if not finding.ok]
    assert [finding.fact for finding in wrong] == ["shared1000.npy"]
    assert "another base" in wrong[0].detail


def test_damaged_files_are_refused(package: Package) -> None:
    tar = package.root / f"wds/{SUBJECT}/train/1.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:1300])
    with pytest.raises(DataError, match="truncated"):
        reader(package).trials(SUBJECT)
    tar.unlink()
    with pytest.raises(DataError, match=r"1\.tar is missing"):
        reader(package).trials(SUBJECT)
    tar.write_bytes(whole)
    with h5py.File(package.betas_path, "r+") as file:
        file["betas"][12, 3] = np.nan
    with pytest.raises(DataError, match="voxel 3, trial 3"):
        reader(package).betas(SUBJECT, 2)
    with h5py.File(package.betas_path, "w") as file:
        file["betas"] = package.betas[:20]
    with pytest.raises(DataError, match="at least 27 rows"):
        reader(package).betas(SUBJECT, 1)
    with pytest.raises(DataError, match="expected float16"):
        reader(package, expect="published").image("5")
    with h5py.File(package.root / IMAGES, "w") as file:
        file["images"] = np.full((NUM_IMAGES, 3, 6, 6), np.nan, np.float16)
    with pytest.raises(DataError, match=r"not within \[0, 1\]"):
        reader(package).image("5")


def test_pickled_samples_are_refused(package: Package) -> None:
    content = io.BytesIO()
    np.save(content, np.array([[{}]], dtype=object), allow_pickle=True)
    with tarfile.open(package.root / f"wds/{SUBJECT}/train/2.tar", "w") as archive:
        member = tarfile.TarInfo("sample000000000.behav.npy")
        member.size = len(content.getvalue())
        archive.addfile(member, io.BytesIO(content.getvalue()))
    with pytest.raises(DataError, match="allow_pickle"):
        reader(package).trials(SUBJECT)
