"""A world whose image-to-voxel model is known, and in which a linear decoder is not optimal.

Axes: M images, N trials, V voxels, d latent dimensions, m embedding width, T tokens, D token width.

Images have latents z on the sphere of radius sqrt(d). Their embedding is e = A z with orthonormal
A. Brains see ``u = f(z + tau xi)``: f rotates pairs of latents by angles that two context latents
set. f is invertible, keeps volume, and is the same for all subjects and datasets, so that a
backbone shared by all of them can learn its inverse and a linear map cannot. Voxel v answers
``y_v = w_v' u + sigma_v eta`` with total variance 1 and a wanted ncsnr.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_decoder.config.data import FabricateConfig
from dist_decoder.errors import ConfigError
from dist_decoder.rng import numpy_generator

Array = NDArray[np.float64]

GRID = 8
"""Pictures are GRID x GRID blocks per colour channel."""
GREY = 128.0
CONTRAST = 60.0
"""Grey levels per unit of a block's value."""
NUM_TOKENS = 4
TOKEN_DIM = 32
TEMPLATE_DIRECTIONS = 64
"""Voxel directions that all subjects share."""
MIN_PRIVATE_SHARE = 0.05
"""Least share of the noise variance that is private to a voxel; caps ncsnr."""


@dataclass(frozen=True)
class SubjectModel:
    """Encoding model of one subject: responses have variance 1 per voxel."""

    world: World
    weights_Vd: Array
    sigma_V: Array
    ncsnr_V: Array

    @property
    def num_voxels(self) -> int:
        return len(self.sigma_V)

    def respond(self, z_Nd: Array, generator: np.random.Generator) -> Array:
        """Return (N, V) single-trial responses to images with latents ``z_Nd``."""
        noisy_Nd = z_Nd + self.world.config.tau * generator.standard_normal(z_Nd.shape)
        private_NV = generator.standard_normal((len(z_Nd), self.num_voxels)) * self.sigma_V
        return self.world.warp(noisy_Nd) @ self.weights_Vd.T + private_NV

    def information_dd(self) -> Array:
        """Return J0 = W' Sigma^-1 W, the Fisher information on u without shared noise."""
        return (self.weights_Vd / self.sigma_V[:, None] ** 2).T @ self.weights_Vd


class World:
    """Latents, embeddings, pictures and subjects of one seed."""

    def __init__(self, config: FabricateConfig, seed: int) -> None:
        check_dimensions(config)
        self.config, self.seed = config, seed
        d, m = config.latent_dim, config.embedding_dim
        self.embedding_md = _orthonormal(numpy_generator(seed, "embedding"), m, d)
        self.class_means_Cd = numpy_generator(seed, "classes").standard_normal(
            (config.num_categories, d)
        )
        blocks = GRID * GRID
        self.paint_d = np.stack(
            [_orthonormal(numpy_generator(seed, "paint", c), blocks, d) for c in range(3)]
        )
        self.token_maps_TDm = numpy_generator(seed, "tokens").standard_normal(
            (NUM_TOKENS, TOKEN_DIM, m)
        ) / np.sqrt(m)
        template = numpy_generator(seed, "template").standard_normal((TEMPLATE_DIRECTIONS, d))
        self.template_d = template / np.linalg.norm(template, axis=1, keepdims=True)

    # images

    def image(self, uid: str, category: int) -> Array:
        """Return the (d,) latents of an image; they depend on its uid, not on its dataset."""
        rho = self.config.rho
        own = numpy_generator(self.seed, "image", uid).standard_normal(self.config.latent_dim)
        z = np.sqrt(rho) * self.class_means_Cd[category] + np.sqrt(1 - rho) * own
        return z * np.sqrt(len(z)) / np.linalg.norm(z)

    def latents(self, uids: Sequence[str], categories: Sequence[int]) -> Array:
        """Return (M, d) latents."""
        return np.stack([self.image(u, c) for u, c in zip(uids, categories, strict=True)])

    def embed(self, z_Md: Array) -> Array:
        """Return (M, m) embeddings e = A z."""
        return z_Md @ self.embedding_md.T

    def picture(self, z_d: Array, size_px: int) -> NDArray[np.uint8]:
        """Return the (size, size, 3) picture; the side must be a multiple of GRID.

        Each colour channel holds its own orthonormal read-out of z, one grey value per block.
        """
        values_3gg = (self.paint_d @ z_d).reshape(3, GRID, GRID)
        levels = np.clip(np.rint(GREY + CONTRAST * values_3gg), 0, 255).astype(np.uint8)
        edges = np.arange(size_px) * GRID // size_px
        return np.ascontiguousarray(levels[:, edges][:, :, edges].transpose(1, 2, 0))

    def encoder_parameters(self) -> dict[str, Array]:
        """Return what the analytic encoder needs to recover e and the tokens from pixels."""
        d = self.config.latent_dim
        read_out = self.paint_d.transpose(2, 0, 1).reshape(d, -1) / (3 * CONTRAST)
        return {
            "read_out": read_out,
            "offset": np.asarray(GREY),
            "embedding": self.embedding_md,
            "token_maps": self.token_maps_TDm,
            "grid": np.asarray(GRID),
        }

    # brains

    def warp(self, z_Nd: Array) -> Array:
        """Return f(z): pairs of latents rotated by omega times a context latent."""
        return self._rotate(z_Nd, self.config.omega)

    def unwarp(self, u_Nd: Array) -> Array:
        """Return the inverse of f."""
        return self._rotate(u_Nd, -self.config.omega)

    def _rotate(self, x_Nd: Array, omega: float) -> Array:
        k = self.config.context_dims
        # Keeping the memory order makes every slice contiguous for callers with latents first.
        out = x_Nd.copy(order="K")
        cosines = [np.cos(omega * x_Nd[..., i]) for i in range(k)]
        sines = [np.sin(omega * x_Nd[..., i]) for i in range(k)]
        for pair, start in enumerate(range(k, self.config.latent_dim, 2)):
            cosine, sine = cosines[pair % k], sines[pair % k]
            first, second = x_Nd[..., start], x_Nd[..., start + 1]
            out[..., start] = cosine * first - sine * second
            out[..., start + 1] = sine * first + cosine * second
        return out

    def signal_variance_d(self) -> Array:
        """Return Var over images of E[u | z], per dimension (1 for context, less for pairs).

        Noise in the context blurs the rotation: E[R(omega (c + tau xi))] = exp(-(omega tau)^2 / 2)
        R(omega c).
        """
        config = self.config
        variance = np.full(config.latent_dim, np.exp(-((config.omega * config.tau) ** 2)))
        variance[: config.context_dims] = 1.0
        return variance

    def subject(self, name: str, num_voxels: int) -> SubjectModel:
        """Return the encoding model of ``dataset/subject`` with that many voxels."""
        config = self.config
        generator = numpy_generator(self.seed, "subject", name)
        shared = self.template_d[generator.integers(len(self.template_d), size=num_voxels)]
        own = generator.standard_normal(shared.shape) / np.sqrt(config.latent_dim)
        direction = shared + config.delta * own
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        signal_d = self.signal_variance_d()
        signal_V = direction**2 @ signal_d
        shared_noise_V = direction**2 @ (1 + config.tau**2 - signal_d)
        ncsnr_V = generator.gamma(4.0, 0.11, size=num_voxels)
        if config.tau > 0 or config.omega > 0:
            cap_V = np.sqrt((1 - MIN_PRIVATE_SHARE) * signal_V / np.maximum(shared_noise_V, 1e-12))
            ncsnr_V = np.minimum(ncsnr_V, cap_V)
        scale2_V = ncsnr_V**2 / ((1 + ncsnr_V**2) * signal_V)
        sigma_V = np.sqrt(1 / (1 + ncsnr_V**2) - scale2_V * shared_noise_V)
        return SubjectModel(self, direction * np.sqrt(scale2_V)[:, None], sigma_V, ncsnr_V)


def check_dimensions(config: FabricateConfig) -> None:
    """Refuse dimensions that the world cannot have.

    Raises:
        ConfigError: naming the keys.
    """
    pairs, odd = divmod(config.latent_dim - config.context_dims, 2)
    if pairs < 1 or odd:
        raise ConfigError(
            "fabricate.latent_dim - fabricate.context_dims must be even and positive, not "
            f"{config.latent_dim} - {config.context_dims}"
        )
    limit = min(config.embedding_dim, GRID * GRID)
    if config.latent_dim > limit:
        raise ConfigError(
            f"fabricate.latent_dim is {config.latent_dim}; it can be at most {limit} "
            f"(embedding_dim {config.embedding_dim}, picture blocks {GRID * GRID})"
        )


def _orthonormal(generator: np.random.Generator, rows: int, columns: int) -> Array:
    q, r = np.linalg.qr(generator.standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))
