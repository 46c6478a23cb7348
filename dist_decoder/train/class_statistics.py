"""Statistics of a trained decoder's tokens by image class, over its source subjects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from dist_decoder.config.class_statistics import ClassStatisticsConfig
from dist_decoder.data.rows import SubjectRows, iterate_rows
from dist_decoder.errors import ConfigError
from dist_decoder.manifest import manifest_fingerprint, read_manifest
from dist_decoder.nn.decoder import Decoder
from dist_decoder.stats.classes import (
    ClassSums,
    check_statistics,
    class_statistics,
    write_statistics,
)
from dist_decoder.storage import open_location
from dist_decoder.train.checkpoint import load_for_inference

_IMAGES_AT_A_TIME = 256


def make_class_statistics(config: ClassStatisticsConfig) -> dict[str, Any]:
    """Predict tokens for the training images of the base's subjects, and write their statistics.

    Only subjects that the base was trained on and that the shards do not hold out are read, so
    that the subject of a later adaptation can never be among them. An image's tokens are the mean
    over its repetitions.

    Returns:
        ``output``, ``subjects``, ``classes``, ``reliability`` per subject, ``rank_one_share`` and
        the numbers of images per class.

    Raises:
        ConfigError: the base has no tokens, or none of its subjects is in the shards.
        DataError: the similarities carry no semantics (see ``stats.classes.check_statistics``).
    """
    decoder, meta = load_for_inference(config.base)
    if decoder.token_shape is None:
        raise ConfigError(f"{config.base} predicts no tokens: class statistics are made of them")
    manifest = read_manifest(open_location(config.shards))
    subjects = [
        name
        for name, entry in sorted(manifest.subjects.items())
        if name in meta.subjects and not entry.holdout
    ]
    if not subjects:
        raise ConfigError(
            f"none of the subjects of {config.base} is in {config.shards} as a source subject"
        )
    classes = _classes(config.shards, subjects, config.min_images)
    sums = {
        rows.subject: _sums(decoder, rows, classes)
        for rows in iterate_rows(config.shards, "train", subjects, tokens=False)
    }
    statistics = class_statistics(classes, sums, decoder.token_shape, meta.fingerprint)
    check_statistics(statistics, config.min_reliability)
    # NaN is not JSON.
    reliability = [float(r) if np.isfinite(r) else None for r in statistics.reliability_S]
    images = statistics.counts_SC.sum(axis=0).tolist()
    note: dict[str, Any] = {
        "manifest_fingerprint": manifest_fingerprint(manifest),
        "reliability": dict(zip(statistics.subjects, reliability, strict=True)),
        "images": dict(zip(classes, images, strict=True)),
    }
    write_statistics(config.output, statistics, note)
    return {
        "output": str(config.output),
        "subjects": list(statistics.subjects),
        "classes": list(classes),
        "rank_one_share": statistics.rank_one_share,
        **note,
    }


def _classes(shards: str, subjects: list[str], min_images: int) -> tuple[str, ...]:
    found: Counter[str] = Counter()
    for rows in iterate_rows(shards, "train", subjects, tokens=False):
        found.update(name for names in rows.categories_M for name in set(names))
    return tuple(sorted(name for name, count in found.items() if count >= min_images))


def _sums(decoder: Decoder, rows: SubjectRows, classes: tuple[str, ...]) -> ClassSums:
    """Return the sums of one subject's projected tokens, mean over repetitions."""
    assert decoder.token_shape is not None
    num_features = decoder.token_shape[0] * decoder.token_shape[1]
    sums = ClassSums(len(classes), num_features)
    num_images = len(rows.uids_M)
    for start in range(0, num_images, _IMAGES_AT_A_TIME):
        images = range(start, min(start + _IMAGES_AT_A_TIME, num_images))
        here = np.flatnonzero((rows.image_N >= start) & (rows.image_N < images.stop))
        found = decoder.predict(torch.from_numpy(rows.voxels_NV[here]), rows.subject)
        assert found.retrieval_BTD is not None
        total = np.zeros((len(images), num_features))
        np.add.at(total, rows.image_N[here] - start, found.retrieval_BTD.flatten(1).numpy())
        count = np.bincount(rows.image_N[here] - start, minlength=len(images))
        labels = np.array(
            [[name in rows.categories_M[image] for name in classes] for image in images], bool
        )
        # By a hash of the image: classes may follow the order of the images.
        half = rows.image_ids_M[images.start : images.stop] % 2
        sums.add(total / np.maximum(count, 1)[:, None], labels, half)
    return sums
