"""Papers' splits, tested categories, near duplicates, and what augmentation may use."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_store import put_dataset, put_responses, random_images
from numpy.typing import NDArray

from data_tools.check_outputs import check_outputs
from data_tools.datasets.protocol import Stimulus
from data_tools.near_duplicates import close_pairs, perceptual_hash
from data_tools.split_file import SPLIT_NAME, Split, identity
from data_tools.splits import make_split, split
from data_tools.store import Store
from data_tools.store_writer import StoreWriter
from data_tools.synthesise import augmentation_images
from dist_decoder.config.base import load_config
from dist_decoder.config.data import DataConfig
from dist_decoder.errors import ConfigError, SplitError

# Test images are the first two of each. nsd:coco:1 and bold share a picture; god tests a synset
# that bold trains on.
UIDS = {
    "nsd": ["coco:1", "coco:2", "coco:3", "coco:4", "coco:5"],
    "bold5000": ["scene:a1", "scene:b1", "coco:1", "imagenet:n00000007_3", "scene:b2"],
    "god": ["imagenet:n00000007_1", "imagenet:n00000009_1", "imagenet:n00000011_1"],
}
CATEGORIES = {
    "nsd": [("cat",), ("dog",), ("cat", "car"), ("car",), ()],
    "bold5000": [("a",), ("b",), ("cat",), ("n00000007",), ("b",)],
    "god": [("n00000007",), ("n00000009",), ("n00000011",)],
}
SUBJECTS = {"nsd": ["subj01", "subj02"], "bold5000": ["CSI1"], "god": ["sub-01"]}


def pictures(name: str) -> list[NDArray[np.uint8]]:
    return random_images(sum(map(ord, name)), len(UIDS[name]), size=32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    for name, uids in UIDS.items():
        stimuli = [
            Stimulus(f"{name}-{i}", uid, CATEGORIES[name][i], i < 2) for i, uid in enumerate(uids)
        ]
        put_dataset(made, name, stimuli, pictures(name), SUBJECTS[name])
        for number, subject in enumerate(SUBJECTS[name]):
            # The second subject of nsd did not see its last image.
            rows = [(s, i) for s in (1, 2) for i in range(len(uids) - number)]
            trials = pd.DataFrame(rows, columns=["session", "image"])
            trials["run"] = 1
            trials["stimulus_id"] = [f"{name}-{i}" for i in trials["image"]]
            trials["image_uid"] = [uids[i] for i in trials["image"]]
            betas = np.random.default_rng(number).normal(size=(len(trials), 3))
            put_responses(made, name, subject, trials.drop(columns="image"), betas.astype("f4"))
    return made


def config(store: Store, *overrides: str, datasets: tuple[str, ...] = tuple(UIDS)) -> DataConfig:
    listed = ", ".join(f"{{name: {name}, path: x}}" for name in datasets)
    given = [f"output={str(store.path.parent)!r}", f"datasets=[{listed}]", *overrides]
    return load_config(DataConfig, None, given)


def test_neurofusion_trains_on_images_tested_elsewhere_and_names_them(store: Store) -> None:
    made = make_split(store, config(store, "split.policy=paper:neurofusion"))
    assert made.images["bold5000"]["coco:1"] == "train"
    assert made.contaminated == ("coco:1",)
    assert any("god: 1 of 2 test synsets" in note and "n00000007" in note for note in made.notes)
    # validation_prob is 0.1: a paper's split has no validation images whatever the seed.
    for seed in range(20):
        again = make_split(store, config(store, "split.policy=paper:neurofusion", f"seed={seed}"))
        assert "validation" not in {w for one in again.images.values() for w in one.values()}
    assert any("no validation images" in note for note in made.notes)
    strict = make_split(store, config(store))
    assert strict.images["bold5000"]["coco:1"] == "excluded"
    assert strict.contaminated == ()


@pytest.mark.parametrize("policy", ["paper:mindeye2", "paper:duala"])
def test_papers_on_nsd_alone(store: Store, policy: str) -> None:
    holdout = "split.holdout=[{subject: nsd/subj02}]"
    made = make_split(store, config(store, f"split.policy={policy}", holdout, datasets=("nsd",)))
    assert made.images["nsd"] == {
        **dict.fromkeys(["coco:1", "coco:2"], "test"),
        **dict.fromkeys(["coco:3", "coco:4", "coco:5"], "train"),
    }
    table = store.trials("nsd", "subj02")
    splits = made.row_splits("nsd", "subj02", table)
    late = (table["session"] == 2) & ~table["image_uid"].isin(["coco:1", "coco:2"])
    assert set(splits[late]) == ({"excluded"} if policy == "paper:duala" else {"train"})
    with pytest.raises(ConfigError, match="take bold5000, god out"):
        make_split(store, config(store, f"split.policy={policy}", holdout))


def test_duala_needs_a_new_subject_with_one_session(store: Store) -> None:
    for holdout in ("[]", "[{subject: nsd/subj01, train_sessions: 2}]"):
        values = ("split.policy=paper:duala", f"split.holdout={holdout}")
        with pytest.raises(ConfigError, match="first session"):
            make_split(store, config(store, *values, datasets=("nsd",)))


def test_tested_categories_are_nowhere_in_training(store: Store) -> None:
    made = make_split(store, config(store, "split.policy=category_disjoint", "seed=3"))
    kept = {
        where: {uid for one in made.images.values() for uid, w in one.items() if w == where}
        for where in ("train", "validation", "test", "excluded")
    }
    # Tested: cat, dog, a, b, n7, n9. Only a car and synset 11 are neither tested nor unknown.
    assert kept["train"] | kept["validation"] == {"coco:4", "imagenet:n00000011_1"}
    assert {"coco:3", "coco:5", "scene:b2", "imagenet:n00000007_3"} <= kept["excluded"]
    named = ("split.policy=category_disjoint", "split.test_categories=[n00000007, a]")
    made = make_split(store, config(store, *named))
    assert made.images["god"]["imagenet:n00000009_1"] == "excluded"
    assert made.images["god"]["imagenet:n00000007_1"] == "test"
    assert made.images["bold5000"]["imagenet:n00000007_3"] == "excluded"
    assert made.images["nsd"]["coco:3"] in ("train", "validation")
    assert any("2 tested categories" in note for note in made.notes)
    with pytest.raises(ConfigError, match="no image shows 'dgo'"):
        make_split(store, config(store, named[0], "split.test_categories=[dgo]"))
    with pytest.raises(SplitError, match="leaves no image"):
        make_split(store, config(store, named[0], "split.test_categories=[car]"))
    with pytest.raises(ConfigError, match=r"needs split\.policy=category_disjoint"):
        make_split(store, config(store, "split.test_categories=[cat]"))


def test_augmentation_takes_no_tested_image_and_no_tested_synset(store: Store) -> None:
    values = config(
        store,
        "synthesise={images_per_subject: 99, pool: other_datasets}",
        "split.validation_prob=0",
    )
    made = make_split(store, values)
    pool = set(augmentation_images(store, made, "nsd", "subj01", values))
    assert pool == {"scene:b2", "imagenet:n00000011_1"}
    assert made.images["bold5000"]["imagenet:n00000007_3"] == "train"
    # Nothing but the synset keeps it out.
    alone = config(
        store,
        "synthesise={images_per_subject: 99, pool: other_datasets}",
        "split.validation_prob=0",
        datasets=("nsd", "bold5000"),
    )
    made = make_split(store, alone)
    assert "imagenet:n00000007_3" in augmentation_images(store, made, "nsd", "subj01", alone)


def test_a_planted_shared_image_makes_split_and_check_fail(store: Store) -> None:
    values = config(store, "split.validation_prob=0")
    split(values)
    assert all(row.state == "ok" for row in check_outputs(values))
    path = store.path / SPLIT_NAME
    made = Split.model_validate(json.loads(path.read_bytes()))
    made.images["bold5000"]["coco:1"] = "train"
    made = made.model_copy(update={"fingerprint": identity(made)})
    path.write_text(json.dumps(made.model_dump(mode="json")))
    (row,) = check_outputs(values)
    assert row.state == "differs"
    assert "'coco:1' is in more than one split" in str(row.found)
    # The same leak in the tables: bold5000 shows it as training, nsd as test.
    for name in ("nsd", "bold5000"):
        for subject in SUBJECTS[name]:
            trials = store.trials(name, subject)
            tests = UIDS[name][:2]
            trials["split"] = ["test" if uid in tests else "train" for uid in trials["image_uid"]]
            StoreWriter(store.place).put_trials(name, subject, trials)
    given = config(store, "split.policy=given", datasets=("nsd", "bold5000"))
    with pytest.raises(SplitError, match="'coco:1'"):
        split(given)


def test_near_duplicates_are_excluded_and_checked(store: Store) -> None:
    values = config(store, "split.near_duplicate_bits=4", "split.validation_prob=0")
    plain = config(store, "split.validation_prob=0")
    assert make_split(store, values).images == make_split(store, plain).images
    # The last NSD picture becomes a paler copy of GOD's second test picture.
    copies = pictures("nsd")
    copies[3] = (pictures("god")[1] * 0.9 + 8).astype(np.uint8)
    stimuli = [Stimulus(f"again-{i}", uid, (), i < 2) for i, uid in enumerate(UIDS["nsd"])]
    put_dataset(store, "nsd", stimuli, copies, SUBJECTS["nsd"])
    store = Store(store.path)
    made = make_split(store, values)
    assert made.images["nsd"]["coco:4"] == "excluded"
    assert any("coco:4 is excluded" in n and "n00000009_1" in n for n in made.notes)
    split(plain)
    (row,) = [row for row in check_outputs(values) if row.fact == "near duplicates"]
    assert row.state == "differs"
    assert "coco:4" in str(row.found)
    split(values)
    (row,) = [row for row in check_outputs(values) if row.fact == "near duplicates"]
    assert row.state == "ok"


def test_close_pairs_against_a_slow_loop() -> None:
    generator = np.random.default_rng(1)
    base = generator.random(64) < 0.5
    hashes = {}
    for name in [f"t{i}" for i in range(7)] + [f"q{i}" for i in range(5)] + ["both"]:
        hashes[name] = base ^ (generator.random(64) < 0.07)
    train = [*(f"t{i}" for i in range(7)), "both", "no picture"]
    test = [*(f"q{i}" for i in range(5)), "both"]
    expected = {}
    for one in train[:-1]:
        distances = [int((hashes[one] != hashes[other]).sum()) for other in test if other != one]
        if min(distances) <= 5:
            expected[one] = min(distances)
    found = close_pairs(hashes, train, test, 5)
    assert {one: bits for one, _, bits in found} == expected
    assert [bits for _, _, bits in found] == sorted(expected.values())
    assert 0 < len(expected) < 8


def test_the_hash_survives_a_change_of_size_but_not_another_picture() -> None:
    first, second = random_images(5, 2, size=48)
    small = first[::2, ::2]
    smooth = np.kron(small, np.ones((3, 3, 1), np.uint8))
    near = int(
        (
            perceptual_hash(np.kron(small, np.ones((2, 2, 1), np.uint8))) != perceptual_hash(smooth)
        ).sum()
    )
    far = int((perceptual_hash(first) != perceptual_hash(second)).sum())
    assert near <= 8 < 16 < far
