"""No loss depends on the order of the rows of a batch or on how ranks divide them."""

import pytest
import torch
from test_losses import IDS, LABELS, SMALL, everything, normal
from torch import Tensor

from dist_decoder.config.loss import LossConfig
from dist_decoder.losses.contrastive import cosine_similarity
from dist_decoder.losses.memory import ImageMemory, Memory
from dist_decoder.losses.mixing import Mixture
from dist_decoder.losses.objective import TERMS, ClassInputs, Inputs, active_terms, objective

B = len(IDS)
PARTNER, SHARE = torch.tensor([1, 0, 2, 4, 3]), torch.tensor([0.7, 1.0, 1.0, 0.2, 0.9])
CONFIG = LossConfig.model_validate({**{term.name: 1.0 for term in TERMS}, "classes": SMALL})


def all_terms(order: Tensor, ranks: tuple[int, ...], step: int) -> dict[str, float]:
    """Return every term of the reordered batch, divided over ranks."""
    made = everything()
    outputs = {name: value.detach()[order] for name, value in made["outputs"].items()}
    targets = {name: value[order] for name, value in made["targets"].items()}
    place = torch.argsort(order)
    labels = torch.eye(3, dtype=torch.bool)
    latents, tokens = Memory(9, 3), ImageMemory(9, 3, 0.9)
    latents.add(normal(3, 8, seed=20), labels)
    tokens.add(normal(3, 12, seed=21), labels, torch.arange(3))
    features = normal(3, 6, seed=22)
    reference = cosine_similarity(features, features)
    classes = ClassInputs(LABELS[order], latents, tokens, reference, torch.ones(3).bool())
    found: dict[str, float] = {}
    start = 0
    for size in ranks:
        rows = slice(start, start + size)
        start += size
        inputs = Inputs(
            CONFIG,
            {name: value[rows] for name, value in outputs.items()},
            {name: value[rows] for name, value in targets.items()},
            {name: value.flatten(1) for name, value in outputs.items()},
            {name: value.flatten(1) for name, value in targets.items()},
            IDS[order], step, 10, Mixture(place[PARTNER[order]], SHARE[order]), classes,
        )  # fmt: skip
        losses = objective(active_terms(CONFIG, frozenset(outputs)), inputs)
        for term in TERMS:
            if term.name in losses.terms:
                whole = term.scope == "shared"
                value = float(losses.terms[term.name].double())
                found[term.name] = value if whole else found.get(term.name, 0.0) + value
    return found


@pytest.mark.parametrize("step", [0, 9])
@pytest.mark.parametrize("ranks", [(5,), (2, 3), (4, 0, 1), (1, 1, 3)])
def test_order_and_ranks_change_no_loss(ranks: tuple[int, ...], step: int) -> None:
    expected = all_terms(torch.arange(B), (B,), step)
    assert len(expected) == len(TERMS) - 1
    for order in (torch.arange(B), torch.tensor([3, 0, 4, 1, 2])):
        assert all_terms(order, ranks, step) == pytest.approx(expected, rel=1e-6, abs=1e-7)
