"""What the policies ``category_disjoint`` and ``paper:*`` add to a division by published tests.

``images`` is always dataset -> image_uid -> train, validation, test or excluded.

Source: NeuroFusion trains on all of NSD, BOLD5000 and GOD and tests on each; MindEye2 trains on
NSD's unshared images and tests on the shared ones; Duala adapts on one session of a new subject.
Differs: the images and synsets that these splits let into training are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from data_tools.near_duplicates import close_pairs, perceptual_hashes
from data_tools.store import Store
from dist_decoder.config.data import DatasetConfig, HoldoutConfig, SplitConfig
from dist_decoder.errors import ConfigError, SplitError

Images = dict[str, dict[str, str]]

_NSD_READERS = ("nsd", "mindeye2")
_LEARNED = ("train", "validation")


def paper_holdout(
    config: SplitConfig, datasets: Iterable[DatasetConfig]
) -> tuple[HoldoutConfig, ...]:
    """Return the held-out subjects under the configured policy: Duala's learn from one session.

    Raises:
        ConfigError: the datasets or the held-out subjects do not fit the paper.
    """
    if config.policy in ("paper:mindeye2", "paper:duala"):
        others = [entry.dataset for entry in datasets if entry.name not in _NSD_READERS]
        if others:
            raise ConfigError(
                f"split.policy={config.policy} is a split of NSD; take {', '.join(others)} out of"
                " `datasets`, or use paper:neurofusion or strict"
            )
    if config.policy != "paper:duala":
        return config.holdout
    if not config.holdout or any(one.train_sessions not in (None, 1) for one in config.holdout):
        raise ConfigError(
            "split.policy=paper:duala adapts each held-out subject on its first session: name them"
            " in split.holdout, with train_sessions 1 or absent"
        )
    return tuple(one.model_copy(update={"train_sessions": 1}) for one in config.holdout)


def paper_notes(config: SplitConfig) -> list[str]:
    """Return what a paper's split does differently, in words."""
    if not config.policy.startswith("paper:"):
        return []
    return [
        f"{config.policy}: no validation images; whatever is chosen by a score is chosen on test"
        " images, as in the paper"
    ]


def keep_categories_apart(
    images: Images, categories: Mapping[str, tuple[str, ...]], wanted: tuple[str, ...]
) -> tuple[Images, list[str]]:
    """Exclude training images of tested categories, and test images of no tested category.

    Categories are compared by name: the synsets of GOD and BOLD5000 with one another, the objects
    of COCO with one another. An image without categories cannot be told apart and is excluded.

    Args:
        images: of the strict policy.
        categories: image_uid -> its categories in any dataset.
        wanted: the tested categories; empty takes those of all test images.

    Raises:
        ConfigError: no image shows one of ``wanted``.
        SplitError: nothing is left to train on or to test.
    """
    by_uid = {uid: where for one in images.values() for uid, where in one.items()}
    known = {name for uid in by_uid for name in categories.get(uid, ())}
    if missing := sorted(set(wanted) - known):
        raise ConfigError(
            f"split.test_categories: no image shows {missing[0]!r}; there are"
            f" {', '.join(sorted(known)[:8])} ..."
        )
    tested = set(wanted) or {
        name for uid, where in by_uid.items() if where == "test" for name in categories.get(uid, ())
    }
    made: Images = {}
    removed = dict.fromkeys(("train", "test"), 0)
    for dataset, one in images.items():
        made[dataset] = {}
        for uid, where in one.items():
            shown = categories.get(uid, ())
            keep = bool(shown) and (where == "test") == bool(tested & set(shown))
            if where != "excluded" and not keep:
                removed["test" if where == "test" else "train"] += 1
            made[dataset][uid] = where if keep else "excluded"
    left = {where for one in made.values() for where in one.values()}
    if "test" not in left or not left & set(_LEARNED):
        raise SplitError(
            f"split.policy=category_disjoint with {len(tested)} tested categories leaves no image"
            " to train on or to test; name fewer in split.test_categories"
        )
    return made, [
        f"category_disjoint: {len(tested)} tested categories; {removed['train']} training and"
        f" {removed['test']} test images are excluded"
    ]


def keep_near_duplicates_apart(
    store: Store, images: Images, max_bits: int
) -> tuple[Images, list[str]]:
    """Exclude training images that look like a test image of another identity."""
    hashes = perceptual_hashes(store, images)
    pairs = close_pairs(hashes, *by_role(images), max_bits)
    close = {train for train, _, _ in pairs}
    made = {
        dataset: {uid: "excluded" if uid in close else where for uid, where in one.items()}
        for dataset, one in images.items()
    }
    return made, [
        f"{train} is excluded: it differs from the test image {test} in {bits} of 64 bits of the"
        " perceptual hash"
        for train, test, bits in pairs
    ]


def by_role(images: Images) -> tuple[list[str], list[str]]:
    """Return the image_uids that are learned from, and those that are tested."""
    roles: tuple[set[str], set[str]] = (set(), set())
    for one in images.values():
        roles[0].update(uid for uid, where in one.items() if where in _LEARNED)
        roles[1].update(uid for uid, where in one.items() if where == "test")
    return sorted(roles[0]), sorted(roles[1])


def synset_of(uid: str) -> str | None:
    """Return the synset of an ImageNet image_uid, None for other images."""
    kind, _, identity = uid.partition(":")
    return identity.partition("_")[0] if kind == "imagenet" else None


def synsets_of_tests(images: Images) -> dict[str, set[str]]:
    """Return dataset -> synsets of its test images, datasets without any left out."""
    found = {
        dataset: {synset_of(uid) for uid, where in one.items() if where == "test"}
        for dataset, one in images.items()
    }
    named = {dataset: {s for s in synsets if s} for dataset, synsets in found.items()}
    return {dataset: synsets for dataset, synsets in named.items() if synsets}


def synset_notes(images: Images) -> list[str]:
    """Return, per dataset, which of its test synsets training images show too."""
    learned = {synset_of(uid) for uid in by_role(images)[0]}
    notes = []
    for dataset, synsets in synsets_of_tests(images).items():
        if shared := sorted(synsets & learned):
            notes.append(
                f"{dataset}: {len(shared)} of {len(synsets)} test synsets are also shown by"
                f" training images ({', '.join(shared)}); these are no new categories"
            )
    return notes
