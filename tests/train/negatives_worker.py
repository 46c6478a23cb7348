"""One rank of a contrastive step for every such term: ``negatives_worker.py FILE``.

The first rank writes each term's loss and the gradient of every whole parameter.
"""

from __future__ import annotations

import sys

import torch
from made_job import GLOBAL_BATCH
from made_terms import SMALL, made_classes, made_decoder, whole_batch
from torch import Tensor

from dist_decoder import dist
from dist_decoder.config.loss import LossConfig
from dist_decoder.cuts import chunk_of
from dist_decoder.data.order import own_positions
from dist_decoder.dist import World, gather_rows, sum_over_ranks
from dist_decoder.losses.objective import TERMS, active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.ends import cut_ends
from dist_decoder.train.loop import _outputs_of
from dist_decoder.train.step import Plan, compute_losses

COMPARING = tuple(term.name for term in TERMS if term.scope == "shared")
"""Terms that compare every sample with the whole global batch."""
Found = dict[str, tuple[float, dict[str, Tensor]]]


def start_of(term: str) -> tuple[Decoder, LossConfig]:
    """Return the model and the losses, in which ``term`` alone is on."""
    off = {other.name: 0.0 for other in TERMS}
    mixing = {"share": 1.0 if term == "bimixco" else 0.0}
    classes = SMALL | {"perturbed_prob": 0.0}
    loss = LossConfig.model_validate({**off, term: 1.0, "classes": classes, "mixing": mixing})
    decoder = made_decoder(skip=True, low_level=term.startswith("low_level"))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return decoder, loss


def contrastive_steps(world: World, terms: tuple[str, ...] = COMPARING) -> Found:
    """Return loss and whole gradients of each term's second step, which has memories."""
    found: Found = {}
    own = own_positions(GLOBAL_BATCH, world.rank, world.size)
    counts = [len(own_positions(GLOBAL_BATCH, rank, world.size)) for rank in range(world.size)]
    for term in terms:
        decoder, loss = start_of(term)
        classes, active = made_classes(loss), active_terms(loss, frozenset(_outputs_of(decoder)))
        shapes = cut_ends(decoder, world, torch.float32)
        for step in range(2):
            losses = compute_losses(
                decoder, whole_batch(step, own), Plan(tuple(counts)), active, loss, 3, world, 4,
                decoder.ridge.num_voxels, classes,
            )  # fmt: skip
        (losses.shared + losses.own).backward()
        grads = {}
        for name, parameter in decoder.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if world.size > 1 and decoder.parts.rows(name) is not None:
                width = shapes[name][0]
                held = [len(chunk_of(width, rank, world.size)) for rank in range(world.size)]
                grads[name] = gather_rows(grad, held)
            else:
                grads[name] = sum_over_ranks(grad, world)
        found[term] = (float(losses.shared.detach()), grads)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = dist.start("cpu", timeout_s=60)
    try:
        everything = contrastive_steps(ranks)
        if ranks.is_first:
            torch.save(everything, sys.argv[1])
    finally:
        dist.stop()
