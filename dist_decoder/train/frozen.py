"""Weights that are not trained, as checkpoints keep them: every rank its share, in float32."""

from __future__ import annotations

import math

from dist_decoder.dist import World
from dist_decoder.nn.decoder import Decoder
from dist_decoder.train.slices import Slice


def frozen_slices(decoder: Decoder, world: World, narrow: bool) -> list[Slice]:
    """Return what this rank saves of the untrained weights; over all ranks every element once.

    To be called before an engine narrows the weights, or divides them in its own way. The ends are
    views of what the rank holds anyway; of the middle every rank copies each so-many-th parameter.

    Args:
        decoder: with its part of the ends, or whole.
        world: this rank.
        narrow: the ends will be computed with in fewer bits, so that they are copied too.
    """
    found = []
    for index, (name, parameter) in enumerate(decoder.named_parameters()):
        rows = decoder.parts.rows(name)
        if parameter.requires_grad or (rows is None and index % world.size != world.rank):
            continue
        value, start = parameter.detach().flatten(), 0
        if rows is None or narrow:
            value = value.to("cpu", copy=True)
        if rows is not None:
            start = rows.start * math.prod(parameter.shape[1:])
        if value.numel():
            shape = decoder.parts.whole_shape(name, tuple(parameter.shape))
            found.append(Slice(name, "frozen", start, shape, value))
    return found
