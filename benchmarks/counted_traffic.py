"""Count what a rank sends, by wrapping torch.distributed before DeepSpeed is imported."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as torch_dist
from torch import Tensor

_LATER = ("all_to_all_single", "all_gather", "all_gather_into_tensor", "all_reduce", "reduce")
_NAMES = (*_LATER, "reduce_scatter_tensor", "broadcast")


class CountedTraffic:
    """Bytes that this rank sends, by collective, as rings send them.

    A reduction to one rank and a broadcast are counted as a rank's share of what all ranks send.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        for name in _NAMES:
            setattr(torch_dist, name, self._counting(name, getattr(torch_dist, name)))

    def take(self) -> dict[str, int]:
        """Return the counts since the last call."""
        found, self.sent = dict(self.sent), Counter()
        return found

    def _counting(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent[name] += round(_sent(name, args, kwargs))
            return function(*args, **kwargs)

        return counted


def _sent(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    size = torch_dist.get_world_size()
    others = size - 1
    if name == "all_to_all_single":
        sends = args[3]
        elements = sum(sends) - sends[torch_dist.get_rank()]
        return float(elements * args[1].element_size())
    if name in ("all_gather", "all_gather_into_tensor"):
        own = args[1] if len(args) > 1 else kwargs.get("input_tensor", kwargs.get("tensor"))
        return _size(own) * others
    if name == "reduce_scatter_tensor":
        return _size(args[1] if len(args) > 1 else kwargs["input"]) * others / size
    tensor = args[0] if args else kwargs["tensor"]
    return _size(tensor) * others / size * (2 if name == "all_reduce" else 1)


def _size(tensor: Any) -> float:
    assert isinstance(tensor, Tensor)
    return float(tensor.numel() * tensor.element_size())
