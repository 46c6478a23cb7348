"""NeuroFusion's encoder: torch's own transformer as oracle, and no batch mates by default."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.keyed import SampleKeys
from dist_decoder.nn.neurofusion import load_neurofusion

VOXELS, WIDTH, HIDDEN, E = 9, 8, 13, 5


def decoder(batch_attention: bool = False, **changes: object) -> Decoder:
    backbone = BackboneConfig(
        mixer="neurofusion", blocks=2, hidden=HIDDEN, heads=4, batch_attention=batch_attention
    )
    config = ModelConfig(
        latent_dim=WIDTH, tokens=False, prior=PriorConfig(enabled=False), backbone=backbone
    )
    return Decoder(config.model_copy(update=changes), {"own/a": VOXELS}, E, None).eval()


def official() -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, activation="gelu")
    parts = torch.nn.ModuleDict(
        {
            "alignment_layers": torch.nn.ModuleDict({"3": torch.nn.Linear(VOXELS, WIDTH)}),
            "transformer": torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            "net": torch.nn.Sequential(
                torch.nn.LayerNorm(WIDTH),
                torch.nn.Linear(WIDTH, WIDTH),
                torch.nn.LayerNorm(WIDTH),
                torch.nn.GELU(),
                torch.nn.Linear(WIDTH, WIDTH),
                torch.nn.Linear(WIDTH, E),
                torch.nn.LayerNorm(E),
            ),
            "alignment_layer": torch.nn.Linear(E, E),
        }
    )
    for parameter in parts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return parts.eval()


@torch.no_grad()
@pytest.mark.parametrize("batch_attention", [False, True])
def test_equals_the_official_transformer(batch_attention: bool) -> None:
    parts = official()
    model = decoder(batch_attention)
    load_neurofusion(model, parts.state_dict(), {"own/a": "3"})
    x = torch.randn(6, VOXELS)
    latents = parts["alignment_layers"]["3"](x)
    if batch_attention:
        latents = parts["transformer"](latents)
    else:
        latents = torch.cat([parts["transformer"](row[None]) for row in latents])
    expected = parts["alignment_layer"](parts["net"](latents))
    found = model({"own/a": x}, {"own/a": torch.arange(6)}, 6)["pooled"]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_batch_mates_act_only_where_asked_for() -> None:
    x = torch.randn(6, VOXELS)
    for batch_attention in (False, True):
        model = decoder(batch_attention)
        load_neurofusion(model, official().state_dict(), {"own/a": "3"})
        whole = model.predict(x, "own/a").pooled_BE
        alone = model.predict(x[2:3], "own/a").pooled_BE
        differs = (whole[2:3] - alone).abs().max() > 1e-3
        assert bool(differs) is batch_attention


def test_dropout_acts_in_training_and_every_parameter_has_a_gradient() -> None:
    model = decoder()
    load_neurofusion(model, official().state_dict(), {"own/a": "3"})
    arguments = ({"own/a": torch.randn(6, VOXELS)}, {"own/a": torch.arange(6)}, 6)
    dropped = model(*arguments, keys=SampleKeys(0, 0, tuple(range(6))))["pooled"]
    assert (dropped - model(*arguments)["pooled"]).abs().max() > 1e-3
    dropped.square().sum().backward()
    # A lone sample attends to itself: a weight of one, whatever queries and keys are.
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_sizes_and_options() -> None:
    with pytest.raises(ConfigError, match=r"multiple of backbone\.heads"):
        decoder(latent_dim=6)
    with pytest.raises(ValidationError, match="mixer=neurofusion"):
        BackboneConfig(batch_attention=True)


def test_published_size_of_five_subjects() -> None:
    config = ModelConfig(
        latent_dim=1024,
        tokens=False,
        prior=PriorConfig(enabled=False),
        backbone=BackboneConfig(mixer="neurofusion", hidden=2048),
    )
    with torch.device("meta"):
        model = Decoder(config, {f"own/s{n}": 15724 for n in range(5)}, 1280, None)
    assert sum(parameter.numel() for parameter in model.parameters()) == 119_169_024
