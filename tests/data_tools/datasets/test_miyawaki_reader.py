"""Measured data: packaged block sums, decoding accuracy, and a file put together with h5py."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from data_tools.datasets.miyawaki2008 import Miyawaki2008Reader, draw_figure
from data_tools.datasets.miyawaki2008_files import PACKAGED, write_block_averages
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError

NAMES = ("pre rest", "rest", "square8x8", "smallFrame8x8", "largeFrame8x8", "plus8x8", "cross8x8")
CODES = (1, 2, 2001, 2002, 2003, 2004, 2005)
NUM_VOXELS = 7


def reader(path: Path | str = "packaged", **values: object) -> Miyawaki2008Reader:
    config = {"name": "miyawaki2008", "path": str(path), **values}
    return Miyawaki2008Reader(DatasetConfig.model_validate(config))


def leave_one_run_out(betas: np.ndarray, categories: np.ndarray, run: np.ndarray) -> float:
    right = []
    for test in np.unique(run):
        model = RidgeClassifier(alpha=100.0).fit(betas[run != test], categories[run != test])
        right += list(model.predict(betas[run == test]) == categories[run == test])
    return float(np.mean(right))


@pytest.mark.parametrize(("shift", "low", "high"), [(0, 0.85, 0.95), (2, 0.95, 1.0)])
def test_packaged_data_decode_as_published(shift: int, low: float, high: float) -> None:
    one = reader(options={"shift_samples": shift, "run_zscore": True})
    trials = one.trials("S2")
    accuracy = leave_one_run_out(
        one.betas("S2", 1), trials["category"].to_numpy(), trials["run"].to_numpy()
    )
    assert low <= accuracy <= high
    raw = reader(options={"shift_samples": shift}).betas("S2", 1)
    assert not np.allclose(raw, one.betas("S2", 1))


def test_packaged_trials_and_voxels() -> None:
    one = reader()
    trials = one.trials("S2")
    assert len(trials) == 40
    assert trials["category"].value_counts().tolist() == [8] * 5
    assert trials["run"].value_counts().to_dict() == {1: 10, 2: 10, 3: 10, 4: 10}
    voxels = one.voxels("S2")
    assert voxels.num_voxels == one.betas("S2", 1).shape[1] == 910
    assert int(voxels.rois["V1d"].sum()) < 910
    part = reader(roi="LH_V1d")
    assert part.voxels("S2").num_voxels == int(voxels.rois["LH_V1d"].sum())
    chosen = one.betas("S2", 1)[:, voxels.rois["LH_V1d"]]
    np.testing.assert_array_equal(part.betas("S2", 1), chosen)
    assert PACKAGED.stat().st_size < 1_000_000
    with np.load(PACKAGED, allow_pickle=False) as archive:
        assert "ODC" in str(archive["attribution"])


def test_five_distinct_pictures() -> None:
    one = reader()
    pictures = [one.image(s.stimulus_id) for s in one.stimuli()]
    assert {p.shape for p in pictures} == {(10, 10, 3)}
    assert len({p.tobytes() for p in pictures}) == 5
    for picture in pictures:
        assert set(np.unique(picture)) == {0, 255}
        np.testing.assert_array_equal(picture, picture[::-1])  # all five are symmetric
        assert not picture[0].any()
        assert not picture[:, 9].any()
    assert draw_figure("smallFrame").sum() < draw_figure("largeFrame").sum()
    with pytest.raises(DataError, match="circle"):
        draw_figure("circle")


def write_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Four runs of 6 pre-rest volumes and two blocks; returns (T, V) data and labels."""
    rng = np.random.default_rng(0)
    blocks = [[2001, 2004], [2002, 2003], [2005, 2001], [2003, 2004]]
    labels = []
    for first, second in blocks:
        labels += [1] * 6 + [first] * 6 + [2] * 6 + [second] * 6 + [2] * 6
    label_array = np.array(labels, float)
    data = rng.integers(0, 1000, (len(labels), NUM_VOXELS)).astype(float)
    with h5py.File(path, "w") as file:

        def cell(key: str, items: list[np.ndarray]) -> None:
            references = []
            for number, item in enumerate(items):
                made = file.create_dataset(f"#refs#/{key}{number}", data=item)
                references.append(made.ref)
            file.create_dataset(
                f"D/{key}", data=np.array(references, h5py.ref_dtype)[:, None], dtype=h5py.ref_dtype
            )

        def text(value: str) -> np.ndarray:
            return np.array([[ord(c)] for c in value], np.uint16)

        file["D/data"] = data.T
        file["D/labels"] = label_array[None]
        file["D/inds_runs"] = np.array([[30 * r + 1, 30 * (r + 1)] for r in range(4)], float)
        file["D/xyz"] = rng.normal(size=(NUM_VOXELS, 3))
        cell("labels_names", [text(name) for name in NAMES])
        cell("inds_conds", [np.flatnonzero(label_array == c)[:, None] + 1.0 for c in CODES])
        cell("rois_names", [text("VOX_X_LH_V1d"), text("VOX_X_RH_V1d")])
        cell("rois_inds", [np.array([[1.0], [3.0]]), np.array([[7.0]])])
    return data, label_array


@pytest.fixture
def mat(tmp_path: Path) -> Path:
    return tmp_path / "S2_figureImage.mat"


@pytest.mark.parametrize("shift", [0, 2, 3])
def test_block_means_follow_the_shift(mat: Path, shift: int) -> None:
    data, _ = write_mat(mat)
    one = reader(mat, options={"shift_samples": shift})
    starts = [30 * run + offset for run in range(4) for offset in (6, 18)]
    expected = np.array([data[s + shift : s + shift + 6].mean(axis=0) for s in starts])
    np.testing.assert_allclose(one.betas("S2", 1), expected, rtol=1e-6)
    assert one.trials("S2")["stimulus_id"].tolist()[:3] == ["square8x8", "plus8x8", "smallFrame8x8"]
    assert one.trials("S2")["run"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_single_volumes_and_run_zscore(mat: Path) -> None:
    data, _ = write_mat(mat)
    one = reader(mat, options={"average": False, "shift_samples": 1, "run_zscore": True})
    betas = one.betas("S2", 1)
    assert betas.shape == (48, NUM_VOXELS)
    run = data[30:60]
    expected = (data[37:43] - run.mean(axis=0)) / run.std(axis=0)
    np.testing.assert_allclose(betas[12:18], expected, rtol=1e-5, atol=1e-5)
    assert one.facts().unit == "z"
    assert one.facts().subjects["S2"].trials == 240
    assert reader(mat, roi="V1d").voxels("S2").num_voxels == 3


def test_packaging_is_exact_and_deterministic(mat: Path, tmp_path: Path) -> None:
    write_mat(mat)
    targets = [tmp_path / name for name in ("a.npz", "b.npz")]
    for target in targets:
        write_block_averages(mat, target)
    assert targets[0].read_bytes() == targets[1].read_bytes()
    for options in ({}, {"shift_samples": 3, "run_zscore": True}):
        whole, packed = (reader(path, options=options) for path in (mat, targets[0]))
        np.testing.assert_array_equal(whole.betas("S2", 1), packed.betas("S2", 1))
        assert whole.trials("S2").equals(packed.trials("S2"))
        assert whole.voxels("S2").mask_fingerprint == packed.voxels("S2").mask_fingerprint


def test_what_the_package_cannot_do_is_refused(mat: Path) -> None:
    with pytest.raises(ConfigError, match="shift_samples 0 to 3"):
        reader(options={"shift_samples": 4})
    with pytest.raises(ConfigError, match="average=false"):
        reader(options={"average": False})
    with pytest.raises(ConfigError, match="did you mean 'shift_samples'"):
        reader(options={"shift_sample": 1})
    with pytest.raises(DataError, match="no subject"):
        reader(mat).subjects()
    with h5py.File(mat, "w") as file:
        file["D/data"] = np.zeros((3, 4))
    with pytest.raises(DataError, match="no array 'D/labels'"):
        reader(mat).trials("S2")
