"""Start values by parameter name, so that every world size starts from the same numbers.

A rank that holds some rows of a parameter gets the numbers that these rows have in the whole. A
stream of torch cannot be skipped, so the rows before are drawn, block by block, and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_decoder.rng import torch_generator

_BLOCK = 1 << 20
"""Numbers that are drawn and dropped at a time."""

RowsOf = Callable[[str], range | None]
"""Parameter name -> the rows that are held; None is all."""


@runtime_checkable
class KnowsItsStart(Protocol):
    """A module with parameters of its own that says how they start."""

    def initialise_parameter(self, name: str, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class StartsUniform(Protocol):
    """A module whose own parameters start uniform within plus and minus ``start_bound``."""

    @property
    def start_bound(self) -> float: ...


def whole_rows(name: str) -> range | None:
    """Return None: the ``RowsOf`` of a model that is held whole."""
    return None


@torch.no_grad()
def initialise(
    model: nn.Module, seed: int, rows_of: RowsOf = whole_rows, drawn: tuple[str, ...] = ("",)
) -> None:
    """Overwrite every parameter of ``model`` by a function of (seed, its name).

    Linear layers and convolutions are uniform within 1 / sqrt(inputs), norms are one and zero. A
    module can name parameters below it in ``start_at_zero`` and ``start_at_identity``. Parameters
    on the meta device are made on the CPU, of their rows alone: at no time is there more than one
    parameter beside what is held.

    Args:
        model: changed in place.
        seed: of the start values.
        rows_of: which rows of the parameters on the meta device are held.
        drawn: beginnings of the names of the parameters that get their start; the others, which
            are to be loaded, are zero and take no memory before.
    """
    zero, identity = set(), set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        zero |= {dot + name for name in getattr(module, "start_at_zero", ())}
        identity |= {dot + name for name in getattr(module, "start_at_identity", ())}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}" if prefix else name
            rows = rows_of(full_name) if parameter.is_meta else None
            if full_name in zero or not full_name.startswith(drawn):
                value = torch.zeros(_held_shape(parameter.shape, rows))
            elif full_name in identity:
                value = _held(torch.eye(*parameter.shape), rows)
            else:
                generator = torch_generator(seed, "init", full_name)
                value = _start(module, name, parameter.shape, rows, generator)
            if parameter.is_meta:
                trained = parameter.requires_grad
                setattr(module, name, nn.Parameter(value, requires_grad=trained))
            else:
                parameter.copy_(value)


def uniform_rows(
    shape: torch.Size, rows: range | None, bound: float, generator: torch.Generator
) -> Tensor:
    """Return some rows of what ``(torch.rand(shape) * 2 - 1) * bound`` is, bit by bit.

    Args:
        shape: of the whole.
        rows: along the first axis; None is all.
        bound: half the width of the interval.
        generator: at the beginning of the whole.
    """
    values = torch.empty(_held_shape(shape, rows))
    per_row = math.prod(shape[1:])
    left = 0 if rows is None else rows.start * per_row
    dropped = torch.empty(min(left, _BLOCK))
    while left > 0:
        count = min(left, _BLOCK)
        dropped[:count].uniform_(generator=generator)
        left -= count
    return values.uniform_(generator=generator).mul_(2).sub_(1).mul_(bound)


def _start(
    module: nn.Module,
    name: str,
    shape: torch.Size,
    rows: range | None,
    generator: torch.Generator,
) -> Tensor:
    if isinstance(module, KnowsItsStart):
        with torch.device("cpu"):
            return _held(module.initialise_parameter(name, generator), rows)
    if isinstance(module, StartsUniform):
        return uniform_rows(shape, rows, module.start_bound, generator)
    if isinstance(module, nn.Linear):
        return uniform_rows(shape, rows, module.in_features**-0.5, generator)
    if isinstance(module, nn.Conv2d):
        return uniform_rows(shape, rows, module.weight[0].numel() ** -0.5, generator)
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        held = _held_shape(shape, rows)
        return torch.ones(held) if name == "weight" else torch.zeros(held)
    raise NotImplementedError(f"{type(module).__name__}.{name} has no start value")


def _held_shape(shape: torch.Size, rows: range | None) -> tuple[int, ...]:
    return tuple(shape) if rows is None else (len(rows), *shape[1:])


def _held(value: Tensor, rows: range | None) -> Tensor:
    return value if rows is None else value[rows.start : rows.stop].clone()
