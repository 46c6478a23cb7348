"""A trained model plus betas, with or without images, to embeddings, tokens and retrievals.

Axes: N rows (trials), V voxels of one subject, M pool, E pooled width, T tokens, D token width.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_decoder.config.loss import LossConfig
from dist_decoder.data.rows import SubjectRows, iterate_rows
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.errors import ConfigError, DataError
from dist_decoder.eval.baseline import flatten
from dist_decoder.eval.retrieval import cosine_scores, top_images
from dist_decoder.formats import Manifest, SplitName
from dist_decoder.manifest import read_npz
from dist_decoder.rng import key64
from dist_decoder.storage import Storage
from dist_decoder.train.checkpoint import (
    CheckpointMeta,
    load_for_inference,
    read_meta,
    resolve_base,
)
from dist_decoder.train.places import Place

_MIN_STD = 1e-6


@dataclass(frozen=True)
class Predicted:
    """Standardised predictions of some rows."""

    pooled_NE: NDArray[np.float32] | None
    tokens_NTD: NDArray[np.float32] | None
    """Of the token head, in the units of the encoder's standardised tokens."""
    retrieval_NTD: NDArray[np.float32] | None
    """What is ranked for ``tokens``: the projected tokens where the projector was trained."""
    prior_NTD: NDArray[np.float32] | None

    def ranked(self) -> dict[str, NDArray[np.floating]]:
        """Return output -> (N, F) what retrieval ranks, for the outputs that the model has."""
        outputs = {
            "pooled": self.pooled_NE,
            "tokens": self.retrieval_NTD,
            "prior": self.prior_NTD,
        }
        return {name: flatten(value) for name, value in outputs.items() if value is not None}


class Predictor:
    """A checkpoint that is ready to predict."""

    def __init__(self, path: Place, device: str = "auto") -> None:
        """Load the newest complete checkpoint of a run folder, or a checkpoint folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
            ConfigError: the device does not exist.
        """
        self.path = path
        self.decoder, self.meta = load_for_inference(path, choose_device(device))
        self._rank_projected = _projector_is_trained(self.meta)

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(sorted(self.meta.subjects))

    @property
    def targets(self) -> TargetStatistics:
        return self.meta.targets

    @property
    def seed(self) -> int:
        return self.meta.document.seed

    def require(self, subject: str, num_voxels: int | None = None) -> None:
        """Refuse a subject that the model has no layer for, or another number of voxels.

        Raises:
            ConfigError: the subject is unknown; the nearest name is given.
            DataError: the voxel counts differ.
        """
        if subject not in self.meta.subjects:
            near = difflib.get_close_matches(subject, self.subjects, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{self.path} has no layer for subject {subject!r}{hint} (it knows "
                f"{', '.join(self.subjects)}); `dist-decoder adapt` adds a subject"
            )
        info = self.meta.subjects[subject]
        if num_voxels is not None and num_voxels != info.num_voxels:
            raise DataError(
                f"betas of {subject} have {num_voxels} voxels, the model was trained on "
                f"{info.num_voxels} (mask {info.mask_fingerprint}): apply the same ROI mask, in "
                "the same voxel order, as `data-tools ingest` did"
            )

    def predict(
        self, subject: str, voxels_NV: NDArray[np.floating], sample_prior: bool, seed: int
    ) -> Predicted:
        """Return the predictions for normalised voxels; the prior's noise is keyed by seed, subject
        and row."""
        self.require(subject, voxels_NV.shape[1])
        voxels = torch.from_numpy(np.ascontiguousarray(voxels_NV, dtype=np.float32))
        found = self.decoder.predict(voxels, subject)
        prior = None
        if sample_prior and self.decoder.has_prior and found.tokens_BTD is not None:
            key = key64(seed, "predict", subject) >> 32
            prior = self.decoder.sample_prior(found.tokens_BTD, key).numpy()
        retrieval = found.retrieval_BTD if self._rank_projected else found.tokens_BTD
        return Predicted(
            pooled_NE=None if found.pooled_BE is None else found.pooled_BE.numpy(),
            tokens_NTD=None if found.tokens_BTD is None else found.tokens_BTD.numpy(),
            retrieval_NTD=None if retrieval is None else retrieval.numpy(),
            prior_NTD=prior,
        )

    def parts(
        self,
        subject: str,
        voxels_NV: NDArray[np.floating],
        sample_prior: bool,
        seed: int,
        rows: int = 1024,
    ) -> Iterator[Predicted]:
        """Yield the predictions of consecutive rows: wide tokens of all rows need not fit."""
        for start in range(0, len(voxels_NV), rows):
            part_seed = seed if start == 0 else key64(seed, "part", start) >> 32
            yield self.predict(subject, voxels_NV[start : start + rows], sample_prior, part_seed)


def choose_device(name: str) -> torch.device:
    """Return the device that a config names.

    Raises:
        ConfigError: unknown, or no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no GPU; use device=cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown: use auto, cpu or cuda") from error


def _projector_is_trained(meta: CheckpointMeta) -> bool:
    """Return whether the losses of a run, or of the base that it adapts, train the projector."""
    loss = meta.config.get("loss")
    if loss is not None and LossConfig.model_validate(loss).trains_projector:
        return True
    if meta.document.base is None:
        return loss is None and LossConfig().trains_projector
    return _projector_is_trained(read_meta(resolve_base(meta.folder, meta.document.base)))


def read_betas(path: Path) -> NDArray[np.float32]:
    """Return (N, V) betas of a .npy file.

    Raises:
        DataError: missing, not a .npy array, of another shape or dtype, or not finite.
    """
    try:
        betas = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a .npy array: {error}") from error
    if not isinstance(betas, np.ndarray) or betas.ndim != 2 or 0 in betas.shape:
        shape = getattr(betas, "shape", None)
        raise DataError(f"{path} must hold one (N, V) array of trials by voxels, found {shape}")
    if betas.dtype.kind not in "fiu":
        raise DataError(f"{path} holds {betas.dtype}; betas must be real numbers")
    bad_V = ~np.isfinite(betas).all(axis=0)
    if bad_V.any():
        raise DataError(
            f"{path}: {int(bad_V.sum())} voxels hold NaN or infinity (first: voxel "
            f"{int(np.argmax(bad_V))}); set them to their mean, or mask them as ingest did"
        )
    return betas.astype(np.float32)


def normalise_betas(
    betas_NV: NDArray[np.float32],
    how: str,
    statistics: Mapping[str, NDArray[Any]] | None,
    where: str,
) -> NDArray[np.float32]:
    """Return z-scored betas.

    Args:
        betas_NV: in the dataset's own unit.
        how: ``self`` by the betas' own mean and SD (a new run), ``stored`` by the subject's
            training statistics, ``none`` as they are.
        statistics: the subject's ``subject_mean_V`` and ``subject_std_V``; needed for ``stored``.
        where: for messages.

    A voxel without variance becomes 0, the mean, as in the shards.

    Raises:
        DataError: ``self`` with fewer than two rows, or statistics of other voxels.
    """
    if how == "none":
        return betas_NV
    if how == "self":
        if len(betas_NV) < 2:
            raise DataError(
                f"{where}: normalise=self needs at least two rows; use normalise=stored for one"
            )
        mean_V, std_V = betas_NV.mean(axis=0), betas_NV.std(axis=0)
    else:
        if statistics is None:
            raise DataError(f"{where}: normalise=stored needs shards with this subject")
        mean_V, std_V = statistics["subject_mean_V"], statistics["subject_std_V"]
        if mean_V.shape != betas_NV.shape[1:]:
            raise DataError(f"{where}: {betas_NV.shape[1]} voxels, statistics of {mean_V.shape}")
    alive_V = std_V > _MIN_STD
    z_NV = np.where(alive_V, (betas_NV - mean_V) / np.where(alive_V, std_V, 1.0), 0.0)
    return z_NV.astype(np.float32)


def subject_statistics(
    storage: Storage, manifest: Manifest, subject: str
) -> dict[str, NDArray[Any]]:
    """Return the stored training statistics of a subject.

    Raises:
        ConfigError: the manifest lacks the subject.
    """
    if subject not in manifest.subjects:
        known = ", ".join(sorted(manifest.subjects))
        raise ConfigError(f"{storage.describe()} has no subject {subject!r} (it holds {known})")
    return read_npz(storage, manifest.subjects[subject].statistics, manifest)


@dataclass(frozen=True)
class Pool:
    """Images that can be retrieved, with standardised targets."""

    uids_M: tuple[str, ...]
    targets: dict[str, NDArray[np.float32]]
    """pooled -> (M, E), tokens -> (M, T * D)."""


def read_pool(
    shards: str,
    manifest: Manifest,
    dataset: str,
    splits: tuple[SplitName, ...],
    standardise_by: TargetStatistics | None = None,
) -> Pool:
    """Return the distinct images of a dataset in these splits.

    Targets are standardised by the shards' own statistics, or by those of a model.

    Raises:
        DataError: there are none.
    """
    found: dict[str, tuple[NDArray[Any], NDArray[Any] | None]] = {}
    for split in splits:
        present = _subjects_with_rows(manifest, dataset, split)
        if not present:
            continue
        for rows in iterate_rows(
            shards, split, subjects=present, allow_holdout=True, standardise_by=standardise_by
        ):
            tokens_MTD = rows.standard_tokens_MTD
            for image, uid in enumerate(rows.uids_M):
                tokens_TD = None if tokens_MTD is None else tokens_MTD[image]
                found.setdefault(uid, (rows.standard_pooled_ME[image], tokens_TD))
    if not found:
        raise DataError(f"{dataset} has no images in split {' or '.join(splits)} to retrieve from")
    uids = tuple(sorted(found))
    targets = {"pooled": np.stack([found[uid][0] for uid in uids]).astype(np.float32)}
    tokens = [found[uid][1] for uid in uids]
    if all(value is not None for value in tokens):
        stacked = np.stack([value for value in tokens if value is not None])
        targets["tokens"] = flatten(stacked).astype(np.float32)
    return Pool(uids, targets)


def _subjects_with_rows(manifest: Manifest, dataset: str, split: str) -> tuple[str, ...]:
    names = {
        f"{dataset}/{subject}"
        for source in manifest.sources
        if source.dataset == dataset and source.split == split and source.kind == "measured"
        for subject, rows in source.rows.items()
        if rows
    }
    return tuple(sorted(names))


def trial_names(rows: SubjectRows) -> list[str]:
    """Return an identity of each row within its subject: session, run, trial; the same in every
    sharding of a dataset, so that folds can be told apart and merged."""
    return [
        f"{rows.uids_M[image]}#{info.session}.{info.run}.{info.trial}.{info.repetition}"
        for image, info in zip(rows.image_N.tolist(), rows.infos_N, strict=True)
    ]


def retrieve(predicted: Predicted, pool: Pool, top: int) -> dict[str, list[list[dict[str, Any]]]]:
    """Return output -> for each row the ``top`` images with their cosine, best first."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for output, rows_NF in predicted.ranked().items():
        targets = pool.targets.get("tokens" if output == "prior" else output)
        if targets is None:
            continue
        scores_NM = cosine_scores(rows_NF, targets)
        best_NK = top_images(scores_NM, top)
        found[output] = [
            [
                {"image_uid": pool.uids_M[image], "score": round(float(scores_NM[row, image]), 6)}
                for image in best_K
            ]
            for row, best_K in enumerate(best_NK)
        ]
    return found


def prediction_arrays(
    predicted: Predicted, targets: TargetStatistics
) -> dict[str, NDArray[np.float32]]:
    """Return what ``predictions.npz`` holds: standardised outputs, and ``raw_`` encoder units."""
    arrays: dict[str, NDArray[np.float32]] = {}
    if predicted.pooled_NE is not None:
        arrays["pooled_NE"] = predicted.pooled_NE
        arrays["raw_pooled_NE"] = targets.unstandardise_pooled(predicted.pooled_NE)
    for name, values in (("tokens", predicted.tokens_NTD), ("prior", predicted.prior_NTD)):
        if values is not None:
            arrays[f"{name}_NTD"] = values
            arrays[f"raw_{name}_NTD"] = targets.unstandardise_tokens(values)
    if predicted.retrieval_NTD is not None:
        arrays["retrieval_NTD"] = predicted.retrieval_NTD
    return arrays
