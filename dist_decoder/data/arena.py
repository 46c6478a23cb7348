"""Memory of a whole batch in one block, handed out in pieces and used again.

A batch of full-size tokens is larger than what malloc keeps, so a new one costs a page fault per
4 KiB: measured, more than reading and decoding it.
"""

from __future__ import annotations

import weakref
from collections import deque
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 16
"""Pieces start at multiples of 64 bytes."""


class Arena:
    """One batch's memory; pieces come in the order in which they are asked for.

    The same requests in the same order give the same places, so that two processes that share the
    block need not tell each other where things are.
    """

    def __init__(self, block: Tensor) -> None:
        self._block = block
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised piece; without room left, memory of its own."""
        count = prod(shape)
        length = piece_size(shape, dtype)
        start, stop = self._used, self._used + length
        if stop > self._block.numel():
            return torch.empty(shape, dtype=dtype)
        self._used = stop
        return self._block[start:stop].view(dtype)[:count].view(shape)


def piece_size(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Return how many float32 of a block a piece takes."""
    length = -(-prod(shape) * dtype.itemsize // 4)
    return -(-length // _ALIGN) * _ALIGN


class Recycled:
    """Hands out float32 blocks of one size; may be used by several threads."""

    def __init__(self, size: int, most: int = 8, pinned: bool = False) -> None:
        self._size = size
        self._pinned = pinned
        self._free: deque[NDArray[np.float32]] = deque(maxlen=most)

    @property
    def num_free(self) -> int:
        """Blocks that wait for their next use."""
        return len(self._free)

    def block(self) -> Tensor:
        """Return an uninitialised (size,) tensor; it comes back when its storage is freed.

        Views, slices and what autograd saved share the storage, so they keep the memory.
        """
        try:
            block = self._free.popleft()
        except IndexError:
            # numpy asks the system for huge pages, torch does not.
            block = (
                torch.empty(self._size, pin_memory=True).numpy()
                if self._pinned
                else np.empty(self._size, np.float32)
            )
        return handed_out(block, self._free.append)


def handed_out(block: NDArray[np.float32], give_back: weakref.CallableProxyType | object) -> Tensor:
    """Return a tensor over ``block``; ``give_back(block)`` is called when its storage is freed."""
    # torch holds this view, not the block, for as long as the storage lives.
    view = block.view()
    weakref.finalize(view, give_back, block).atexit = False  # type: ignore[arg-type]
    return torch.from_numpy(view)
