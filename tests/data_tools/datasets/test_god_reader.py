"""GOD: both file formats, exact labels (genuine ids, MIT), NaN metadata, overlapping ROIs."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from bold5000_files import genuine_orders
from PIL import Image

from data_tools.check import check
from data_tools.datasets.god import GODReader
from data_tools.datasets.god_labels import decode_label, encode_label
from data_tools.datasets.identity import uid_of_bold5000_name
from data_tools.split_policies import synset_notes, synset_of, synsets_of_tests
from dist_decoder.config.data import DataConfig, DatasetConfig
from dist_decoder.errors import ConfigError, DataError

GENUINE = Path(__file__).with_name("genuine") / "god_image_ids.csv"
IDS = [line.split(",") for line in GENUINE.read_text().split()]
NAMES = [name.strip('"').removesuffix(".JPEG") for _, name in IDS]
TRAIN = [*NAMES[:4], NAMES[9], NAMES[17]]
TEST = NAMES[1200:1203]
NUM_VOXELS = 11


def label(name: str) -> float:
    synset, number = name[1:].split("_")
    return float(f"{int(synset)}.{int(number):06d}")


class GODFiles:
    """Training 6 rows in runs 1, 1, 1, 2, 2, 3; test 6 rows in runs 1, 2; imagery 3 rows."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(2)
        self.names = [*TRAIN, TEST[0], TEST[2], TEST[1], TEST[1], TEST[0], TEST[2], *TEST]
        self.types = np.repeat([1.0, 2.0, 3.0], [6, 6, 3])
        self.runs = np.array([1, 1, 1, 2, 2, 3, 1, 1, 1, 2, 2, 2, 7, 7, 8], float)
        self.labels = np.array([label(name) for name in self.names])
        self.voxels = rng.normal(size=(15, NUM_VOXELS))
        self.xyz = rng.normal(size=(3, NUM_VOXELS))
        index = np.arange(NUM_VOXELS)
        self.rois = {
            "V1": index < 3,
            "V2": (index >= 2) & (index < 6),  # shares voxel 2 with V1
            "LVC": index < 6,
            "VC": index != 8,
        }
        for name in sorted(set(self.names)):
            folder = "test" if name in TEST else "training"
            path = root / "images" / folder / name.split("_")[0] / f"{name}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8, 3), 3 * self.names.index(name), np.uint8)
            Image.fromarray(pixels).save(path)

    def table(self, own: list[str], voxels_first: bool) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Return keys, (K, columns) metadata and the matrix."""
        columns = {"DataType": self.types, "Run": self.runs, own[0]: self.labels}
        for extra in own[1:]:
            columns[extra] = np.full(len(self.names), 99.0)  # wrong on purpose, as before version 5
        block = np.column_stack(list(columns.values()))
        parts = [self.voxels, block] if voxels_first else [block, self.voxels]
        matrix = np.hstack(parts)
        voxel = np.full(matrix.shape[1], False)
        start = 0 if voxels_first else len(columns)
        voxel[start : start + NUM_VOXELS] = True
        keys = [*columns, "VoxelData", "voxel_x", "voxel_y", "voxel_z"]
        keys += [f"ROI_{name}" for name in self.rois]
        value = np.full((len(keys), matrix.shape[1]), np.nan)
        for row in range(len(columns)):
            value[row, np.flatnonzero(~voxel)[row]] = 1
        value[len(columns), voxel] = 1
        value[len(columns) + 1 : len(columns) + 4, voxel] = self.xyz
        for row, mask in enumerate(self.rois.values(), len(columns) + 4):
            value[row, voxel] = np.where(mask, 1, np.nan)
        return keys, value, matrix

    def write_mat(self, number: int = 1) -> Path:
        keys, value, matrix = self.table(["Label"], voxels_first=False)
        cells = np.array([keys], dtype=object)
        path = self.root / f"Subject{number}.mat"
        meta = {"key": cells, "description": cells, "value": value}
        scipy.io.savemat(path, {"dataSet": matrix, "metaData": meta})
        return path

    def write_h5(self, number: int = 1, dtype: type = np.float64, old: bool = False) -> Path:
        own = ["stimulus_id", "image_index", "category_index"]
        keys, value, matrix = self.table(own, voxels_first=True)
        path = self.root / f"Subject{number}.h5"
        data, meta = ("dataSet", "metaData") if old else ("dataset", "metadata")
        with h5py.File(path, "w") as file:
            file[data] = matrix.astype(dtype)
            file[f"{meta}/key"] = np.array(keys, "S")
            file[f"{meta}/value"] = value
        return path


@pytest.fixture
def files(tmp_path: Path) -> GODFiles:
    return GODFiles(tmp_path)


def reader(files: GODFiles, **values: object) -> GODReader:
    return GODReader(DatasetConfig.model_validate({"name": "god", "path": files.root, **values}))


def test_all_genuine_ids_round_trip() -> None:
    assert len(NAMES) == len(set(NAMES)) == 1250
    for (text, _), name in zip(IDS, NAMES, strict=True):
        assert decode_label(float(text)) == name
        assert encode_label(name) == float(text)
    # What the rule guards against: the shortest text of a float drops zeros at the end.
    naive = [str(float(text)).partition(".")[2].lstrip("0") for text, _ in IDS]
    wrong = sum(a != name.split("_")[1] for a, name in zip(naive, NAMES, strict=True))
    assert wrong > 100
    assert len({np.float32(text) for text, _ in IDS[:1200]}) == 150
    assert decode_label(1443537.0) == "n01443537"


@pytest.mark.parametrize("kind", ["mat", "h5", "old h5"])
def test_betas_and_trials_from_every_format(files: GODFiles, kind: str) -> None:
    if kind == "mat":
        files.write_mat()
    else:
        files.write_h5(old=kind == "old h5")
    god = reader(files)
    assert god.subjects() == ("sub-01",)
    chosen = [v for v in range(NUM_VOXELS) if v != 8]
    for session, rows in ((1, slice(0, 6)), (2, slice(6, 12)), (3, slice(12, 15))):
        expected = files.voxels[rows][:, chosen].astype(np.float32)
        np.testing.assert_array_equal(god.betas("sub-01", session), expected)
    trials = god.trials("sub-01")
    assert trials["stimulus_id"].tolist() == files.names
    assert trials["session"].tolist() == [1] * 6 + [2] * 6 + [3] * 3
    assert trials["run"].tolist() == [1, 1, 1, 2, 2, 3, 1, 1, 1, 2, 2, 2, 1, 1, 2]
    assert trials["split"].tolist() == ["train"] * 6 + ["test"] * 6 + ["imagery"] * 3
    assert trials["repetition"].tolist() == [0] * 6 + [0, 0, 0, 1, 1, 1] + [0] * 3
    assert trials["category"].tolist() == [name.split("_")[0] for name in files.names]
    assert all(finding.ok for finding in god.consistency("sub-01"))


def test_formats_agree_and_one_can_be_chosen(files: GODFiles) -> None:
    files.write_mat()
    files.voxels = files.voxels + 1
    files.write_h5()
    mat = reader(files, options={"format": "mat"}).betas("sub-01", 1)
    h5 = reader(files).betas("sub-01", 1)
    np.testing.assert_allclose(h5 - mat, 1, atol=1e-6)
    xyz = [reader(files, options={"format": f}).voxels("sub-01").xyz_V3 for f in ("mat", "h5")]
    np.testing.assert_array_equal(xyz[0], xyz[1])
    np.testing.assert_allclose(xyz[0], np.delete(files.xyz, 8, axis=1).T, rtol=1e-6)


def test_rois_are_unions_without_duplicates(files: GODFiles) -> None:
    files.write_h5()
    both = reader(files, roi="V2+V1").betas("sub-01", 1)
    np.testing.assert_array_equal(both, files.voxels[:6, :6].astype(np.float32))
    voxels = reader(files, roi="V2+V1").voxels("sub-01")
    assert voxels.rois["V1"].tolist() == [True] * 3 + [False] * 3  # NaN is not part
    with pytest.raises(ConfigError, match="no ROI 'FFA'"):
        reader(files, roi="FFA").betas("sub-01", 1)


def test_imagery_labels_may_be_bare_synsets(files: GODFiles) -> None:
    files.labels[12:] = np.floor(files.labels[12:])
    files.write_mat()
    assert reader(files).trials("sub-01")["stimulus_id"].tolist() == files.names


def test_float32_labels_are_refused(files: GODFiles) -> None:
    files.write_h5(dtype=np.float32)
    with pytest.raises(DataError, match="float32"):
        reader(files).trials("sub-01")
    files.labels = files.labels.astype(np.float32).astype(np.float64)
    files.write_h5()
    with pytest.raises(DataError, match="float32"):
        reader(files).trials("sub-01")


def test_stimuli_and_images(files: GODFiles) -> None:
    files.write_h5()
    god = reader(files)
    stimuli = {s.stimulus_id: s for s in god.stimuli()}
    assert set(stimuli) == set(files.names)
    for name, stimulus in stimuli.items():
        wnid, number = name.split("_")
        assert stimulus.image_uid == f"imagenet:{wnid}_{int(number)}"
        assert stimulus.is_test == (name in TEST)
        assert abs(int(god.image(name)[0, 0, 0]) - 3 * files.names.index(name)) <= 2
    assert len(reader(files, max_sessions=1).stimuli()) == len(TRAIN)
    assert reader(files, max_sessions=1).trials("sub-01")["session"].max() == 1
    (files.root / "images/test" / TEST[0].split("_")[0] / f"{TEST[0]}.JPEG").unlink()
    findings = {f.fact: f for f in god.consistency("sub-01")}
    assert TEST[0] in findings["image files"].detail
    assert not findings["image files"].ok


def test_image_in_training_and_test_is_refused(files: GODFiles) -> None:
    files.labels[0] = label(TEST[0])
    files.write_h5()
    with pytest.raises(DataError, match=f"{TEST[0]} is in the training and in the test"):
        reader(files).stimuli()


def test_damaged_files_are_refused(files: GODFiles) -> None:
    path = files.write_mat()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="not a readable MATLAB 5"):
        reader(files).trials("sub-01")
    files.write_h5().rename(path)
    with pytest.raises(DataError, match=r"7\.3"):
        reader(files).trials("sub-01")
    path.unlink()
    path = files.write_h5()
    with h5py.File(path, "a") as file:
        turned = file["dataset"][...].T
        del file["dataset"]
        file["dataset"] = turned
    with pytest.raises(DataError, match="transposed"):
        reader(files).trials("sub-01")
    files.types[3] = 4
    files.write_h5()
    with pytest.raises(DataError, match=r"DataType \[4.0\]"):
        reader(files).trials("sub-01")


def test_subjects_are_ordered_and_limited(files: GODFiles) -> None:
    for number in (10, 2):
        files.write_mat(number)
    assert reader(files).subjects() == ("sub-02", "sub-10")
    with pytest.raises(ConfigError, match="sub-02, sub-10"):
        reader(files, subjects=["Subject2"]).subjects()
    facts = reader(files).facts().subjects
    assert (facts["sub-01"].trials, facts["sub-01"].voxels) == (3450, 4466)
    assert reader(files, roi="V1").facts().subjects["sub-01"].voxels is None


@pytest.mark.parametrize("kind", ["mat", "h5"])
def test_one_back_trials_are_left_out(files: GODFiles, kind: str) -> None:
    # Row 1 repeats row 0; row 9 repeats row 8, the end of another run, and stays.
    files.labels[1] = files.labels[0]
    files.names[1] = files.names[0]
    files.labels[13] = files.labels[12]
    files.write_mat() if kind == "mat" else files.write_h5()
    god = reader(files)
    trials = god.trials("sub-01")
    assert (trials["split"] == "train").sum() == 5
    assert trials["stimulus_id"].tolist()[:5] == [files.names[0], *files.names[2:6]]
    assert (trials["split"] == "test").sum() == 6
    assert (trials["split"] == "imagery").sum() == 3  # imagined twice is no task
    chosen = [v for v in range(NUM_VOXELS) if v != 8]
    expected = files.voxels[[0, 2, 3, 4, 5]][:, chosen].astype(np.float32)
    np.testing.assert_array_equal(god.betas("sub-01", 1), expected)
    found = {one.fact: one.detail for one in god.consistency("sub-01")}
    assert found["one-back trials"] == "1 left out"


def test_wrong_indices_of_old_files_change_nothing(files: GODFiles) -> None:
    """image_index and category_index are wrong before version 5: here wrong in two ways."""
    found = []
    for wrong in (99.0, 1.0):
        path = files.write_h5()
        with h5py.File(path, "a") as file:
            keys = [key.decode() for key in file["metadata/key"][...]]
            values = file["metadata/value"][...]
            for key in ("image_index", "category_index"):
                (column,) = np.flatnonzero(values[keys.index(key)] == 1)
                assert (file["dataset"][:, column] == 99.0).all()
                file["dataset"][:, column] = wrong
        god = reader(files)
        found.append((god.trials("sub-01"), god.stimuli(), god.betas("sub-01", 2)))
        told = {finding.fact: finding for finding in god.consistency("sub-01")}["image_index"]
        assert told.ok
        assert "contradicts stimulus_id in Subject1.h5, as before version 5" in told.detail
    assert found[0][0].equals(found[1][0])
    assert found[0][0]["stimulus_id"].tolist() == files.names
    assert found[0][1] == found[1][1]
    np.testing.assert_array_equal(found[0][2], found[1][2])


def test_links_are_refused(files: GODFiles) -> None:
    path = files.write_h5()
    with h5py.File(path, "a") as file, h5py.File(files.root / "other.hdf5", "w") as other:
        other["dataset"] = file["dataset"][...]
        del file["dataset"]
        file["dataset"] = h5py.ExternalLink(str(files.root / "other.hdf5"), "dataset")
    with pytest.raises(DataError, match="is a link into"):
        reader(files).trials("sub-01")


def genuine_samples() -> GODFiles:
    """The published numbers of rows of one subject, with the genuine ids."""
    files = GODFiles.__new__(GODFiles)
    training, test = NAMES[:1200], NAMES[1200:]
    rng = np.random.default_rng(6)
    files.names = [training[i] for i in rng.permutation(1200)]
    for _ in range(35):
        files.names += [test[i] for i in rng.permutation(50)]
    for _ in range(10):
        files.names += [test[i] for i in rng.permutation(50)]
    files.types = np.repeat([1.0, 2.0, 3.0], [1200, 1750, 500])
    runs = [np.arange(1200) // 50, np.arange(1750) // 50, np.arange(500) // 25]
    files.runs = np.concatenate(runs) + 1.0
    files.labels = np.array([label(name) for name in files.names])
    files.voxels = rng.normal(size=(3450, NUM_VOXELS))
    files.xyz = rng.normal(size=(3, NUM_VOXELS))
    files.rois = {"VC": np.ones(NUM_VOXELS, bool)}
    return files


def test_genuine_ids_give_the_published_counts_and_the_excluded_synsets(tmp_path: Path) -> None:
    files = genuine_samples()
    files.root = tmp_path
    files.write_mat(1)
    files.write_h5(2)
    for name in set(files.names):
        folder = "test" if name in NAMES[1200:] else "training"
        path = tmp_path / "images" / folder / name.split("_")[0] / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    dataset = {"name": "god", "path": tmp_path, "expect": "counts"}
    config = DataConfig.model_validate(
        {"output": tmp_path / "out", "datasets": [dataset], "check": {"images": 0}}
    )
    report = check(config)
    assert report.ok, report.first_difference
    found = {(row.subject, row.fact): row.found for row in report.rows}
    for subject in ("sub-01", "sub-02"):
        counts = [found[subject, fact] for fact in ("train_trials", "test_images", "test_trials")]
        assert counts == [1200, 50, 1750]
    stimuli = reader(files).stimuli()
    where = {one.image_uid: "test" if one.is_test else "train" for one in stimuli}
    (synsets,) = synsets_of_tests({"god": where}).values()
    assert len(synsets) == 50
    assert not synsets & {synset_of(uid) for uid, split in where.items() if split == "train"}
    # 20 of them are trained on by BOLD5000.
    bold = {uid_of_bold5000_name(n): "train" for names in genuine_orders().values() for n in names}
    (note,) = synset_notes({"god": where, "bold5000": bold})
    assert note.startswith("god: 20 of 50 test synsets")
