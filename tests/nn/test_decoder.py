"""The decoder: starts by name, keyed noise, outputs that do not depend on batch mates."""

import pytest
import torch

from dist_decoder.config.loss import LossConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.errors import ConfigError
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.keyed import SampleKeys

SUBJECTS = {"nsd/subj01": 7, "god/S1": 11}
E, T, D = 5, 3, 4


def small(**changes: object) -> ModelConfig:
    values = {
        "latent_dim": 6,
        "backbone": BackboneConfig(blocks=2, hidden=9, dropout=0.2),
        "prior": PriorConfig(depth=1, heads=2, head_dim=4, timesteps=10, sample_steps=4),
        "voxel_noise": 0.3,
        **changes,
    }
    return ModelConfig.model_validate(values)


def decoder(subjects: dict[str, int] = SUBJECTS, seed: int = 0, **changes: object) -> Decoder:
    return Decoder(small(**changes), subjects, E, (T, D), seed)


@torch.no_grad()
def scramble(model: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def batch(size: int = 5) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    names = ["nsd/subj01" if place % 2 else "god/S1" for place in range(size)]
    voxels, rows = {}, {}
    for name, count in SUBJECTS.items():
        places = [place for place, other in enumerate(names) if other == name]
        voxels[name] = torch.randn(size, count, generator=generator)[places]
        rows[name] = torch.tensor(places)
    return {"voxels": voxels, "rows": rows, "batch_size": size}


def test_start_depends_on_seed_and_name_only() -> None:
    first, again = decoder(), decoder()
    more = decoder({"bold5000/CSI1": 4, **SUBJECTS})
    other = decoder(seed=1)
    values = dict(more.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
        assert torch.equal(parameter, values[name])
    weight = "ends.ridge.layers.god/S1.weight"
    assert not torch.equal(values[weight], dict(other.named_parameters())[weight])


def test_pooled_head_starts_as_the_identity_on_the_first_latents() -> None:
    found = decoder()(**batch())
    torch.testing.assert_close(found["pooled"], found["latents"][:, :E])


def test_prediction_of_a_sample_ignores_its_batch_mates() -> None:
    model = scramble(decoder()).eval()
    voxels_BV = torch.randn(9, 11, generator=torch.Generator().manual_seed(2))
    whole = model.predict(voxels_BV, "god/S1")
    single = model.predict(voxels_BV[4:5], "god/S1")
    parted = model.predict(voxels_BV, "god/S1", batch_size=2)
    for name in ("latents_BL", "pooled_BE", "tokens_BTD", "retrieval_BTD"):
        value = getattr(whole, name)
        torch.testing.assert_close(value[4:5], getattr(single, name))
        torch.testing.assert_close(value, getattr(parted, name))


def test_training_draws_of_a_sample_ignore_its_batch_mates() -> None:
    model = scramble(decoder(ridge_dropout=0.3))
    outputs = ("pooled", "tokens", "retrieval", "prior")
    clean = torch.randn(5, T, D, generator=torch.Generator().manual_seed(3))
    whole = model(
        **batch(), keys=SampleKeys(0, 7, (20, 21, 22, 23, 24)), prior_target_BTD=clean,
        outputs=outputs,
    )  # fmt: skip
    arguments = batch()
    alone = model(
        {"god/S1": arguments["voxels"]["god/S1"][1:2]}, {"god/S1": torch.tensor([0])}, 1,
        keys=SampleKeys(0, 7, (22,)), prior_target_BTD=clean[2:3], outputs=outputs,
    )  # fmt: skip
    for name in ("latents", *outputs):
        torch.testing.assert_close(whole[name][2:3], alone[name])


@pytest.mark.parametrize(("option", "value"), [("voxel_noise", 0.0), ("ridge_dropout", 0.5)])
def test_training_noise_options_act_in_training_only(option: str, value: float) -> None:
    base, changed = scramble(decoder()), scramble(decoder(**{option: value}))
    keys = SampleKeys(0, 0, tuple(range(5)))
    assert not torch.allclose(base(**batch(), keys=keys)["latents"],
                              changed(**batch(), keys=keys)["latents"])  # fmt: skip
    torch.testing.assert_close(base(**batch())["latents"], changed(**batch())["latents"])


def test_voxel_noise_has_its_size() -> None:
    model = decoder({"nsd/subj01": 500}, voxel_noise=0.25)
    keys = SampleKeys(0, 0, (0, 1))
    noisy = model._add_noise(
        {"nsd/subj01": torch.zeros(2, 500)}, {"nsd/subj01": torch.tensor([1, 0])}, keys
    )
    assert float(noisy["nsd/subj01"].std()) == pytest.approx(0.25, rel=0.1)


def test_sizes_and_switches_act() -> None:
    assert decoder(pooled_hidden=8).middle.pooled.up is not None  # type: ignore[union-attr]
    hidden = scramble(decoder(pooled_hidden=8))
    plain = decoder(pooled_hidden=8)
    plain.load_state_dict(hidden.state_dict())
    with torch.no_grad():
        plain.middle.pooled.down.weight.zero_()  # type: ignore[union-attr]
    assert not torch.allclose(hidden(**batch())["pooled"], plain(**batch())["pooled"])
    assert "pooled" not in decoder(pooled=False)(**batch())
    no_tokens = decoder(tokens=False, prior=PriorConfig(enabled=False))
    assert set(no_tokens(**batch())) == {"latents", "pooled"}
    assert not decoder(prior=PriorConfig(enabled=False)).has_prior


def test_sampled_tokens_ignore_the_chunking_and_depend_on_the_seed() -> None:
    model = scramble(decoder()).eval()
    tokens = torch.randn(7, T, D, generator=torch.Generator().manual_seed(4))
    whole = model.sample_prior(tokens, seed=1)
    torch.testing.assert_close(model.sample_prior(tokens, seed=1, batch_size=3), whole)
    assert (model.sample_prior(tokens, seed=2) - whole).abs().max() > 1e-3
    assert (model.sample_prior(tokens.flip(2), seed=1) - whole).abs().max() > 1e-3


def test_parts_without_a_loss_are_frozen() -> None:
    model = decoder()
    assert model.train_only_for(LossConfig()) == []
    loss = LossConfig(prior=0, token_contrastive=0)
    assert model.train_only_for(loss) == ["middle.projector", "middle.prior"]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith(("middle.projector", "middle.prior")) for name in frozen)


def test_bad_sizes_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"model.tokens=false"):
        Decoder(small(), SUBJECTS, E, None)
    with pytest.raises(ConfigError, match="pooled"):
        Decoder(small(), SUBJECTS, None, (T, D))
    with pytest.raises(ConfigError, match="even token width"):
        Decoder(small(), SUBJECTS, E, (T, 5))
    with pytest.raises(ConfigError, match="without a prior"):
        decoder(prior=PriorConfig(enabled=False)).sample_prior(torch.zeros(1, T, D))
