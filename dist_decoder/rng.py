"""Random streams that depend on (seed, purpose, counters) and on nothing else.

Neither workers, nor world size, nor a restart change them. There is no global seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # Commands on data draw numpy streams and must not wait for torch.
    import torch
    from torch import Tensor


def key64(seed: int, purpose: str, *counters: int | str) -> int:
    """Return 64 bits that identify a stream."""
    text = "\x1f".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def numpy_generator(seed: int, purpose: str, *counters: int | str) -> np.random.Generator:
    """Return a numpy generator for one stream (Philox: stable over numpy versions)."""
    return np.random.Generator(np.random.Philox(key64(seed, purpose, *counters)))


def torch_generator(
    seed: int, purpose: str, *counters: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a torch generator for one stream on ``device``."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(key64(seed, purpose, *counters) >> 1)
    return generator


def sample_normal(
    seed: int,
    purpose: str,
    step: int,
    positions: Iterable[int],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return (B, *shape) float32 standard normal draws that depend on the global position."""
    import torch

    return _by_position(torch.randn, seed, purpose, step, positions, shape, device)


def sample_uniform(
    seed: int,
    purpose: str,
    step: int,
    positions: Iterable[int],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return (B, *shape) float32 draws from [0, 1) that depend on the global position."""
    import torch

    return _by_position(torch.rand, seed, purpose, step, positions, shape, device)


_BLOCK = 16
"""Neighbouring positions share a stream: starting one costs as much as thousands of draws."""


def _by_position(
    draw: Callable[..., Tensor],
    seed: int,
    purpose: str,
    step: int,
    positions: Iterable[int],
    shape: tuple[int, ...],
    device: torch.device | str,
) -> Tensor:
    import torch

    wanted = list(positions)
    if torch.device(device).type == "meta":
        return torch.empty((len(wanted), *shape), device=device)
    blocks = sorted({position // _BLOCK for position in wanted})
    if not blocks:
        return torch.empty((0, *shape), device=device)
    drawn = torch.cat(
        [
            draw(
                (_BLOCK, *shape),
                generator=torch_generator(seed, purpose, step, block, device=device),
                device=device,
            )
            for block in blocks
        ]
    )
    place = {block: index * _BLOCK for index, block in enumerate(blocks)}
    rows = [place[position // _BLOCK] + position % _BLOCK for position in wanted]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return drawn[rows[0] : rows[0] + len(rows)]
    return drawn[torch.tensor(rows, device=drawn.device)]
