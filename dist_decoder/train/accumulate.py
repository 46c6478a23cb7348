"""One global step in micro-batches, with the negatives of the whole global batch.

The terms that compare samples see all of them, so their gradient cannot be had micro-batch by
micro-batch. First every micro-batch is sent forward without a graph and its outputs are kept; the
loss on all of them gives the gradient at each output. Then every micro-batch is sent forward again,
with a graph, and takes its part of those gradients and its own terms back. Random draws are keyed
by sample, so that both passes draw the same.

Activations are kept for one micro-batch instead of for all samples of a rank; what is kept of all
are the outputs that are compared, and their targets. The terms of single samples are computed once.

The layers have no statistics over a batch (their norms are over the features of one sample): with
those, micro-batches would change the model.

Source: GradCache (Gao et al. 2021), section 3. Differs: the outputs are cut over the ranks.

Axes: B samples of the global batch, b of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_decoder.batch import Batch
from dist_decoder.cuts import Cuts
from dist_decoder.losses.objective import CUT, Inputs, Losses, objective
from dist_decoder.train.step import Forward, Step

Backward = Callable[[Tensor, bool], None]
"""(scalar, whether it is the last of the step): adds its gradient up."""


@dataclass(frozen=True)
class _Micro:
    """Samples that are in the graph at once."""

    rows: slice
    """Of this rank's samples."""
    cuts: Cuts
    places_B: Tensor
    """Of all ranks' samples of this micro-batch, in the global batch."""

    def places(self, name: str) -> slice | Tensor:
        """Return where the rows of an output belong in the output of the whole step."""
        return self.places_B if name in CUT else self.rows


def accumulate(
    step: Step, forward: Forward, backward: Backward, micro_batch_size: int, factor: float
) -> Losses:
    """Send the gradient of one global step back, and return this rank's losses.

    A collective call. Every rank takes as many micro-batches as the fullest one; some may be
    empty.

    Args:
        step: of the whole global batch.
        forward: the decoder or the engine around it.
        backward: takes the gradient of one micro-batch.
        micro_batch_size: samples of a rank that are in the graph at once.
        factor: what gradients are multiplied by: the number of ranks, times the loss scale.
    """
    micros = list(_micro_batches(step, micro_batch_size))
    shared = tuple(term for term in step.terms if term.scope == "shared")
    own = tuple(term for term in step.terms if term.scope == "own")
    tokens = step.targets.get("tokens")
    kept: dict[str, Tensor] = {}
    if shared:
        with torch.no_grad():
            for micro in micros:
                batch = _rows(step.batch, micro.rows)
                found = step.outputs(forward, batch, micro.cuts, shared, None)
                wanted = {term.output for term in shared}
                for name in wanted & found.keys():
                    _keep(kept, name, found[name], micro, step.cuts)
                if "temperature" in found:
                    kept["temperature"] = found["temperature"].detach().clone()
    leaves = {name: value.requires_grad_() for name, value in kept.items()}
    compared = step.losses(leaves, shared)
    grads: dict[str, Tensor] = {}
    if leaves:
        found_grads = torch.autograd.grad(
            compared.shared * factor, list(leaves.values()), allow_unused=True
        )
        grads = {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found_grads, strict=True)
        }
    terms: dict[str, Tensor] = dict(compared.terms)
    own_sum = compared.own
    del leaves, kept
    for index, micro in enumerate(micros):
        batch = _rows(step.batch, micro.rows)
        clean = None if tokens is None else tokens[micro.rows]
        outputs = step.outputs(forward, batch, micro.cuts, step.terms, clean)
        alone = objective(own, _own_inputs(step, outputs, micro))
        total = alone.own * factor
        for name, grad in grads.items():
            if name == "temperature":
                # A parameter, not one value per sample: its gradient counts once.
                part = grad if index == 0 else torch.zeros_like(grad)
            else:
                part = grad[micro.places(name)]
            total = total + (outputs[name].float() * part.float()).sum()
        backward(total, index == len(micros) - 1)
        own_sum = own_sum + alone.own.detach()
        for name, value in alone.terms.items():
            terms[name] = terms[name] + value if name in terms else value
    ordered = {term.name: terms[term.name] for term in step.terms if term.name in terms}
    return Losses(compared.shared.detach(), own_sum, ordered)


def _micro_batches(step: Step, size: int) -> Iterator[_Micro]:
    counts, world = step.plan.counts, step.world
    firsts = [sum(counts[:rank]) for rank in range(world.size)]
    for start in range(0, max(counts), size):
        rows = [slice(min(start, count), min(start + size, count)) for count in counts]
        places = [
            first + row
            for first, held in zip(firsts, rows, strict=True)
            for row in range(held.start, held.stop)
        ]
        yield _Micro(
            rows[world.rank],
            Cuts(world, tuple(held.stop - held.start for held in rows)),
            torch.tensor(places, dtype=torch.int64, device=world.device),
        )


def _rows(batch: Batch, rows: slice) -> Batch:
    """Return what a forward pass needs of some of a rank's samples."""
    voxels, places = {}, {}
    for name, value in batch.voxels.items():
        inside = (batch.rows[name] >= rows.start) & (batch.rows[name] < rows.stop)
        if bool(inside.any()):
            voxels[name] = value[inside]
            places[name] = batch.rows[name][inside] - rows.start
    return replace(
        batch,
        positions_B=batch.positions_B[rows],
        voxels=voxels,
        rows=places,
        subjects=batch.subjects[rows],
        image_uids=batch.image_uids[rows],
        image_ids_B=batch.image_ids_B[rows],
        keys=batch.keys[rows],
        pooled_BE=None,
        tokens_BTD=None,
        low_level={},
    )


def _keep(kept: dict[str, Tensor], name: str, rows: Tensor, micro: _Micro, cuts: Cuts) -> None:
    if name not in kept:
        size = cuts.global_size if name in CUT else cuts.own_size
        kept[name] = rows.new_empty((size, *rows.shape[1:]))
    kept[name][micro.places(name)] = rows


def _own_inputs(step: Step, outputs: dict[str, Tensor], micro: _Micro) -> Inputs:
    return Inputs(
        config=step.config,
        own=outputs,
        own_targets={name: value[micro.rows] for name, value in step.targets.items()},
        gathered={},
        gathered_targets={},
        # Only its length counts: the terms are divided by the size of the global batch.
        image_ids_B=torch.zeros(step.plan.global_size, device=step.world.device),
        step=step.batch.step,
        num_steps=step.num_steps,
    )
