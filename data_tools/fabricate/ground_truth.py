"""What is known about a fabricated world, and the best score that any decoder can reach in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.fabricate.bayes import BayesScores, Score, bayes_r2, bayes_scores
from data_tools.fabricate.catalogue import Catalogue, Picture, latent_class
from data_tools.fabricate.subjects import FabricatedSubject
from dist_decoder.rng import numpy_generator

FORMAT = "dist-decoder-ground-truth"
VERSION = 1
MIN_QUERIES = 6500
"""Simulated queries per subject: the standard error stays below .0063 at any score."""
_DRAWS_BUDGET = 40_000
_R2_IMAGES = 400


@dataclass(frozen=True)
class Participant:
    """A subject and the pictures it saw."""

    subject: FabricatedSubject
    gallery: tuple[Picture, ...]
    """Its distinct test images."""
    seen: tuple[Picture, ...]
    """All its distinct images."""


def subject_scores(participant: Participant) -> tuple[BayesScores, Score]:
    """Return the optimal single-trial retrieval on the subject's own gallery, and the optimal R2.

    The R2 is over the latents of the same images.
    """
    subject = participant.subject
    seed = subject.catalogue.seed
    gallery_Md = subject.catalogue.latents(participant.gallery)
    rounds = -(-MIN_QUERIES // len(gallery_Md))
    draw = numpy_generator(seed, "bayes", subject.key)
    # Small galleries belong to subjects with few voxels, where more draws matter and cost little.
    draws = 2 ** int(np.log2(np.clip(_DRAWS_BUDGET / len(gallery_Md), 128, 512)))
    scores = bayes_scores(subject.model, gallery_Md, rounds, draw, draws)
    repeated = np.resize(gallery_Md, (max(_R2_IMAGES, len(gallery_Md)), gallery_Md.shape[1]))
    return scores, bayes_r2(subject.model, repeated, numpy_generator(seed, "r2", subject.key))


def summary(catalogue: Catalogue, participants: Sequence[Participant]) -> dict[str, Any]:
    """Return ``ground_truth.json``."""
    subjects = {}
    for participant in participants:
        model = participant.subject.model
        scores, r2 = subject_scores(participant)
        subjects[participant.subject.key] = {
            "num_voxels": model.num_voxels,
            "pool": scores.pool,
            "bayes": {
                "brain_to_image_top1": _score(scores.brain_to_image_top1),
                "image_to_brain_top1": _score(scores.image_to_brain_top1),
            },
            "r2": _score(r2),
            "ncsnr_median": round(float(np.median(model.ncsnr_V)), 6),
        }
    return {
        "format": FORMAT,
        "version": VERSION,
        "seed": catalogue.seed,
        "subjects": subjects,
        "shared_images": _shared(participants),
    }


def arrays(catalogue: Catalogue, participants: Sequence[Participant]) -> dict[str, NDArray[Any]]:
    """Return ``ground_truth.npz``.

    ``W_<dataset>_<subject>`` (V, d), ``sigma_...`` and ``ncsnr_...`` (V,) in the voxel order of
    the files; ``A`` (m, d) embedding; ``B`` (3, blocks, d) paint; ``uids``, ``labels``,
    ``classes`` and ``z`` (M, d) of every picture that a subject saw.
    """
    pictures = {p.uid: p for participant in participants for p in participant.seen}
    ordered = [pictures[uid] for uid in sorted(pictures)]
    num_classes = catalogue.config.num_categories
    out: dict[str, NDArray[Any]] = {
        "A": catalogue.world.embedding_md,
        "B": catalogue.world.paint_d,
        "uids": np.asarray([p.uid for p in ordered]),
        "labels": np.asarray([p.label for p in ordered]),
        "classes": np.asarray([latent_class(p.label, num_classes) for p in ordered]),
        "z": catalogue.latents(ordered),
    }
    for participant in participants:
        model = participant.subject.model
        name = participant.subject.key.replace("/", "_")
        out[f"W_{name}"] = model.weights_Vd
        out[f"sigma_{name}"] = model.sigma_V
        out[f"ncsnr_{name}"] = model.ncsnr_V
    return out


def _shared(participants: Sequence[Participant]) -> dict[str, list[str]]:
    """Return the uids that two datasets have in common, by ``first+second``."""
    seen: dict[str, set[str]] = {}
    for participant in participants:
        uids = seen.setdefault(participant.subject.dataset, set())
        uids.update(picture.uid for picture in participant.seen)
    return {f"{a}+{b}": sorted(seen[a] & seen[b]) for a, b in combinations(seen, 2)}


def _score(score: Score) -> dict[str, float]:
    return {"value": round(score.value, 6), "se": round(score.se, 6)}
