"""fp16 on a CPU, which computes in it slowly and which DeepSpeed refuses unless told otherwise."""

import torch

from dist_decoder.train.ends import ShardedEnds
from dist_decoder.train.zero import import_deepspeed


def accelerator() -> type:
    """Return the class of DeepSpeed's accelerator; its ``is_fp16_supported`` may be replaced."""
    import_deepspeed(torch.device("cpu"))
    from deepspeed.accelerator import get_accelerator

    return type(get_accelerator())


def yes(self: object) -> bool:
    """Stand for an accelerator that computes in fp16."""
    return True


class OverflowingEnds(ShardedEnds):
    """Ends whose gradient is infinite at one backward pass, on one rank."""

    at = -1
    rank = 1
    _passes = 0

    def collect(self) -> None:
        if self._passes == self.at and self.world.rank == self.rank:
            next(iter(self.parameters.values())).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        self._passes += 1
        super().collect()
