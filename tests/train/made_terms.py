"""Made-up class statistics, labels and low-level targets for the jobs of ``made_job``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from made_job import GLOBAL_BATCH, MODEL, SUBJECTS, D, E, T, made_batch

from dist_decoder.batch import Batch
from dist_decoder.config.adapt import LoraConfig
from dist_decoder.config.loss import LossConfig
from dist_decoder.data.order import own_positions
from dist_decoder.dist import World, sum_over_ranks
from dist_decoder.losses.objective import TERMS, active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.nn.lora import add_lora
from dist_decoder.rng import numpy_generator
from dist_decoder.stats.classes import ClassStatistics
from dist_decoder.train.accumulate import accumulate
from dist_decoder.train.class_terms import ClassTerms
from dist_decoder.train.ends import cut_ends, is_cut
from dist_decoder.train.loop import _outputs_of
from dist_decoder.train.step import Plan, Step, compute_losses

NUM_CLASSES, STEPS = 3, 4
CLASSES = tuple(f"class {number}" for number in range(NUM_CLASSES))
SMALL = {
    "memory": 20, "memory_minimum": 1, "min_members": 1, "margin": 3.0, "perturbed_prob": 0.6,
}  # fmt: skip
EVERY: dict[str, Any] = {
    **{term.name: 1.0 for term in TERMS},
    "classes": SMALL,
    "mixing": {"share": 0.5, "mixed_prob": 0.9, "concentration": 1.0},
}


def made_statistics(subjects: tuple[str, ...] = ("x/1", "x/2")) -> ClassStatistics:
    """Return statistics of subjects that no job has."""
    rng = numpy_generator(0, "made statistics")
    size, num = NUM_CLASSES, len(subjects)
    return ClassStatistics(
        classes=CLASSES[::-1],
        subjects=subjects,
        counts_SC=np.full((num, size), 5),
        mean_CTD=rng.normal(size=(size, T, D)).astype(np.float32),
        variance_SCTD=rng.uniform(1, 4, size=(num, size, T, D)).astype(np.float32),
        similarity_SCC=np.zeros((num, size, size), np.float32),
        similarity_CC=rng.uniform(-1, 1, size=(size, size)).astype(np.float32),
        reliability_S=np.ones(num),
        rank_one_share=0.1,
        base="made",
    )


def made_classes(loss: LossConfig) -> ClassTerms:
    """Return class terms; image 11 has no class, some have two."""
    labels = {
        f"made:{number}": tuple({CLASSES[number % 3], CLASSES[number % 2]})
        for number in range(40)
        if number != 11
    }
    labels["made:11"] = ()
    return ClassTerms(labels, loss.classes, T, made_statistics())


def whole_batch(step: int, positions: range) -> Batch:
    """Return a made batch with low-level targets."""
    drawn: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("low_level", "low_level_maps", "low_level_maps_augmented")
    }
    for position in positions:
        generator = torch.Generator().manual_seed(step * 1000 + position)
        for name, values in drawn.items():
            shape = (4, 28, 28) if name == "low_level" else (49, 512)
            values.append(torch.randn(shape, generator=generator))
    return replace(
        made_batch(step, positions),
        low_level={name: torch.stack(values) for name, values in drawn.items()},
    )


def made_decoder(skip: bool = False, low_level: bool = False) -> Decoder:
    """Return a decoder with a learned temperature and the parts that are asked for."""
    model = MODEL.model_copy(update={"low_level": low_level, "learned_temperature": 0.1})
    decoder = Decoder(model, SUBJECTS, E, (T, D), seed=3)
    if skip:
        add_lora(decoder, LoraConfig(rank=2, skip=("align",)), seed=1)
        decoder.requires_grad_(True)
    return decoder


def losses_by_step(
    world: World,
    changes: dict[str, Any] | None = None,
    low_level: bool = False,
    micro_batch_size: int | None = None,
) -> list[dict[str, float]]:
    """Train with every term by plain gradient descent; return the terms of every step.

    With a size of micro-batches the gradients are accumulated.
    """
    off = {} if low_level else {"low_level_l1": 0.0, "low_level_contrastive": 0.0}
    loss = LossConfig.model_validate({**EVERY, **off, **(changes or {})})
    decoder = made_decoder(skip=True, low_level=low_level)
    terms = active_terms(loss, frozenset(_outputs_of(decoder)))
    sizes = [len(own_positions(GLOBAL_BATCH, rank, world.size)) for rank in range(world.size)]
    own = own_positions(GLOBAL_BATCH, world.rank, world.size)
    classes, found = made_classes(loss), []
    cut_ends(decoder, world, torch.float32)
    for step in range(STEPS):
        settings = (
            whole_batch(step, own), Plan(tuple(sizes)), terms, loss, 3, world, STEPS,
            decoder.ridge.num_voxels, classes,
        )  # fmt: skip
        decoder.zero_grad()
        if micro_batch_size is None:
            losses = compute_losses(decoder, *settings)
            (losses.shared + losses.own).backward()
        else:
            losses = accumulate(
                Step(*settings), decoder, lambda part, _: part.backward(), micro_batch_size, 1.0
            )
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                whole = name.startswith("ends.") and is_cut(name)
                parameter.sub_(0.002 * (grad if whole else sum_over_ranks(grad, world)))
        own_names = [term.name for term in terms if term.scope == "own"]
        summed = {
            name: float(sum_over_ranks(value, world)) if name in own_names else float(value)
            for name, value in losses.terms.items()
        }
        found.append(summed)
    return found
