"""Memory of batches that nobody uses any more, handed out again.

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


class Recycled:
    """Hands out float32 tensors; may be used by several threads."""

    def __init__(self, most: int = 8) -> None:
        self._free: deque[NDArray[np.float32]] = deque(maxlen=most)

    @property
    def num_free(self) -> int:
        """Blocks that wait for their next use."""
        return len(self._free)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor; its memory comes back when its storage is freed.

        Views, slices and what autograd saved share the storage, so they keep the memory.
        """
        size = prod(shape)
        try:
            block = self._free.popleft()
        except IndexError:
            block = np.empty(size, np.float32)
        if block.size != size:
            block = np.empty(size, np.float32)
        # torch holds this view, not the block, for as long as the storage lives.
        view = block.view()
        weakref.finalize(view, self._free.append, block).atexit = False
        return torch.from_numpy(view).view(shape)
