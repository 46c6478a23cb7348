"""MindEye2's mixer at any length against a slow loop, and the proof that its blocks are dead."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_decoder.config.model import BackboneConfig
from dist_decoder.nn.backbone import MindEye2Mixer, ResidualBackbone
from dist_decoder.nn.keyed import SampleKeys

B, L = 2, 5
CONFIG = BackboneConfig(mixer="mindeye2", blocks=3, hidden=7, dropout=0.4)


@torch.no_grad()
def scrambled(mixer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in mixer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return mixer


def slow_mlp(block: torch.nn.Module, x: Tensor) -> Tensor:
    mean, variance = x.mean(), x.var(unbiased=False)
    normed = (x - mean) / torch.sqrt(variance + 1e-5) * block.norm.weight + block.norm.bias
    hidden = block.up.weight @ normed + block.up.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return block.down.weight @ hidden + block.down.bias


@torch.no_grad()
def test_sequences_follow_both_streams() -> None:
    mixer = scrambled(MindEye2Mixer(L, CONFIG, seq_len=3))
    x_BSL = torch.randn(B, 3, L, generator=torch.Generator().manual_seed(1))
    mixed = mixer(x_BSL)
    assert mixed.shape == (B, 3 * L)
    for x_SL, y in zip(x_BSL, mixed, strict=True):
        u, w, current = x_SL.clone(), x_SL.T.clone(), x_SL.clone()
        for wide, across in zip(mixer.dead_blocks, mixer.constants, strict=True):
            u = u + torch.stack([slow_mlp(wide, row) for row in current])
            w = w + torch.stack([slow_mlp(across, column) for column in u.T])
            current = w.T
        torch.testing.assert_close(y.view(3, L), current)


@torch.no_grad()
def test_at_length_one_wide_blocks_cannot_act() -> None:
    mixer = scrambled(MindEye2Mixer(L, CONFIG))
    x_BL = torch.randn(B, L, generator=torch.Generator().manual_seed(1))
    whole = mixer.mix(x_BL[:, None]).flatten(1)
    torch.testing.assert_close(whole, mixer(x_BL))
    added = whole - x_BL
    torch.testing.assert_close(added, added[0, 0].expand_as(added))
    scrambled(mixer.dead_blocks, seed=9)
    torch.testing.assert_close(mixer.mix(x_BL[:, None]).flatten(1), whole)
    assert not any(parameter.requires_grad for parameter in mixer.dead_blocks.parameters())


def test_at_length_one_wide_blocks_get_no_gradient() -> None:
    mixer = scrambled(MindEye2Mixer(L, CONFIG))
    mixer.requires_grad_(True)
    mixer.mix(torch.randn(B, 1, L)).square().sum().backward()
    found = {n: p.grad.abs().max() for n, p in mixer.named_parameters() if p.grad is not None}
    # Rounding leaves a trace in the weight of a norm over one number: hence relative.
    least = 1e-3 * max(found.values())
    for name, _ in mixer.named_parameters():
        alive = name in found and bool(found[name] > least)
        assert alive == (name.startswith("constants.") and "norm.weight" not in name), name


@torch.no_grad()
def test_longer_sequences_use_every_wide_block_but_see_dropout() -> None:
    mixer = scrambled(MindEye2Mixer(L, CONFIG, seq_len=3))
    x_BSL = torch.randn(B, 3, L, generator=torch.Generator().manual_seed(1))
    whole = mixer(x_BSL)
    for block in mixer.dead_blocks:
        kept = {name: value.clone() for name, value in block.state_dict().items()}
        scrambled(block, seed=4)
        assert (mixer(x_BSL) - whole).abs().max() > 1e-3
        block.load_state_dict(kept)
    assert (mixer(x_BSL, SampleKeys(0, 0, (0, 1))) - whole).abs().max() > 1e-3


@torch.no_grad()
def test_every_residual_block_acts() -> None:
    config = BackboneConfig(blocks=3, hidden=7)
    backbone = scrambled(ResidualBackbone(L, config))
    x_BL = torch.randn(B, L, generator=torch.Generator().manual_seed(1))
    whole = backbone(x_BL)
    for block in backbone.blocks:
        kept = {name: value.clone() for name, value in block.state_dict().items()}
        scrambled(block, seed=4)
        assert (backbone(x_BL) - whole).abs().max() > 1e-3
        block.load_state_dict(kept)
