"""Scores of the optimal decoder of a fabricated world, simulated on the gallery that is tested.

Axes: Q queries, M gallery images, K draws, d latent dimensions.

A decoder that scores significantly above them has seen the test images: proof of a leak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from data_tools.fabricate.world import SubjectModel

Array = NDArray[np.float64]

_TRIALS_AT_ONCE = 4
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Score:
    """An expected score and the standard error of its simulation."""

    value: float
    se: float


@dataclass(frozen=True)
class BayesScores:
    """Optimal single-trial retrieval on one gallery."""

    brain_to_image_top1: Score
    image_to_brain_top1: Score
    pool: int


def bayes_scores(
    subject: SubjectModel,
    gallery_Md: Array,
    rounds: int,
    generator: np.random.Generator,
    draws: int = 256,
) -> BayesScores:
    """Simulate the optimal rule: ``rounds`` fresh trials of every gallery image.

    brain_to_image: the candidate with the largest likelihood p(y | z_j). image_to_brain: among one
    trial of each image, the one with the largest p(y | z_i) / p(y).

    p(y | z) / p(y) is the mean of p(u | z) / p(u) over the posterior of u given y alone, which is
    Gaussian because f keeps isotropic Gaussians; p(u | z) = N(f^-1(u); z, tau^2 I).

    Args:
        subject: its encoding model.
        gallery_Md: latents of the candidates.
        rounds: simulated trials of every candidate.
        generator: of the trials and draws.
        draws: posterior draws per trial, a power of 2; few bias the scores of subjects with little
            information downwards (.005 at 128 draws for 115 voxels).
    """
    tau2 = subject.world.config.tau**2
    own = np.arange(len(gallery_Md))
    forward = np.empty((rounds, len(gallery_Md)))
    backward = np.empty((rounds, len(gallery_Md)))
    points_dK = _normal_points(gallery_Md.shape[1], draws, generator)
    for r in range(rounds):
        n_dMK = _posterior_draws(subject, subject.respond(gallery_Md, generator), points_dK)
        ratio_MM = _log_ratio(n_dMK, gallery_Md, tau2)
        forward[r] = ratio_MM.argmax(axis=1) == own
        backward[r] = ratio_MM.argmax(axis=0) == own
    return BayesScores(_score(forward), _score(backward), len(gallery_Md))


def bayes_r2(
    subject: SubjectModel, z_Md: Array, generator: np.random.Generator, draws: int = 256
) -> Score:
    """Return R^2 of the posterior mean of z given one trial, over one trial of each image.

    The noisy latents n = f^-1(u) = z + tau xi have E[z | n] = n / (1 + tau^2).
    """
    total = 1 + subject.world.config.tau**2
    points_dK = _normal_points(z_Md.shape[1], draws, generator)
    n_dMK = _posterior_draws(subject, subject.respond(z_Md, generator), points_dK)
    estimate_Md = n_dMK.mean(axis=-1).T / total
    explained_M = 1 - ((z_Md - estimate_Md) ** 2).sum(axis=1) / (z_Md**2).sum(axis=1)
    return Score(float(explained_M.mean()), float(explained_M.std() / np.sqrt(len(explained_M))))


def _posterior_draws(
    subject: SubjectModel, y_MV: Array, points_dK: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return (d, M, K) draws of n = f^-1(u) given one trial.

    u has prior N(0, (1 + tau^2) I), as n has, and its posterior is Gaussian with precision
    J0 + I / (1 + tau^2). All trials share the quasi-random points: half as many are needed as of
    independent ones.
    """
    dim = subject.weights_Vd.shape[1]
    total = 1 + subject.world.config.tau**2
    covariance_dd = np.linalg.inv(subject.information_dd() + np.eye(dim) / total)
    project_Vd = (subject.weights_Vd / subject.sigma_V[:, None] ** 2) @ covariance_dd
    root_dd = np.linalg.cholesky(covariance_dd).astype(np.float32)
    mean_Md = (y_MV @ project_Vd).astype(np.float32)
    u_dMK: NDArray[Any] = mean_Md.T[:, :, None] + (root_dd @ points_dK)[:, None, :]
    # Latents lie first in memory: float32 and contiguous slices make this four times as fast.
    n_MKd: NDArray[Any] = subject.world.unwarp(np.moveaxis(u_dMK, 0, -1))
    return np.moveaxis(n_MKd, -1, 0)


def _normal_points(dim: int, count: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Return (dim, count) scrambled Sobol points as standard normal draws."""
    # Here, because it takes longer to import than a second call of fabricate needs.
    from scipy.stats import qmc

    uniform_Kd = qmc.Sobol(dim, scramble=True, rng=generator).random(count)
    return ndtri(np.clip(uniform_Kd.T, 1e-6, 1 - 1e-6)).astype(np.float32)


def _log_ratio(n_dMK: NDArray[np.float32], gallery_Md: Array, tau2: float) -> Array:
    """Return (M trials, M candidates) log mean over draws of p(n | z) / p(n), up to a constant.

    The exponent -|n - z|^2 / (2 tau^2) + |n|^2 / (2 (1 + tau^2)) is one product of matrices with
    two extra columns. It is at most |z|^2 / 2, so nothing overflows, and a draw that underflows
    is too far away to count.
    """
    _, num_trials, draws = n_dMK.shape
    half_1MK = np.square(n_dMK).sum(axis=0, keepdims=True) * (0.5 / (1 + tau2) - 0.5 / tau2)
    half_M1 = -(gallery_Md**2).sum(axis=-1, keepdims=True) / (2 * tau2)
    left = np.concatenate([n_dMK, np.ones_like(half_1MK), half_1MK]).astype(np.float32)
    right = np.concatenate([gallery_Md / tau2, half_M1, np.ones_like(half_M1)], axis=-1)
    right = right.astype(np.float32)
    out = np.empty((num_trials, len(gallery_Md)))
    for start in range(0, num_trials, _TRIALS_AT_ONCE):
        part = left[:, start : start + _TRIALS_AT_ONCE]
        exponent = right @ part.reshape(len(part), -1)
        np.exp(exponent, out=exponent)
        total = exponent.reshape(len(right), -1, draws).sum(axis=-1)
        out[start : start + _TRIALS_AT_ONCE] = np.log(np.maximum(total, _TINY)).T
    return out - np.log(draws)


def _score(hits_RM: Array) -> Score:
    return Score(float(hits_RM.mean()), float(hits_RM.std() / np.sqrt(hits_RM.size)))
