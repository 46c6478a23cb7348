"""BOLD5000: lists, ROI packages and volumes, with genuine names and trial orders (CC0)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from bold5000_files import (
    GENUINE,
    NUM_TRIALS,
    ONCE,
    REPEATED,
    ROIS,
    SESSION_ROWS,
    WIDTHS,
    BOLD5000Files,
    folder_of,
    genuine_orders,
    write_roi_npy,
)

from data_tools.check import check
from data_tools.datasets.bold5000 import BOLD5000Reader
from data_tools.datasets.bold5000_lists import published_structure
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.errors import ConfigError, DataError


@pytest.fixture
def files(tmp_path: Path) -> BOLD5000Files:
    return BOLD5000Files(tmp_path)


def reader(files: BOLD5000Files, **values: object) -> BOLD5000Reader:
    config = {"name": "bold5000", "path": files.root, **values}
    return BOLD5000Reader(DatasetConfig.model_validate(config))


def test_trials_come_from_run_lists_without_prefix(files: BOLD5000Files) -> None:
    trials = reader(files).trials("CSI1")
    assert trials["stimulus_id"].tolist() == files.names
    assert trials["session"].tolist() == [1] * 7 + [2] * 7
    assert trials["run"].tolist() == [1] * 3 + [2] * 4 + [1] * 2 + [2] * 2 + [3] * 3
    assert [s == "test" for s in trials["split"]] == [n in REPEATED for n in files.names]
    expected = [files.names[:i].count(name) for i, name in enumerate(files.names)]
    assert trials["repetition"].tolist() == expected


def test_roi_arrays_are_joined_in_a_fixed_order(files: BOLD5000Files) -> None:
    bold = reader(files)
    everything = np.concatenate([files.arrays[roi] for roi in ROIS], axis=1)
    for session, rows in SESSION_ROWS.items():
        np.testing.assert_array_equal(
            bold.betas("CSI1", session), everything[rows].astype(np.float32)
        )
    voxels = bold.voxels("CSI1")
    assert voxels.num_voxels == sum(WIDTHS.values())
    assert int(voxels.rois["PPA"].sum()) == WIDTHS["LHPPA"] + WIDTHS["RHPPA"]
    chosen = reader(files, roi="RSC+LHLOC").betas("CSI1", 1)
    parts = [files.arrays[roi][:7] for roi in ("LHLOC", "LHRSC", "RHRSC")]
    np.testing.assert_array_equal(chosen, np.concatenate(parts, axis=1).astype(np.float32))
    with pytest.raises(ConfigError, match="no ROI 'FFA'"):
        reader(files, roi="FFA").betas("CSI1", 1)


def test_release_1_mat_and_h5(files: BOLD5000Files) -> None:
    for kind, suffix in (("mat", "mat"), ("h5", "h5")):
        path = files.root / "ROIs" / "CSI1" / kind / f"CSI1_ROIs_TR34.{suffix}"
        path.parent.mkdir(parents=True)
        if kind == "mat":
            scipy.io.savemat(path, files.arrays)
        else:
            (files.root / "ROIs/CSI1/mat/CSI1_ROIs_TR34.mat").unlink()
            with h5py.File(path, "w") as file:
                for roi, array in files.arrays.items():
                    file[roi] = array
        old = reader(files, options={"source": "release1"})
        np.testing.assert_array_equal(old.betas("CSI1", 2), reader(files).betas("CSI1", 2))
        assert old.facts().unit == "arbitrary"
    with pytest.raises(DataError, match="TR3"):
        reader(files, options={"source": "release1", "tr": "3"}).betas("CSI1", 1)
    (files.root / "BOLD5000_GLMsingle_ROI_betas").rename(files.root / "elsewhere")
    assert reader(files).facts().unit == "arbitrary"  # auto goes on to release 1


def test_volumes_with_a_mask(files: BOLD5000Files) -> None:
    data, mask = files.write_volumes()
    options = {"source": "nii", "mask": "masks/{subject}.nii.gz"}
    bold = reader(files, options=options)
    xyz = np.argwhere(mask)
    for session, rows in SESSION_ROWS.items():
        expected = np.array([data[x, y, z, rows] for x, y, z in xyz]).T
        np.testing.assert_array_equal(bold.betas("CSI1", session), expected)
    np.testing.assert_array_equal(bold.voxels("CSI1").xyz_V3, xyz)
    with pytest.raises(ConfigError, match=r"options\.mask"):
        reader(files, options={"source": "nii"}).voxels("CSI1")
    next(files.root.glob("betas/*ses-02*")).unlink()
    bold = reader(files, options=options)
    with pytest.raises(DataError, match="no volume file"):
        bold.betas("CSI1", 2)
    assert reader(files, options=options, max_sessions=1).consistency("CSI1")[0].ok


def test_nan_voxel_is_refused_unless_it_is_invalid_throughout(files: BOLD5000Files) -> None:
    folder = files.root / "BOLD5000_GLMsingle_ROI_betas" / "py"
    path = next(folder.glob("*LHOPA.npy"))
    array = files.arrays["LHOPA"].copy()
    array[:7, 0] = np.nan
    np.save(path, array)
    betas = reader(files).betas("CSI1", 1)
    assert np.isnan(betas).sum() == 7
    array[3, 0] = 1.0
    np.save(path, array)
    with pytest.raises(DataError, match="session 1: 1 voxel"):
        reader(files).betas("CSI1", 1)


def test_arrays_that_do_not_fit_the_lists_are_refused(files: BOLD5000Files) -> None:
    path = next(files.root.glob("BOLD5000_GLMsingle_ROI_betas/py/*LHOPA.npy"))
    np.save(path, np.zeros((NUM_TRIALS, 2)).T)
    with pytest.raises(DataError, match="transposed"):
        reader(files).betas("CSI1", 1)
    np.save(path, np.zeros((NUM_TRIALS - 1, 1)))
    with pytest.raises(DataError, match="lists have 14 trials"):
        reader(files).betas("CSI1", 1)
    np.save(path, np.array([[{}]] * NUM_TRIALS), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        reader(files).betas("CSI1", 1)


def test_identities_categories_and_images(files: BOLD5000Files) -> None:
    (files.root / "instances.json").write_text(
        json.dumps(
            {
                "images": [{"id": 420713, "width": 10, "height": 10}],
                "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
                "annotations": [
                    {"image_id": 420713, "category_id": 90, "bbox": [0, 0, 2, 2]},
                    {"image_id": 420713, "category_id": 3, "bbox": [0, 0, 9, 9]},
                ],
            }
        )
    )
    bold = reader(files, options={"coco_annotations": "instances.json"})
    stimuli = {s.stimulus_id: s for s in bold.stimuli()}
    assert stimuli["COCO_train2014_000000420713.jpg"].image_uid == "coco:420713"
    assert stimuli["COCO_train2014_000000420713.jpg"].categories == ("car", "toothbrush")
    nematode = stimuli["n01930112_19568.JPEG"]
    assert nematode.image_uid == "imagenet:n01930112_19568"
    assert (nematode.categories, nematode.is_test) == (("n01930112",), True)
    assert nematode.extra["words"] == "nematode, roundworm"
    rink = stimuli["ice_rink10.jpg"]
    assert (rink.image_uid, rink.categories) == ("scene:ice_rink10", ("ice_rink",))
    assert stimuli["ATM2.jpg"].image_uid == "scene:atm2"
    for number, name in enumerate([*REPEATED, *ONCE]):
        picture = bold.image(name)
        assert picture.shape == (6, 9, 3)
        assert (picture == 10 * number).all()
    plain = {s.stimulus_id: s for s in reader(files).stimuli()}
    assert plain["COCO_train2014_000000420713.jpg"].categories == ()


def test_missing_lists_and_images_are_named(files: BOLD5000Files) -> None:
    lists = files.stimuli / "Stimuli_Presentation_Lists" / "CSI1"
    (lists / "CSI1_sess02" / "CSI_sess02_run02.txt").unlink()
    with pytest.raises(DataError, match=r"session 2 has run lists \[1, 3\]"):
        reader(files).trials("CSI1")
    files.write_run_lists()
    (files.stimuli / "Scene_Stimuli/Presented_Stimuli/Scene/ATM2.jpg").unlink()
    findings = {f.fact: f for f in reader(files).consistency("CSI1")}
    assert not findings["image files"].ok
    assert "ATM2.jpg" in findings["image files"].detail
    with pytest.raises(DataError, match=r"ATM2\.jpg"):
        reader(files).image("ATM2.jpg")


def test_families_of_lists_are_compared(files: BOLD5000Files) -> None:
    other = files.root / "ROIs" / "stim_lists" / "CSI01_stim_lists.txt"
    other.parent.mkdir(parents=True)
    other.write_text("\n".join(files.lines()))
    (files.root / "sub-CSI1_imgnames.txt").write_text("\n".join(files.names))
    assert all(finding.ok for finding in reader(files).consistency("CSI1"))
    swapped = files.lines()
    position = next(i for i in range(len(swapped) - 1) if swapped[i] != swapped[i + 1])
    swapped[position : position + 2] = swapped[position + 1], swapped[position]
    other.write_text("\n".join(swapped))
    wrong = [f for f in reader(files).consistency("CSI1") if not f.ok]
    assert f"line {position + 1}" in wrong[0].detail


def test_run_lists_in_their_other_spelling(files: BOLD5000Files) -> None:
    before = reader(files).trials("CSI1")
    old = files.stimuli / "Stimuli_Presentation_Lists" / "CSI1"
    new = files.root / "Subject_Img_Lists" / "Subj01"
    for path in sorted(old.rglob("*.txt")):
        session, run = path.stem.split("_")[1:]
        target = new / session.replace("sess", "Sess") / f"Subj01_{session}_{run}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    old.rmdir() if not any(old.iterdir()) else old.rename(files.root / "empty")
    (new / "Subj01_sess_setup_info.txt").write_text("not a list\n")
    assert reader(files).trials("CSI1").equals(before)


def genuine_tree(root: Path, subjects: tuple[str, ...]) -> DataConfig:
    """Full trial counts, ROI arrays of a few voxels, empty image files."""
    orders = genuine_orders()
    scenes = root / "Scene_Stimuli"
    for name in sorted({name for subject in subjects for name in orders[subject]}):
        path = scenes / "Presented_Stimuli" / folder_of(name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    listing = (GENUINE / "repeated_stimuli_113_list.txt").read_text()
    (scenes / "repeated_stimuli_113_list.txt").write_text(listing)
    for seed, subject in enumerate(subjects):
        write_roi_npy(root, subject, len(orders[subject]), seed)
        (root / f"sub-{subject}_imgnames.txt").write_text("\n".join(orders[subject]))
    dataset = DatasetConfig.model_validate({"name": "bold5000", "path": root, "expect": "counts"})
    return DataConfig.model_validate(
        {"output": root / "out", "datasets": [dataset], "check": {"images": 0}}
    )


HISTOGRAMS = {
    "CSI1": {3: 1, 4: 112},
    "CSI2": {3: 1, 4: 112},
    "CSI3": {2: 1, 3: 2, 4: 107, 5: 3},
    "CSI4": {1: 16, 2: 39, 3: 37, 4: 13, 5: 1},
}
"""Times that a repeated image was shown -> images."""


def test_genuine_lists_give_the_published_counts(tmp_path: Path) -> None:
    config = genuine_tree(tmp_path, tuple(HISTOGRAMS))
    report = check(config)
    assert report.ok, report.first_difference
    found = {(row.subject, row.fact): row.found for row in report.rows}
    bold = BOLD5000Reader(config.datasets[0])
    for subject, histogram in HISTOGRAMS.items():
        full = subject != "CSI4"
        assert found[subject, "trials"] == (5254 if full else 3108)
        assert found[subject, "train_trials"] == (4803 if full else 2846)
        assert found[subject, "train_images"] == (4803 if full else 2846)
        assert found[subject, "test_trials"] == (451 if full else 262)
        assert found[subject, "test_images"] == (113 if full else 106)
        told = ", ".join(f"{images} x {times}" for times, images in sorted(histogram.items()))
        assert found[subject, "repeats"] == f"{told} (images x showings)"
        trials = bold.trials(subject)
        sizes = [333] * 6 + [370] * 3 if not full else [333] * 8 + [370] * 7
        assert sorted(trials["session"].value_counts().tolist()) == sizes
        counts = Counter(trials["stimulus_id"][trials["split"] == "test"])
        assert Counter(counts.values()) == histogram
    four = set(bold.trials("CSI4")["stimulus_id"])
    assert four < set(bold.trials("CSI1")["stimulus_id"])
    stimuli = bold.stimuli()
    assert len(stimuli) == len({s.image_uid for s in stimuli}) == 4916
    kinds = Counter(s.image_uid.partition(":")[0] for s in stimuli)
    assert kinds == {"coco": 2000, "imagenet": 1916, "scene": 1000}
    scenes = Counter(s.categories[0] for s in stimuli if s.image_uid.startswith("scene:"))
    assert len(scenes) == 250
    assert set(scenes.values()) == {4}
    synsets = Counter(s.categories[0] for s in stimuli if s.image_uid.startswith("imagenet:"))
    assert len(synsets) == 958
    assert set(synsets.values()) == {2}
    assert sum(s.is_test for s in stimuli) == 113
    assert sum(s.stimulus_id.endswith(".jpeg") for s in stimuli) == 15


@pytest.mark.parametrize("subject", ["CSI4"])
def test_all_families_of_genuine_lists_agree(tmp_path: Path, subject: str) -> None:
    """The genuine order as run lists with ``rep_``, as CSI0k list with ``rep_``, and plain."""
    config = genuine_tree(tmp_path, (subject,))
    order = genuine_orders()[subject]
    repeated = set((GENUINE / "repeated_stimuli_113_list.txt").read_text().split())
    lines = [f"rep_{name}" if name in repeated else name for name in order]
    plain = BOLD5000Reader(config.datasets[0]).trials(subject)
    flat = tmp_path / "ROIs" / "stim_lists" / f"CSI0{subject[-1]}_stim_lists.txt"
    flat.parent.mkdir(parents=True)
    flat.write_text("\n".join(lines))
    (tmp_path / f"sub-{subject}_imgnames.txt").unlink()
    assert BOLD5000Reader(config.datasets[0]).trials(subject).equals(plain)
    session_N, run_N = published_structure(subject)
    for start in range(0, len(lines), 37):
        session, run = session_N[start], run_N[start]
        folder = tmp_path / f"Stimuli_Presentation_Lists/{subject}/{subject}_sess{session:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"CSI_sess{session:02d}_run{run:02d}.txt"
        path.write_text("\n".join(lines[start : start + 37]))
    runs = BOLD5000Reader(config.datasets[0])
    assert runs.trials(subject).equals(plain)
    assert all(finding.ok for finding in runs.consistency(subject))
    flat.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    (wrong,) = [one for one in runs.consistency(subject) if not one.ok]
    assert f"line 1 is {order[1]}, not {order[0]}" in wrong.detail


def test_release_1_files_of_another_kind_are_refused(files: BOLD5000Files) -> None:
    folder = files.root / "ROIs" / "CSI1"
    for kind in ("mat", "h5"):
        (folder / kind).mkdir(parents=True)
    mat, h5 = folder / "mat/CSI1_ROIs_TR34.mat", folder / "h5/CSI1_ROIs_TR34.h5"
    old = {"options": {"source": "release1"}}
    with h5py.File(mat, "w") as file:
        for roi, array in files.arrays.items():
            file[roi] = array.T
    with pytest.raises(
        DataError, match=r"MATLAB 7\.3 \(HDF5\) file; the published file is MATLAB 5"
    ):
        reader(files, **old).betas("CSI1", 1)
    mat.rename(files.root / "other.h5")
    with h5py.File(h5, "w") as file:
        for roi in files.arrays:
            file[roi] = h5py.ExternalLink(str(files.root / "other.h5"), roi)
    with pytest.raises(DataError, match="is a link into"):
        reader(files, **old).betas("CSI1", 1)


def test_check_names_the_first_fact_that_differs(tmp_path: Path) -> None:
    config = genuine_tree(tmp_path, ("CSI4",))
    path = tmp_path / "Scene_Stimuli" / "repeated_stimuli_113_list.txt"
    path.write_text("\n".join(path.read_text().split()[:-3]))
    report = check(config)
    assert not report.ok
    assert report.first_difference is not None
    assert "bold5000/CSI4: test_images: 10" in report.first_difference
    names = (tmp_path / "sub-CSI4_imgnames.txt").read_text().split()
    (tmp_path / "sub-CSI4_imgnames.txt").write_text("\n".join(names[:-1]))
    report = check(config)
    assert report.first_difference is not None
    assert "lists 3107 trials" in report.first_difference
