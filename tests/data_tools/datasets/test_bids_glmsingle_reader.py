"""BIDS events and GLMsingle output: three file formats, both axis orders, and what is refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from nsd_files import write_nii
from numpy.typing import NDArray
from PIL import Image

from data_tools.check import check
from data_tools.datasets.bids_glmsingle import BidsGlmsingleReader
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.errors import ConfigError, DataError

MODEL = "TYPED_FITHRF_GLMDENOISE_RR"
SPACE = (3, 5, 4)
# (session, run) -> pictures in the order of their onsets.
RUNS = {
    ("01", 1): ["a.png", "b.png", "c.png"],
    ("01", 2): ["b.png", "a.png"],
    ("02", 1): ["c.png", "a.png"],
    ("02", 10): ["b.png", "d.png", "a.png", "c.png"],
    ("02", 2): ["d.png"],
}
ORDER = [("01", 1), ("01", 2), ("02", 1), ("02", 2), ("02", 10)]
NAMES = [name for key in ORDER for name in RUNS[key]]
NUM_TRIALS = len(NAMES)


class BidsFiles:
    """One subject; run 10 sorts before run 2 by name, and events are not sorted by onset."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.glm = root / "derivatives" / "glmsingle" / "sub-07"
        self.glm.mkdir(parents=True)
        for (session, run), names in RUNS.items():
            rows = [
                f"{4.0 * i + 1.5}\t1\tkind {name[0]}\t{name}\t"
                f"{'test' if name == 'd.png' else 'train'}"
                for i, name in enumerate(names)
            ]
            # A pause, and the first two events in the wrong order.
            rows = [*rows[:2][::-1], f"{4.0 * len(names)}\t9\tn/a\tn/a\tn/a", *rows[2:]]
            self.events(session, run).parent.mkdir(parents=True, exist_ok=True)
            header = "onset\tduration\ttrial_type\tstim_file\tsplit"
            self.events(session, run).write_text("\n".join([header, *rows]) + "\n")
        (root / "stimuli").mkdir()
        for number, name in enumerate(sorted(set(NAMES))):
            pixels = np.full((6, 8, 3), 20 * number, np.uint8)
            Image.fromarray(pixels).save(root / "stimuli" / name)
        rng = np.random.default_rng(5)
        self.volumes = rng.normal(size=(*SPACE, NUM_TRIALS)).astype(np.float32)
        self.mask = rng.random(SPACE) < 0.4
        write_nii(self.glm / "mask.nii.gz", self.mask.astype(np.uint8))

    def events(self, session: str, run: int) -> Path:
        name = f"sub-07_ses-{session}_task-view_run-{run}_events.tsv"
        return self.root / "sub-07" / f"ses-{session}" / "func" / name

    def expected(self, rows: slice) -> NDArray[np.float32]:
        cells = np.argwhere(self.mask)
        return np.array([[self.volumes[(*cell, t)] for cell in cells] for t in range(NUM_TRIALS)])[
            rows
        ]

    def write(self, kind: str, data: NDArray[np.float32] | None = None, folder: str = "") -> Path:
        data = self.volumes if data is None else data
        suffix = {"mat5": ".mat", "mat7": ".mat"}.get(kind, f".{kind}")
        path = self.glm / folder / f"{MODEL}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if kind == "npy":
            np.save(path, data)
        elif kind == "mat5":
            scipy.io.savemat(path, {"modelmd": data, "R2": data[..., 0]})
        else:
            with h5py.File(path, "w") as file:
                # MATLAB stores the axes the other way round.
                file["modelmd" if kind == "mat7" else "betasmd"] = (
                    data.T if kind == "mat7" else data
                )
        return path


@pytest.fixture
def files(tmp_path: Path) -> BidsFiles:
    return BidsFiles(tmp_path)


def reader(files: BidsFiles, **values: object) -> BidsGlmsingleReader:
    config = {"name": "bids_glmsingle", "path": files.root, **values}
    return BidsGlmsingleReader(DatasetConfig.model_validate(config))


def test_trials_are_in_the_order_of_session_run_and_onset(files: BidsFiles) -> None:
    files.write("hdf5")
    trials = reader(files).trials("sub-07")
    assert trials["stimulus_id"].tolist() == NAMES
    assert trials["session"].tolist() == [1] * 5 + [2] * 7
    assert trials["run"].tolist() == [1, 1, 1, 2, 2, 1, 1, 2, 10, 10, 10, 10]
    assert trials["repetition"].tolist() == [NAMES[:i].count(n) for i, n in enumerate(NAMES)]
    assert trials["category"].tolist() == [f"kind {name[0]}" for name in NAMES]
    assert [s == "test" for s in trials["split"]] == [name == "d.png" for name in NAMES]
    assert len(reader(files, max_sessions=1).trials("sub-07")) == 5
    stimuli = {item.stimulus_id: item for item in reader(files).stimuli()}
    assert [name for name, item in stimuli.items() if item.is_test] == ["d.png"]
    assert stimuli["b.png"].image_uid == "bids_glmsingle:b.png"
    assert int(reader(files).image("c.png")[0, 0, 0]) == 40


@pytest.mark.parametrize("kind", ["hdf5", "npy", "mat5", "mat7"])
def test_every_format_gives_the_same_numbers(files: BidsFiles, kind: str) -> None:
    files.write(kind)
    bids = reader(files)
    np.testing.assert_array_equal(bids.betas("sub-07", 1), files.expected(slice(0, 5)))
    np.testing.assert_array_equal(bids.betas("sub-07", 2), files.expected(slice(5, 12)))
    np.testing.assert_array_equal(bids.voxels("sub-07").xyz_V3, np.argwhere(files.mask))


@pytest.mark.parametrize("kind", ["hdf5", "npy", "mat5", "mat7"])
def test_betas_that_are_masked_already_need_no_mask(files: BidsFiles, kind: str) -> None:
    (files.glm / "mask.nii.gz").unlink()
    flat = np.moveaxis(files.expected(slice(None)), 0, 1)[:, None, None, :]
    files.write(kind, flat)
    (files.glm / "rois").mkdir()
    chosen = np.arange(len(flat)) % 3 == 1
    np.save(files.glm / "rois" / "V1.npy", chosen)
    bids = reader(files)
    np.testing.assert_array_equal(bids.betas("sub-07", 2), files.expected(slice(5, 12)))
    assert np.isnan(bids.voxels("sub-07").xyz_V3).all()
    few = reader(files, roi="V1").betas("sub-07", 1)
    np.testing.assert_array_equal(few, files.expected(slice(0, 5))[:, chosen])


def test_one_file_per_session_and_roi_volumes(files: BidsFiles) -> None:
    files.write("hdf5", files.volumes[..., :5], "ses-01")
    files.write("hdf5", files.volumes[..., 5:], "ses-02")
    labels = np.where(np.arange(SPACE[1])[None, :, None] < 3, 2, 0) * np.ones(SPACE)
    (files.glm / "rois").mkdir()
    write_nii(files.glm / "rois" / "V2.nii.gz", labels.astype(np.int16))
    bids = reader(files, roi="V2")
    kept = [i for i, cell in enumerate(np.argwhere(files.mask)) if cell[1] < 3]
    np.testing.assert_array_equal(bids.betas("sub-07", 2), files.expected(slice(5, 12))[:, kept])
    config = DataConfig.model_validate(
        {"output": files.root / "out", "datasets": [{"name": "bids_glmsingle", "path": files.root}]}
    )
    report = check(config)
    assert report.ok, report.first_difference
    files.write("hdf5", files.volumes[:, :, :2, 5:], "ses-02")
    with pytest.raises(DataError, match="same voxels in the same order"):
        reader(files).betas("sub-07", 2)


def test_a_pickled_result_is_refused(files: BidsFiles) -> None:
    path = files.glm / f"{MODEL}.npy"
    np.save(path, np.array({"betasmd": files.volumes}), allow_pickle=True)
    with pytest.raises(DataError, match="wanthdf5=1"):
        reader(files).betas("sub-07", 1)


def test_links_and_wrong_arrays_are_refused(files: BidsFiles) -> None:
    path = files.write("hdf5")
    path.rename(files.root / "elsewhere.hdf5")
    with h5py.File(path, "w") as file:
        file["betasmd"] = h5py.ExternalLink(str(files.root / "elsewhere.hdf5"), "betasmd")
    with pytest.raises(DataError, match="is a link into"):
        reader(files).betas("sub-07", 1)
    with h5py.File(path, "w") as file:
        file["R2"] = files.volumes
    with pytest.raises(DataError, match="neither betasmd nor modelmd; it has R2"):
        reader(files).betas("sub-07", 1)
    files.write("hdf5", files.volumes[..., 0])
    with pytest.raises(DataError, match=r"of shape \(3, 5, 4\)"):
        reader(files).betas("sub-07", 1)
    files.write("hdf5", files.volumes[..., :-1])
    with pytest.raises(DataError, match="holds 11 trials, the events of all sessions 12"):
        reader(files).betas("sub-07", 1)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="not a readable HDF5"):
        reader(files).betas("sub-07", 1)
    path.unlink()
    with pytest.raises(DataError, match="has no TYPED_FITHRF_GLMDENOISE_RR"):
        reader(files).betas("sub-07", 1)


def test_a_mask_of_another_subject_is_refused(files: BidsFiles) -> None:
    files.write("hdf5")
    write_nii(files.glm / "mask.nii.gz", np.ones((5, 3, 4), np.uint8))
    with pytest.raises(DataError, match="mask of another subject"):
        reader(files).voxels("sub-07")


def test_events_are_checked(files: BidsFiles) -> None:
    files.write("hdf5")
    path = files.events("01", 2)
    good = path.read_text()
    for change, message in (
        (good.replace("1.5\t", "soon\t"), "line 3: onset is 'soon'"),
        (good.replace("5.5\t", "1.5\t"), "line 3: two stimuli have the same onset"),
        (good.replace("train", "tset", 1), "line 2: split is none of"),
        (good.replace("stim_file", "stimulus"), r"lacks the column\(s\) stim_file"),
        (good.replace("kind a", "kind z"), "'a.png' has another category"),
    ):
        path.write_text(change)
        with pytest.raises(DataError, match=message):
            reader(files).stimuli()
    path.write_text(good.replace("stim_file", "picture"))
    for key in ORDER:
        events = files.events(*key)
        events.write_text(events.read_text().replace("stim_file", "picture"))
    named = reader(files, options={"stimulus_column": "picture", "category_column": "none"})
    assert named.trials("sub-07")["stimulus_id"].tolist() == NAMES
    assert set(named.trials("sub-07")["category"]) == {""}
    other = path.with_name("sub-07_ses-01_task-rest_run-1_events.tsv")
    other.write_text("onset\tpicture\n0\tn/a\n")
    with pytest.raises(ConfigError, match=r"rest, view; set options\.task"):
        reader(files).trials("sub-07")
    options = {"stimulus_column": "picture", "task": "view"}
    assert len(reader(files, options=options).trials("sub-07")) == NUM_TRIALS
    other.rename(path.with_name("sub-07_ses-01_task-view_run-02_events.tsv"))
    with pytest.raises(DataError, match="the same session and run"):
        reader(files, options=options).trials("sub-07")
