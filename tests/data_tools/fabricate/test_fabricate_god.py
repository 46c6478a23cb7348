"""The GOD tree against the published layout, read with scipy and h5py."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from data_tools.datasets.god import GODReader
from data_tools.datasets.registry import open_dataset
from data_tools.fabricate.bold5000 import num_once_shown
from data_tools.fabricate.catalogue import Catalogue
from data_tools.fabricate.god import _h5, god_subjects, label_number
from data_tools.fabricate.world import World
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.stats.reliability import ncsnr


@pytest.fixture(scope="module")
def god(tiny_raw: Path) -> Path:
    return tiny_raw / "god"


@pytest.fixture(scope="module")
def mat(god: Path) -> dict[str, Any]:
    values = scipy.io.loadmat(god / "Subject1.mat", squeeze_me=False)
    meta = values["metaData"][0, 0]
    keys = [str(cell.item()) for cell in meta["key"][0]]
    return {"data": values["dataSet"], "keys": keys, "value": meta["value"], "meta": meta}


def test_mat_header_says_matlab_5(god: Path) -> None:
    header = (god / "Subject1.mat").read_bytes()[:128]
    assert header.startswith(b"MATLAB 5.0 MAT-file")
    assert header[124:128] == b"\x00\x01IM"


def test_rows_are_training_test_imagery(mat: dict[str, Any]) -> None:
    data = mat["data"]
    assert data.dtype == np.float64
    # 12 x 2 training, 5 x 3 test, 5 x 10 imagery
    assert data.shape[0] == 24 + 15 + 50
    assert data[:, 0].tolist() == [1] * 24 + [2] * 15 + [3] * 50
    runs = data[:, 1]
    assert runs[:24].tolist() == list(range(1, 25))
    assert runs[24:39].tolist() == [1] * 5 + [2] * 5 + [3] * 5
    assert runs[39:].tolist() == [1] * 25 + [2] * 25
    for run in (1, 2, 3):
        assert len(set(data[24:39][runs[24:39] == run, 2])) == 5


def test_metadata_apply_or_are_nan(mat: dict[str, Any]) -> None:
    keys, value = mat["keys"], mat["value"]
    num_voxels = mat["data"].shape[1] - 3
    assert keys[:4] == ["DataType", "Run", "Label", "VoxelData"]
    assert mat["meta"]["key"].shape == mat["meta"]["description"].shape == (1, len(keys))
    assert value.shape == (len(keys), num_voxels + 3)
    for column, key in enumerate(keys[:3]):
        applies = value[keys.index(key)] == 1
        assert np.flatnonzero(applies).tolist() == [column]
    assert np.flatnonzero(value[keys.index("VoxelData")] == 1).tolist() == list(
        range(3, num_voxels + 3)
    )
    rois = {key: value[keys.index(key)] for key in keys if key.startswith("ROI_")}
    assert set(rois) == {
        f"ROI_{name}"
        for name in "V1 V2 V3 V4 LOC FFA PPA LVC HVC VC".split()  # noqa: SIM905
    }
    for flags in rois.values():
        assert set(np.unique(flags[~np.isnan(flags)])) == {1.0}
        assert np.isnan(flags[:3]).all()
    masks = {key: flags == 1 for key, flags in rois.items()}
    small = sum(masks[f"ROI_{name}"].astype(int) for name in ("V1", "V2", "V3", "V4", "LOC", "FFA"))
    assert small.max() == 2, "small areas overlap somewhere"
    assert (masks["ROI_LVC"] == (masks["ROI_V1"] | masks["ROI_V2"] | masks["ROI_V3"])).all()
    assert masks["ROI_VC"].sum() == num_voxels


def test_labels_are_synset_and_image_number(mat: dict[str, Any], tiny_catalogue: Catalogue) -> None:
    labels = mat["data"][:, 2]
    decoded = set()
    for label in labels[:24]:
        synset, number = f"{label:.6f}".split(".")
        decoded.add(f"imagenet:n{int(synset):08d}_{int(number)}")
    assert decoded == {picture.uid for picture in tiny_catalogue.god_training}
    tests = {label_number(picture) for picture in tiny_catalogue.god_test}
    assert set(labels[24:39]) == set(labels[39:]) == tests
    assert len(set(labels[:24].astype(np.float32))) < 24, "float32 must merge ids, as in the data"


def test_h5_holds_the_same_numbers_at_other_columns(god: Path, mat: dict[str, Any]) -> None:
    with h5py.File(god / "Subject1.h5") as file:
        keys = [key.decode() for key in file["metadata/key"][...]]
        value = file["metadata/value"][...]
        data = file["dataset"][...]
    voxels = np.flatnonzero(value[keys.index("VoxelData")] == 1)
    assert voxels[0] == 0
    np.testing.assert_array_equal(data[:, voxels], mat["data"][:, 3:])
    label = np.flatnonzero(value[keys.index("stimulus_id")] == 1)
    np.testing.assert_array_equal(data[:, label[0]], mat["data"][:, 2])
    image = np.flatnonzero(value[keys.index("image_index")] == 1)
    assert sorted(data[:24, image[0]]) == list(range(1, 25))
    assert not (god / "Subject2.h5").exists()
    assert (god / "Subject2.mat").exists()


def test_imagery_carries_less_signal(tiny_catalogue: Catalogue) -> None:
    from data_tools.fabricate.god import GodSubject

    subject = GodSubject(1, tiny_catalogue)
    y, samples = subject.responses(), subject.samples
    names = np.array([picture.uid for picture in samples.pictures])
    ratio = {}
    for kind in (2, 3):
        rows = samples.data_type_N == kind
        ratio[kind] = np.nanmean(
            ncsnr(y[rows], names[rows], np.zeros(rows.sum()), repetitions=None)
        )
    assert ratio[3] < 0.7 * ratio[2]


def test_pictures_lie_in_synset_folders(god: Path, tiny_catalogue: Catalogue) -> None:
    files = {p.relative_to(god).as_posix() for p in (god / "images").rglob("*.JPEG")}
    expected = {f"images/training/{p.label}/{p.name}" for p in tiny_catalogue.god_training}
    expected |= {f"images/test/{p.label}/{p.name}" for p in tiny_catalogue.god_test}
    assert files == expected
    assert Image.open(god / sorted(files)[0]).size == (64, 64)
    training = {p.label for p in tiny_catalogue.god_training}
    assert not training & {p.label for p in tiny_catalogue.god_test}


def test_wrong_indices_leave_everything_else_alone(
    tiny_config: DataConfig, god: Path, tmp_path: Path
) -> None:
    assert tiny_config.fabricate is not None
    wrong = tiny_config.fabricate.god.model_copy(update={"wrong_indices": True})
    fabricated = tiny_config.fabricate.model_copy(update={"god": wrong})
    catalogue = Catalogue(World(fabricated, tiny_config.seed), num_once_shown(fabricated))
    files = []
    contents = [_h5(god_subjects(catalogue)[0]), (god / "Subject1.h5").read_bytes()]
    for data in contents:
        with h5py.File(io.BytesIO(data), "r") as file:
            keys = [key.decode() for key in file["metadata/key"][...]]
            value, matrix = file["metadata/value"][...], file["dataset"][...]
        own = [
            np.flatnonzero(value[keys.index(k)] == 1)[0] for k in ("image_index", "category_index")
        ]
        files.append((np.delete(matrix, own, axis=1), matrix[:, own]))
    np.testing.assert_array_equal(files[0][0], files[1][0])
    assert (files[0][1][:, 0] != files[1][1][:, 0]).mean() > 0.5
    # Plausible: the same numbers, at other rows.
    np.testing.assert_array_equal(np.sort(files[0][1], axis=0), np.sort(files[1][1], axis=0))
    # Both are read alike, and ``check`` says which file has the mistake.
    told = []
    for name, number in (("wrong", 0), ("right", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "Subject1.h5").write_bytes(contents[number])
        shutil.copytree(god / "images", folder / "images")
        reader = open_dataset(DatasetConfig(name="god", path=folder))
        assert isinstance(reader, GODReader)
        finding = {one.fact: one for one in reader.consistency("sub-01")}["image_index"]
        told.append((reader.trials("sub-01")["stimulus_id"].tolist(), finding.ok, finding.detail))
    assert told[0][:2] == told[1][:2] == (told[0][0], True)
    assert "contradicts stimulus_id in Subject1.h5" in told[0][2]
    assert "agrees with stimulus_id" in told[1][2]
