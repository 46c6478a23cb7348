"""The table of loss terms, and their weighted sum.

A term is *shared* when it needs all samples of the global batch (every rank then computes the same
number) or *own* when it is a sum over samples (each rank adds its own, over
the size of the global batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dist_decoder.config.loss import LossConfig
from dist_decoder.errors import ConfigError
from dist_decoder.losses.classes import (
    alike,
    prototype_similarity,
    relational_consistency,
    triplet_alignment,
)
from dist_decoder.losses.contrastive import (
    Total,
    cosine_similarity,
    symmetric_contrastive,
    whole,
)
from dist_decoder.losses.memory import ImageMemory, Memory
from dist_decoder.losses.mixing import Mixture, bimixco
from dist_decoder.losses.regression import correlation_sum, squared_error_sum
from dist_decoder.losses.schedules import Phase, is_active, softclip_temperature
from dist_decoder.losses.soft import absolute_error_sum, soft_contrastive, softclip

Target = Literal["pooled", "tokens", "low_level", "low_level_maps"]


@dataclass(frozen=True)
class ClassInputs:
    """What the terms on classes see of one global batch."""

    labels_BC: Tensor
    """Classes of the images of the global batch, boolean."""
    latents: Memory
    tokens: ImageMemory
    reference_CC: Tensor | None
    """S_ref of the source subjects."""
    known_C: Tensor | None
    """Classes that the reference has."""


@dataclass(frozen=True)
class Inputs:
    """One global batch as one rank sees it."""

    config: LossConfig
    own: Mapping[str, Tensor]
    """Outputs of this rank's samples, (b, ...)."""
    own_targets: Mapping[str, Tensor]
    """Targets of this rank's samples by name."""
    gathered: Mapping[str, Tensor]
    """Outputs of shared terms over the global batch, (B, F); of ``CUT`` this rank's features."""
    gathered_targets: Mapping[str, Tensor]
    """Targets of shared terms over the global batch, cut as the outputs are."""
    image_ids_B: Tensor
    """Of the global batch; its length is the denominator of the own terms."""
    step: int = 0
    num_steps: int = 1
    mixture: Mixture | None = None
    """None where nothing is mixed."""
    classes: ClassInputs | None = None
    temperature: Tensor | None = None
    """Learned temperature of the symmetric contrastive losses."""
    total: Total = whole
    """Sums what ranks make of their own features, for the outputs in ``CUT``."""

    @property
    def progress(self) -> float:
        """Finished share of the run."""
        return self.step / self.num_steps


@dataclass(frozen=True)
class Term:
    """One loss term. Its weight is the field of ``LossConfig`` of the same name."""

    name: str
    scope: Literal["shared", "own"]
    output: str
    """Output of the decoder."""
    target: Target | None
    value: Callable[[Inputs, Term], Tensor] = field(repr=False)
    phase: Phase = "always"


def _contrastive(inputs: Inputs, term: Term) -> Tensor:
    similarity = cosine_similarity(*_pair(inputs, term), _total(inputs, term))
    temperature = inputs.config.temperature if inputs.temperature is None else inputs.temperature
    return symmetric_contrastive(similarity, inputs.image_ids_B, temperature)


def _bimixco(inputs: Inputs, term: Term) -> Tensor:
    mixing = inputs.config.mixing
    assert inputs.mixture is not None
    ids = None if mixing.legacy else inputs.image_ids_B
    similarity = cosine_similarity(*_pair(inputs, term), _total(inputs, term))
    return bimixco(similarity, inputs.mixture, mixing.temperature, ids, mixing.legacy)


def _softclip(inputs: Inputs, term: Term) -> Tensor:
    brain, image = _pair(inputs, term)
    first, last = inputs.config.softclip_temperatures
    share = mixing_share(inputs.config)
    temperature = softclip_temperature(first, last, inputs.progress, share, inputs.num_steps)
    total = _total(inputs, term)
    return softclip(
        cosine_similarity(brain, image, total),
        cosine_similarity(image, image, total),
        temperature,
    )


def _low_level_contrastive(inputs: Inputs, term: Term) -> Tensor:
    augmented = inputs.gathered_targets["low_level_maps_augmented"]
    width = inputs.own[term.output].shape[-1]
    student, teacher = (maps.reshape(-1, width) for maps in _pair(inputs, term))
    augmented = augmented.reshape(-1, width)
    return soft_contrastive(
        cosine_similarity(teacher, augmented),
        cosine_similarity(student, augmented),
        inputs.config.low_level_temperature,
    )


def _triplet(inputs: Inputs, term: Term) -> Tensor:
    classes, latents = inputs.classes, inputs.gathered[term.output]
    assert classes is not None
    if len(classes.latents) < inputs.config.classes.memory_minimum:
        return latents.sum() * 0
    similarity = cosine_similarity(latents, classes.latents.features_KF)
    pairs = alike(classes.labels_BC, classes.latents.labels_KC)
    return triplet_alignment(similarity, *pairs, inputs.config.classes.margin)


def _relational(inputs: Inputs, term: Term) -> Tensor:
    classes = inputs.classes
    assert classes is not None
    assert classes.reference_CC is not None
    assert classes.known_C is not None
    tokens = inputs.gathered[term.output].float()
    features = torch.cat([classes.tokens.features_KF, tokens]) if len(classes.tokens) else tokens
    labels = torch.cat([classes.tokens.labels_KC, classes.labels_BC])
    cosines = cosine_similarity(features, features, _total(inputs, term))
    similarity, counts = prototype_similarity(cosines, labels)
    usable = classes.known_C & (counts >= inputs.config.classes.min_members)
    return relational_consistency(similarity, classes.reference_CC, usable)


def _squared(inputs: Inputs, term: Term) -> Tensor:
    assert term.target is not None
    return squared_error_sum(inputs.own[term.output], inputs.own_targets[term.target])


def _absolute(inputs: Inputs, term: Term) -> Tensor:
    assert term.target is not None
    return absolute_error_sum(inputs.own[term.output], inputs.own_targets[term.target])


def _correlation(inputs: Inputs, term: Term) -> Tensor:
    return correlation_sum(inputs.own["linear_latents"], inputs.own[term.output])


TERMS: tuple[Term, ...] = (
    Term("prior", "own", "prior", "tokens", _squared),
    Term("pooled_contrastive", "shared", "pooled", "pooled", _contrastive),
    Term("token_contrastive", "shared", "retrieval", "tokens", _contrastive),
    Term("pooled_mse", "own", "pooled", "pooled", _squared),
    Term("token_mse", "own", "tokens", "tokens", _squared),
    Term("bimixco", "shared", "retrieval", "tokens", _bimixco, "mixing"),
    Term("softclip", "shared", "retrieval", "tokens", _softclip, "after_mixing"),
    Term("low_level_l1", "own", "low_level", "low_level", _absolute),
    Term(
        "low_level_contrastive",
        "shared",
        "low_level_maps",
        "low_level_maps",
        _low_level_contrastive,
    ),
    Term("triplet", "shared", "subject_latents", None, _triplet),
    Term("relational", "shared", "retrieval", None, _relational),
    Term("skip", "own", "skip_latents", None, _correlation),
)
CUT = frozenset({"retrieval"})
"""Outputs of which a rank has its own features of every sample. The others are small."""
_NEED_CLASSES = ("triplet", "relational")


@dataclass(frozen=True)
class Losses:
    """Result of one step on one rank."""

    shared: Tensor
    """Weighted sum of the shared terms; the same on every rank."""
    own: Tensor
    """Weighted sum of this rank's part of the own terms; summed over ranks gives the mean."""
    terms: dict[str, Tensor]
    """Unweighted, detached: a shared term whole, an own term as this rank's part. Terms that are
    not in their phase are left out."""


def mixing_share(config: LossConfig) -> float:
    """Return the part of the run in which scans are mixed; 0 without BiMixCo."""
    return config.mixing.share if config.bimixco > 0 else 0.0


def needs_classes(config: LossConfig) -> bool:
    """Return whether any part of the objective asks for the classes of images."""
    weights = (getattr(config, name) for name in _NEED_CLASSES)
    return any(weight > 0 for weight in weights) or config.classes.perturbed_prob > 0


def active_terms(config: LossConfig, available: frozenset[str]) -> tuple[Term, ...]:
    """Return the terms with a weight whose output the model has.

    Raises:
        ConfigError: a term that is off by default was switched on for a model without its output.
    """
    wanted = [term for term in TERMS if getattr(config, term.name) > 0]
    for term in wanted:
        default = LossConfig.model_fields[term.name].default
        if term.output not in available and not default:
            raise ConfigError(
                f"loss.{term.name} is switched on but the model has no output {term.output!r}: "
                "switch on the part of the model or adapter that makes it, or set the weight to 0"
            )
    return tuple(term for term in wanted if term.output in available)


def objective(terms: tuple[Term, ...], inputs: Inputs) -> Losses:
    """Return the weighted losses of the terms of ``active_terms``."""
    zero = torch.zeros((), device=inputs.image_ids_B.device)
    total = {"shared": zero, "own": zero}
    values = {}
    share = mixing_share(inputs.config)
    for term in terms:
        if not is_active(term.phase, inputs.progress, share):
            # The output keeps its place in the graph: every parameter has a gradient, if zero.
            total["shared"] = total["shared"] + 0 * inputs.gathered[term.output].sum()
            continue
        value = term.value(inputs, term)
        if term.scope == "own":
            value = value / len(inputs.image_ids_B)
        total[term.scope] = total[term.scope] + getattr(inputs.config, term.name) * value
        values[term.name] = value.detach()
    return Losses(total["shared"], total["own"], values)


def _total(inputs: Inputs, term: Term) -> Total:
    return inputs.total if term.output in CUT else whole


def _pair(inputs: Inputs, term: Term) -> tuple[Tensor, Tensor]:
    assert term.target is not None
    return inputs.gathered[term.output], inputs.gathered_targets[term.target]
