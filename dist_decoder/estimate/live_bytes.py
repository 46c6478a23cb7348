"""How much memory a computation would hold, counted on the meta device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block and still alive.

    ``peak`` is the most that was alive at once, ``now`` what is alive. Tensors of the meta device
    have sizes but no values, so a full-size training step is walked through in seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if _counts(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _counts(leaf) and _storage(leaf)._cdata not in before:
                self._add(_storage(leaf))
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            # A storage keeps its Python object as long as it lives.
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _counts(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
