"""No image in two splits, over all datasets; leaks that a policy accepts are named."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_dataset import TESTS, UIDS, TinyDataset, tiny_config

from data_tools.ingest import ingest
from data_tools.split_file import Split, count_images, read_split, verify_split
from data_tools.splits import make_split, split
from data_tools.store import Store
from dist_decoder.config.data import DataConfig
from dist_decoder.errors import ConfigError, DataError, FormatError, SplitError

PLACES = [("alpha", "s1"), ("alpha", "s2"), ("beta", "p-1")]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits")
    ingest(tiny_config(folder), TinyDataset)
    return folder


def made(output: Path, *overrides: str) -> tuple[Split, Store, DataConfig]:
    config = tiny_config(output, *overrides)
    store = Store(config.store)
    return make_split(store, config), store, config


def shown(result: Split, store: Store, name: str) -> set[str]:
    """The uids of a split by a slow loop over all trials."""
    found = set()
    for place in PLACES:
        table = store.trials(*place)
        for uid, where in zip(table["image_uid"], result.row_splits(*place, table), strict=True):
            if where == name:
                found.add(uid)
    return found


def test_strict_keeps_every_test_image_out_of_all_training(output: Path) -> None:
    result, store, _ = made(output, "split.validation_prob=0.3")
    test = TESTS["alpha"] | TESTS["beta"]
    assert shown(result, store, "test") == test
    learned = shown(result, store, "train") | shown(result, store, "validation")
    assert not learned & test
    assert not shown(result, store, "train") & shown(result, store, "validation")
    assert learned == {*UIDS["alpha"], *UIDS["beta"]} - test
    # beta shows two test images of alpha: no split of beta has them.
    table = store.trials("beta", "p-1")
    excluded = result.row_splits("beta", "p-1", table) == "excluded"
    assert set(table["image_uid"][excluded]) == {"coco:2", "coco:3"}
    assert "strict: 2 images of beta are test images of alpha: their rows in beta are excluded" in (
        result.notes
    )
    assert result.contaminated == ()


def test_within_leaks_between_datasets_and_says_so(output: Path) -> None:
    result, store, _ = made(output, "split.policy=within", "split.validation_prob=0")
    both = shown(result, store, "train") & shown(result, store, "test")
    assert both == {"coco:2", "coco:3"}
    assert result.contaminated == ("coco:2", "coco:3")
    assert any("2 images are in train and in test" in note for note in result.notes)
    verify_split(store, result)


def test_a_planted_leak_is_named(output: Path) -> None:
    result, store, _ = made(output)
    images = {name: dict(uids) for name, uids in result.images.items()}
    images["beta"]["coco:3"] = "train"
    leaky = result.model_copy(update={"images": images})
    with pytest.raises(SplitError, match=r"'coco:3' is in more than one split \(train in beta"):
        verify_split(store, leaky)
    # Naming it does not help under strict.
    with pytest.raises(SplitError, match="coco:3"):
        verify_split(store, leaky.model_copy(update={"contaminated": ("coco:3",)}))


def test_a_leak_between_train_and_validation_is_named_too(output: Path) -> None:
    result, store, _ = made(output, "split.validation_prob=0")
    images = {name: dict(uids) for name, uids in result.images.items()}
    images["beta"]["coco:18"] = "validation"
    with pytest.raises(SplitError, match="'coco:18'"):
        verify_split(store, result.model_copy(update={"images": images}))


def test_validation_takes_its_share_by_image_and_seed(output: Path) -> None:
    counts = []
    for seed in range(30):
        result, _, _ = made(output, "split.validation_prob=0.25", f"seed={seed}")
        assert result.images["alpha"]["coco:18"] == result.images["beta"]["coco:18"]
        counts.append(count_images(result)["validation"])
    # 23 training images: 5.75 expected, SD 2.1.
    assert 4.5 < np.mean(counts) < 7
    assert len(set(counts)) > 2
    assert count_images(made(output, "split.validation_prob=0")[0])["validation"] == 0


def test_imagery_rows_are_their_own_split(output: Path) -> None:
    result, store, _ = made(output)
    table = store.trials("beta", "p-1")
    splits = result.row_splits("beta", "p-1", table)
    np.testing.assert_array_equal(splits == "imagery", table["split"] == "imagery")
    assert (splits == "imagery").sum() == 2


def test_given_takes_the_split_column(output: Path) -> None:
    result, store, _ = made(
        output, "split.policy=given", "datasets=[{name: alpha, path: x}]", "split.validation_prob=0"
    )
    for subject in ("s1", "s2"):
        table = store.trials("alpha", subject)
        splits = result.row_splits("alpha", subject, table)
        assert splits.tolist() == table["split"].tolist()
    verify_split(store, result)
    both, store, _ = made(output, "split.policy=given")
    with pytest.raises(SplitError, match=r"policy given: image 'coco:2'"):
        verify_split(store, both)


def test_given_needs_a_consistent_column(tmp_path: Path) -> None:
    class Mixed(TinyDataset):
        change = ""

        def trials(self, subject: str) -> pd.DataFrame:
            table = super().trials(subject)
            table.loc[25, "split"] = self.change
            return table

    overrides = ("split.policy=given", "datasets=[{name: alpha, path: x}]")
    config = tiny_config(tmp_path, *overrides)
    ingest(config, Mixed)
    with pytest.raises(DataError, match=r"alpha/s1: .* trial 25 has none"):
        split(config)
    Mixed.change = "test"
    ingest(config, Mixed)
    with pytest.raises(SplitError, match=r"has rows in (train|validation|test) and in"):
        split(config)


def test_leave_one_run_out_divides_rows_and_names_the_leak(output: Path) -> None:
    only = "datasets=[{name: alpha, path: x}]"
    result, store, _ = made(
        output,
        "split.policy=leave_one_run_out",
        "split.test_run=2",
        only,
        "split.validation_prob=0.2",
    )
    table = store.trials("alpha", "s1")
    splits = result.row_splits("alpha", "s1", table)
    np.testing.assert_array_equal(splits == "test", table["run"] == 2)
    assert {"train", "validation"} <= set(splits)
    uids: dict[bool, set[str]] = {True: set(), False: set()}
    for subject in ("s1", "s2"):
        one = store.trials("alpha", subject)
        for uid, run in zip(one["image_uid"], one["run"], strict=True):
            uids[run == 2].add(uid)
    assert result.contaminated == tuple(sorted(uids[True] & uids[False]))
    assert len(result.contaminated) > 10
    assert any("run 2 is tested; train and test share images" in note for note in result.notes)
    verify_split(store, result)
    with pytest.raises(SplitError):
        verify_split(store, result.model_copy(update={"contaminated": ()}))
    with pytest.raises(ConfigError, match=r"needs split\.test_run"):
        made(output, "split.policy=leave_one_run_out", only)
    with pytest.raises(DataError, match=r"test_run=9 takes 0 of 60 trials; runs are \[1, 2\]"):
        made(output, "split.policy=leave_one_run_out", "split.test_run=9", only)


def test_a_held_out_subject_learns_from_its_first_sessions_only(output: Path) -> None:
    holdout = "split.holdout=[{subject: alpha/s1, train_sessions: 1}]"
    result, store, _ = made(output, holdout)
    table = store.trials("alpha", "s1")
    splits = result.row_splits("alpha", "s1", table)
    late = (table["session"] > 1).to_numpy()
    assert not np.isin(splits[late], ("train", "validation")).any()
    assert (splits[late] == "test").sum() == 8
    assert (splits[~late] == "train").any()
    assert (result.row_splits("alpha", "s2", store.trials("alpha", "s2")) != "excluded").all()
    free, _, _ = made(output, "split.holdout=[{subject: alpha/s1}]")
    assert (free.row_splits("alpha", "s1", table) != "excluded").all()
    with pytest.raises(ConfigError, match="no subject 'alpha/s9'; there are alpha/s1"):
        made(output, "split.holdout=[{subject: alpha/s9}]")


def test_images_of_held_out_subjects_only_are_flagged(output: Path) -> None:
    result, _, _ = made(output, "split.holdout=[{subject: beta/p-1}]")
    assert set(result.holdout_only["beta"]) == {
        uid for uid, where in result.images["beta"].items() if where in ("train", "validation")
    }
    assert any("were seen by held-out subjects only" in note for note in result.notes)
    assert made(output, "split.holdout=[{subject: alpha/s1}]")[0].holdout_only == {}


def test_the_file_is_checked_when_it_is_read(tmp_path: Path, output: Path) -> None:
    config = tiny_config(tmp_path)
    store = Store(config.store)
    ingest(config, TinyDataset)
    with pytest.raises(FormatError, match="run `data-tools split` first"):
        read_split(store)
    summary = split(config)
    first = (store.path / "split.json").read_bytes()
    split(config)
    assert (store.path / "split.json").read_bytes() == first
    assert read_split(store, config).fingerprint == summary["fingerprint"]
    with pytest.raises(SplitError, match="another configuration"):
        read_split(store, tiny_config(tmp_path, "split.validation_prob=0.5"))
    values = json.loads(first)
    values["images"]["beta"]["coco:3"] = "train"
    (store.path / "split.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match="was changed after it was written"):
        read_split(store)
    assert made(output)[0].fingerprint == summary["fingerprint"]


def test_new_images_need_a_new_split(tmp_path: Path, output: Path) -> None:
    result, store, _ = made(output)
    images = {name: dict(uids) for name, uids in result.images.items()}
    del images["alpha"]["coco:7"]
    with pytest.raises(SplitError, match="does not know the image 'coco:7'"):
        verify_split(store, result.model_copy(update={"images": images}))
    with pytest.raises(DataError, match="dataset gamma is missing"):
        made(output, "datasets=[{name: gamma, path: x}]")
