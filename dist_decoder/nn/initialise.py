"""Start values by parameter name, so that every world size starts from the same numbers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_decoder.rng import torch_generator


@runtime_checkable
class KnowsItsStart(Protocol):
    """A module with parameters of its own that says how they start."""

    def initialise_parameter(self, name: str, generator: torch.Generator) -> Tensor: ...


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter of ``model`` by a function of (seed, its name).

    Linear layers and convolutions are uniform within 1 / sqrt(inputs), norms are one and zero. A
    module can name parameters below it in ``start_at_zero`` and ``start_at_identity``. A model on
    the meta device has no values, and gets none.
    """
    zero, identity = set(), set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        zero |= {dot + name for name in getattr(module, "start_at_zero", ())}
        identity |= {dot + name for name in getattr(module, "start_at_identity", ())}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            if parameter.is_meta:
                continue
            if full_name in zero:
                parameter.zero_()
            elif full_name in identity:
                parameter.copy_(torch.eye(*parameter.shape))
            else:
                generator = torch_generator(seed, "init", full_name)
                parameter.copy_(_start(module, name, parameter, generator))


def _start(
    module: nn.Module, name: str, parameter: nn.Parameter, generator: torch.Generator
) -> Tensor:
    if isinstance(module, KnowsItsStart):
        return module.initialise_parameter(name, generator)
    if isinstance(module, nn.Linear):
        bound = module.in_features**-0.5
        return (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
    if isinstance(module, nn.Conv2d):
        bound = module.weight[0].numel() ** -0.5
        return (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return torch.ones(parameter.shape) if name == "weight" else torch.zeros(parameter.shape)
    raise NotImplementedError(f"{type(module).__name__}.{name} has no start value")
