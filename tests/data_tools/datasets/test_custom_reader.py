"""Own scans: the example of the documentation page, formats, and every mistake a lab can make."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_tools.check import check
from data_tools.datasets.custom import CustomReader
from dist_decoder.config import DataConfig, load_config
from dist_decoder.config.data import DatasetConfig
from dist_decoder.errors import ConfigError, DataError

PAGE = Path(__file__).parents[3] / "docs" / "own-scans.md"
SESSIONS, NUM_VOXELS = {1: 5, 2: 3}, 7


def test_example_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"<!-- example: (.+?) -->\n```\w*\n(.+?)```", PAGE.read_text(), re.DOTALL)
    example = dict(blocks)
    exec(compile(example["make the files"], str(PAGE), "exec"), {})
    Path("my_lab.yaml").write_text(example["the configuration"])
    assert example["the command"].strip() == "data-tools check my_lab.yaml"
    config = load_config(DataConfig, "my_lab.yaml")
    report = check(config)
    assert report.ok, report.first_difference
    found = {row.fact: row.found for row in report.rows}
    assert (found["trials"], found["voxels"], found["test_trials"]) == (8, 3, 2)
    reader = CustomReader(config.datasets[0])
    assert reader.facts().licence == "not to be shared"
    assert {s.image_uid for s in reader.stimuli()} == {
        "my_lab:face",
        "my_lab:house",
        "my_lab:shoe",
    }
    stated = re.findall(r"^\| `(.+?)` \|", PAGE.read_text().partition("## When")[2], re.MULTILINE)
    assert len(stated) == 7


class Lab:
    """One subject; every change is written by ``save``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "sub-01"
        self.folder.mkdir()
        (root / "images").mkdir()
        rng = np.random.default_rng(4)
        self.betas = {s: rng.normal(size=(n, NUM_VOXELS)) for s, n in SESSIONS.items()}
        names = ["cat", "dog", "sun", "cat", "sun", "dog", "dog", "cat"]
        for number, name in enumerate(("cat", "dog", "sun")):
            pixels = np.full((4, 6, 3), 50 * number, np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        self.table = pd.DataFrame(
            {
                "trial": [1, 2, 3, 4, 5, 1, 2, 3],
                "session": [1] * 5 + [2] * 3,
                "run": [1, 1, 2, 2, 2, 1, 1, 2],
                "stimulus_id": names,
                "image": [f"{name}.png" for name in names],
                "category": ["animal" if name != "sun" else "star" for name in names],
                "split": ["test" if name == "sun" else "train" for name in names],
            }
        )
        self.save()

    def save(self) -> None:
        for session, betas in self.betas.items():
            np.save(self.folder / f"betas_session{session:02d}.npy", betas)
        self.table.to_csv(self.folder / "trials.csv", index=False)

    def reader(self, **values: object) -> CustomReader:
        config = {"name": "custom", "as_name": "lab", "path": self.root, **values}
        return CustomReader(DatasetConfig.model_validate(config))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_trials_betas_and_stimuli(lab: Lab) -> None:
    reader = lab.reader()
    trials = reader.trials("sub-01")
    assert trials["stimulus_id"].tolist() == lab.table["stimulus_id"].tolist()
    assert trials["trial"].tolist() == list(range(8))
    assert trials["repetition"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert trials["category"].tolist() == lab.table["category"].tolist()
    for session, betas in lab.betas.items():
        np.testing.assert_array_equal(reader.betas("sub-01", session), betas.astype(np.float32))
    stimuli = {s.stimulus_id: s for s in reader.stimuli()}
    assert {name: s.is_test for name, s in stimuli.items()} == {
        "cat": False,
        "dog": False,
        "sun": True,
    }
    assert stimuli["cat"].image_uid == "lab:cat"
    assert (reader.image("sun") == 100).all()
    assert reader.image("sun").shape == (4, 6, 3)


def test_rows_in_any_order_give_the_same_trials(lab: Lab) -> None:
    before = lab.reader().trials("sub-01")
    lab.table = lab.table.sample(frac=1, random_state=1)
    lab.save()
    pd.testing.assert_frame_equal(lab.reader().trials("sub-01"), before)
    (lab.folder / "trials.csv").unlink()
    lab.table.to_csv(lab.folder / "trials.tsv", sep="\t", index=False)
    pd.testing.assert_frame_equal(lab.reader().trials("sub-01"), before)


def test_npz_nifti_and_masks(lab: Lab) -> None:
    np.savez(lab.folder / "betas_session02.npz", betas=lab.betas[2])
    (lab.folder / "betas_session02.npy").unlink()
    np.testing.assert_array_equal(lab.reader().betas("sub-01", 2), lab.betas[2].astype(np.float32))
    shape = (3, 5, 2)
    mask = np.zeros(shape, np.uint8)
    mask.ravel()[[1, 4, 9, 11, 17, 23, 28]] = 1
    rng = np.random.default_rng(0)
    volumes = {
        s: rng.integers(-900, 900, (*shape, n)).astype(np.int16) for s, n in SESSIONS.items()
    }
    for path in lab.folder.glob("betas*"):
        path.unlink()
    nib.save(nib.Nifti1Image(mask, np.eye(4)), lab.folder / "mask.nii.gz")
    for session, data in volumes.items():
        image = nib.Nifti1Image(data, np.eye(4))
        image.header.set_slope_inter(0.5, 2.0)
        nib.save(image, lab.folder / f"betas_session{session:02d}.nii.gz")
    (lab.folder / "rois").mkdir()
    roi = np.zeros(shape, np.uint8)
    roi[1:] = 1
    nib.save(nib.Nifti1Image(roi, np.eye(4)), lab.folder / "rois" / "back.nii.gz")
    np.save(lab.folder / "rois" / "first.npy", np.arange(NUM_VOXELS) < 1)
    for session in SESSIONS:
        path = lab.folder / f"betas_session{session:02d}.nii.gz"
        expected = nib.load(path).get_fdata()[mask == 1].T
        np.testing.assert_allclose(lab.reader().betas("sub-01", session), expected, rtol=1e-6)
        part = lab.reader(roi="back+first").betas("sub-01", session)
        wanted = (roi[mask == 1] == 1) | (np.arange(NUM_VOXELS) < 1)
        np.testing.assert_allclose(part, expected[:, wanted], rtol=1e-6)
    voxels = lab.reader().voxels("sub-01")
    np.testing.assert_array_equal(voxels.xyz_V3, np.argwhere(mask))
    assert set(voxels.rois) == {"back", "first"}
    with pytest.raises(ConfigError, match="no ROI 'front'"):
        lab.reader(roi="front").betas("sub-01", 1)


def test_labels_without_images(lab: Lab) -> None:
    lab.table = lab.table.drop(columns=["image", "split"])
    lab.save()
    reader = lab.reader()
    assert not reader.has_images()
    assert {s.categories for s in reader.stimuli()} == {("animal",), ("star",)}
    assert set(reader.trials("sub-01")["split"]) == {""}
    with pytest.raises(DataError, match="has no image"):
        reader.image("cat")


def test_public_identities_are_kept(lab: Lab) -> None:
    uids = {"cat": "coco:42", "dog": "", "sun": ""}
    lab.table["image_uid"] = [uids[name] for name in lab.table["stimulus_id"]]
    lab.save()
    stimuli = {s.stimulus_id: s.image_uid for s in lab.reader().stimuli()}
    assert stimuli == {"cat": "coco:42", "dog": "lab:dog", "sun": "lab:sun"}


def test_invalid_voxels_and_session_limit(lab: Lab) -> None:
    lab.betas[1][:, 2] = np.nan
    lab.save()
    betas = lab.reader().betas("sub-01", 1)
    assert np.isnan(betas[:, 2]).all()
    assert np.isnan(betas).sum() == SESSIONS[1]
    assert lab.reader(max_sessions=1).trials("sub-01")["session"].tolist() == [1] * 5
    assert all(f.ok for f in lab.reader(max_sessions=1).consistency("sub-01"))
    before = lab.reader().fingerprint("sub-01", 1)
    lab.betas[1] = np.vstack([lab.betas[1], lab.betas[1]])
    lab.save()
    assert lab.reader().fingerprint("sub-01", 1) != before


def drop_run(lab: Lab) -> None:
    lab.table = lab.table.drop(columns="run")


def misspell(lab: Lab) -> None:
    lab.table = lab.table.rename(columns={"category": "catgory"})


def restart_per_run(lab: Lab) -> None:
    lab.table["trial"] = [1, 2, 1, 2, 3, 1, 2, 1]


def text_in_session(lab: Lab) -> None:
    lab.table["session"] = lab.table["session"].astype(str).replace("2", "two")


def test_and_train(lab: Lab) -> None:
    lab.table.loc[4, "split"] = "train"


def two_images(lab: Lab) -> None:
    lab.table.loc[3, "image"] = "dog.png"


def wrong_split(lab: Lab) -> None:
    lab.table.loc[1, "split"] = "testing"


def nothing_shown(lab: Lab) -> None:
    lab.table = lab.table.drop(columns=["image", "category"])


def one_image_missing_in_table(lab: Lab) -> None:
    lab.table.loc[lab.table["stimulus_id"] == "sun", "image"] = ""


def no_rows(lab: Lab) -> None:
    lab.table = lab.table.iloc[:0]


test_and_train.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_run, r"lacks the column\(s\) run"),
        (misspell, "did you mean 'category'"),
        (restart_per_run, "do not restart"),
        (text_in_session, r"line 7: session is 'two'"),
        (test_and_train, "test in some rows and not in others"),
        (two_images, "has another image"),
        (wrong_split, r"line 3: split"),
        (nothing_shown, "neither image nor category"),
        (one_image_missing_in_table, r"line 4: image is empty"),
        (no_rows, "has no rows"),
    ],
)
def test_wrong_tables_are_refused(lab: Lab, change, message: str) -> None:
    change(lab)
    lab.save()
    with pytest.raises(DataError, match=message):
        lab.reader().trials("sub-01")


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (np.zeros((4, NUM_VOXELS)), "has 4 rows, trials.csv has 3"),
        (np.zeros((NUM_VOXELS, 3)), "transposed"),
        (np.zeros((3, NUM_VOXELS - 1)), "has 6 voxels, betas_session01.npy has 7"),
        (np.zeros((3, NUM_VOXELS), complex), "expected numbers"),
        (np.zeros((3, NUM_VOXELS, 1)), "expected numbers"),
        (np.where(np.arange(21).reshape(3, 7) == 9, np.nan, 1.0), "voxel 2, trial 1"),
        (np.where(np.arange(21).reshape(3, 7) == 9, np.inf, 1.0), "NaN or infinity"),
    ],
)
def test_wrong_betas_are_refused(lab: Lab, betas: np.ndarray, message: str) -> None:
    np.save(lab.folder / "betas_session02.npy", betas)
    with pytest.raises(DataError, match=message):
        lab.reader().betas("sub-01", 2)


def test_pickles_and_damaged_files_are_refused(lab: Lab) -> None:
    path = lab.folder / "betas_session02.npy"
    np.save(path, np.array([[{}] * NUM_VOXELS] * 3), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        lab.reader().betas("sub-01", 2)
    np.save(path, lab.betas[2])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a readable"):
        lab.reader().betas("sub-01", 2)
    path.unlink()
    packed = lab.folder / "betas_session02.npz"
    np.savez(packed, betas=np.array([[{}] * NUM_VOXELS] * 3), allow_pickle=True)
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        lab.reader().betas("sub-01", 2)
    np.savez(packed, data=lab.betas[2])
    with pytest.raises(DataError, match="no array 'betas'"):
        lab.reader().betas("sub-01", 2)
    packed.unlink()
    with pytest.raises(DataError, match=r"no betas_session02\.npy"):
        lab.reader().betas("sub-01", 2)


def test_missing_images_and_unused_betas_are_found(lab: Lab) -> None:
    (lab.root / "images" / "dog.png").unlink()
    np.save(lab.folder / "betas_session03.npy", lab.betas[2])
    findings = {f.fact: f for f in lab.reader().consistency("sub-01")}
    assert "dog.png" in findings["image files"].detail
    assert "[3]" in findings["sessions with betas"].detail
    assert not any(f.ok for f in findings.values())
    with pytest.raises(DataError, match=r"dog\.png.*'dog'"):
        lab.reader().image("dog")


def test_mask_of_another_subject_is_refused(lab: Lab) -> None:
    mask = np.ones((2, 2, 2), np.uint8)
    nib.save(nib.Nifti1Image(mask, np.eye(4)), lab.folder / "mask.nii.gz")
    with pytest.raises(DataError, match="8 voxels, the betas 7"):
        lab.reader().voxels("sub-01")
    (lab.folder / "mask.nii.gz").unlink()
    (lab.folder / "rois").mkdir()
    np.save(lab.folder / "rois" / "V1.npy", np.ones(6, bool))
    with pytest.raises(DataError, match=r"shape \(6,\), the betas need \(7,\)"):
        lab.reader(roi="V1").voxels("sub-01")


def test_options_act(lab: Lab) -> None:
    (lab.root / "images").rename(lab.root / "pictures")
    reader = lab.reader(options={"images": "pictures", "unit": "z", "redistributable": True})
    assert reader.image("dog").shape == (4, 6, 3)
    assert (reader.facts().unit, reader.facts().redistributable) == ("z", True)
    with pytest.raises(ConfigError, match="did you mean 'licence'"):
        lab.reader(options={"license": "CC0"})
