"""Every table of the cosine noise schedule, as the released code stores them in checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def noise_schedule(timesteps: int) -> dict[str, Tensor]:
    """Return the 13 buffers of the schedule by their released names, each (timesteps,) float32.

    f(i) = cos^2((i/T + .008) / 1.008 * pi/2), beta_i = min(1 - f(i+1)/f(i), .999), in float64
    until the end. ``posterior_*`` describe q(x_{t-1} | x_t, x_0).

    Source: Nichol and Dhariwal 2021, equation 17; names of DALLE2-pytorch's NoiseScheduler.
    """
    steps = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64)
    f = ((steps / timesteps + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(0, 0.999)
    alphas = 1 - betas
    abar = alphas.cumprod(dim=0)
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    tables = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance,
        # The first variance is zero: its logarithm is cut off.
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - abar),
        "p2_loss_weight": torch.ones_like(abar),
    }
    return {name: table.float() for name, table in tables.items()}
