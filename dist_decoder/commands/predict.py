"""``dist-decoder predict``: betas without images to embeddings, tokens and retrieved images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_decoder.config.evaluate import PredictConfig
from dist_decoder.data.rows import read_rows
from dist_decoder.data.targets import TargetStatistics, read_targets
from dist_decoder.errors import ConfigError
from dist_decoder.eval.gallery import contact_sheet, png_bytes, thumbnail
from dist_decoder.formats import Manifest, SplitName
from dist_decoder.manifest import encode_npz, read_manifest
from dist_decoder.predict import (
    Pool,
    Predicted,
    Predictor,
    normalise_betas,
    prediction_arrays,
    read_betas,
    read_pool,
    retrieve,
    subject_statistics,
    trial_names,
)
from dist_decoder.stimuli import read_pictures
from dist_decoder.storage import atomic_write_bytes, atomic_write_json, open_location
from dist_decoder.train.targets_of_base import check_masks, targets_of_base

_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_SHEET_ROWS = 24
"""Rows on the contact sheet; the JSON holds them all."""


def run(config: PredictConfig) -> dict[str, Any]:
    """Predict and write ``predictions.npz``, ``retrieved.json`` and ``retrieved.png``.

    Returns:
        Paths and counts.

    Raises:
        ConfigError: the subject is unknown to the model or the shards.
        DataError: the betas do not fit the subject, or are not finite.
    """
    predictor = Predictor(config.run, config.device)
    predictor.require(config.subject)
    shards = config.shards or _shards_of(predictor)
    storage = open_location(shards)
    manifest = read_manifest(storage)
    if config.betas is not None:
        betas_NV = read_betas(config.betas)
        predictor.require(config.subject, betas_NV.shape[1])
        stored = None
        if config.normalise == "stored":
            stored = subject_statistics(storage, manifest, config.subject)
        voxels_NV = normalise_betas(betas_NV, config.normalise, stored, str(config.betas))
        names = [str(row) for row in range(len(voxels_NV))]
        seen: list[str] | None = None
    else:
        check_masks(predictor.meta, manifest, (config.subject,))
        rows = read_rows(shards, config.split, subjects=(config.subject,), allow_holdout=True)[
            config.subject
        ]
        voxels_NV = rows.voxels_NV
        names, seen = trial_names(rows), list(rows.image_uids)
    predicted = predictor.predict(config.subject, voxels_NV, config.sample_prior, config.seed)
    targets = read_targets(storage, manifest)
    targets = targets_of_base(predictor.meta, manifest, targets, shards)
    pool = _pool(config, shards, manifest, targets)
    found = retrieve(predicted, pool, config.top)
    return _write(config, predictor, predicted, pool, found, names, seen)


def render(result: dict[str, Any]) -> str:
    """Return what was predicted and where it is, for people."""
    lines = [
        f"{result['rows']} rows decoded, nearest of {result['pool']} images by "
        f"{', '.join(result['outputs']) or 'no output'}",
        f"  embeddings: {result['predictions']}",
        f"  retrieved images: {result['retrieved']}",
    ]
    return "\n".join([*lines, *([f"  picture: {result['sheet']}"] if "sheet" in result else [])])


def _write(
    config: PredictConfig,
    predictor: Predictor,
    predicted: Predicted,
    pool: Pool,
    found: dict[str, list[list[dict[str, Any]]]],
    names: list[str],
    seen: list[str] | None,
) -> dict[str, Any]:
    output = config.output
    arrays: dict[str, NDArray[Any]] = {**prediction_arrays(predicted, predictor.targets)}
    arrays["row_N"] = np.asarray(names, dtype=np.str_)
    result: dict[str, Any] = {
        "predictions": str(output / "predictions.npz"),
        "retrieved": str(output / "retrieved.json"),
        "rows": len(names),
        "pool": len(pool.uids_M),
        "outputs": sorted(found),
    }
    atomic_write_bytes(output / "predictions.npz", encode_npz(arrays))
    sheet = _contact_sheet(config, found, names, seen)
    if sheet is not None:
        atomic_write_bytes(output / "retrieved.png", sheet)
        result["sheet"] = str(output / "retrieved.png")
    content = {
        "format": "dist-decoder-retrieved",
        "version": 1,
        "subject": config.subject,
        "model": predictor.meta.fingerprint,
        "encoder": predictor.meta.encoder.id,
        "normalise": config.normalise if config.betas is not None else "as in the shards",
        "pool": len(pool.uids_M),
        "rows": [
            {
                "row": name,
                **({"image_uid": seen[index]} if seen is not None else {}),
                **{kind: ranked[index] for kind, ranked in found.items()},
            }
            for index, name in enumerate(names)
        ],
    }
    atomic_write_json(output / "retrieved.json", content)
    return result


def _contact_sheet(
    config: PredictConfig,
    found: dict[str, list[list[dict[str, Any]]]],
    names: list[str],
    seen: list[str] | None,
) -> bytes | None:
    if config.images is None or not found:
        return None
    ranked = found.get("pooled", next(iter(found.values())))[:_SHEET_ROWS]
    wanted = {entry["image_uid"] for row in ranked for entry in row} | set(seen or ())
    pictures = {
        uid: thumbnail(picture) for uid, picture in read_pictures(config.images, wanted).items()
    }
    if not pictures:
        return None
    lines = [
        ([pictures.get(seen[index])] if seen is not None else [])
        + [pictures.get(entry["image_uid"]) for entry in row]
        for index, row in enumerate(ranked)
    ]
    labels = [seen[index] if seen is not None else f"row {names[index]}"
              for index in range(len(ranked))]  # fmt: skip
    return png_bytes(contact_sheet(lines, labels, first_is_seen=seen is not None))


def _pool(
    config: PredictConfig, shards: str, manifest: Manifest, targets: TargetStatistics
) -> Pool:
    splits = _SPLITS if config.pool == "all" else (config.pool,)
    return read_pool(shards, manifest, config.subject.partition("/")[0], splits, targets)


def _shards_of(predictor: Predictor) -> str:
    shards = predictor.meta.config.get("data", {}).get("shards")
    if not shards:
        raise ConfigError(f"{predictor.path} does not say its shards; give shards=FOLDER")
    return str(shards)
