"""NSD: published layout, index bases and voxel order, against arrays written independently."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from nsd_files import (
    EXECUTED,
    NUM_SHARED,
    SHARED_73K,
    TRIALS,
    VERSION,
    NSDFiles,
    write_nii,
)

from data_tools.datasets.nsd import NSDReader
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError


@pytest.fixture
def files(tmp_path: Path) -> NSDFiles:
    return NSDFiles(tmp_path)


def reader(files: NSDFiles, **values: object) -> NSDReader:
    return NSDReader(DatasetConfig.model_validate({"name": "nsd", "path": files.root, **values}))


def shown_1based(files: NSDFiles, subject: str) -> np.ndarray:
    return files.subjectim[int(subject[-1]) - 1][files.order - 1]


@pytest.mark.parametrize("subject", ["subj01", "subj03"])
@pytest.mark.parametrize("source", ["nii", "hdf5"])
def test_betas_are_scaled_masked_and_in_c_order(files: NSDFiles, subject: str, source: str) -> None:
    nsd = reader(files, options={"source": source})
    for session in range(1, EXECUTED[subject] + 1):
        betas = nsd.betas(subject, session)
        assert betas.dtype == np.float32
        np.testing.assert_array_equal(betas, files.selected(subject, session))


def test_nii_and_hdf5_give_identical_bytes(files: NSDFiles) -> None:
    nii, hdf5 = reader(files), reader(files, options={"source": "hdf5"})
    assert nii.betas("subj01", 2).tobytes() == hdf5.betas("subj01", 2).tobytes()
    fingerprints = [one.voxels("subj01").mask_fingerprint for one in (nii, hdf5)]
    assert fingerprints[0] == fingerprints[1]


def test_hdf5_of_other_chunks_gives_the_same_betas(files: NSDFiles) -> None:
    path = files.betas_path("subj01", 1, "hdf5")
    data = files.betas["subj01", 1].transpose(3, 2, 1, 0)
    for options in ({}, {"chunks": (2, 3, 4, 5), "compression": "gzip"}):
        path.unlink()
        with h5py.File(path, "w") as file:
            file.create_dataset("betas", data=data, **options)
        betas = reader(files, options={"source": "hdf5"}).betas("subj01", 1)
        np.testing.assert_array_equal(betas, files.selected("subj01", 1))


def test_voxel_that_is_zero_in_a_whole_session_is_nan_there_only(files: NSDFiles) -> None:
    xyz = np.argwhere(files.masks["subj01"] == 1)
    data = files.betas["subj01", 2]
    data[tuple(xyz[3])] = 0
    data[tuple(xyz[5])][:4] = 0
    files.write_betas("subj01", 2, data)
    betas = reader(files).betas("subj01", 2)
    assert np.isnan(betas[:, 3]).all()
    assert np.isfinite(np.delete(betas, 3, axis=1)).all()
    assert np.isfinite(reader(files).betas("subj01", 1)).all()


def test_trials_follow_the_design_with_zero_based_image_ids(files: NSDFiles) -> None:
    nsd = reader(files)
    trials = nsd.trials("subj03")
    count = EXECUTED["subj03"] * TRIALS
    shown = shown_1based(files, "subj03")[:count]
    assert trials["stimulus_id"].tolist() == [str(image - 1) for image in shown]
    assert trials["trial"].tolist() == list(range(count))
    assert trials["session"].tolist() == [1] * 9 + [2] * 9
    assert trials["run"].tolist() == ([1] * 5 + [2] * 4) * 2
    expected = [list(shown[:i]).count(image) for i, image in enumerate(shown)]
    assert trials["repetition"].tolist() == expected
    assert [s == "test" for s in trials["split"]] == [i in SHARED_73K for i in shown]
    # Row 0 of imgBrick is 73KID 1; the first channel holds the row number.
    for image, stimulus in zip(shown, trials["stimulus_id"], strict=True):
        assert (nsd.image(stimulus)[:, :, 0] == image - 1).all()
    assert nsd.image("7")[:, 0, 1].tolist() == list(range(6))


def test_stimuli_have_identities_flags_and_categories_of_the_crop(files: NSDFiles) -> None:
    stimuli = {s.stimulus_id: s for s in reader(files).stimuli()}
    for row in stimuli:
        assert stimuli[row].image_uid == f"coco:{1000 + 7 * int(row)}"
        assert stimuli[row].is_test == (int(row) + 1 in SHARED_73K)
        cropped = int(row) % 3 == 0  # the left half, where the person is, is cut off
        assert stimuli[row].categories == (("dog",) if cropped else ("person", "dog"))
    trials = reader(files).trials("subj01")
    first = trials.iloc[0]
    assert first["category"] == stimuli[first["stimulus_id"]].categories[0]
    assert sum(s.is_test for s in stimuli.values()) == NUM_SHARED


def test_categories_can_be_left_out_or_required(files: NSDFiles) -> None:
    assert set(reader(files, options={"categories": "none"}).trials("subj01")["category"]) == {""}
    (files.root / "nsddata_stimuli/stimuli/nsd/annotations/instances_val2017.json").unlink()
    assert set(reader(files).trials("subj01")["category"]) == {""}
    with pytest.raises(DataError, match="instances_val2017"):
        reader(files, options={"categories": "require"}).trials("subj01")


def test_max_sessions_and_subjects_limit_what_is_read(files: NSDFiles) -> None:
    nsd = reader(files, max_sessions=2, subjects=["subj01"])
    assert nsd.subjects() == ("subj01",)
    assert nsd.trials("subj01")["session"].max() == 2
    seen = set(shown_1based(files, "subj01")[: 2 * TRIALS] - 1)
    assert {int(s.stimulus_id) for s in nsd.stimuli()} == seen
    with pytest.raises(ConfigError, match=r"subj02.*subj01, subj03"):
        reader(files, subjects=["subj02"]).subjects()


def test_missing_session_in_the_middle(files: NSDFiles) -> None:
    files.betas_path("subj01", 2).unlink()
    with pytest.raises(DataError, match=r"session\(s\) 2 are missing"):
        reader(files).trials("subj01")
    nsd = reader(files, options={"allow_missing_sessions": True})
    full = reader(files, options={"source": "hdf5"}).trials("subj01")
    trials = nsd.trials("subj01")
    kept = full[full["session"] != 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(trials, kept)  # trial numbers and repetitions stay
    np.testing.assert_array_equal(nsd.betas("subj01", 3), files.selected("subj01", 3))


def test_roi_by_name_number_and_union(files: NSDFiles) -> None:
    streams = files.streams
    lateral = reader(files, roi="streams:lateral")
    expected = files.selected("subj03", 1, streams == 3)
    np.testing.assert_array_equal(lateral.betas("subj03", 1), expected)
    np.testing.assert_array_equal(reader(files, roi="streams:3").betas("subj03", 1), expected)
    both = reader(files, roi="streams:early+streams:3").betas("subj03", 1)
    wanted = (streams == 1) | (streams == 3)
    np.testing.assert_array_equal(both, files.selected("subj03", 1, wanted))
    for roi, message in {
        "streams:0": "labels start at 1",
        "streams:ventral": "midventral",
        "floc": "nsdgeneral, streams",
    }.items():
        with pytest.raises((ConfigError, DataError), match=message):
            reader(files, roi=roi).betas("subj03", 1)


def test_voxel_table(files: NSDFiles) -> None:
    voxels = reader(files).voxels("subj03")
    xyz = np.argwhere(files.masks["subj03"] == 1)
    np.testing.assert_array_equal(voxels.xyz_V3, xyz)
    np.testing.assert_array_equal(voxels.ncsnr_V, files.ncsnr[tuple(xyz.T)])
    label = files.streams[tuple(xyz.T)]
    np.testing.assert_array_equal(voxels.rois["streams:midventral"], label == 2)
    assert voxels.rois["nsdgeneral"].all()
    assert reader(files, roi="streams:1").voxels("subj03").mask_fingerprint != (
        voxels.mask_fingerprint
    )


def damage_count(files: NSDFiles) -> None:
    write_nii(files.betas_path("subj01", 1), files.betas["subj01", 1][..., :-1])


def damage_scaling(files: NSDFiles) -> None:
    write_nii(files.betas_path("subj01", 1), files.betas["subj01", 1], slope=0.5)


def damage_dtype(files: NSDFiles) -> None:
    write_nii(files.betas_path("subj01", 1), files.betas["subj01", 1].astype(np.float32))


def damage_truncated(files: NSDFiles) -> None:
    path = files.betas_path("subj01", 1)
    path.write_bytes(path.read_bytes()[:-400])


def damage_trailer(files: NSDFiles) -> None:
    path = files.betas_path("subj01", 1)
    path.write_bytes(path.read_bytes()[:-5])


def damage_length(files: NSDFiles) -> None:
    path = files.betas_path("subj01", 1)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"more"))


def damage_subject(files: NSDFiles) -> None:
    files.betas_path("subj01", 1).write_bytes(files.betas_path("subj03", 1).read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_count, r"holds \(8,\) volumes, session 1 has 9"),
        (damage_scaling, "without scaling"),
        (damage_dtype, "int16"),
        (damage_truncated, "truncated"),
        (damage_trailer, "truncated"),
        (damage_length, "longer than its header"),
        (damage_subject, "different subjects"),
    ],
)
def test_damaged_nifti_is_refused(files: NSDFiles, damage, message: str) -> None:
    damage(files)
    with pytest.raises(DataError, match=message):
        reader(files).betas("subj01", 1)


def rewrite_hdf5(files: NSDFiles, data: np.ndarray) -> None:
    path = files.betas_path("subj01", 1, "hdf5")
    path.unlink()
    with h5py.File(path, "w") as file:
        file["betas"] = data


def test_damaged_hdf5_is_refused(files: NSDFiles) -> None:
    nsd = reader(files, options={"source": "hdf5"})
    data = files.betas["subj01", 1]
    rewrite_hdf5(files, data)  # (X, Y, Z, T): turned round by whoever copied it
    with pytest.raises(DataError, match="transposed"):
        nsd.betas("subj01", 1)
    rewrite_hdf5(files, data.transpose(3, 2, 1, 0)[:-1])
    with pytest.raises(DataError, match="expected"):
        nsd.betas("subj01", 1)
    rewrite_hdf5(files, data.transpose(3, 2, 1, 0).astype(np.float32))
    with pytest.raises(DataError, match="float32, expected int16"):
        nsd.betas("subj01", 1)
    path = files.betas_path("subj01", 1, "hdf5")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="not a readable HDF5"):
        nsd.betas("subj01", 1)


def test_external_links_are_refused(files: NSDFiles) -> None:
    path = files.betas_path("subj01", 1, "hdf5")
    moved = path.with_name("moved.hdf5")
    path.rename(moved)
    with h5py.File(path, "w") as file:
        file["betas"] = h5py.ExternalLink(moved.name, "/betas")
    with pytest.raises(DataError, match="link into"):
        reader(files, options={"source": "hdf5"}).betas("subj01", 1)


def test_index_base_mistakes_are_refused(files: NSDFiles) -> None:
    files.write_expdesign((files.order - 1).astype(np.uint16))
    with pytest.raises(DataError, match="counts from 1"):
        reader(files).trials("subj01")
    files.write_expdesign()
    table = pd.read_csv(files.stim_info, index_col=0)
    table.assign(nsdId=table["nsdId"] + 1).to_csv(files.stim_info)
    with pytest.raises(DataError, match="counts from 0"):
        reader(files).stimuli()
    rolled = np.roll(table["shared1000"].to_numpy(), 1)
    table.assign(shared1000=rolled).to_csv(files.stim_info)
    with pytest.raises(DataError, match="off by one"):
        reader(files).stimuli()


def test_design_keeps_wide_integers(files: NSDFiles) -> None:
    design = reader(files).tree.design
    assert design.image_10k_T.dtype == np.int64
    assert (design.image_10k_T - 5).min() < 0  # in uint16 this would be 65531


def test_matlab_73_design_is_refused(files: NSDFiles) -> None:
    path = files.root / "nsddata/experiments/nsd/nsd_expdesign.mat"
    path.unlink()
    with h5py.File(path, "w") as file:
        file["masterordering"] = files.order
    with pytest.raises(DataError, match=r"MATLAB 7\.3"):
        reader(files).trials("subj01")


def test_consistency_names_what_differs(files: NSDFiles) -> None:
    assert all(finding.ok for finding in reader(files).consistency("subj01"))
    files.write_responses("subj01", offset=1)
    wrong = [f for f in reader(files).consistency("subj01") if not f.ok]
    assert [f.fact for f in wrong] == ["responses.tsv"]
    assert "73KID of trial 1" in wrong[0].detail
    files.write_responses("subj01")
    table = pd.read_csv(files.stim_info, index_col=0)
    table.loc[SHARED_73K[0] - 1, "subject1_rep0"] += 1
    table.to_csv(files.stim_info)
    wrong = [f for f in reader(files).consistency("subj01") if not f.ok]
    assert [f.fact for f in wrong] == ["repetition columns"]
    assert f"nsdId {SHARED_73K[0] - 1}" in wrong[0].detail


def test_fingerprint_follows_files_and_selection(files: NSDFiles) -> None:
    before = reader(files).fingerprint("subj01", 1)
    assert before == reader(files).fingerprint("subj01", 1)
    assert before != reader(files, roi="streams").fingerprint("subj01", 1)
    assert before != reader(files).fingerprint("subj01", 2)
    files.write_betas("subj01", 1, files.betas["subj01", 1] + 1)
    assert before != reader(files).fingerprint("subj01", 1)


def test_options_act_and_unknown_ones_are_refused(files: NSDFiles) -> None:
    with pytest.raises(ConfigError, match="did you mean 'source'"):
        reader(files, options={"sourze": "nii"})
    folder = files.betas_path("subj01", 1).parent
    folder.rename(folder.with_name("betas_assumehrf"))
    assert reader(files).subjects() == ("subj03",)
    other = reader(files, options={"beta_version": "betas_assumehrf"})
    assert other.subjects() == ("subj01",)
    assert other.betas("subj01", 1).shape[0] == TRIALS
    assert folder.name == VERSION


def test_declared_facts() -> None:
    facts = NSDReader(DatasetConfig(name="nsd", path=Path("."))).facts().subjects
    assert sum(one.trials or 0 for one in facts.values()) == 213_000
    assert (facts["subj01"].voxels, facts["subj06"].voxels) == (15724, 17907)
    old = NSDReader(DatasetConfig(name="nsd", path=Path("."), max_sessions=37)).facts()
    first = old.subjects["subj01"]
    assert (first.test_images, first.test_trials) == (982, 2770)
    assert first.images is not None
    assert first.trials is not None
    assert first.images - 982 == 8859
    assert first.trials - 2770 == 24980
