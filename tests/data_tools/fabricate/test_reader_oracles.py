"""Readers against other programs that read the same files: nibabel, h5py, bdpy, pycocotools."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import h5py
import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools.datasets.god_labels import encode_label
from data_tools.datasets.nsd import NSDReader
from data_tools.datasets.protocol import Dataset
from data_tools.datasets.registry import open_dataset
from dist_decoder.config.data import DatasetConfig

FUNC = "nsddata/ppdata/{}/func1pt8mm"
BETAS = "nsddata_betas/ppdata/{}/func1pt8mm/betas_fithrf_GLMdenoise_RR"


@pytest.fixture
def bdpy() -> ModuleType:
    return pytest.importorskip(
        "bdpy", reason="bdpy, the lab's own reader, is not installed (it needs Python < 3.12)"
    )


@pytest.fixture
def coco_api() -> ModuleType:
    return pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")


def nsd(raw: Path, **options: str) -> Dataset:
    return open_dataset(DatasetConfig(name="nsd", path=raw / "nsd", options=dict(options)))


@pytest.mark.parametrize("subject", ["subj01", "subj03"])
def test_nsd_volumes_as_nibabel_reads_them(tiny_raw: Path, subject: str) -> None:
    reader = nsd(tiny_raw)
    roi = nib.load(tiny_raw / "nsd" / FUNC.format(subject) / "roi/nsdgeneral.nii.gz")
    mask = np.asanyarray(roi.dataobj) == 1
    folder = tiny_raw / "nsd" / BETAS.format(subject)
    ncsnr = np.asanyarray(nib.load(folder / "ncsnr.nii.gz").dataobj)
    np.testing.assert_allclose(reader.voxels(subject).ncsnr_V, ncsnr[mask])
    image = nib.load(folder / "betas_session02.nii.gz")
    stored_NV = np.asanyarray(image.dataobj)[mask].T
    assert stored_NV.dtype == np.int16  # no scaling was applied
    compare_with_stored(reader.betas(subject, 2), stored_NV)


def test_nsd_hdf5_as_h5py_reads_it(tiny_raw: Path) -> None:
    folder = tiny_raw / "nsd" / BETAS.format("subj01")
    roi = nib.load(tiny_raw / "nsd" / FUNC.format("subj01") / "roi/nsdgeneral.nii.gz")
    places = np.argwhere(np.asanyarray(roi.dataobj) == 1)
    with h5py.File(folder / "betas_session01.hdf5") as file:
        stored_NV = np.stack([file["betas"][:, z, y, x] for x, y, z in places], axis=1)
    compare_with_stored(nsd(tiny_raw, source="hdf5").betas("subj01", 1), stored_NV)


def compare_with_stored(found_NV: NDArray[np.float32], stored_NV: NDArray[np.int16]) -> None:
    valid_V = stored_NV.any(axis=0)
    assert valid_V.sum() > 30
    np.testing.assert_allclose(found_NV[:, valid_V], stored_NV[:, valid_V] / 300, rtol=1e-6)
    assert np.isnan(found_NV[:, ~valid_V]).all()


@pytest.mark.parametrize("kind", ["h5", "mat"])
def test_god_as_bdpy_reads_it(tiny_raw: Path, bdpy: ModuleType, kind: str) -> None:
    path = tiny_raw / "god"
    data = bdpy.BData(str(path / f"Subject1.{kind}"))
    for roi in ("VC", "V1", "LOC", "HVC"):
        entry = DatasetConfig(name="god", path=path, roi=roi, options={"format": kind})
        compare_with_bdata(open_dataset(entry), data, roi)


def test_god_reads_what_bdpy_writes(tiny_raw: Path, tmp_path: Path, bdpy: ModuleType) -> None:
    """Built by bdpy from nothing: order of columns and header are not ours."""
    draw = np.random.default_rng(4)
    names = ["n01443537_22563", "n01621127_19020", "n01677366_18182"]
    stimuli = np.array([encode_label(names[i]) for i in (0, 1, 2, 0)])
    data = bdpy.BData()
    data.add(draw.normal(size=(4, 5)), "VoxelData")
    data.add(np.array([[1.0], [1], [2], [1]]), "Run")
    data.add(stimuli[:, None], "stimulus_id")
    data.add(np.array([[1.0], [1], [2], [3]]), "DataType")
    everything = np.array([1.0, 1, 1, 1, 1])
    data.add_metadata("ROI_VC", everything, "1 = VC", "VoxelData")
    data.add_metadata("ROI_V1", np.array([np.nan, 1, 1, np.nan, 1]), "1 = V1", "VoxelData")
    # The imagined picture is that of the test row.
    data.dataset[3, data.get_metadata("stimulus_id") == 1] = stimuli[2]
    data.save(str(tmp_path / "Subject4.h5"))
    for roi in ("VC", "V1"):
        reader = open_dataset(DatasetConfig(name="god", path=tmp_path, roi=roi))
        compare_with_bdata(reader, bdpy.BData(str(tmp_path / "Subject4.h5")), roi, "sub-04")
        assert reader.trials("sub-04")["stimulus_id"].tolist() == [*names, names[2]]


def compare_with_bdata(reader: Dataset, data: object, roi: str, subject: str = "sub-01") -> None:
    select, get = data.select, data.get  # type: ignore[attr-defined]
    keys = data.metadata.key  # type: ignore[attr-defined]
    betas_NV = np.concatenate([reader.betas(subject, session) for session in (1, 2, 3)])
    np.testing.assert_array_equal(betas_NV, select(f"ROI_{roi}").astype(np.float32))
    table = reader.trials(subject)
    label = "stimulus_id" if "stimulus_id" in keys else "Label"
    labels = [encode_label(name) for name in table["stimulus_id"]]
    np.testing.assert_allclose(labels, get(label).ravel(), rtol=0, atol=1e-8)
    assert table["session"].tolist() == get("DataType").ravel().tolist()


def test_coco_objects_as_pycocotools_reads_them(tiny_raw: Path, coco_api: ModuleType) -> None:
    reader = nsd(tiny_raw)
    assert isinstance(reader, NSDReader)
    folder = tiny_raw / "nsd" / reader.options.annotations
    files = {s: coco_api.COCO(folder / f"instances_{s}2017.json") for s in ("train", "val")}
    hidden = 0
    for stimulus in reader.stimuli():
        coco = files[stimulus.extra["coco_split"].removesuffix("2017")]
        number = int(stimulus.image_uid.removeprefix("coco:"))
        size = coco.loadImgs([number])[0]
        top, bottom, left, right = eval_box(stimulus.extra["crop_box"])
        areas: dict[str, float] = {}
        boxes = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        for one in boxes:
            x, y, width, height = one["bbox"]
            wide = min(x + width, size["width"] * (1 - right)) - max(x, size["width"] * left)
            high = min(y + height, size["height"] * (1 - bottom)) - max(y, size["height"] * top)
            (category,) = coco.loadCats([one["category_id"]])
            if wide > 0 and high > 0:
                name = category["name"]
                areas[name] = max(areas.get(name, 0.0), wide * high)
            else:
                hidden += 1
        assert set(stimulus.categories) == set(areas)
        assert [areas[name] for name in stimulus.categories] == sorted(areas.values())[::-1]
    assert hidden > 5


def eval_box(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.strip("()").split(","))
