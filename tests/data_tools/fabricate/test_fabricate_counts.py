"""Full trial counts in the fabricated NSD design, and MindEye2's package beside NSD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.check import check
from data_tools.datasets.registry import open_dataset
from data_tools.fabricate import ground_truth
from data_tools.fabricate.nsd_order import planned_order
from data_tools.fabricate.nsd_volumes import nsd_volumes, volume_shape
from data_tools.fabricate.run import fabricate
from dist_decoder.config.base import load_config, validate
from dist_decoder.config.data import DataConfig, DatasetConfig

BETAS = "nsddata_betas/ppdata/subj05/func1pt8mm/betas_fithrf_GLMdenoise_RR"
PUBLISHED = {
    1: (583, 47, 62),
    30: (9209, 907, 2188),
    32: (9411, 930, 2371),
    37: (9841, 982, 2770),
    40: (10000, 1000, 3000),
}
"""Sessions -> distinct images, distinct shared images, trials with shared images."""


@pytest.mark.parametrize("seed", [0, 8])
def test_full_size_has_the_published_counts_after_any_number_of_sessions(seed: int) -> None:
    order = planned_order(40, 750, 1000, np.random.default_rng(seed))
    assert (np.bincount(order) == 3).all()
    for sessions, (images, shared_images, shared_trials) in PUBLISHED.items():
        seen = order[: 750 * sessions]
        shared = seen[seen < 1000]
        assert len(np.unique(seen)) == images
        assert (len(np.unique(shared)), len(shared)) == (shared_images, shared_trials)
    assert not np.array_equal(order, planned_order(40, 750, 1000, np.random.default_rng(seed + 1)))


def test_other_sizes_are_a_plain_permutation() -> None:
    order = planned_order(4, 30, 7, np.random.default_rng(2))
    expected = np.random.default_rng(2).permutation(np.repeat(np.arange(40), 3))
    np.testing.assert_array_equal(order, expected)


def test_tiny_volumes_differ_between_subjects() -> None:
    shapes = {volume_shape(subject, 40) for subject in range(1, 9)}
    assert len(shapes) == 8
    assert max(np.prod(shape) for shape in shapes) < 200
    assert len(nsd_volumes(8, 40, 40).general_in_brain()) == 40


def made(tmp_path: Path, **nsd: object) -> DataConfig:
    small = {"subjects": [3], "sessions": 5, "trials_per_session": 30, "shared_images": 12}
    return validate(
        DataConfig,
        {
            "output": str(tmp_path),
            "fabricate": {
                "nsd": {**small, "num_voxels": [20, 40], "image_px": 8, **nsd},
                "bold5000": {"subjects": [], "shared_with_nsd": 5},
                "god": {"subjects": []},
            },
        },
        "test",
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground_truth, "MIN_QUERIES", 100)


def test_mindeye2_package_agrees_with_nsd(tmp_path: Path, quick: None) -> None:
    config = made(tmp_path, mindeye2=True)
    fabricate(config)
    nsd = open_dataset(DatasetConfig(name="nsd", path=config.raw / "nsd"))
    package = DatasetConfig(name="mindeye2", path=config.raw / "mindeye2")
    me2 = open_dataset(package)
    columns = ["session", "run", "trial", "stimulus_id", "repetition", "split"]
    ours, theirs = me2.trials("subj03"), nsd.trials("subj03")
    assert ours[columns].to_numpy().tolist() == theirs[columns].to_numpy().tolist()
    uids = [[s.image_uid for s in one.stimuli()] for one in (nsd, me2)]
    assert uids[0] == uids[1]
    stimulus = ours["stimulus_id"].iloc[0]
    np.testing.assert_array_equal(me2.image(stimulus), nsd.image(stimulus))
    # One affine map per voxel over all sessions: unshared trials have mean 0 and SD 1.
    betas = [np.concatenate([one.betas("subj03", s) for s in (1, 2, 3, 4)]) for one in (nsd, me2)]
    train = (ours["split"] == "train").to_numpy()
    np.testing.assert_allclose(betas[1][train].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(betas[1][train].std(axis=0, ddof=1), 1, rtol=1e-4)
    valid = np.isfinite(betas[0]).all(axis=0)
    for voxel in np.flatnonzero(valid):
        assert np.corrcoef(betas[0][:, voxel], betas[1][:, voxel])[0, 1] > 0.9999
    old = open_dataset(package.model_copy(update={"options": {"test": "test"}}))
    assert len(old.trials("subj03")) < len(ours)
    entry = package.model_copy(update={"expect": "consistent"})
    assert check(config.model_copy(update={"datasets": (entry,)})).ok


def test_surface_betas_are_those_of_voxels_without_scaling(tmp_path: Path, quick: None) -> None:
    config = made(tmp_path, fsaverage_vertices=37)
    fabricate(config)
    entry = DatasetConfig(name="nsd", path=config.raw / "nsd")
    surface = open_dataset(surface_entry(entry))
    volume = open_dataset(entry)
    assert surface.voxels("subj03").num_voxels == 2 * 15
    vertices, voxels = surface.betas("subj03", 2), volume.betas("subj03", 2)
    reliability = surface.voxels("subj03").ncsnr_V
    published = volume.voxels("subj03").ncsnr_V
    assert reliability is not None
    assert published is not None
    for vertex in range(vertices.shape[1]):
        same = (voxels == vertices[:, vertex : vertex + 1]).all(axis=0)
        assert reliability[vertex] in published[same] or np.isnan(vertices[:, vertex]).all()
    assert check(config.model_copy(update={"datasets": (surface_entry(entry),)})).ok


def surface_entry(entry: DatasetConfig) -> DatasetConfig:
    return entry.model_copy(update={"options": {"space": "fsaverage"}})


@pytest.mark.slow
def test_check_prints_the_counts_of_the_papers(tmp_path: Path, quick: None) -> None:
    path = Path(__file__).parents[3] / "configs/data/full-counts.yaml"
    # One subject for each number of sessions; the command itself takes all eight.
    overrides = [f"output={str(tmp_path)!r}", "fabricate.nsd.subjects=[5,6,8]"]
    config = load_config(DataConfig, path, overrides)
    fabricate(config)
    report = check(config)
    assert report.ok, report.first_difference
    found = {(row.dataset, row.subject, row.fact): row.found for row in report.rows}
    facts = ("train_images", "train_trials", "test_images", "test_trials")
    for (dataset, subject), counts in {
        ("nsd", "subj05"): [9000, 27000, 1000, 3000],
        ("nsd", "subj06"): [8481, 21629, 930, 2371],
        ("nsd", "subj08"): [8302, 20312, 907, 2188],
        ("nsd-37-sessions", "subj05"): [8859, 24980, 982, 2770],
    }.items():
        assert [found[dataset, subject, fact] for fact in facts] == counts
    one = config.datasets[0].model_copy(update={"subjects": ("subj05",)})
    config = config.model_copy(update={"datasets": (one,)})
    (config.raw / "nsd").joinpath(BETAS, "betas_session40.nii.gz").unlink()
    assert check(config).first_difference == "nsd/subj05: sessions: 39, published: 40"
