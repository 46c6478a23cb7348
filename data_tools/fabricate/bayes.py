"""Scores of the optimal decoder of a fabricated world, simulated on the gallery that is tested.

Axes: Q queries, M gallery images, K draws, d latent dimensions.

A decoder that scores significantly above them has seen the test images: proof of a leak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    draws: int = 192,
) -> BayesScores:
    """Simulate the optimal rule: ``rounds`` fresh trials of every gallery image.

    brain_to_image: the candidate with the largest likelihood p(y | z_j). image_to_brain: among one
    trial of each image, the one with the largest p(y | z_i) / p(y).

    The likelihood of z given a trial is the average over draws of N(f^-1(u~ + J0^-1/2 eps); z,
    tau^2 I), u~ = J0^-1 W' Sigma^-1 y being the sufficient statistic. The marginal p(y) is Gaussian
    because f keeps isotropic Gaussians.
    """
    num_images = len(gallery_Md)
    information_dd = subject.information_dd()
    covariance_dd = np.linalg.inv(information_dd)
    root_dd = np.linalg.cholesky(covariance_dd).astype(np.float32)
    project_Vd = (subject.weights_Vd / subject.sigma_V[:, None] ** 2) @ covariance_dd
    tau2 = subject.world.config.tau**2
    marginal_dd = covariance_dd + (1 + tau2) * np.eye(len(covariance_dd))
    forward = np.empty((rounds, num_images))
    backward = np.empty((rounds, num_images))
    for r in range(rounds):
        u_Md = subject.respond(gallery_Md, generator) @ project_Vd
        z_dMK = _draws_of_latents(subject, u_Md, root_dd, draws, generator)
        likelihood_MM = _log_likelihood(z_dMK, gallery_Md, tau2)
        marginal_M = -0.5 * np.einsum("md,md->m", u_Md, np.linalg.solve(marginal_dd, u_Md.T).T)
        own = np.arange(num_images)
        forward[r] = likelihood_MM.argmax(axis=1) == own
        backward[r] = (likelihood_MM - marginal_M[:, None]).argmax(axis=0) == own
    return BayesScores(_score(forward), _score(backward), num_images)


def bayes_r2(
    subject: SubjectModel, z_Md: Array, generator: np.random.Generator, draws: int = 192
) -> Score:
    """Return R^2 of the posterior mean of z given one trial, over one trial of each image.

    The noisy latents n = z + tau xi have prior N(0, (1 + tau^2) I), which f keeps: u given a trial
    is Gaussian with precision J0 + I / (1 + tau^2), and E[z | n] = n / (1 + tau^2).
    """
    world = subject.world
    information_dd = subject.information_dd()
    total = 1 + world.config.tau**2
    posterior_dd = np.linalg.inv(information_dd + np.eye(len(information_dd)) / total)
    score_Md = subject.respond(z_Md, generator) @ (
        subject.weights_Vd / subject.sigma_V[:, None] ** 2
    )
    root_dd = np.linalg.cholesky(posterior_dd)
    noise_KMd = generator.standard_normal((draws, *z_Md.shape)) @ root_dd.T
    estimate_Md = world.unwarp(score_Md @ posterior_dd + noise_KMd).mean(axis=0) / total
    explained_M = 1 - ((z_Md - estimate_Md) ** 2).sum(axis=1) / (z_Md**2).sum(axis=1)
    return Score(float(explained_M.mean()), float(explained_M.std() / np.sqrt(len(explained_M))))


def _draws_of_latents(
    subject: SubjectModel,
    mean_Md: Array,
    root_dd: NDArray[np.float32],
    draws: int,
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """Return (d, M, K) f^-1(mean + root eps), K draws of eps ~ N(0, I) per trial."""
    num_trials, dim = mean_Md.shape
    noise = generator.standard_normal((dim, num_trials * draws), dtype=np.float32)
    u_dMK: NDArray[Any] = (root_dd @ noise).reshape(dim, num_trials, draws)
    u_dMK += mean_Md.T[:, :, None].astype(np.float32)
    # Latents lie first in memory: float32 and contiguous slices make this four times as fast.
    z_MKd: NDArray[Any] = subject.world.unwarp(np.moveaxis(u_dMK, 0, -1))
    return np.moveaxis(z_MKd, -1, 0)


def _log_likelihood(z_dMK: NDArray[np.float32], gallery_Md: Array, tau2: float) -> Array:
    """Return (M trials, M candidates) log mean over draws of N(z; gallery, tau^2 I), up to const.

    -|z - g|^2 / 2 comes out of one product of matrices with two extra columns. It is never
    positive, so nothing overflows, and a draw that underflows is too far away to count.
    """
    _, num_trials, draws = z_dMK.shape
    half_1MK = -np.square(z_dMK).sum(axis=0, keepdims=True) / 2
    half_M1 = -(gallery_Md**2).sum(axis=-1, keepdims=True) / 2
    left = np.concatenate([z_dMK, np.ones_like(half_1MK), half_1MK]) / np.float32(tau2)
    right = np.concatenate([gallery_Md, half_M1, np.ones_like(half_M1)], axis=-1)
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
