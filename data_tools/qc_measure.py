"""What ``qc`` measures on the betas of one subject.

Axes: N trials, V voxels of one subject, S sessions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_tools.store import Store
from dist_decoder.errors import DataError
from dist_decoder.stats.reliability import (
    ncsnr,
    noise_ceiling_pct,
    split_half_correlation,
)

OUTLIER_RMS = 2.5
"""A trial whose root mean square z over voxels exceeds this is an outlier."""
_VOXEL_BLOCK = 1024
"""Voxels that are z-scored at once: all of a subject in float64 would not fit in memory."""


@dataclass(frozen=True)
class SubjectQuality:
    """What ``qc`` measured for one subject. NaN where a number is not defined."""

    dataset: str
    subject: str
    unit: str
    num_trials: int
    num_images: int
    num_voxels: int
    sessions_S: NDArray[np.int64]
    trials_S: NDArray[np.int64]
    mean_S: NDArray[np.float64]
    """Mean over trials and voxels, in the unit of the betas."""
    std_S: NDArray[np.float64]
    """Median over voxels of the SD over trials."""
    invalid_S: NDArray[np.int64]
    """Voxels without a value (NaN) in the session."""
    dead_S: NDArray[np.int64]
    """Voxels with one constant value in the session."""
    shift_S: NDArray[np.float64]
    """Root mean square over voxels of (session mean - median of session means) / session SD."""
    global_mean_N: NDArray[np.float32]
    """Mean over voxels of each trial after z-scoring voxels within the session."""
    rms_N: NDArray[np.float32]
    """Root mean square over voxels of the same z-scores: 1 for an ordinary trial."""
    always_dead: int
    """Voxels without any varying session."""
    num_imagery: int
    """Trials of imagery, which count neither as repetitions nor for reliability."""
    repetitions: dict[int, int]
    """How often shown -> number of images."""
    repetitions_used: int | None
    """ncsnr is from images with exactly this many trials; None: all repeated images."""
    ncsnr_V: NDArray[np.float64] | None
    """Computed from all images, test images too: not for choosing voxels. None: no repeats."""
    split_half_V: NDArray[np.float64] | None
    published_ncsnr_V: NDArray[np.float64] | None

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.subject}"

    @property
    def outlier_N(self) -> NDArray[np.bool_]:
        """Trials much stronger than the others of their session."""
        return self.rms_N > OUTLIER_RMS

    @property
    def num_outliers(self) -> int:
        return int(self.outlier_N.sum())

    def noise_ceilings(self) -> dict[int, NDArray[np.float64]]:
        """Return repetitions averaged -> (V,) explainable variance in percent: of single trials,
        and of the mean of every number of repetitions that images have."""
        if self.ncsnr_V is None:
            return {}
        counts = sorted({1, *self.repetitions})
        return {count: noise_ceiling_pct(self.ncsnr_V, count) for count in counts}

    def ncsnr_correlation(self) -> float:
        """Return Pearson's r over voxels between computed and published ncsnr, or NaN."""
        if self.ncsnr_V is None or self.published_ncsnr_V is None:
            return float("nan")
        both_V = np.isfinite(self.ncsnr_V) & np.isfinite(self.published_ncsnr_V)
        pair = self.ncsnr_V[both_V], self.published_ncsnr_V[both_V]
        if both_V.sum() < 3 or min(values.std() for values in pair) == 0:
            return float("nan")
        return float(np.corrcoef(*pair)[0, 1])


def measure_subject(store: Store, dataset: str, subject: str) -> SubjectQuality:
    """Return the measurements of one subject; its betas are held in memory once.

    Raises:
        DataError: a session has another number of rows than the trial table.
    """
    trials = store.trials(dataset, subject)
    order = np.unique(trials["session"])
    voxels = store.voxels(dataset, subject)
    betas_NV = np.empty((len(trials), voxels.num_voxels), dtype=np.float32)
    for session in order:
        rows = (trials["session"] == session).to_numpy()
        values = store.betas(dataset, subject, int(session))
        if values.shape != (rows.sum(), voxels.num_voxels):
            raise DataError(
                f"{dataset}/{subject}, session {session}: betas have shape {values.shape}, the "
                f"trial table {rows.sum()} rows and the mask {voxels.num_voxels} voxels; ingest "
                "again"
            )
        betas_NV[rows] = values
    by_session = _sessions(betas_NV, trials, order)
    seen = (trials["split"] != "imagery").to_numpy()
    repeats = trials["image_uid"][seen].value_counts().value_counts()
    repetitions = {int(shown): int(images) for shown, images in sorted(repeats.items())}
    published = voxels.ncsnr_V
    return SubjectQuality(
        dataset=dataset,
        subject=subject,
        unit=str(store.facts(dataset)["unit"]),
        num_trials=len(trials),
        num_images=int(trials["image_uid"].nunique()),
        num_voxels=voxels.num_voxels,
        sessions_S=order,
        num_imagery=int((~seen).sum()),
        repetitions=repetitions,
        published_ncsnr_V=None if published is None else published.astype(np.float64),
        **by_session,
        **_reliability(betas_NV, trials, seen, repetitions),
    )


def _sessions(
    betas_NV: NDArray[np.float32], trials: pd.DataFrame, order: NDArray[np.int64]
) -> dict[str, Any]:
    """Return the fields of ``SubjectQuality`` that describe sessions and trials."""
    num_voxels = betas_NV.shape[1]
    mean_SV = np.full((len(order), num_voxels), np.nan)
    std_SV = np.full((len(order), num_voxels), np.nan)
    invalid_S = np.zeros(len(order), dtype=np.int64)
    global_mean_N = np.zeros(len(trials), dtype=np.float32)
    rms_N = np.zeros(len(trials), dtype=np.float32)
    for index, session in enumerate(order):
        rows = (trials["session"] == session).to_numpy()
        values_NV = betas_NV[rows].astype(np.float64)
        valid_V = np.isfinite(values_NV).all(axis=0)
        invalid_S[index] = (~valid_V).sum()
        mean_SV[index, valid_V] = values_NV[:, valid_V].mean(axis=0)
        std_SV[index, valid_V] = values_NV[:, valid_V].std(axis=0)
        live_V = std_SV[index] > 0
        if live_V.any():
            z_NV = (values_NV[:, live_V] - mean_SV[index, live_V]) / std_SV[index, live_V]
            global_mean_N[rows] = z_NV.mean(axis=1)
            rms_N[rows] = np.sqrt((z_NV**2).mean(axis=1))
    live_SV = std_SV > 0
    mean_SV[~live_SV] = np.nan
    usual_V = np.full(num_voxels, np.nan)
    known_V = live_SV.any(axis=0)
    # The median: one session that is off must not make the others look shifted.
    usual_V[known_V] = np.nanmedian(mean_SV[:, known_V], axis=0)
    shift_SV = (mean_SV - usual_V) / np.where(live_SV, std_SV, np.nan)
    return {
        "trials_S": np.array([(trials["session"] == session).sum() for session in order]),
        "mean_S": _nan_mean(mean_SV.T),
        "std_S": np.array(
            [
                np.median(row[live]) if live.any() else np.nan
                for row, live in zip(std_SV, live_SV, strict=True)
            ]
        ),
        "invalid_S": invalid_S,
        "dead_S": (std_SV == 0).sum(axis=1),
        "shift_S": np.sqrt(_nan_mean(shift_SV.T**2)),
        "global_mean_N": global_mean_N,
        "rms_N": rms_N,
        "always_dead": int((~live_SV.any(axis=0)).sum()),
    }


def _reliability(
    betas_NV: NDArray[np.float32],
    trials: pd.DataFrame,
    seen_N: NDArray[np.bool_],
    repetitions: dict[int, int],
) -> dict[str, Any]:
    """Return the fields of ``SubjectQuality`` that need repeated images."""
    repeated = sum(images for shown, images in repetitions.items() if shown > 1)
    if repeated < 3:
        return {"repetitions_used": None, "ncsnr_V": None, "split_half_V": None}
    # NSD's estimator takes images shown three times; elsewhere those may be a handful.
    used = 3 if 2 * repetitions.get(3, 0) >= repeated else None
    uids = trials["image_uid"].to_numpy(str)[seen_N]
    sessions = trials["session"].to_numpy()[seen_N]
    ratios, halves = [], []
    for start in range(0, betas_NV.shape[1], _VOXEL_BLOCK):
        block_NV = betas_NV[seen_N, start : start + _VOXEL_BLOCK]
        ratios.append(ncsnr(block_NV, uids, sessions, repetitions=used))
        halves.append(split_half_correlation(block_NV, uids))
    return {
        "repetitions_used": used,
        "ncsnr_V": np.concatenate(ratios),
        "split_half_V": np.concatenate(halves),
    }


def _nan_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the first axis of what is not NaN; NaN where nothing is."""
    count = np.isfinite(values).sum(axis=0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
