"""Adapters: they start as nothing, train alone with the ridge layer, and merge exactly."""

import pytest
import torch

from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.lora import add_lora, merge_lora

CONFIG = ModelConfig(
    latent_dim=6,
    backbone=BackboneConfig(blocks=2, hidden=9, dropout=0),
    prior=PriorConfig(depth=1, heads=2, head_dim=4),
)


@torch.no_grad()
def model() -> Decoder:
    made = Decoder(CONFIG, {"nsd/subj07": 7}, 5, (3, 4), seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return made


def outputs(decoder: Decoder) -> dict[str, torch.Tensor]:
    voxels = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    return decoder({"nsd/subj07": voxels}, {"nsd/subj07": torch.arange(4)}, 4)


def test_adapters_start_as_nothing_and_alone_are_trainable() -> None:
    plain, adapted = model(), model()
    layers = add_lora(adapted, LoraConfig(rank=2), seed=3)
    assert layers == [
        f"middle.backbone.blocks.{block}.{part}" for block in range(2) for part in ("up", "down")
    ]
    torch.testing.assert_close(outputs(adapted)["pooled"], outputs(plain)["pooled"])
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("ends.ridge.") for name in trainable)
    assert sum(".lora_" in name for name in trainable) == 8
    outputs(adapted)["pooled"].square().sum().backward()
    for name, parameter in adapted.named_parameters():
        # A gets none while B is zero; everything frozen gets none at all.
        expected = name in trainable and ".lora_A." not in name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == expected, name


def test_start_of_adapters_depends_on_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        adapted = model()
        add_lora(adapted, LoraConfig(rank=2), seed)
        return next(p for name, p in adapted.named_parameters() if ".lora_A." in name)

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_merged_model_predicts_the_same_and_is_plain() -> None:
    adapted = model()
    add_lora(adapted, LoraConfig(rank=2, alpha=6, targets=("backbone", "pooled")), seed=3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    before = outputs(adapted)
    assert (before["pooled"] - outputs(model())["pooled"]).abs().max() > 1e-3
    merge_lora(adapted)
    for name, value in outputs(adapted).items():
        torch.testing.assert_close(value, before[name])
    assert {name for name, _ in adapted.named_parameters()} == {
        name for name, _ in model().named_parameters()
    }


def test_alpha_and_rank_act() -> None:
    def pooled(**changes: object) -> torch.Tensor:
        adapted = model()
        add_lora(adapted, LoraConfig.model_validate({"rank": 2, "alpha": 8.0, **changes}), seed=3)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_B." in name:
                    parameter.fill_(0.1)
        return outputs(adapted)["pooled"]

    for changes in ({"alpha": 1.0}, {"rank": 3}, {"rank": 0}, {"targets": ("pooled",)}):
        assert (pooled(**changes) - pooled()).abs().max() > 1e-4


def test_a_part_without_layers_is_refused() -> None:
    made = Decoder(
        CONFIG.model_copy(update={"backbone": BackboneConfig(blocks=0)}), {"a/b": 3}, 5, (3, 4)
    )
    with pytest.raises(ConfigError, match="backbone"):
        add_lora(made, LoraConfig(), seed=0)
