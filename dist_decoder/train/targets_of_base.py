"""How targets are standardised for a model that exists already: as it was trained."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from dist_decoder.data.targets import TargetStatistics
from dist_decoder.errors import ConfigError
from dist_decoder.formats import EncoderEntry, Manifest
from dist_decoder.train.checkpoint import CheckpointMeta

RELEASED_ENCODER = "mindeye2-openclip-bigG-tokens"
"""Encoder id of an imported checkpoint that says no other: the files do not name theirs."""
UNKNOWN_MASK = "not recorded by MindEye2"
"""Mask fingerprint of the subjects of an imported checkpoint."""
IMPORTED_KIND = "imported"
"""Kind of the encoder of an imported checkpoint."""
_RELEASED = re.compile(r"openclip-ViT-bigG-14-laion2b_s39b_b160k-mindeye2-[0-9a-f]{8}")


def targets_of_base(
    base: CheckpointMeta, manifest: Manifest, targets: TargetStatistics, shards: str
) -> TargetStatistics:
    """Return the statistics by which ``shards`` are standardised for ``base``.

    A base of our own was trained with those of its shards, which must be the same here. An imported
    one reads and gives raw tokens: the statistics of the shards are then put aside.

    Args:
        base: the model that is adapted, evaluated or asked to predict.
        manifest: of the shards.
        targets: statistics of the shards.
        shards: where they are, for messages.

    Raises:
        ConfigError: another encoder, or other statistics.
    """
    if not _is_same_encoder(base.encoder, manifest.encoder):
        hint = ""
        if base.encoder.id == RELEASED_ENCODER:
            hint = (
                ". Released MindEye2 checkpoints were trained with ViT-bigG-14, "
                "laion2b_s39b_b160k, embed.clip_input=mindeye2; if this one had other targets, "
                "name their encoder when importing (encoder=ID)"
            )
        raise ConfigError(
            f"{shards} holds targets of encoder {manifest.encoder.id}, {base.folder} predicts "
            f"those of encoder {base.encoder.id}{hint}"
        )
    if base.targets.is_raw:
        return TargetStatistics.raw(manifest.encoder.pooled_dim, manifest.encoder.token_shape)
    mine, theirs = targets.arrays(), base.targets.arrays()
    if not all(name in mine and np.array_equal(mine[name], theirs[name]) for name in theirs):
        raise ConfigError(
            f"{shards} standardises its targets by other statistics than the shards that "
            f"{base.folder} was trained on: shard a new subject together with the others (as a "
            "holdout), and evaluate a model on its own shards"
        )
    return targets


def check_masks(model: CheckpointMeta, manifest: Manifest, subjects: Iterable[str]) -> None:
    """Refuse shards whose voxels are not those that the model was trained on.

    Raises:
        ConfigError: a subject was made with another mask, even if it has as many voxels.
    """
    for name in subjects:
        known = model.subjects[name].mask_fingerprint
        found = manifest.subjects[name].mask_fingerprint
        if known not in (found, UNKNOWN_MASK):
            raise ConfigError(
                f"{name}: the shards were made with the mask {found}, {model.folder} was trained "
                f"with {known}: other voxels, or another order. Ingest with the same roi"
            )


def _is_same_encoder(model: EncoderEntry, shards: EncoderEntry) -> bool:
    if model == shards:
        return True
    if model.token_shape != shards.token_shape:
        return False
    if model.id == RELEASED_ENCODER:
        return bool(_RELEASED.fullmatch(shards.id))
    # The kind and the pooled width of an imported checkpoint's encoder are not in its file.
    return model.kind == IMPORTED_KIND and model.id == shards.id
