"""From scores to tables: what one subject's test trials say about one output of one model.

Axes: N test trials of one subject, M pool (its distinct test images), C classes, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dist_decoder.errors import DataError
from dist_decoder.eval.baseline import flatten
from dist_decoder.eval.categories import (
    CATEGORY,
    CATEGORY_PROTOCOL,
    Classes,
    category_chance,
    category_hits,
    truth_matrix,
)
from dist_decoder.eval.queries import QueryTable, TableKey
from dist_decoder.eval.retrieval import (
    BRAIN_TO_IMAGE,
    IMAGE_TO_BRAIN,
    PROTOCOLS,
    brain_to_image_hits,
    cosine_scores,
    image_to_brain_hits,
    repetitions_in_order,
    shuffled_brains,
)

SHUFFLES = 20
SHUFFLED_QUERIES = 10_000
"""Permutations that the shuffled control averages."""


@dataclass(frozen=True)
class Bayes:
    """The optimal single-trial score on this very gallery (fabricated worlds only)."""

    value: float
    se: float


@dataclass(frozen=True)
class SubjectTrials:
    """The test trials of one subject and the images they are ranked against."""

    dataset: str
    subject: str
    """Without the dataset."""
    holdout: bool
    pool_M: tuple[str, ...]
    """image_uids, sorted."""
    own_N: NDArray[np.int64]
    """Position of each trial's image in the pool."""
    repetition_N: NDArray[np.int64]
    trials_N: NDArray[np.str_]
    targets: dict[str, NDArray[np.float32]]
    """Kind of target (``pooled``, ``tokens``) -> (M, F) standardised, flattened."""
    categories_M: tuple[tuple[str, ...], ...]
    bayes: dict[str, Bayes] = field(default_factory=dict)
    """By metric."""
    repetitions: float = 1.0
    """Trials averaged in one row; the mean over rows where it differs."""

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.subject}"


def target_of(output: str) -> str:
    """Return which target an output is ranked against: the prior samples tokens."""
    return "tokens" if output == "prior" else output


def make_trials(
    name: str,
    image_N: NDArray[np.integer],
    uids_M: Sequence[str],
    trials_N: Sequence[str],
    targets: Mapping[str, NDArray[np.floating]],
    categories_M: Sequence[Sequence[str]],
    *,
    holdout: bool = False,
    bayes: dict[str, Bayes] | None = None,
    repetitions: float = 1.0,
) -> SubjectTrials:
    """Return the test trials of one subject (``dataset/subject``) with a pool sorted by name.

    Args:
        image_N: which of the M images each trial showed; an image's trials in recording order.
        uids_M: image_uid of each image.
        trials_N: identity of each trial.
        targets: kind of target -> (M, ...) standardised target of each image.
        categories_M: categories of each image.
        holdout: whether joint training never saw the subject.
        bayes: optimal scores by metric.
        repetitions: trials averaged in one row, on average.

    Raises:
        DataError: fewer than two images, or an image is listed twice.
    """
    if len(uids_M) < 2:
        raise DataError(f"{name} has {len(uids_M)} test images; retrieval needs at least two")
    pool, order_M = np.unique(np.asarray(uids_M, dtype=np.str_), return_index=True)
    if len(pool) != len(uids_M):
        raise DataError(f"{name} lists {len(uids_M) - len(pool)} test images twice")
    place_M = np.empty(len(pool), dtype=np.int64)
    place_M[order_M] = np.arange(len(pool))
    own_N = place_M[np.asarray(image_N)]
    dataset, _, subject = name.partition("/")
    return SubjectTrials(
        dataset=dataset,
        subject=subject,
        holdout=holdout,
        pool_M=tuple(pool.tolist()),
        own_N=own_N,
        repetition_N=repetitions_in_order(own_N),
        trials_N=np.asarray(trials_N, dtype=np.str_),
        targets={
            kind: flatten(np.asarray(values)[order_M]).astype(np.float32)
            for kind, values in targets.items()
        },
        categories_M=tuple(tuple(categories_M[image]) for image in order_M),
        bayes=bayes or {},
        repetitions=repetitions,
    )


@dataclass(frozen=True)
class Scores:
    """Cosines of one output's predictions with the pool and with the class means."""

    pool_NM: NDArray[np.float32]
    class_NC: NDArray[np.float32] | None


def score(
    trials: SubjectTrials,
    classes: Classes | None,
    output: str,
    predictions_NF: NDArray[np.floating],
) -> Scores:
    """Rank the predictions of an output; rows may be a part of the trials."""
    kind = target_of(output)
    pool_NM = cosine_scores(predictions_NF, trials.targets[kind])
    class_NC = None
    if classes is not None and kind in classes.means:
        class_NC = cosine_scores(predictions_NF, classes.means[kind])
    return Scores(pool_NM, class_NC)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Return the scores of consecutive parts of the trials as one."""
    classes = [part.class_NC for part in parts if part.class_NC is not None]
    return Scores(
        np.concatenate([part.pool_NM for part in parts]),
        np.concatenate(classes) if classes else None,
    )


def tables(
    trials: SubjectTrials,
    classes: Classes | None,
    scores: Scores,
    model: str,
    output: str,
    seed: int,
    stage: str = "final",
) -> list[QueryTable]:
    """Return the tables of all metrics for the scores of all trials."""
    found = []
    values = _retrieval_values(trials, scores, trials.own_N)
    for metric, values_N in values.items():
        found.append(_table(trials, model, output, metric, seed, stage, values_N))
    if classes is not None and scores.class_NC is not None:
        truth_NC = truth_matrix(
            [trials.categories_M[image] for image in trials.own_N], classes.names
        )
        known_N = np.asarray(truth_NC.any(axis=1))
        if known_N.any():
            hits = category_hits(scores.class_NC[known_N], truth_NC[known_N])
            found.append(
                _category_table(trials, model, output, seed, stage, hits, truth_NC, known_N)
            )
    return found


def shuffled_tables(
    trials: SubjectTrials, scores: Scores, output: str, seed: int
) -> list[QueryTable]:
    """Return the control: the same predictions, each brain given to an image at random.

    Values are means over ``SHUFFLES`` permutations, more where a subject has few trials, so that
    the draw of the permutations adds little to the interval. Anything but chance means that the
    ranking knows the image without looking at the brain.
    """
    shuffles = max(SHUFFLES, -(-SHUFFLED_QUERIES // len(trials.own_N)))
    sums: dict[str, NDArray[np.float64]] = {}
    for draw in range(shuffles):
        shuffled_N = shuffled_brains(trials.own_N, trials.repetition_N, seed, trials.name, draw)
        for metric, values_N in _retrieval_values(trials, scores, shuffled_N).items():
            # A trial of the table stays with its own image: the values are those of the image
            # that it was given, hence the change back to the order of images.
            back_N = _same_image_order(shuffled_N, trials.own_N)
            sums[metric] = sums.get(metric, np.zeros(len(values_N))) + values_N[back_N]
    return [
        _table(trials, "shuffled", output, metric, seed, "final", total_N / shuffles)
        for metric, total_N in sums.items()
    ]


def _same_image_order(shuffled_N: NDArray[np.int64], own_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return rows of ``shuffled_N`` such that ``shuffled_N[rows] == own_N``."""
    rows = np.empty(len(own_N), dtype=np.int64)
    rows[np.argsort(own_N, kind="stable")] = np.argsort(shuffled_N, kind="stable")
    return rows


def _retrieval_values(
    trials: SubjectTrials, scores: Scores, own_N: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    pool_NM = scores.pool_NM
    if pool_NM.shape != (len(trials.own_N), len(trials.pool_M)):
        raise DataError(
            f"{trials.name}: scores {pool_NM.shape} for {len(trials.own_N)} trials and "
            f"{len(trials.pool_M)} images"
        )
    forward = brain_to_image_hits(pool_NM, own_N)
    backward = image_to_brain_hits(pool_NM, own_N, trials.repetition_N)
    return {
        BRAIN_TO_IMAGE: forward.astype(np.float64),
        IMAGE_TO_BRAIN: backward.astype(np.float64),
    }


def _table(
    trials: SubjectTrials,
    model: str,
    output: str,
    metric: str,
    seed: int,
    stage: str,
    values_N: NDArray[np.floating],
) -> QueryTable:
    bayes = trials.bayes.get(metric)
    pool = len(trials.pool_M)
    return QueryTable(
        key=TableKey(
            trials.dataset,
            trials.subject,
            model,
            output,
            metric,
            seed,
            "start" if stage == "start" else "final",
        ),
        protocol=PROTOCOLS[metric],
        chance=1.0 / pool,
        pool=pool,
        bayes=bayes.value if bayes else None,
        bayes_se=bayes.se if bayes else 0.0,
        holdout=trials.holdout,
        values_Q=values_N.astype(np.float32),
        images_Q=np.asarray(trials.pool_M)[trials.own_N],
        trials_Q=trials.trials_N,
        repetitions=trials.repetitions,
    )


def _category_table(
    trials: SubjectTrials,
    model: str,
    output: str,
    seed: int,
    stage: str,
    hits: NDArray[np.bool_],
    truth_NC: NDArray[np.bool_],
    known_N: NDArray[np.bool_],
) -> QueryTable:
    return QueryTable(
        key=TableKey(
            trials.dataset,
            trials.subject,
            model,
            output,
            CATEGORY,
            seed,
            "start" if stage == "start" else "final",
        ),
        protocol=CATEGORY_PROTOCOL,
        chance=category_chance(truth_NC[known_N]),
        pool=truth_NC.shape[1],
        bayes=None,
        bayes_se=0.0,
        holdout=trials.holdout,
        values_Q=hits.astype(np.float32),
        images_Q=np.asarray(trials.pool_M)[trials.own_N][known_N],
        trials_Q=trials.trials_N[known_N],
        repetitions=trials.repetitions,
    )
