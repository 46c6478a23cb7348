"""Memories on classes in checkpoints: each rank's part, read by any number of ranks."""

import pytest
import torch
from made_job import D, T
from made_terms import made_classes
from torch import Tensor

from dist_decoder.config.loss import LossConfig
from dist_decoder.cuts import chunk_of
from dist_decoder.dist import World
from dist_decoder.errors import CheckpointError
from dist_decoder.train.canonical import State
from dist_decoder.train.class_terms import ClassTerms

B, L = 5, 6
LOSS = LossConfig.model_validate({"relational": 1.0, "triplet": 1.0})
IDS = torch.tensor([2**62 + 5, 7, 2**62 + 5, 9, 11])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def remembered(rank: int, size: int) -> ClassTerms:
    """Return what a rank holds after two batches."""
    terms, held = made_classes(LOSS), chunk_of(T, rank, size)
    labels = terms.labels_of(["made:1", "made:2", "made:1", "made:3", "made:5"])
    for step in range(2):
        tokens = normal(B, T, D, seed=step)
        square_B = tokens.flatten(1).square().sum(dim=1)
        own = tokens[:, held.start : held.stop].flatten(1)
        terms.tokens.add(own, labels, IDS + step * 2, lambda _, whole=square_B: whole)
        terms.latents.add(normal(B, L, seed=10 + step), labels)
    return terms


def saved(size: int) -> State:
    """Return what all ranks save together."""
    state: State = {}
    for rank in range(size):
        own = remembered(rank, size).state(World(rank, size, torch.device("cpu")))
        assert not set(own) & set(state)
        state |= own
    return state


@pytest.mark.parametrize(("wrote", "reads"), [(1, 2), (2, 1), (2, 3), (T + 2, 2), (2, T + 2)])
def test_any_number_of_ranks_goes_on(wrote: int, reads: int) -> None:
    state = saved(wrote)
    for rank in range(reads):
        terms, expected = made_classes(LOSS), remembered(rank, reads)
        terms.load(state, World(rank, reads, torch.device("cpu")))
        assert terms.tokens.image_K.tolist() == expected.tokens.image_K.tolist()
        assert 2**62 + 7 in terms.tokens.image_K.tolist()
        assert torch.equal(terms.tokens.labels_KC, expected.tokens.labels_KC)
        assert torch.equal(terms.tokens.features_KF, expected.tokens.features_KF)
        assert torch.equal(terms.latents.features_KF, expected.latents.features_KF)


def test_a_part_that_is_missing_is_named() -> None:
    state = saved(2)
    without = {name: value for name, value in state.items() if name != "memory.tokens.images"}
    with pytest.raises(CheckpointError, match=r"memory\.tokens\.images"):
        made_classes(LOSS).load(without, World(0, 1, torch.device("cpu")))
    del state["memory.tokens.from-0"]
    with pytest.raises(CheckpointError, match="tokens"):
        made_classes(LOSS).load(state, World(0, 1, torch.device("cpu")))
