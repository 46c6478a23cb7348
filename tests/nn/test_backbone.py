"""Both mixers: what is said to act acts, and what is said to be dead is dead."""

import pytest
import torch
from torch.nn import functional as F

from dist_decoder.config.model import BackboneConfig
from dist_decoder.nn.backbone import MindEye2Mixer, ResidualBackbone, make_backbone
from dist_decoder.nn.initialise import initialise
from dist_decoder.nn.keyed import SampleKeys

L = 6


@torch.no_grad()
def scramble(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def latents_BL() -> torch.Tensor:
    return torch.randn(5, L, generator=torch.Generator().manual_seed(1))


def residual(**changes: object) -> ResidualBackbone:
    config = BackboneConfig(**{"blocks": 3, "hidden": 9, "dropout": 0.4, **changes})
    backbone = make_backbone(L, config)
    assert isinstance(backbone, ResidualBackbone)
    initialise(backbone, seed=2)
    return backbone


def test_residual_blocks_start_as_the_identity_and_then_act(latents_BL: torch.Tensor) -> None:
    backbone = residual()
    torch.testing.assert_close(backbone(latents_BL), latents_BL)
    scramble(backbone, 0)
    whole = backbone(latents_BL)
    for block in backbone.blocks:
        before = {name: value.clone() for name, value in block.state_dict().items()}
        scramble(block, 9)
        assert (backbone(latents_BL) - whole).abs().max() > 1e-2
        block.load_state_dict(before)


def test_a_residual_block_is_x_plus_mlp_of_layernorm(latents_BL: torch.Tensor) -> None:
    backbone = residual(blocks=1)
    scramble(backbone, 4)
    block = backbone.blocks[0]
    for x, y in zip(latents_BL, backbone(latents_BL), strict=True):
        spread = ((x - x.mean()) ** 2).mean().add(1e-5).sqrt()
        normed = (x - x.mean()) / spread * block.norm.weight + block.norm.bias
        hidden = block.up.weight @ normed + block.up.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        torch.testing.assert_close(y, x + block.down.weight @ hidden + block.down.bias)


def released_mixer(mixer: MindEye2Mixer, x_L: torch.Tensor) -> torch.Tensor:
    """Run the two-stream recursion of the released code on one sample at sequence length 1."""
    u, w, current = x_L[None], x_L[:, None], x_L[None]
    for dead, block in zip(mixer.dead_blocks, mixer.constants, strict=True):
        u = dead.down(F.gelu(dead.up(dead.norm(current)))) + u
        w = block.down(F.gelu(block.up(block.norm(u.mT)))) + w
        current = w.mT
    return current[0]


def test_mindeye2_closed_form_equals_the_released_recursion(latents_BL: torch.Tensor) -> None:
    mixer = make_backbone(L, BackboneConfig(mixer="mindeye2", blocks=3, dropout=0.5))
    assert isinstance(mixer, MindEye2Mixer)
    scramble(mixer, 5)
    expected = torch.stack([released_mixer(mixer, x_L) for x_L in latents_BL])
    torch.testing.assert_close(mixer(latents_BL), expected, rtol=1e-5, atol=1e-5)
    assert (expected - latents_BL).std() < 1e-5 < (expected - latents_BL).abs().max()


def test_mindeye2_dead_blocks_have_no_effect_and_do_not_train(latents_BL: torch.Tensor) -> None:
    mixer = make_backbone(L, BackboneConfig(mixer="mindeye2", blocks=2))
    scramble(mixer, 5)
    before = mixer(latents_BL)
    scramble(mixer.dead_blocks, 6)
    assert torch.equal(mixer(latents_BL), before)
    assert not any(p.requires_grad for p in mixer.dead_blocks.parameters())
    before.sum().backward()
    assert all(p.grad is not None for p in mixer.constants.parameters())


@pytest.mark.parametrize("mixer", ["residual", "mindeye2"])
def test_dropout_is_keyed_by_position_and_step(mixer: str, latents_BL: torch.Tensor) -> None:
    backbone = make_backbone(L, BackboneConfig(mixer=mixer, blocks=2, hidden=9, dropout=0.5))
    scramble(backbone, 7)
    keys = SampleKeys(seed=1, step=3, positions=(10, 11, 12, 13, 14))
    whole = backbone(latents_BL, keys)
    tail = backbone(latents_BL[3:], SampleKeys(1, 3, (13, 14)))
    torch.testing.assert_close(whole[3:], tail)
    for other in (SampleKeys(1, 4, keys.positions), SampleKeys(2, 3, keys.positions), None):
        assert (backbone(latents_BL, other) - whole).abs().max() > 1e-3


def test_dropout_rate_and_scale() -> None:
    from dist_decoder.nn.keyed import keyed_dropout

    keys = SampleKeys(0, 0, tuple(range(400)))
    dropped = keyed_dropout(torch.ones(400, 50), 0.3, keys, "x")
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.02
    torch.testing.assert_close(dropped[dropped > 0], torch.full_like(dropped[dropped > 0], 1 / 0.7))
    assert not keyed_dropout(torch.ones(2, 3), 1.0, SampleKeys(0, 0, (0, 1)), "x").any()
