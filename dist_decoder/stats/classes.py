"""Statistics of predicted tokens by image class over source subjects (Duala), and their checks.

An image may have several classes and then counts for each. Axes: N images of one subject,
S subjects, C classes, T tokens, D token width, F = T * D.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import DataError, FormatError
from dist_decoder.files import atomic_write_bytes, atomic_write_json
from dist_decoder.manifest import encode_npz

ARRAYS_NAME = "class-statistics.npz"
DOCUMENT_NAME = "class-statistics.json"
_FORMAT = "dist-decoder-class-statistics"
LARGEST_RANK_ONE_SHARE = 0.9
MIN_CLASSES = 5
"""With fewer, one number per class fits almost any symmetric matrix: the check says nothing."""


@dataclass(frozen=True)
class ClassStatistics:
    """Per class: mean, every subject's spread about it, similarities, and how far to trust them."""

    classes: tuple[str, ...]
    subjects: tuple[str, ...]
    """Source subjects; the subject that is adapted is never among them."""
    counts_SC: NDArray[np.int64]
    """Images of each subject and class."""
    mean_CTD: NDArray[np.float32]
    """Over the images of all source subjects."""
    variance_SCTD: NDArray[np.float32]
    """Of a subject, second moment about the mean of all."""
    similarity_SCC: NDArray[np.float32]
    """Cosines of a subject's class prototypes; NaN for classes that it has not seen."""
    similarity_CC: NDArray[np.float32]
    """S_ref: mean over the subjects that have both classes; 0 where none has."""
    reliability_S: NDArray[np.float64]
    """Correlation of similarities from two halves of a subject's images; NaN if not measurable."""
    rank_one_share: float
    """Part of the off-diagonal variance of S_ref that one number per class explains."""
    base: str
    """Fingerprint of the checkpoint whose tokens these are."""


class ClassSums:
    """Running sums of one subject's tokens by class, in two halves of its images."""

    def __init__(self, num_classes: int, num_features: int) -> None:
        self.sum_HCF = np.zeros((2, num_classes, num_features))
        self.square_CF = np.zeros((num_classes, num_features))
        self.unit_HCF = np.zeros((2, num_classes, num_features))
        self.count_HC = np.zeros((2, num_classes), np.int64)

    def add(
        self, features_NF: NDArray[Any], labels_NC: NDArray[np.bool_], half_N: NDArray[np.int64]
    ) -> None:
        """Add images: features, labels, and which half (0 or 1) each image belongs to."""
        features = np.asarray(features_NF, np.float64)
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        unit = features / np.maximum(norms, 1e-12)
        for half in (0, 1):
            here = half_N == half
            weights = labels_NC[here].astype(np.float64)
            self.sum_HCF[half] += np.einsum("nc,nf->cf", weights, features[here])
            self.unit_HCF[half] += np.einsum("nc,nf->cf", weights, unit[here])
            self.count_HC[half] += labels_NC[here].sum(axis=0)
        self.square_CF += np.einsum("nc,nf->cf", labels_NC.astype(np.float64), features**2)


def class_statistics(
    classes: tuple[str, ...],
    sums: dict[str, ClassSums],
    token_shape: tuple[int, int],
    base: str,
) -> ClassStatistics:
    """Return the statistics of some subjects' sums.

    Raises:
        DataError: fewer than ``MIN_CLASSES`` classes have at least two images in some subject.
    """
    subjects = tuple(sorted(sums))
    all_sums = [sums[name] for name in subjects]
    counts_SC = np.stack([one.count_HC.sum(axis=0) for one in all_sums])
    if (counts_SC.max(axis=0) >= 2).sum() < MIN_CLASSES:
        raise DataError(
            f"only {(counts_SC.max(axis=0) >= 2).sum()} classes have two images or more in one "
            f"source subject; class similarities need at least {MIN_CLASSES}"
        )
    total_C = counts_SC.sum(axis=0)
    mean_CF = sum(one.sum_HCF.sum(axis=0) for one in all_sums) / np.maximum(total_C, 1)[:, None]
    variances = []
    for one, count_C in zip(all_sums, counts_SC, strict=True):
        divisor_C1 = np.maximum(count_C, 1)[:, None]
        first = one.sum_HCF.sum(axis=0) / divisor_C1
        second = one.square_CF / divisor_C1
        spread = second - 2 * mean_CF * first + mean_CF**2
        variances.append(np.where(count_C[:, None] > 0, np.maximum(spread, 0), 0))
    similarity_SCC = np.stack([_similarity(one.unit_HCF.sum(axis=0)) for one in all_sums])
    similarity_CC = _nanmean(similarity_SCC)
    reliability_S = np.array([_split_half(one) for one in all_sums])
    return ClassStatistics(
        classes=classes,
        subjects=subjects,
        counts_SC=counts_SC,
        mean_CTD=mean_CF.reshape(-1, *token_shape).astype(np.float32),
        variance_SCTD=np.stack(variances)
        .reshape(len(subjects), -1, *token_shape)
        .astype(np.float32),
        similarity_SCC=similarity_SCC.astype(np.float32),
        similarity_CC=np.nan_to_num(similarity_CC).astype(np.float32),
        reliability_S=reliability_S,
        rank_one_share=rank_one_share(similarity_CC),
        base=base,
    )


def rank_one_share(similarity_CC: NDArray[Any], rounds: int = 200) -> float:
    """Return how much of the off-diagonal variance a_i * a_j explains, one number per class.

    NaN pairs are left out. Near 1 the matrix says how typical each class is, and nothing about
    which classes are alike: prototypes made with permuted labels look so, because every one of
    them is the common mean plus noise that shrinks with the number of images.
    """
    similarity = np.asarray(similarity_CC, np.float64)
    valid = np.isfinite(similarity) & ~np.eye(len(similarity), dtype=bool)
    values = similarity[valid]
    total = float(((values - values.mean()) ** 2).sum()) if values.size else 0.0
    if total <= 1e-12 * max(1.0, float((values**2).sum())):
        return 1.0
    filled = np.where(valid, similarity, 0.0)
    best = np.inf
    mean = max(abs(float(values.mean())), 1e-3) ** 0.5
    for start in (np.full(len(similarity), mean), np.linalg.eigh(filled)[1][:, -1]):
        number = start.copy()
        for _ in range(rounds):
            # A damped alternating least-squares step; undamped it can oscillate in sign.
            norm = (valid * number[None, :] ** 2).sum(axis=1)
            number = (number + filled @ number / np.maximum(norm, 1e-12)) / 2
        error = float((((similarity - np.outer(number, number))[valid]) ** 2).sum())
        best = min(best, error)
    return 1 - best / total


def check_statistics(statistics: ClassStatistics, min_reliability: float) -> None:
    """Refuse statistics that carry no semantics.

    Raises:
        DataError: one number per class explains most of S_ref, or its two halves disagree.
    """
    share = statistics.rank_one_share
    if share > LARGEST_RANK_ONE_SHARE:
        raise DataError(
            f"one number per class explains {share:.2f} of the variance between class pairs "
            f"(limit {LARGEST_RANK_ONE_SHARE}): the matrix says how typical each class is, not "
            "which classes are alike. Labels on the wrong images look so; check the categories of "
            "the shards, and that the base predicts better than chance"
        )
    measured = statistics.reliability_S[np.isfinite(statistics.reliability_S)]
    reliability = float(measured.mean()) if measured.size else float("nan")
    if not reliability >= min_reliability:
        raise DataError(
            f"class similarities from two halves of the images correlate {reliability:.2f} (limit "
            f"{min_reliability}, mean over subjects): too few images per class, or labels on the "
            "wrong images. Lower min_reliability only if you know why"
        )


def write_statistics(folder: Path, statistics: ClassStatistics, note: dict[str, Any]) -> None:
    """Write the statistics; the document comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("counts_SC", "mean_CTD", "variance_SCTD", "similarity_SCC", "similarity_CC")
    arrays = {name: getattr(statistics, name) for name in names}
    arrays["reliability_S"] = statistics.reliability_S
    atomic_write_bytes(folder / ARRAYS_NAME, encode_npz(arrays))
    document = {
        "format": _FORMAT,
        "version": 1,
        "classes": statistics.classes,
        "subjects": statistics.subjects,
        "rank_one_share": statistics.rank_one_share,
        "base": statistics.base,
        **note,
    }
    atomic_write_json(folder / DOCUMENT_NAME, document)


def read_statistics(folder: Path) -> ClassStatistics:
    """Return what ``write_statistics`` wrote.

    Raises:
        FormatError: the folder holds no whole statistics of this version.
    """
    try:
        document = json.loads((folder / DOCUMENT_NAME).read_text())
        with np.load(folder / ARRAYS_NAME, allow_pickle=False) as stored:
            arrays = dict(stored)
        if (document["format"], document["version"]) != (_FORMAT, 1):
            raise ValueError(f"format {document['format']!r}, version {document['version']}")
        return ClassStatistics(
            classes=tuple(document["classes"]),
            subjects=tuple(document["subjects"]),
            rank_one_share=float(document["rank_one_share"]),
            base=document["base"],
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{folder} holds no class statistics of this version ({error}): run `dist-decoder "
            "class-statistics`"
        ) from error


def _similarity(unit_sum_CF: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(unit_sum_CF, axis=1, keepdims=True)
    prototypes = unit_sum_CF / np.where(norms > 0, norms, np.nan)
    return np.einsum("cf,df->cd", prototypes, prototypes)


def _split_half(sums: ClassSums) -> float:
    """Return the correlation of off-diagonal similarities of both halves."""
    both = (sums.count_HC > 0).all(axis=0)
    if both.sum() < MIN_CLASSES:
        return float("nan")
    upper = np.triu_indices(int(both.sum()), k=1)
    first, second = (_similarity(sums.unit_HCF[half][both])[upper] for half in (0, 1))
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _nanmean(values_SCC: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.isfinite(values_SCC)
    count = known.sum(axis=0)
    total = np.where(known, values_SCC, 0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
