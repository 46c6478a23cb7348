"""A trained prior says what its brain saw, and not more: against the same prior, other brains.

Axes: B samples, M images, T tokens, D token width.
"""

import numpy as np
import torch
from torch import Tensor

from dist_decoder.config.model import PriorConfig
from dist_decoder.eval.retrieval import brain_to_image_hits, cosine_scores
from dist_decoder.losses.regression import squared_error_sum
from dist_decoder.nn.diffusion import DiffusionPrior
from dist_decoder.nn.initialise import initialise
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.stats.intervals import cluster_interval, paired_interval

T, D, M, STEPS = 2, 8, 60, 150
CONFIG = PriorConfig(depth=2, heads=2, head_dim=8, timesteps=20, sample_steps=6, cond_drop_prob=0.1)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brains_of(images_BTD: Tensor, seed: int) -> Tensor:
    """Return tokens as a token head gives them: another basis, noisy."""
    basis = torch.linalg.qr(draw(D, D, seed=99))[0]
    return images_BTD @ basis + 0.5 * draw(*images_BTD.shape, seed=seed)


def test_samples_of_the_own_brain_beat_those_of_shuffled_brains() -> None:
    prior = DiffusionPrior(CONFIG, T, D)
    initialise(prior, seed=0)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for step in range(STEPS):
        images = draw(64, T, D, seed=1000 + step)
        keys = SampleKeys(0, step, tuple(range(64)))
        predicted = prior(brains_of(images, seed=5000 + step), images, keys)
        loss = squared_error_sum(predicted, images) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = draw(M, T, D, seed=1)
    brains = brains_of(unseen, seed=2)
    noises = [draw(M, T, D, seed=10 + index) for index in range(CONFIG.sample_steps + 1)]
    others = torch.roll(torch.arange(M), 7)
    hits = {
        name: brain_to_image_hits(
            cosine_scores(
                prior.sample(condition, noises).flatten(1).numpy(), unseen.flatten(1).numpy()
            ),
            np.arange(M),
        )
        for name, condition in (("own", brains), ("shuffled", brains[others]))
    }
    difference = paired_interval(hits["own"], hits["shuffled"], np.arange(M))
    assert difference.low > 0.1
    shuffled = cluster_interval(hits["shuffled"].astype(float), np.arange(M))
    assert shuffled.low <= 1 / M <= shuffled.high
