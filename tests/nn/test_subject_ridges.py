"""Subject layers: looked up by name, in any composition of a batch."""

import pytest
import torch

from dist_decoder.errors import ConfigError, DataError
from dist_decoder.nn.initialise import initialise
from dist_decoder.nn.ridge import SubjectRidges

SUBJECTS = {"nsd/subj01": 7, "bold5000/CSI1": 11, "god/S1": 5}


@pytest.fixture
def ridges() -> SubjectRidges:
    layers = SubjectRidges(SUBJECTS, latent_dim=6)
    initialise(layers, seed=3)
    return layers


def mixed_batch() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    voxels = {
        "nsd/subj01": torch.randn(3, 7, generator=generator),
        "bold5000/CSI1": torch.randn(2, 11, generator=generator),
    }
    rows = {"nsd/subj01": torch.tensor([4, 0, 2]), "bold5000/CSI1": torch.tensor([1, 3])}
    return voxels, rows


def test_each_row_goes_through_its_own_layer(ridges: SubjectRidges) -> None:
    voxels, rows = mixed_batch()
    latents_BL = ridges(voxels, rows, 5)
    for name, places in rows.items():
        layer = ridges.layer(name)
        for place, own in zip(places.tolist(), voxels[name], strict=True):
            expected = layer.weight @ own + layer.bias
            torch.testing.assert_close(latents_BL[place], expected)


def test_absent_subjects_get_a_zero_gradient(ridges: SubjectRidges) -> None:
    voxels, rows = mixed_batch()
    ridges(voxels, rows, 5).square().sum().backward()
    for name in SUBJECTS:
        gradient = ridges.layer(name).weight.grad
        assert gradient is not None
        assert bool(gradient.any()) == (name in voxels)


def test_a_batch_of_nothing_keeps_the_graph(ridges: SubjectRidges) -> None:
    latents_BL = ridges({}, {}, 0)
    assert latents_BL.shape == (0, 6)
    latents_BL.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ridges.parameters())


def test_unknown_subject_wrong_mask_and_missing_rows_are_named(ridges: SubjectRidges) -> None:
    with pytest.raises(DataError, match=r"nsd/subj02.*adapt"):
        ridges({"nsd/subj02": torch.zeros(1, 7)}, {"nsd/subj02": torch.tensor([0])}, 1)
    with pytest.raises(DataError, match=r"god/S1.*mask"):
        ridges({"god/S1": torch.zeros(1, 4)}, {"god/S1": torch.tensor([0])}, 1)
    with pytest.raises(DataError, match="1 rows of voxels for a batch of 2"):
        ridges({"god/S1": torch.zeros(1, 5)}, {"god/S1": torch.tensor([0])}, 2)


def test_names_that_would_split_a_parameter_are_refused() -> None:
    with pytest.raises(ConfigError, match="dot"):
        SubjectRidges({"nsd/subj.01": 3}, 4)
    with pytest.raises(ConfigError, match="at least one"):
        SubjectRidges({}, 4)
