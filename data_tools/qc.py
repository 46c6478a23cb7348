"""``data-tools qc``: are these betas worth training on? One page per subject, from the store.

Axes: V voxels of one subject, S sessions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.qc_measure import OUTLIER_RMS, SubjectQuality, measure_subject
from data_tools.store import open_store
from dist_decoder.config.data import DataConfig
from dist_decoder.config.progress import progress
from dist_decoder.storage import atomic_write_bytes, atomic_write_json

MAX_INVALID_SHARE = 0.05
"""More voxels without values in a session are flagged."""
MAX_SD_RATIO = 2.0
"""A session whose SD differs by more from the median session is flagged."""
MAX_SHIFT = 1.0
"""Session means that move by more SDs are flagged."""
MAX_OUTLIER_SHARE = 0.01
MIN_NCSNR = 0.05
MIN_NCSNR_CORRELATION = 0.8


def qc(config: DataConfig) -> dict[str, object]:
    """Write ``<output>/qc/<dataset>-<subject>.html`` and ``.json``, and ``index.html``.

    Returns:
        The index, and the flags of every subject in words.

    Raises:
        DataError: a session has another number of rows than the trial table.
        ConfigError: the extra ``report`` is not installed.
    """
    from data_tools.qc_page import render_index, render_page

    store = open_store(config)
    datasets = store.require([dataset.dataset for dataset in config.datasets])
    subjects = [(name, subject) for name in datasets for subject in store.subjects(name)]
    folder = config.output / "qc"
    measured: list[tuple[SubjectQuality, list[str]]] = []
    with progress("qc", len(subjects)) as counter:
        for dataset, subject in subjects:
            quality = measure_subject(store, dataset, subject)
            flags = find_flags(quality)
            stem = f"{dataset}-{subject}"
            atomic_write_bytes(folder / f"{stem}.html", render_page(quality, flags).encode())
            atomic_write_json(folder / f"{stem}.json", to_json(quality, flags))
            measured.append((quality, flags))
            counter.advance()
    atomic_write_bytes(folder / "index.html", render_index(measured).encode())
    return {
        "index": str(folder / "index.html"),
        "flags": {quality.name: flags for quality, flags in measured},
    }


def describe_qc(result: dict[str, Any]) -> str:
    """Return the flags of every subject, for people."""
    lines = []
    for name, flags in result["flags"].items():
        lines.append(f"{name}: {'nothing to look at' if not flags else ''}".rstrip())
        lines += [f"  {flag}" for flag in flags]
    return "\n".join([*lines, f"pages: {result['index']}"])


def find_flags(quality: SubjectQuality) -> list[str]:
    """Return what deserves a look before training, in words; empty if nothing does."""
    flags = []
    usual = float(np.nanmedian(quality.std_S)) if np.isfinite(quality.std_S).any() else 0.0
    for index, session in enumerate(quality.sessions_S):
        share = quality.invalid_S[index] / quality.num_voxels
        if share > MAX_INVALID_SHARE:
            flags.append(
                f"Session {session}: {share:.0%} of the voxels have no value (NaN). They count as "
                "0 after normalisation; check the brain mask and the alignment of this session."
            )
        ratio = quality.std_S[index] / usual if usual > 0 else float("nan")
        if ratio > MAX_SD_RATIO or ratio < 1 / MAX_SD_RATIO:
            flags.append(
                f"Session {session}: responses vary {ratio:.1f} times as much as in the usual "
                "session. A wrong scale factor or many bad trials look like this."
            )
        if quality.shift_S[index] > MAX_SHIFT:
            flags.append(
                f"Session {session}: its voxel means are shifted by {quality.shift_S[index]:.1f} "
                "SD. Keep shard.normalise=session (or run)."
            )
    if quality.always_dead:
        flags.append(
            f"{quality.always_dead} of {quality.num_voxels} voxels never vary. They carry nothing; "
            "a mask that leaves the brain is the usual cause."
        )
    if quality.num_outliers > MAX_OUTLIER_SHARE * quality.num_trials:
        flags.append(
            f"{quality.num_outliers} of {quality.num_trials} trials are more than {OUTLIER_RMS} "
            "times as strong as the others in their session: motion, or a failed fit."
        )
    return flags + _reliability_flags(quality)


def _reliability_flags(quality: SubjectQuality) -> list[str]:
    if quality.ncsnr_V is None:
        return ["Hardly any image is repeated: reliability (ncsnr) cannot be computed."]
    flags = []
    finite = quality.ncsnr_V[np.isfinite(quality.ncsnr_V)]
    if not len(finite) or np.median(finite) < MIN_NCSNR:
        flags.append(
            "Repetitions of an image agree hardly more than different images do (median ncsnr "
            f"{np.median(finite) if len(finite) else 0:.2f}). Check first that trial table and "
            "betas are in the same order."
        )
    correlation = quality.ncsnr_correlation()
    if correlation < MIN_NCSNR_CORRELATION:
        flags.append(
            f"Computed and published ncsnr agree poorly over voxels (r = {correlation:.2f}). "
            "Voxels or trials may be in another order than the publisher's."
        )
    return flags


def to_json(quality: SubjectQuality, flags: list[str]) -> dict[str, object]:
    """Return the measurements as JSON types; undefined numbers are null."""

    def numbers(values: NDArray[Any]) -> list[float | None]:
        return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]

    def quantiles(values: NDArray[np.float64] | None) -> dict[str, float] | None:
        if values is None or not np.isfinite(values).any():
            return None
        marks = (5, 25, 50, 75, 95)
        found = np.nanpercentile(values, marks)
        return {f"p{mark}": float(f"{value:.6g}") for mark, value in zip(marks, found, strict=True)}

    correlation = quality.ncsnr_correlation()
    return {
        "dataset": quality.dataset,
        "subject": quality.subject,
        "flags": flags,
        "unit": quality.unit,
        "num_trials": quality.num_trials,
        "num_imagery_trials": quality.num_imagery,
        "num_images": quality.num_images,
        "num_voxels": quality.num_voxels,
        "repetitions": {str(shown): images for shown, images in quality.repetitions.items()},
        "sessions": {
            "session": quality.sessions_S.tolist(),
            "trials": quality.trials_S.tolist(),
            "mean": numbers(quality.mean_S),
            "std": numbers(quality.std_S),
            "invalid_voxels": quality.invalid_S.tolist(),
            "dead_voxels": quality.dead_S.tolist(),
            "shift_sd": numbers(quality.shift_S),
        },
        "always_dead_voxels": quality.always_dead,
        "outlier_trials": quality.num_outliers,
        "ncsnr_repetitions": quality.repetitions_used,
        "ncsnr": quantiles(quality.ncsnr_V),
        "noise_ceiling_pct": {
            str(count): quantiles(ceiling_V)
            for count, ceiling_V in quality.noise_ceilings().items()
        },
        "published_ncsnr": quantiles(quality.published_ncsnr_V),
        "ncsnr_correlation": correlation if np.isfinite(correlation) else None,
        "split_half_correlation": quantiles(quality.split_half_V),
    }
