"""``qc``: each defect is measured, named in words, and only the defect."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_store import put_dataset, put_responses
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from data_tools.datasets.protocol import Stimulus
from data_tools.qc import find_flags, qc
from data_tools.qc_measure import SubjectQuality, measure_subject
from data_tools.store import Store
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.stats.reliability import ncsnr

IMAGES, VOXELS = 80, 13


def recording() -> tuple[pd.DataFrame, NDArray[np.float32]]:
    """Three sessions, every image three times, ncsnr about 1."""
    generator = np.random.default_rng(0)
    order = generator.permutation(np.repeat(np.arange(IMAGES), 3))
    signal = generator.normal(size=(IMAGES, VOXELS))
    betas = 5 + signal[order] + generator.normal(size=(len(order), VOXELS))
    trials = pd.DataFrame(
        {
            "session": np.repeat([1, 2, 3], IMAGES),
            "run": 1,
            "stimulus_id": [f"x{n}" for n in order],
            "image_uid": [f"lab:{n}" for n in order],
            "split": "train",
        }
    )
    return trials, betas.astype(np.float32)


def measure(
    path: Path,
    trials: pd.DataFrame,
    betas: NDArray[np.float32],
    published: NDArray[np.float32] | None = None,
) -> SubjectQuality:
    store = Store(path / "store")
    stimuli = [Stimulus(f"x{n}", f"lab:{n}") for n in range(IMAGES)]
    put_dataset(store, "lab", stimuli, None, ("p",))
    put_responses(store, "lab", "p", trials, betas, published)
    return measure_subject(store, "lab", "p")


def test_good_data_are_not_flagged_and_numbers_are_right(tmp_path: Path) -> None:
    trials, betas = recording()
    quality = measure(tmp_path, trials, betas)
    assert find_flags(quality) == []
    expected = ncsnr(betas, trials["image_uid"], trials["session"])
    assert quality.ncsnr_V is not None
    assert_allclose(quality.ncsnr_V, expected)
    assert quality.repetitions == {3: IMAGES}
    ceilings = quality.noise_ceilings()
    assert list(ceilings) == [1, 3]
    for count, ceiling_V in ceilings.items():
        assert_allclose(ceiling_V, [100 * r * r / (r * r + 1 / count) for r in expected])
    assert 40 < np.median(ceilings[1]) < 60 < np.median(ceilings[3])
    for session in (1, 2, 3):
        rows = betas[trials["session"] == session]
        assert_allclose(quality.mean_S[session - 1], rows.mean(), rtol=1e-5)
        assert_allclose(quality.std_S[session - 1], np.median(rows.std(axis=0)), rtol=1e-5)
    assert_allclose(quality.rms_N.mean(), 1, atol=0.05)


def test_a_rescaled_session_is_named(tmp_path: Path) -> None:
    trials, betas = recording()
    betas[trials["session"] == 2] *= 300
    flags = find_flags(measure(tmp_path, trials, betas))
    assert any(flag.startswith("Session 2: responses vary 3") for flag in flags)
    assert not any(flag.startswith("Session 1: responses") for flag in flags)


def test_a_shifted_session_is_named(tmp_path: Path) -> None:
    trials, betas = recording()
    betas[trials["session"] == 3] += 6
    quality = measure(tmp_path, trials, betas)
    flags = find_flags(quality)
    assert any("Session 3: its voxel means are shifted" in flag for flag in flags)
    assert not any("Session 1" in flag for flag in flags)
    assert_allclose(quality.shift_S[2], 6 / np.sqrt(2), rtol=0.1)


def test_missing_and_dead_voxels_are_counted(tmp_path: Path) -> None:
    trials, betas = recording()
    betas[:, 4] = 7.0
    betas[np.ix_(trials["session"] == 2, [0, 1, 2])] = np.nan
    quality = measure(tmp_path, trials, betas)
    assert quality.invalid_S.tolist() == [0, 3, 0]
    assert quality.dead_S.tolist() == [1, 1, 1]
    assert quality.always_dead == 1
    flags = find_flags(quality)
    assert flags[0].startswith("Session 2: 23% of the voxels have no value")
    assert flags[1].startswith("1 of 13 voxels never vary")
    assert len(flags) == 2


def test_outlier_trials_are_counted(tmp_path: Path) -> None:
    trials, betas = recording()
    signs = np.random.default_rng(1).choice([-1, 1], size=(4, VOXELS))
    betas[[3, 90, 91, 200]] += 20 * signs
    quality = measure(tmp_path, trials, betas)
    assert np.flatnonzero(quality.outlier_N).tolist() == [3, 90, 91, 200]
    assert any("4 of 240 trials" in flag for flag in find_flags(quality))


def test_a_trial_table_in_another_order_is_recognised(tmp_path: Path) -> None:
    trials, betas = recording()
    shuffled = betas[np.random.default_rng(2).permutation(len(betas))]
    published = ncsnr(betas, trials["image_uid"], trials["session"]).astype(np.float32)
    flags = find_flags(measure(tmp_path, trials, shuffled, published))
    assert any("same order" in flag for flag in flags)
    assert any("published ncsnr agree poorly" in flag for flag in flags)


def test_published_ncsnr_that_agrees_is_fine(tmp_path: Path) -> None:
    trials, betas = recording()
    published = ncsnr(betas, trials["image_uid"], trials["session"]).astype(np.float32)
    quality = measure(tmp_path, trials, betas, published)
    assert_allclose(quality.ncsnr_correlation(), 1, atol=1e-6)
    assert find_flags(quality) == []
    assert len(find_flags(replace(quality, published_ncsnr_V=-quality.ncsnr_V))) == 1  # type: ignore[operator]


def test_imagery_is_no_repetition(tmp_path: Path) -> None:
    trials, betas = recording()
    trials["split"] = np.where(np.arange(240) % 10 == 0, "imagery", "train")
    quality = measure(tmp_path, trials, betas)
    kept = trials["split"] != "imagery"
    assert quality.num_imagery == 24
    assert sum(shown * images for shown, images in quality.repetitions.items()) == 216
    assert quality.ncsnr_V is not None
    expected = ncsnr(betas[kept], trials["image_uid"][kept], trials["session"][kept])
    assert_allclose(quality.ncsnr_V, expected)


def test_few_images_shown_three_times_do_not_stand_for_all(tmp_path: Path) -> None:
    trials, betas = recording()
    keep = (trials.groupby("image_uid").cumcount() < 2) | (trials["image_uid"] == "lab:7")
    quality = measure(tmp_path, trials[keep], betas[keep])
    assert quality.repetitions == {2: IMAGES - 1, 3: 1}
    assert quality.repetitions_used is None
    assert quality.ncsnr_V is not None
    assert abs(np.median(quality.ncsnr_V) - 1) < 0.25


def test_without_repeats_the_page_says_so(tmp_path: Path) -> None:
    trials, betas = recording()
    first = trials.groupby("image_uid").cumcount() == 0
    flags = find_flags(measure(tmp_path, trials[first], betas[first]))
    assert any("ncsnr) cannot be computed" in flag for flag in flags)


def test_pages_hold_everything_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trials, betas = recording()
    betas[:, 4] = 7.0
    measure(tmp_path, trials, betas)
    config = DataConfig(output=tmp_path)
    result = qc(config)
    page = (tmp_path / "qc/lab-p.html").read_bytes()
    assert b"1 of 13 voxels never vary" in page
    assert b"data:image/png;base64," in page
    assert b"http" not in page
    values = json.loads((tmp_path / "qc/lab-p.json").read_text())
    assert values["flags"] == result["flags"]["lab/p"]  # type: ignore[index]
    assert values["always_dead_voxels"] == 1
    index = (tmp_path / "qc/index.html").read_text()
    assert 'href="lab-p.html"' in index
    qc(config)
    assert (tmp_path / "qc/lab-p.html").read_bytes() == page
    only = config.model_copy(update={"datasets": (DatasetConfig(name="lab", path=tmp_path),)})
    assert qc(only)["flags"] == result["flags"]
