"""NSD: each known trap is planted, and ends in an error that names it or in the right numbers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import nsd_files
import numpy as np
import pytest
from nsd_files import TRIALS, VERSION, NSDFiles, write_nii

from data_tools.check import check
from data_tools.datasets.nsd import NSDReader
from data_tools.ingest import ingest
from data_tools.store import Store
from dist_decoder.config.base import validate
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.errors import ConfigError, DataError


@pytest.fixture
def files(tmp_path: Path) -> NSDFiles:
    return NSDFiles(tmp_path / "nsd")


def reader(files: NSDFiles, **values: Any) -> NSDReader:
    return NSDReader(DatasetConfig.model_validate({"name": "nsd", "path": files.root, **values}))


def configured(files: NSDFiles, output: str = "out", **values: Any) -> DataConfig:
    entry = {"name": "nsd", "path": str(files.root), **values}
    tree = {"output": str(files.root.parent / output), "datasets": [entry]}
    return validate(DataConfig, tree, "test")


def first_difference(files: NSDFiles, **values: Any) -> str:
    return str(check(configured(files, **values)).first_difference)


def test_nii_and_hdf5_give_identical_bytes_in_the_store(files: NSDFiles) -> None:
    def chunks(source: str) -> dict[str, bytes]:
        config = configured(files, source, options={"source": source})
        ingest(config)
        root = Store(config.store).subject_path("nsd", "subj01")
        # zarr.json names the raw file; everything else is data.
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.name != "zarr.json"
        }

    nii, hdf5 = chunks("nii"), chunks("hdf5")
    assert sum(name.startswith("betas/") for name in nii) >= 3
    assert nii == hdf5


def test_mask_of_another_subject(files: NSDFiles) -> None:
    mask = files.roi_folder("subj01") / "nsdgeneral.nii.gz"
    mask.write_bytes((files.roi_folder("subj03") / "nsdgeneral.nii.gz").read_bytes())
    with pytest.raises(DataError, match="different subjects or spaces"):
        reader(files).betas("subj01", 1)
    assert "nsd/subj01: files: DataError" in first_difference(files)
    hdf5 = reader(files, options={"source": "hdf5"})
    with pytest.raises(DataError, match="expected"):
        hdf5.betas("subj01", 1)


@pytest.fixture
def same_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NSDFiles:
    """Two people whose volumes have one shape, with zero around what was scanned."""
    monkeypatch.setitem(nsd_files.SHAPES, "subj03", nsd_files.SHAPES["subj01"])
    made = NSDFiles(tmp_path / "same")
    for (subject, session), betas in list(made.betas.items()):
        outside = made.masks[subject] == -1
        made.write_betas(subject, session, np.where(outside[..., None], 0, betas).astype("i2"))
    return made


@pytest.mark.parametrize("source", ["nii", "hdf5"])
def test_swapped_people_of_one_shape_show_as_voxels_without_values(
    same_shape: NSDFiles, source: str
) -> None:
    """Mask and betas of different people: neither name, shape nor count is wrong."""
    files = same_shape
    masks = [files.roi_folder(name) / "nsdgeneral.nii.gz" for name in ("subj01", "subj03")]
    first, second = (path.read_bytes() for path in masks)
    assert check(configured(files, options={"source": source})).ok
    masks[0].write_bytes(second)
    masks[1].write_bytes(first)
    with pytest.raises(DataError, match=r"betas_session01.*of \d+ voxels that roi nsdgeneral"):
        reader(files, options={"source": source}).betas("subj01", 1)
    message = first_difference(files, options={"source": source})
    assert "mask and betas are of different subjects" in message
    assert str(files.roi_folder("subj01")) in message
    with pytest.raises(DataError, match="different subjects"):
        ingest(configured(files, options={"source": source}))


def test_a_mask_copied_from_another_person_is_named(same_shape: NSDFiles) -> None:
    files = same_shape
    for session in (1, 2, 3):  # values everywhere: nothing shows in the betas
        betas = np.maximum(files.betas["subj01", session], 1)
        files.write_betas("subj01", session, betas)
    mask = files.roi_folder("subj01") / "nsdgeneral.nii.gz"
    mask.write_bytes((files.roi_folder("subj03") / "nsdgeneral.nii.gz").read_bytes())
    message = first_difference(files)
    assert "own mask: nsdgeneral selects the same voxels in" in message
    for name in ("subj01", "subj03"):
        assert str(files.roi_folder(name)) in message


def test_transposed_mask(files: NSDFiles) -> None:
    turned = np.ascontiguousarray(files.masks["subj01"].transpose(2, 1, 0))
    write_nii(files.roi_folder("subj01") / "nsdgeneral.nii.gz", turned)
    for source in ("nii", "hdf5"):
        with pytest.raises(DataError):
            reader(files, options={"source": source}).betas("subj01", 1)


def test_mask_with_minus_one_is_no_truth_value(files: NSDFiles) -> None:
    mask = files.masks["subj01"]
    selected = int((mask == 1).sum())
    assert selected < int(mask.astype(bool).sum())  # what the trap would select
    assert selected < int((mask != -1).sum())
    assert reader(files).voxels("subj01").num_voxels == selected
    write_nii(files.roi_folder("subj01") / "nsdgeneral.nii.gz", np.where(mask > 0, 0.5, 0.0))
    with pytest.raises(DataError, match="not label numbers"):
        reader(files).voxels("subj01")


def test_session_of_too_few_volumes_is_named_by_check_and_ingest(files: NSDFiles) -> None:
    write_nii(files.betas_path("subj03", 2), files.betas["subj03", 2][..., :-1])
    message = f"holds ({TRIALS - 1},) volumes, session 2 has {TRIALS} trials"
    assert message in first_difference(files)
    with pytest.raises(DataError, match="volumes, session 2"):
        ingest(configured(files))
    assert Store(configured(files).store).datasets() == ()


def test_truncated_gzip_is_named_by_check(files: NSDFiles) -> None:
    path = files.betas_path("subj01", 3)
    path.write_bytes(path.read_bytes()[:-300])
    found = first_difference(files)
    assert "betas_session03.nii.gz is truncated or damaged" in found


def test_missing_session_in_the_middle_is_named_by_check(files: NSDFiles) -> None:
    files.betas_path("subj01", 2).unlink()
    assert "session(s) 2 are missing" in first_difference(files)


@pytest.mark.parametrize("shape", [(71, 6, 5, 3), (70, 6, 6, 3), (71, 6, 6, 4), (71, 3, 6, 6)])
def test_stimulus_file_of_the_wrong_resolution(files: NSDFiles, shape: tuple[int, ...]) -> None:
    path = files.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
    with h5py.File(path, "w") as file:
        file["imgBrick"] = np.zeros(shape, np.uint8)
    with pytest.raises(DataError, match="imgBrick is uint8 of shape"):
        reader(files).image("5")


def test_published_pictures_have_425_pixels(files: NSDFiles) -> None:
    reader(files).image("5")
    with pytest.raises(DataError, match="a side of 425"):
        reader(files, expect="published").image("5")


# The fsaverage surface

VERTICES = {"lh": 13, "rh": 17}
LABELS = {side: np.arange(count) % 4 - 1 for side, count in VERTICES.items()}  # -1, 0, 1, 2


def write_mgh(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.MGHImage(data, np.eye(4)), path)


def surface_path(files: NSDFiles, side: str, name: str) -> Path:
    return files.root / f"nsddata_betas/ppdata/subj03/fsaverage/{VERSION}/{side}.{name}.mgh"


@pytest.fixture
def surface(files: NSDFiles) -> dict[str, np.ndarray]:
    """Betas (vertices, trials) by side and session, percent signal change."""
    rng = np.random.default_rng(2)
    written = {}
    for side, count in VERTICES.items():
        labels = files.root / f"nsddata/freesurfer/fsaverage/label/{side}.streams.mgz"
        write_mgh(labels, LABELS[side].astype(np.int32)[:, None, None])
        ncsnr = rng.uniform(0, 1, count).astype(np.float32)
        written[f"{side}.ncsnr"] = ncsnr
        write_mgh(surface_path(files, side, "ncsnr"), ncsnr[:, None, None])
        for session in (1, 2):
            name = f"betas_session{session:02d}"
            values = rng.standard_normal((count, TRIALS)).astype(np.float32)
            written[f"{side}.{session}"] = values
            write_mgh(surface_path(files, side, name), values[:, None, None, :])
    return written


def on_surface(files: NSDFiles, roi: str = "streams") -> NSDReader:
    return reader(files, roi=roi, subjects=["subj03"], options={"space": "fsaverage"})


def test_fsaverage_is_not_scaled_and_left_comes_first(
    files: NSDFiles, surface: dict[str, np.ndarray]
) -> None:
    for roi, wanted in {"streams": (1, 2), "streams:2": (2,)}.items():
        nsd = on_surface(files, roi)
        chosen = {side: np.isin(LABELS[side], wanted) for side in VERTICES}
        for session in (1, 2):
            parts = [surface[f"{side}.{session}"][chosen[side]] for side in VERTICES]
            np.testing.assert_array_equal(nsd.betas("subj03", session), np.vstack(parts).T)
        voxels = nsd.voxels("subj03")
        vertices = np.concatenate([np.flatnonzero(chosen[side]) for side in VERTICES])
        np.testing.assert_array_equal(voxels.xyz_V3[:, 1], vertices)
        sides = [0] * chosen["lh"].sum() + [1] * chosen["rh"].sum()
        assert voxels.xyz_V3[:, 0].tolist() == sides
        expected = np.concatenate([surface[f"{side}.ncsnr"][chosen[side]] for side in VERTICES])
        np.testing.assert_array_equal(voxels.ncsnr_V, expected)
        labels = np.concatenate([LABELS[side][chosen[side]] for side in VERTICES])
        # The colour table calls label 2 midventral.
        np.testing.assert_array_equal(voxels.rois["streams:midventral"], labels == 2)
    assert all(finding.ok for finding in on_surface(files).consistency("subj03"))
    assert len(on_surface(files).trials("subj03")) == 2 * TRIALS
    assert on_surface(files).facts().subjects["subj03"].voxels is None


def test_fsaverage_betas_with_a_nan_vertex(files: NSDFiles, surface: dict[str, np.ndarray]) -> None:
    values = surface["rh.2"]
    values[6, 4] = np.nan  # label 1
    values[2] = 0  # label 1, invalid in the whole session
    write_mgh(surface_path(files, "rh", "betas_session02"), values[:, None, None, :])
    with pytest.raises(DataError, match=r"session 2, fsaverage: 1 voxel.*trial 4"):
        on_surface(files).betas("subj03", 2)
    values[6, 4] = 1
    write_mgh(surface_path(files, "rh", "betas_session02"), values[:, None, None, :])
    betas = on_surface(files).betas("subj03", 2)
    assert np.flatnonzero(np.isnan(betas).all(axis=0)).tolist() == [6]
    assert np.isnan(betas).sum() == TRIALS


def test_damaged_fsaverage_files(files: NSDFiles, surface: dict[str, np.ndarray]) -> None:
    path = surface_path(files, "rh", "betas_session01")
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    with pytest.raises(DataError, match="truncated"):
        on_surface(files).betas("subj03", 1)
    path.write_bytes(whole[:4] + struct.pack(">i", 12) + whole[8:])
    with pytest.raises(DataError, match="another number"):
        on_surface(files).betas("subj03", 1)
    write_mgh(path, surface["rh.1"][:, None, None, :-1])
    with pytest.raises(DataError, match=f"session 1 has {TRIALS} trials"):
        on_surface(files).consistency("subj03")
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        on_surface(files).betas("subj03", 1)
    with pytest.raises(ConfigError, match="mgh files only"):
        reader(files, options={"space": "fsaverage", "source": "hdf5"})
    with pytest.raises(DataError, match="ROIs on fsaverage: streams"):
        on_surface(files, "nsdgeneral").voxels("subj03")
