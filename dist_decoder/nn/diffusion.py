"""Noise schedule, training target and sampler around the prior network.

Axes: B samples, T tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_decoder.config.model import PriorConfig
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.nn.prior import PriorNetwork

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

Predict = Callable[[Tensor, Tensor], Tensor]


class DiffusionPrior(nn.Module):
    """A diffusion model over image tokens, conditioned on the brain's tokens.

    Predicts x0; cosine schedule; loss on the raw difference of tokens.
    Source: BrainDiffusionPrior of MindEye2. Differs: timestep, noise and dropped conditions of a
    sample are keyed by its place in the global batch.
    """

    def __init__(self, config: PriorConfig, num_tokens: int, token_dim: int) -> None:
        super().__init__()
        self.config = config
        self.token_shape = (num_tokens, token_dim)
        self.net = PriorNetwork(num_tokens, token_dim, config.depth, config.heads, config.head_dim)
        self.scheduler = make_scheduler(config.timesteps)

    def forward(self, brain_BTD: Tensor, target_BTD: Tensor, keys: SampleKeys) -> Tensor:
        """Return the network's x0_BTD for targets noised at drawn timesteps."""
        device = brain_BTD.device
        drawn = keys.uniform("prior-choices", (3,), device)
        t_B = (drawn[:, 0] * self.config.timesteps).long().clamp_max(self.config.timesteps - 1)
        noise = keys.normal("prior-noise", self.token_shape, device)
        noisy = self.scheduler.add_noise(target_BTD.float(), noise, t_B)  # type: ignore[arg-type]
        drops = drawn[:, 1:] < self.config.cond_drop_prob
        return self.net(noisy, t_B, brain_BTD, drops[:, 0], drops[:, 1])

    @torch.no_grad()
    def sample(self, brain_BTD: Tensor, noises: Iterable[Tensor]) -> Tensor:
        """Return sampled tokens_BTD, float32.

        Args:
            brain_BTD: condition.
            noises: (B, T, D) standard normal draws: the start, then one per step but the last.
        """

        def predict(noisy_BTD: Tensor, t_B: Tensor) -> Tensor:
            return self.net(noisy_BTD, t_B, brain_BTD).float()

        return sample(
            predict,
            self.scheduler.alphas_cumprod.to(brain_BTD.device),
            noises,
            self.config.sample_steps,
        )


def make_scheduler(timesteps: int) -> DDPMScheduler:
    """Return the cosine schedule: f(i) = cos^2((i/T + .008) / 1.008 * pi/2), beta <= .999."""
    # Seconds to import: an error in the configuration must not wait for it.
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    # No parameters: a model that is made on the meta device and then loaded needs real numbers.
    with torch.device("cpu"):
        return DDPMScheduler(
            num_train_timesteps=timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            clip_sample=False,
        )


def sample_times(timesteps: int, steps: int) -> list[int]:
    """Return the visited timesteps, falling, with -1 (clean) at the end."""
    spaced = torch.linspace(-1.0, timesteps, steps + 1)[:-1]
    return [int(value) for value in spaced.int().flip(0)]


def sample(
    predict: Predict, alphas_cumprod: Tensor, noises: Iterable[Tensor], steps: int
) -> Tensor:
    """Run the stochastic sampler (eta 1) with a network that predicts x0.

    With a = abar[t-1] and a' = abar[t'-1] for the step t -> t':
    c1 = sqrt((1 - a/a')(1 - a')/(1 - a)), x' = sqrt(a') x0 + c1 z + sqrt(1 - a' - c1^2) eps, but
    eps is solved from x with abar[t]: the released sampler mixes the two, and published numbers
    come from it.

    Args:
        predict: (noisy_BTD, t_B) -> x0_BTD.
        alphas_cumprod: (timesteps,) abar.
        noises: start and one draw per step.
        steps: entries of ``sample_times``.

    Source: decoder inference of the released MindEyeV2 / DALLE2-pytorch ``p_sample_loop_ddim``.
    """
    shifted = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    times = sample_times(len(alphas_cumprod), steps)
    draws = iter(noises)
    x = next(draws)
    clean = x
    for now, following in pairwise(times):
        t_B = torch.full((len(x),), now, device=x.device, dtype=torch.long)
        clean = predict(x, t_B)
        if following < 0:
            break
        abar = alphas_cumprod[now]
        eps = (x / abar.sqrt() - clean) / (1 / abar - 1).sqrt()
        a, a_next = shifted[now], shifted[following]
        c1 = ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        c2 = (1 - a_next - c1**2).clamp_min(0).sqrt()
        x = a_next.sqrt() * clean + c1 * next(draws) + c2 * eps
    return clean
