"""The table of loss terms, and their weighted sum.

A term is *shared* when it needs all samples of the global batch (every rank then computes the same
number from gathered tensors) or *own* when it is a sum over samples (each rank adds its own, over
the size of the global batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_decoder.config.train import LossConfig
from dist_decoder.losses.contrastive import cosine_similarity, symmetric_contrastive
from dist_decoder.losses.regression import squared_error_sum


@dataclass(frozen=True)
class Term:
    """One loss term. Its weight is the field of ``LossConfig`` of the same name."""

    name: str
    scope: Literal["shared", "own"]
    output: str
    """Output of the decoder."""
    target: Literal["pooled", "tokens"]


TERMS: tuple[Term, ...] = (
    Term("prior", "own", "prior", "tokens"),
    Term("pooled_contrastive", "shared", "pooled", "pooled"),
    Term("token_contrastive", "shared", "retrieval", "tokens"),
    Term("pooled_mse", "own", "pooled", "pooled"),
    Term("token_mse", "own", "tokens", "tokens"),
)


@dataclass(frozen=True)
class Losses:
    """Result of one step on one rank."""

    shared: Tensor
    """Weighted sum of the shared terms; the same on every rank."""
    own: Tensor
    """Weighted sum of this rank's part of the own terms; summed over ranks gives the mean."""
    terms: dict[str, Tensor]
    """Unweighted, detached: a shared term whole, an own term as this rank's part."""


def active_terms(config: LossConfig, available: frozenset[str]) -> tuple[Term, ...]:
    """Return the terms with a weight whose output the model has."""
    return tuple(
        term for term in TERMS if getattr(config, term.name) > 0 and term.output in available
    )


def objective(
    terms: tuple[Term, ...],
    config: LossConfig,
    own: Mapping[str, Tensor],
    own_targets: Mapping[str, Tensor],
    gathered: Mapping[str, Tensor],
    gathered_targets: Mapping[str, Tensor],
    image_ids_B: Tensor,
) -> Losses:
    """Return the weighted losses.

    Args:
        terms: from ``active_terms``.
        config: weights and temperature.
        own: outputs of this rank's samples, (b, ...).
        own_targets: ``pooled`` and ``tokens`` of this rank's samples.
        gathered: outputs of shared terms over the global batch, (B, F).
        gathered_targets: targets of shared terms over the global batch, (B, F).
        image_ids_B: of the global batch; its length is the denominator of the own terms.
    """
    global_size = len(image_ids_B)
    zero = torch.zeros((), device=image_ids_B.device)
    total = {"shared": zero, "own": zero}
    values = {}
    for term in terms:
        if term.scope == "shared":
            similarity = cosine_similarity(gathered[term.output], gathered_targets[term.target])
            value = symmetric_contrastive(similarity, image_ids_B, config.temperature)
        else:
            value = squared_error_sum(own[term.output], own_targets[term.target]) / global_size
        total[term.scope] = total[term.scope] + getattr(config, term.name) * value
        values[term.name] = value.detach()
    return Losses(total["shared"], total["own"], values)
