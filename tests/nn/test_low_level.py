"""The low-level branch: sizes, keyed dropout, and gradients to all of it."""

from __future__ import annotations

import torch

from dist_decoder.nn.initialise import initialise
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.nn.low_level import LATENT_SHAPE, LowLevelBranch


def test_low_level_branch() -> None:
    branch = LowLevelBranch(6)
    initialise(branch, seed=3)
    latents_BL = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    pictures, maps = branch(latents_BL)
    assert pictures.shape == (3, *LATENT_SHAPE)
    assert maps.shape == (3, 49, 512)
    # The maps are a function of each of the 7 x 7 places after the shared normalisation.
    seeds = branch.norm(branch.seed(latents_BL).view(3, 64, 7, 7))
    x = branch.maps[0].weight[:, :, 0, 0] @ seeds[1, :, 4, 2]
    assert torch.allclose(branch.maps[0](seeds)[1, :, 4, 2], x, atol=1e-5)
    alone, _ = branch(latents_BL[1:2])
    torch.testing.assert_close(alone, pictures[1:2], rtol=1e-3, atol=1e-4)
    dropped, _ = branch(latents_BL, SampleKeys(0, 0, (4, 5, 6)))
    other, _ = branch(latents_BL[2:], SampleKeys(0, 0, (6,)))
    torch.testing.assert_close(other, dropped[2:], rtol=1e-3, atol=1e-4)
    assert (dropped - pictures).abs().max() > 1e-3
    (pictures.square().mean() + maps.square().mean()).backward()
    without = [name for name, p in branch.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias moves all scores of a query alike, which a softmax does not see.
    assert [name for name in without if "to_k.bias" not in name] == []
