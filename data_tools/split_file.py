"""``split.json`` of a store: who is where, read, checked and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ValidationError

from data_tools.store import Store
from dist_decoder.config.base import Section, fingerprint
from dist_decoder.config.data import DataConfig, HoldoutConfig
from dist_decoder.errors import FormatError, SplitError

SPLIT_NAME = "split.json"
SPLITS = ("train", "validation", "test", "imagery", "excluded")
PAPERS = ("paper:neurofusion", "paper:mindeye2", "paper:duala")
LEAKY = ("within", "leave_one_run_out", *PAPERS)
"""Policies that accept images in train and test, and name them."""
REMEDY = "run `data-tools split` again"


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
            raise SplitError(f"{name}: the split does not know {dataset}; {REMEDY}")
        if self.rows:
            if len(self.rows.get(name, ())) != len(trials):
                raise SplitError(f"{name}: the split was made for other trials; {REMEDY}")
            splits = np.array(self.rows[name], dtype="<U10")
        else:
            image_split = self.images[dataset]
            unknown = sorted(set(trials["image_uid"]) - set(image_split))
            if unknown:
                raise SplitError(
                    f"{name}: the split does not know the image {unknown[0]!r} ({len(unknown)}"
                    f" such images); {REMEDY}"
                )
            splits = np.array([image_split[uid] for uid in trials["image_uid"]], dtype="<U10")
        imagery = trials["split"].to_numpy() == "imagery"
        splits[imagery] = "imagery"
        limit = self.train_sessions(dataset, subject)
        if limit is not None:
            late = trials["session"].to_numpy() > limit
            splits[late & np.isin(splits, ("train", "validation"))] = "excluded"
        return splits


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
        raise FormatError(f"{path} is damaged or of another version; {REMEDY}") from error
    if made.fingerprint != identity(made):
        raise FormatError(f"{path} was changed after it was written; {REMEDY}")
    if config is not None and made.config != config_fingerprint(store, config):
        raise SplitError(f"{path} was made by another configuration; {REMEDY}")
    return made


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
    overlap = overlap_of(trials, made)
    allowed = set(made.contaminated) if made.policy in LEAKY else set()
    leaked = sorted(set(overlap) - allowed)
    if leaked:
        places = "; ".join(overlap[leaked[0]])
        raise SplitError(
            f"policy {made.policy}: image {leaked[0]!r} is in more than one split ({places}), and"
            f" {len(leaked) - 1} more; {REMEDY}, with policy `strict`"
        )


def count_images(made: Split) -> dict[str, int]:
    """Return the number of distinct images of each split over all datasets."""
    found: dict[str, set[str]] = {name: set() for name in SPLITS if name != "imagery"}
    for images in made.images.values():
        for uid, name in images.items():
            found[name].add(uid)
    return {name: len(uids) for name, uids in found.items()}


def identity(made: Split) -> str:
    """Return the fingerprint that a split must carry."""
    return fingerprint(made.model_dump(mode="json", exclude={"fingerprint", "notes", "config"}))


def config_fingerprint(store: Store, config: DataConfig) -> str:
    """Return what identifies the configuration that makes a split of a store."""
    datasets = store.require(entry.dataset for entry in config.datasets)
    return fingerprint([config.split.model_dump(mode="json"), config.seed, list(datasets)])


def overlap_of(trials: Mapping[tuple[str, str], pd.DataFrame], made: Split) -> dict[str, list[str]]:
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
