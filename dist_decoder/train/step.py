"""One training step: forward, gather over ranks, losses, backward.

Axes: B samples of the global batch, b of this rank, F flattened features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_decoder.batch import Batch
from dist_decoder.config.train import LossConfig
from dist_decoder.dist import World, gather
from dist_decoder.errors import DataError
from dist_decoder.losses.objective import Losses, Term, objective
from dist_decoder.nn.keyed import SampleKeys

Forward = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """How many samples of the global batch each rank holds; known without communication."""

    counts: tuple[int, ...]

    @property
    def global_size(self) -> int:
        return sum(self.counts)


def compute_losses(
    forward: Forward,
    batch: Batch,
    plan: Plan,
    terms: tuple[Term, ...],
    config: LossConfig,
    seed: int,
    world: World,
) -> Losses:
    """Return this rank's losses of one global step.

    ``backward((shared + own) * world_size)`` on every rank, followed by the engine's average over
    ranks, gives the gradient of the loss over the global batch: the gather passes each rank its
    own rows of the shared loss's gradient, and the average divides by what was multiplied.

    Args:
        forward: the decoder or the engine around it.
        batch: this rank's samples; may be empty.
        plan: samples of every rank.
        terms: active terms.
        config: weights.
        seed: of noise, dropout and the prior's draws.
        world: this rank.
    """
    keys = SampleKeys(seed, batch.step, tuple(batch.positions_B.tolist()))
    targets = _targets(batch, terms)
    needed = tuple(sorted({term.output for term in terms}))
    outputs = forward(
        batch.voxels,
        batch.rows,
        batch.size,
        keys=keys,
        prior_target_BTD=targets.get("tokens") if "prior" in needed else None,
        outputs=needed,
    )
    shared = [term for term in terms if term.scope == "shared"]
    gathered = {
        name: gather(outputs[name].float().flatten(1), plan.counts, world)
        for name in dict.fromkeys(term.output for term in shared)
    }
    gathered_targets = {
        str(name): gather(targets[name].flatten(1), plan.counts, world)
        for name in dict.fromkeys(term.target for term in shared)
    }
    image_ids_B = gather(batch.image_ids_B, plan.counts, world)
    return objective(terms, config, outputs, targets, gathered, gathered_targets, image_ids_B)


def _targets(batch: Batch, terms: tuple[Term, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in (("pooled", batch.pooled_BE), ("tokens", batch.tokens_BTD)):
        if value is not None:
            found[name] = value
        elif any(term.target == name for term in terms):
            raise DataError(
                f"step {batch.step}: the batch has no {name} but a loss term needs them; embed "
                f"with an encoder that gives {name} or set model.{name}=false"
            )
    return found


def non_finite_terms(losses: Losses) -> list[str]:
    """Return the names of the terms that are not finite."""
    return [name for name, value in losses.terms.items() if not bool(torch.isfinite(value))]
