"""Which images are train, validation and test, over all datasets at once.

NSD's 1,000 shared images are all among BOLD5000's stimuli: a split that is clean inside each
dataset leaks between them. Images are therefore divided by ``image_uid``, never by dataset.

Source: test images as published (NSD shared images, BOLD5000's repeated 113, GOD's 50).
Differs: images that are test in one dataset are not used for training in another (``strict``);
the papers on joint training do not say that they remove them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ValidationError

from data_tools.share import Share, held
from data_tools.split_policies import (
    keep_categories_apart,
    keep_near_duplicates_apart,
    paper_holdout,
    paper_notes,
    synset_notes,
)
from data_tools.store import Store, open_store
from dist_decoder.config.base import Section, fingerprint
from dist_decoder.config.data import DataConfig, HoldoutConfig, SplitConfig
from dist_decoder.errors import ConfigError, DataError, FormatError, SplitError
from dist_decoder.rng import key64
from dist_decoder.storage import json_bytes

SPLIT_NAME = "split.json"
SPLITS = ("train", "validation", "test", "imagery", "excluded")
_PAPERS = ("paper:neurofusion", "paper:mindeye2", "paper:duala")
_LEAKY = ("within", "leave_one_run_out", *_PAPERS)
"""Policies that accept images in train and test, and name them."""


class Split(Section):
    """``split.json`` of a store."""

    format: Literal["dist-decoder-split"] = "dist-decoder-split"
    version: Literal[1] = 1
    policy: str
    config: str
    """Fingerprint of the configuration that made it."""
    fingerprint: str = ""
    """Identifies who is where; everything below it enters."""
    images: dict[str, dict[str, str]]
    """dataset -> image_uid -> train, validation, test or excluded. Rows of imagery are imagery
    whatever their image is."""
    rows: dict[str, tuple[str, ...]] = {}
    """leave_one_run_out: dataset/subject -> split of every trial, instead of ``images``."""
    holdout: tuple[HoldoutConfig, ...] = ()
    holdout_only: dict[str, tuple[str, ...]] = {}
    """dataset -> training images that only held-out subjects saw: statistics skip them."""
    contaminated: tuple[str, ...] = ()
    """image_uids that are in train or validation and in test under this policy."""
    notes: tuple[str, ...] = ()

    def is_holdout(self, dataset: str, subject: str) -> bool:
        """Return whether joint training and statistics must not use a subject."""
        return any(entry.subject == f"{dataset}/{subject}" for entry in self.holdout)

    def train_sessions(self, dataset: str, subject: str) -> int | None:
        """Return the number of sessions whose rows a held-out subject may learn from."""
        for entry in self.holdout:
            if entry.subject == f"{dataset}/{subject}":
                return entry.train_sessions
        return None

    def row_splits(self, dataset: str, subject: str, trials: pd.DataFrame) -> NDArray[np.str_]:
        """Return the split of every row of a trial table.

        Raises:
            SplitError: the split does not know the dataset, an image or the subject's trials.
        """
        name = f"{dataset}/{subject}"
        if dataset not in self.images:
            raise SplitError(f"{name}: the split does not know {dataset}; {_REMEDY}")
        if self.rows:
            if len(self.rows.get(name, ())) != len(trials):
                raise SplitError(f"{name}: the split was made for other trials; {_REMEDY}")
            splits = np.array(self.rows[name], dtype="<U10")
        else:
            image_split = self.images[dataset]
            unknown = sorted(set(trials["image_uid"]) - set(image_split))
            if unknown:
                raise SplitError(
                    f"{name}: the split does not know the image {unknown[0]!r} ({len(unknown)}"
                    f" such images); {_REMEDY}"
                )
            splits = np.array([image_split[uid] for uid in trials["image_uid"]], dtype="<U10")
        imagery = trials["split"].to_numpy() == "imagery"
        splits[imagery] = "imagery"
        limit = self.train_sessions(dataset, subject)
        if limit is not None:
            late = trials["session"].to_numpy() > limit
            splits[late & np.isin(splits, ("train", "validation"))] = "excluded"
        return splits


_REMEDY = "run `data-tools split` again"


def split(config: DataConfig) -> dict[str, Any]:
    """Divide the store's images, write ``split.json`` and return a summary.

    Raises:
        SplitError: an image is in train and test although the policy forbids it.
    """
    store = open_store(config)
    made = make_split(store, config)
    verify_split(store, made)
    with held(store.storage, Share(), "split"):
        store.storage.write(SPLIT_NAME, json_bytes(made.model_dump(mode="json")))
    return {
        "policy": made.policy,
        "fingerprint": made.fingerprint,
        "num_images": count_images(made),
        "contaminated": len(made.contaminated),
        "notes": list(made.notes),
    }


def describe_split(result: dict[str, Any]) -> str:
    """Return the numbers of images and what is to be known about them, for people."""
    numbers = ", ".join(f"{count} {name}" for name, count in result["num_images"].items())
    lines = [f"split {result['policy']} (fingerprint {result['fingerprint']}): {numbers} images"]
    if result["contaminated"]:
        lines.append(f"  warning: {result['contaminated']} images are in training and in test")
    return "\n".join([*lines, *(f"  {note}" for note in result["notes"])])


def read_split(store: Store, config: DataConfig | None = None) -> Split:
    """Return the split of a store.

    Args:
        store: its store.
        config: if given, the split must have been made by this configuration.

    Raises:
        FormatError: there is none, or it is damaged.
        SplitError: another configuration made it.
    """
    path = f"{store.storage.describe()}/{SPLIT_NAME}"
    if not store.storage.exists(SPLIT_NAME):
        raise FormatError(f"{path} does not exist; run `data-tools split` first")
    try:
        made = Split.model_validate(json.loads(store.storage.read(SPLIT_NAME)))
    except (ValueError, ValidationError) as error:
        raise FormatError(f"{path} is damaged or of another version; {_REMEDY}") from error
    if made.fingerprint != _identity(made):
        raise FormatError(f"{path} was changed after it was written; {_REMEDY}")
    if config is not None and made.config != _config_fingerprint(store, config):
        raise SplitError(f"{path} was made by another configuration; {_REMEDY}")
    return made


def make_split(store: Store, config: DataConfig) -> Split:
    """Divide all images of the configured datasets.

    Args:
        store: ingested datasets.
        config: ``split``, ``datasets`` and ``seed``.

    Raises:
        ConfigError: the policy lacks what it needs, or a held-out subject does not exist.
        SplitError: ``given`` puts one image into train and test, or ``category_disjoint`` leaves
            nothing to train on or to test.
    """
    datasets = store.require(entry.dataset for entry in config.datasets)
    _check_holdout(store, config.split, datasets)
    holdout = paper_holdout(config.split, config.datasets)
    uids = {name: sorted({one.image_uid for one in store.stimuli(name)}) for name in datasets}
    trials = {
        (name, subject): store.trials(name, subject)
        for name in datasets
        for subject in store.subjects(name)
    }
    rows: dict[str, tuple[str, ...]] = {}
    if config.split.policy == "leave_one_run_out":
        images = {name: dict.fromkeys(uids[name], "train") for name in datasets}
        rows, notes = _by_run(trials, config)
    elif config.split.policy == "given":
        images, notes = _as_given(uids, trials, config)
    else:
        images, notes = _by_published_test(store, uids, trials, config)
    if config.split.policy == "category_disjoint":
        categories = _all_categories(store, datasets)
        images, more = keep_categories_apart(images, categories, config.split.test_categories)
        notes += more
    elif config.split.test_categories:
        raise ConfigError("split.test_categories needs split.policy=category_disjoint")
    if config.split.near_duplicate_bits is not None:
        if rows:
            raise ConfigError("split.near_duplicate_bits needs a policy that divides images")
        images, more = keep_near_duplicates_apart(store, images, config.split.near_duplicate_bits)
        notes += more
    if not rows:
        notes += paper_notes(config.split) + synset_notes(images)
    made = Split(
        policy=config.split.policy,
        config=_config_fingerprint(store, config),
        images=images,
        rows=rows,
        holdout=holdout,
    )
    overlap = _overlap(trials, made)
    contaminated = tuple(sorted(overlap)) if config.split.policy in _LEAKY else ()
    if contaminated:
        notes.append(
            f"{config.split.policy}: {len(contaminated)} images are in train and in test; scores on"
            " them are not generalisation to new images"
        )
    holdout_only = _holdout_only(trials, made)
    for name, images_of_holdout in holdout_only.items():
        notes.append(
            f"{name}: {len(images_of_holdout)} training images were seen by held-out subjects"
            " only; target statistics skip them"
        )
    made = made.model_copy(
        update={"contaminated": contaminated, "holdout_only": holdout_only, "notes": tuple(notes)}
    )
    return made.model_copy(update={"fingerprint": _identity(made)})


def verify_split(store: Store, made: Split) -> None:
    """Check on the actual trials that no image is in train and test, over all datasets.

    Raises:
        SplitError: it leaks an image that it does not name, or does not fit the store.
    """
    trials = {
        (name, subject): store.trials(name, subject)
        for name in made.images
        for subject in store.subjects(name)
    }
    overlap = _overlap(trials, made)
    allowed = set(made.contaminated) if made.policy in _LEAKY else set()
    leaked = sorted(set(overlap) - allowed)
    if leaked:
        places = "; ".join(overlap[leaked[0]])
        raise SplitError(
            f"policy {made.policy}: image {leaked[0]!r} is in more than one split ({places}), and"
            f" {len(leaked) - 1} more; {_REMEDY}, with policy `strict`"
        )


def count_images(made: Split) -> dict[str, int]:
    """Return the number of distinct images of each split over all datasets."""
    found: dict[str, set[str]] = {name: set() for name in SPLITS if name != "imagery"}
    for images in made.images.values():
        for uid, name in images.items():
            found[name].add(uid)
    return {name: len(uids) for name, uids in found.items()}


def _identity(made: Split) -> str:
    return fingerprint(made.model_dump(mode="json", exclude={"fingerprint", "notes", "config"}))


def _config_fingerprint(store: Store, config: DataConfig) -> str:
    datasets = store.require(entry.dataset for entry in config.datasets)
    return fingerprint([config.split.model_dump(mode="json"), config.seed, list(datasets)])


def _check_holdout(store: Store, config: SplitConfig, datasets: Iterable[str]) -> None:
    known = [f"{name}/{subject}" for name in datasets for subject in store.subjects(name)]
    for entry in config.holdout:
        if entry.subject not in known:
            raise ConfigError(
                f"split.holdout: no subject {entry.subject!r}; there are {', '.join(known)}"
            )


def _by_published_test(
    store: Store,
    uids: Mapping[str, list[str]],
    trials: Mapping[tuple[str, str], pd.DataFrame],
    config: DataConfig,
) -> tuple[dict[str, dict[str, str]], list[str]]:
    test = {name: {one.image_uid for one in store.stimuli(name) if one.is_test} for name in uids}
    for (name, _), table in trials.items():
        test[name] |= set(table["image_uid"][table["split"] == "test"])
    strict = config.split.policy in ("strict", "category_disjoint")
    images: dict[str, dict[str, str]] = {}
    notes = []
    for name in uids:
        images[name] = {}
        taken: Counter[str] = Counter()
        for uid in uids[name]:
            others = [other for other in uids if other != name and uid in test[other]]
            if uid in test[name]:
                images[name][uid] = "test"
            elif strict and others:
                images[name][uid] = "excluded"
                taken.update(others)
            else:
                images[name][uid] = _train_or_validation(uid, config)
        for other, count in sorted(taken.items()):
            notes.append(
                f"{config.split.policy}: {count} images of {name} are test images of {other}:"
                f" their rows in {name} are excluded"
            )
    return images, notes


def _as_given(
    uids: Mapping[str, list[str]],
    trials: Mapping[tuple[str, str], pd.DataFrame],
    config: DataConfig,
) -> tuple[dict[str, dict[str, str]], list[str]]:
    images: dict[str, dict[str, str]] = {name: {} for name in uids}
    for (name, subject), table in trials.items():
        for row, (uid, given) in enumerate(zip(table["image_uid"], table["split"], strict=True)):
            if given == "imagery":
                continue
            if not given:
                raise DataError(
                    f"{name}/{subject}: policy `given` needs the split column of the trial table;"
                    f" trial {table['trial'].iloc[row]} has none"
                )
            wanted = given if given == "test" else _train_or_validation(uid, config)
            held = images[name].setdefault(uid, wanted)
            if held != wanted:
                raise SplitError(
                    f"{name}/{subject}: policy `given`: image {uid!r} has rows in {held} and in"
                    f" {wanted}; mend the split column, or use policy `strict`"
                )
    for name in uids:
        for uid in uids[name]:
            images[name].setdefault(uid, "excluded")
    return images, []


def _by_run(
    trials: Mapping[tuple[str, str], pd.DataFrame], config: DataConfig
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    run = config.split.test_run
    if run is None:
        raise ConfigError("split.policy=leave_one_run_out needs split.test_run (1-based)")
    rows = {}
    for (name, subject), table in trials.items():
        place = f"{name}/{subject}"
        is_test = table["run"].to_numpy() == run
        if not is_test.any() or is_test.all():
            raise DataError(
                f"{place}: split.test_run={run} takes {int(is_test.sum())} of {len(table)} trials;"
                f" runs are {sorted(set(table['run'].tolist()))}"
            )
        rows[place] = tuple(
            "test" if tested else _train_or_validation(f"{place}:{trial}", config)
            for tested, trial in zip(is_test, table["trial"], strict=True)
        )
    return rows, [
        f"leave_one_run_out: run {run} is tested; train and test share images, validation rows"
        " are drawn by trial"
    ]


def _all_categories(store: Store, datasets: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return image_uid -> the categories that any dataset gives it."""
    found: dict[str, set[str]] = {}
    for name in datasets:
        for one in store.stimuli(name):
            found.setdefault(one.image_uid, set()).update(one.categories)
    return {uid: tuple(sorted(names)) for uid, names in found.items()}


def _train_or_validation(identity: str, config: DataConfig) -> str:
    if config.split.policy in _PAPERS:
        return "train"
    share = key64(config.seed, "validation", identity) / 2**64
    return "validation" if share < config.split.validation_prob else "train"


def _overlap(trials: Mapping[tuple[str, str], pd.DataFrame], made: Split) -> dict[str, list[str]]:
    """Return image_uid -> places, for images in more than one of train, validation and test.

    A uid that the table of images puts into two splits counts even if no trial shows it:
    augmentation takes images from that table.
    """
    found: dict[str, dict[str, set[str]]] = {}
    if not made.rows:
        for name, images in made.images.items():
            for uid, where in images.items():
                found.setdefault(uid, {}).setdefault(where, set()).add(name)
    for (name, subject), table in trials.items():
        splits = made.row_splits(name, subject, table)
        for uid, where in set(zip(table["image_uid"], splits.tolist(), strict=True)):
            found.setdefault(uid, {}).setdefault(where, set()).add(f"{name}/{subject}")
    overlap = {}
    for uid, by_split in found.items():
        learned = [name for name in ("train", "validation", "test") if name in by_split]
        # Row-wise policies share images between train and validation by design.
        if len(learned) > 1 and ("test" in learned or not made.rows):
            overlap[uid] = [f"{name} in {', '.join(sorted(by_split[name]))}" for name in learned]
    return overlap


def _holdout_only(
    trials: Mapping[tuple[str, str], pd.DataFrame], made: Split
) -> dict[str, tuple[str, ...]]:
    seen: dict[str, dict[bool, set[str]]] = {}
    for (name, subject), table in trials.items():
        splits = made.row_splits(name, subject, table)
        learned = table["image_uid"][np.isin(splits, ("train", "validation"))]
        group = seen.setdefault(name, {True: set(), False: set()})
        group[made.is_holdout(name, subject)] |= set(learned)
    only = {name: tuple(sorted(group[True] - group[False])) for name, group in seen.items()}
    return {name: uids for name, uids in only.items() if uids}
