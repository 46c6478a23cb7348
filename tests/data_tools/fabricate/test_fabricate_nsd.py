"""The NSD tree, read with nibabel, h5py, scipy and pandas, against the published layout."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import scipy.io

from data_tools.fabricate.bold5000 import num_once_shown
from data_tools.fabricate.catalogue import Catalogue
from data_tools.fabricate.nsd import nsd_subjects
from data_tools.fabricate.nsd_design import NsdDesign
from data_tools.fabricate.nsd_volumes import volume_shape
from data_tools.fabricate.world import World
from dist_decoder.config.data import FabricateConfig, FabricatedNSD

BETAS = "nsddata_betas/ppdata/{}/func1pt8mm/betas_fithrf_GLMdenoise_RR"


@pytest.fixture(scope="module")
def nsd(tiny_raw: Path) -> Path:
    return tiny_raw / "nsd"


@pytest.fixture(scope="module")
def design(nsd: Path) -> dict[str, np.ndarray]:
    return scipy.io.loadmat(nsd / "nsddata/experiments/nsd/nsd_expdesign.mat")


@pytest.fixture(scope="module")
def info(nsd: Path) -> pd.DataFrame:
    return pd.read_csv(nsd / "nsddata/experiments/nsd/nsd_stim_info_merged.csv")


def test_expdesign_has_published_names_dtypes_and_bases(design: dict[str, np.ndarray]) -> None:
    assert design["masterordering"].dtype == np.uint16
    assert design["masterordering"].shape == (1, 150)
    assert np.array_equal(np.bincount(design["masterordering"][0]), [0] + [3] * 50)
    assert design["subjectim"].dtype == np.int32
    assert design["subjectim"].shape == (8, 50)
    assert design["sharedix"].dtype == np.int32
    assert (np.diff(design["sharedix"][0]) > 0).all()
    assert (design["subjectim"][:, :12] == design["sharedix"]).all()
    # 12 shared + 8 * 38 own, 1-based, each once
    ids = np.concatenate([design["sharedix"][0], design["subjectim"][:, 12:].ravel()])
    assert np.array_equal(np.sort(ids), np.arange(1, 12 + 8 * 38 + 1))
    assert design["stimpattern"].shape[:2] == (5, 12)
    assert (design["stimpattern"].sum(axis=(1, 2)) == 30).all()
    assert design["basiccnt"].shape == (3, 5)
    assert (np.array([1, 2, 3]) @ design["basiccnt"] == 30).all()


def test_real_run_lengths() -> None:
    config = FabricateConfig(nsd=FabricatedNSD(sessions=40, trials_per_session=750))
    catalogue = Catalogue(World(config, 0), num_once_shown(config))
    per_run = NsdDesign(catalogue).trials_per_run()
    assert per_run.tolist() == [63, 62] * 6
    assert catalogue.num_nsd_ids == 10_000
    executed = [NsdDesign(catalogue).executed_sessions(subject) for subject in range(1, 9)]
    assert executed == [40, 40, 32, 30, 40, 32, 40, 30]


def test_betas_are_unscaled_int16_with_trials_last(nsd: Path) -> None:
    folder = nsd / BETAS.format("subj01")
    image = nib.Nifti1Image.from_filename(folder / "betas_session01.nii.gz")
    assert image.header.get_data_dtype() == np.int16
    assert image.shape == (*volume_shape(1, 60), 30)
    assert image.header.get_zooms() == pytest.approx((1.8, 1.8, 1.8, 1.3333))
    raw = gzip.decompress((folder / "betas_session01.nii.gz").read_bytes())
    assert np.frombuffer(raw, np.float32, count=1, offset=112)[0] == 0  # scl_slope
    assert np.diag(image.affine)[:3] == pytest.approx([1.8] * 3)
    values = np.asanyarray(image.dataobj)
    brain = (
        np.asanyarray(nib.Nifti1Image.from_filename(_func(nsd) / "brainmask.nii.gz").dataobj) > 0
    )
    assert not values[~brain].any()
    # 1.6 percent times 300 is the typical amplitude; a reader must divide by 300
    assert 200 < np.median(values[brain].std(axis=-1)) < 900
    limits = np.iinfo(np.int16)
    assert {values.min(), values.max()} & {limits.min, limits.max}, "nothing saturates"


def test_hdf5_is_the_reversed_nifti(nsd: Path) -> None:
    folder = nsd / BETAS.format("subj01")
    values = np.asanyarray(nib.Nifti1Image.from_filename(folder / "betas_session01.nii.gz").dataobj)
    with h5py.File(folder / "betas_session01.hdf5") as file:
        assert file["betas"].chunks == (30, 1, 1, 1)
        assert file["betas"].dtype == np.int16
        np.testing.assert_array_equal(file["betas"][...].transpose(3, 2, 1, 0), values)
    assert not (folder / "betas_session02.hdf5").exists()
    assert not list((nsd / BETAS.format("subj03")).glob("*.hdf5"))


def test_subject_3_did_not_do_all_planned_sessions(nsd: Path) -> None:
    counts = [len(list((nsd / BETAS.format(s)).glob("*.nii.gz"))) - 1 for s in ("subj01", "subj03")]
    assert counts == [5, 4]


def test_every_subject_has_its_own_prime_shape() -> None:
    shapes = [volume_shape(subject, 700) for subject in range(1, 9)]
    assert len(set(shapes)) == 8
    for shape in shapes:
        assert len(set(shape)) == 3
        assert all(n > 1 and all(n % k for k in range(2, n)) for n in shape)


def test_roi_volumes_mark_cortex_and_hemispheres(nsd: Path) -> None:
    roi = _func(nsd) / "roi"
    general = np.asanyarray(nib.Nifti1Image.from_filename(roi / "nsdgeneral.nii.gz").dataobj)
    assert general.dtype == np.float64
    assert set(np.unique(general)) == {-1, 0, 1}
    assert 40 <= (general == 1).sum() <= 60
    left, right = (
        np.asanyarray(nib.Nifti1Image.from_filename(roi / f"{side}.nsdgeneral.nii.gz").dataobj)
        for side in ("lh", "rh")
    )
    assert ((left == 1) ^ (right == 1))[general == 1].all()
    assert not ((left >= 0) & (right >= 0)).any()
    x = np.nonzero(left == 1)[0]
    assert x.max() < general.shape[0] / 2
    visual = np.asanyarray(nib.Nifti1Image.from_filename(roi / "prf-visualrois.nii.gz").dataobj)
    assert set(np.unique(visual)) == set(range(-1, 8))
    table = nsd / "nsddata/freesurfer/fsaverage/label/prf-visualrois.mgz.ctab"
    assert table.read_text().splitlines()[7] == "7 hV4"


def test_some_voxels_are_invalid_in_one_session_only(nsd: Path) -> None:
    general = (
        np.asanyarray(nib.Nifti1Image.from_filename(_func(nsd) / "roi/nsdgeneral.nii.gz").dataobj)
        == 1
    )
    dead = []
    for session in range(1, 6):
        path = nsd / BETAS.format("subj01") / f"betas_session{session:02d}.nii.gz"
        dead.append(
            ~np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)[general].any(axis=-1)
        )
    per_voxel = np.sum(dead, axis=0)
    assert per_voxel.max() == 1
    assert per_voxel.sum() == 3


def test_stimulus_table_has_41_columns_that_agree_with_the_design(
    info: pd.DataFrame, design: dict[str, np.ndarray]
) -> None:
    assert info.shape == (12 + 8 * 38, 41)
    assert (info["nsdId"] == np.arange(len(info))).all()
    assert np.array_equal(np.flatnonzero(info["shared1000"]) + 1, design["sharedix"][0])
    assert info["cocoId"].is_unique
    assert set(info["cocoSplit"]) == {"train2017", "val2017"}
    order = design["masterordering"][0].astype(np.int64)
    for subject in (1, 3):
        row = 7  # any image of this subject, also one beyond its executed sessions
        nsd_id = design["subjectim"][subject - 1, row] - 1
        trials = np.flatnonzero(order == row + 1) + 1
        listed = info.loc[nsd_id, [f"subject{subject}_rep{k}" for k in range(3)]]
        assert listed.tolist() == trials.tolist()
        assert info.loc[nsd_id, f"subject{subject}"] == 1
    last = info[[f"subject3_rep{k}" for k in range(3)]].to_numpy().max()
    assert last > 4 * 30, "the table must list planned trials that were never executed"
    assert info.loc[info["shared1000"], "BOLD5000"].all()


def test_responses_have_19_columns_and_missing_answers(
    nsd: Path, design: dict[str, np.ndarray]
) -> None:
    table = pd.read_csv(nsd / "nsddata/ppdata/subj03/behav/responses.tsv", sep="\t")
    assert table.shape == (120, 19)
    assert table["RT"].isna().any()
    assert table["BUTTON"].isna().equals(table["RT"].isna())
    order = design["masterordering"][0, :120].astype(np.int64)
    assert (table["10KID"] == order).all()
    assert (table["73KID"] == design["subjectim"][2, order - 1]).all()
    assert (table["ISOLD"] == table["73KID"].duplicated()).all()


def test_pictures_exist_for_images_that_were_shown(
    nsd: Path, design: dict[str, np.ndarray]
) -> None:
    with h5py.File(nsd / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        brick = file["imgBrick"][...]
    assert brick.shape == (12 + 8 * 38, 16, 16, 3)
    assert brick.dtype == np.uint8
    painted = np.flatnonzero(brick.any(axis=(1, 2, 3)))
    order = design["masterordering"][0].astype(np.int64) - 1
    shown = np.union1d(design["subjectim"][0, order], design["subjectim"][2, order[:120]]) - 1
    assert np.array_equal(painted, shown)


def test_objects_outside_the_crop_change_the_answer(
    nsd: Path, info: pd.DataFrame, tiny_catalogue: Catalogue
) -> None:
    folder = nsd / "nsddata_stimuli/stimuli/nsd/annotations"
    fooled, outside = 0, 0
    for split in ("train2017", "val2017"):
        tree = json.loads((folder / f"instances_{split}.json").read_text())
        names = {entry["id"]: entry["name"] for entry in tree["categories"]}
        assert len(names) == 80
        assert max(names) == 90
        boxes = pd.DataFrame(tree["annotations"])
        assert boxes["id"].is_unique
        for image in tree["images"]:
            row = info[info["cocoId"] == image["id"]].iloc[0]
            assert row["cocoSplit"] == split
            top, bottom, left, right = (float(part) for part in row["cropBox"][1:-1].split(","))
            width, height = image["width"], image["height"]
            shown = (1 - left - right) * width, (1 - top - bottom) * height
            assert shown[0] == pytest.approx(shown[1], abs=0.01), "the crop is a square"
            mine = boxes[boxes["image_id"] == image["id"]]
            x, y, w, h = np.stack(mine["bbox"].to_list()).T
            wide = np.minimum(x + w, (1 - right) * width) - np.maximum(x, left * width)
            high = np.minimum(y + h, (1 - bottom) * height) - np.maximum(y, top * height)
            area = np.clip(wide, 0, None) * np.clip(high, 0, None)
            largest = names[mine["category_id"].iloc[int(area.argmax())]]
            assert largest == tiny_catalogue.nsd[row["nsdId"]].label
            outside += int((area == 0).any())
            fooled += names[mine["category_id"].iloc[int((w * h).argmax())]] != largest
    assert outside > 10
    assert fooled > 10


def test_official_ncsnr_recovers_the_world() -> None:
    sizes = FabricatedNSD(subjects=(2,), sessions=6, trials_per_session=300, num_voxels=(90, 99))
    config = FabricateConfig(nsd=sizes)
    catalogue = Catalogue(World(config, 1), num_once_shown(config))
    (subject,) = nsd_subjects(catalogue)
    estimated = subject.ncsnr_volume()[subject.volumes.labels["nsdgeneral"] == 1]
    truth = subject.subject.model.ncsnr_V
    assert np.corrcoef(estimated, truth)[0, 1] > 0.95
    assert np.median(estimated / truth) == pytest.approx(1, abs=0.05)
    others = subject.ncsnr_volume()[subject.volumes.brain & (subject.volumes.labels["streams"] < 0)]
    assert np.median(others) < 0.15


def test_sessions_differ_in_gain_and_offset(nsd: Path) -> None:
    general = (
        np.asanyarray(nib.Nifti1Image.from_filename(_func(nsd) / "roi/nsdgeneral.nii.gz").dataobj)
        == 1
    )
    means, stds = [], []
    for session in (1, 2, 3):
        path = nsd / BETAS.format("subj01") / f"betas_session{session:02d}.nii.gz"
        values = np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)[general].astype(float)
        means.append(values.mean(axis=-1))
        stds.append(values.std(axis=-1))
    # 30 trials: the standard error of a mean is .18 SD, drift adds .2 SD
    drift = np.std(means, axis=0).mean() / np.mean(stds)
    assert 0.15 < drift < 0.4


def _func(nsd: Path) -> Path:
    return nsd / "nsddata/ppdata/subj01/func1pt8mm"
