"""Which images are train, validation and test, over all datasets at once.

NSD's 1,000 shared images are all among BOLD5000's stimuli: a split that is clean inside each
dataset leaks between them. Images are therefore divided by ``image_uid``, never by dataset.

Source: test images as published (NSD shared images, BOLD5000's repeated 113, GOD's 50).
Differs: images that are test in one dataset are not used for training in another (``strict``);
the papers on joint training do not say that they remove them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from data_tools.share import Share, held
from data_tools.split_file import (
    LEAKY,
    PAPERS,
    SPLIT_NAME,
    Split,
    config_fingerprint,
    count_images,
    identity,
    overlap_of,
    verify_split,
)
from data_tools.split_policies import (
    keep_categories_apart,
    keep_near_duplicates_apart,
    paper_holdout,
    paper_notes,
    synset_notes,
)
from data_tools.store import Store, open_store
from dist_decoder.config.data import DataConfig, SplitConfig
from dist_decoder.errors import ConfigError, DataError, SplitError
from dist_decoder.rng import key64
from dist_decoder.storage import json_bytes


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
        config=config_fingerprint(store, config),
        images=images,
        rows=rows,
        holdout=holdout,
    )
    overlap = overlap_of(trials, made)
    contaminated = tuple(sorted(overlap)) if config.split.policy in LEAKY else ()
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
    return made.model_copy(update={"fingerprint": identity(made)})


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
    if config.split.policy in PAPERS:
        return "train"
    share = key64(config.seed, "validation", identity) / 2**64
    return "validation" if share < config.split.validation_prob else "train"


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
