"""Voxel selection by ncsnr: the same voxels in table, masks and betas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nsd_files import NSDFiles, write_nii

from data_tools.check import check
from data_tools.datasets.registry import open_dataset
from data_tools.ingest import ingest
from data_tools.store import Store
from dist_decoder.config.base import validate
from dist_decoder.config.data import DataConfig
from dist_decoder.errors import ConfigError, DataError


@pytest.fixture
def files(tmp_path: Path) -> NSDFiles:
    return NSDFiles(tmp_path / "nsd")


def configured(files: NSDFiles, **values: Any) -> DataConfig:
    entry = {"name": "nsd", "path": str(files.root), "subjects": ["subj03"], **values}
    output = files.root.parent / "out"
    return validate(DataConfig, {"output": str(output), "datasets": [entry]}, "test")


def test_the_threshold_selects_the_same_voxels_everywhere(files: NSDFiles) -> None:
    xyz = np.argwhere(files.masks["subj03"] == 1)
    files.ncsnr[tuple(xyz[2])] = np.nan
    write_nii(files.betas_path("subj03", 1).with_name("ncsnr.nii.gz"), files.ncsnr)
    reliability = files.ncsnr[tuple(xyz.T)]
    threshold = float(np.sort(reliability)[11])  # met exactly by one voxel
    kept = np.flatnonzero(reliability >= threshold)
    assert 0 < len(kept) < len(xyz) - 1
    config = configured(files, min_ncsnr=threshold)
    reader = open_dataset(config.datasets[0])
    voxels = reader.voxels("subj03")
    np.testing.assert_array_equal(voxels.xyz_V3, xyz[kept])
    np.testing.assert_array_equal(voxels.ncsnr_V, reliability[kept])
    labels = files.streams[tuple(xyz[kept].T)]
    np.testing.assert_array_equal(voxels.rois["streams:lateral"], labels == 3)
    expected = files.selected("subj03", 2)[:, kept]
    np.testing.assert_array_equal(reader.betas("subj03", 2), expected)
    whole = open_dataset(configured(files).datasets[0])
    assert whole.voxels("subj03").mask_fingerprint != voxels.mask_fingerprint
    assert whole.fingerprint("subj03", 1) != reader.fingerprint("subj03", 1)
    ingest(config)
    np.testing.assert_array_equal(Store(config.store).betas("nsd", "subj03", 2), expected)
    rows = {row.fact: row for row in check(config).rows}
    assert rows["min_ncsnr"].found == (
        f"{len(kept)} of {len(xyz)} voxels have ncsnr >= {threshold}"
    )
    assert rows["imgBrick"].state == "ok"


def test_a_threshold_that_selects_nothing_or_has_no_ncsnr_is_refused(files: NSDFiles) -> None:
    reader = open_dataset(configured(files, min_ncsnr=1.5).datasets[0])
    with pytest.raises(DataError, match=r"no voxel has ncsnr >= 1\.5 \(the highest is 0\.9"):
        reader.voxels("subj03")
    files.betas_path("subj03", 1).with_name("ncsnr.nii.gz").unlink()
    with pytest.raises(ConfigError, match="comes without ncsnr"):
        reader.voxels("subj03")
