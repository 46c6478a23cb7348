"""Start values: what each rank makes of its rows is what the whole has there."""

import pytest
import torch

from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.model import BackboneConfig, ModelConfig, PriorConfig
from dist_decoder.cuts import chunk_of
from dist_decoder.dist import World
from dist_decoder.nn import initialise as module
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.initialise import uniform_rows
from dist_decoder.nn.lora import add_lora
from dist_decoder.rng import torch_generator

SUBJECTS = {"nsd/subj01": 7, "god/S1": 11}
E, T, D, L = 5, 3, 4, 6
MODEL = ModelConfig(
    latent_dim=L,
    backbone=BackboneConfig(blocks=2, hidden=9),
    prior=PriorConfig(depth=1, heads=2, head_dim=4, timesteps=10, sample_steps=4),
)


def made(rank: int = 0, size: int = 1, **options: object) -> Decoder:
    world = World(rank, size, torch.device("cpu"))
    return Decoder(MODEL, SUBJECTS, E, (T, D), 3, world, **options)  # type: ignore[arg-type]


def test_uniform_starts_are_one_draw_over_the_whole() -> None:
    """The numbers of runs that were begun before."""
    whole = dict(made().named_parameters())
    for name, shape, fan_in in (
        ("ends.tokens.weight", (T, D, L), L),
        ("ends.tokens.bias", (T, D), L),
        ("ends.ridge.layers.god/S1.weight", (L, 11), 11),
        ("middle.projector.layers.1.weight", (D, D), D),
    ):
        drawn = torch.rand(shape, generator=torch_generator(3, "init", name))
        assert torch.equal(whole[name], (drawn * 2 - 1) * fan_in**-0.5), name


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_parts_of_all_ranks_are_the_whole(size: int) -> None:
    whole = made()
    add_lora(whole, LoraConfig(rank=2, skip=("align",)), seed=1)
    expected = dict(whole.named_parameters())
    held = 0
    for rank in range(size):
        decoder = made(rank, size)
        add_lora(decoder, LoraConfig(rank=2, skip=("align",)), seed=1)
        for name, value in decoder.named_parameters():
            rows = decoder.parts.rows(name)
            part = expected[name] if rows is None else expected[name][rows.start : rows.stop]
            assert torch.equal(value, part), name
            assert decoder.parts.whole_shape(name, tuple(value.shape)) == expected[name].shape
            assert value.requires_grad == expected[name].requires_grad
        held += sum(p.numel() for n, p in decoder.ends.named_parameters() if ".lora_A." not in n)
        assert decoder.ends.tokens is not None
        assert len(decoder.ends.ridge.layer("god/S1").weight) == len(chunk_of(L, rank, size))
    assert held == sum(p.numel() for n, p in whole.ends.named_parameters() if ".lora_A." not in n)


def test_rows_before_are_dropped_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 10)
    shape = torch.Size((9, 7))
    whole = (torch.rand(shape, generator=torch_generator(0, "x")) * 2 - 1) * 0.3
    for rows in (range(4), range(3, 8), range(8, 9), range(9, 9)):
        found = uniform_rows(shape, rows, 0.3, torch_generator(0, "x"))
        assert torch.equal(found, whole[rows.start : rows.stop])


def test_what_is_to_be_loaded_is_not_drawn() -> None:
    drawn = dict(made().named_parameters())
    for name, value in made(drawn=("ends.ridge.",)).named_parameters():
        if name.startswith("ends.ridge."):
            assert torch.equal(value, drawn[name])
        else:
            assert not value.any()


def test_on_the_meta_device_nothing_is_made() -> None:
    with torch.device("meta"):
        assert all(value.is_meta for value in made().parameters())
