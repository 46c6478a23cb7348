"""Scores of the optimal decoder of a fabricated world, simulated on the gallery that is tested.

Axes: Q queries, M gallery images, K draws, d latent dimensions.

A decoder that scores significantly above them has seen the test images: proof of a leak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from data_tools.fabricate.world import SubjectModel

Array = NDArray[np.float64]


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
    world = subject.world
    num_images = len(gallery_Md)
    information_dd = subject.information_dd()
    covariance_dd = np.linalg.inv(information_dd)
    root_dd = np.linalg.cholesky(covariance_dd)
    project_Vd = (subject.weights_Vd / subject.sigma_V[:, None] ** 2) @ covariance_dd
    tau2 = world.config.tau**2
    marginal_dd = covariance_dd + (1 + tau2) * np.eye(len(covariance_dd))
    forward = np.empty((rounds, num_images))
    backward = np.empty((rounds, num_images))
    for r in range(rounds):
        u_Md = subject.respond(gallery_Md, generator) @ project_Vd
        noise_KMd = generator.standard_normal((draws, *u_Md.shape)) @ root_dd.T
        z_KMd = world.unwarp(u_Md + noise_KMd)
        likelihood_MM = _log_likelihood(z_KMd, gallery_Md, tau2)
        marginal_M = -0.5 * np.einsum("md,md->m", u_Md, np.linalg.solve(marginal_dd, u_Md.T).T)
        own = np.arange(num_images)
        forward[r] = likelihood_MM.argmax(axis=1) == own
        backward[r] = (likelihood_MM - marginal_M[:, None]).argmax(axis=0) == own
    return BayesScores(_score(forward), _score(backward), num_images)


def _log_likelihood(z_KMd: Array, gallery_Md: Array, tau2: float) -> Array:
    """Return (M trials, M candidates) log mean over draws of N(z; gallery, tau^2 I), up to const."""
    draws = len(z_KMd)
    out = np.empty((z_KMd.shape[1], len(gallery_Md)))
    square_M = (gallery_Md**2).sum(axis=1)
    for start in range(0, len(out), 64):
        z = z_KMd[:, start : start + 64].astype(np.float32)
        cross = z.reshape(-1, z.shape[-1]) @ gallery_Md.T.astype(np.float32)
        own = (z**2).sum(axis=-1)[..., None]
        exponent = -(own + square_M.astype(np.float32) - 2 * cross.reshape(*z.shape[:2], -1))
        out[start : start + 64] = logsumexp(exponent / np.float32(2 * tau2), axis=0)
    return out - np.log(draws)


def _score(hits_RM: Array) -> Score:
    per_image = hits_RM.mean(axis=0)
    return Score(float(per_image.mean()), float(hits_RM.std() / np.sqrt(hits_RM.size)))
