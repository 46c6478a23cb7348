"""A collective that fails since another rank is gone, said in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as torch_dist

from dist_decoder.dist import World
from dist_decoder.errors import LateRankError

_SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused",
    "Socket Timeout", "Timed out waiting", "NCCL error", "gloo/transport",
)  # fmt: skip


@contextmanager
def lost_peer_explained(world: World) -> Iterator[None]:
    """Turn the errors that torch raises when a peer is gone into one.

    Raises:
        LateRankError: instead of gloo's, NCCL's and the store's errors.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise LateRankError(
            f"rank {world.rank} of {world.size} lost its connection to another rank ({cause}): "
            "that rank died or was stopped, and its own log says why. The same command goes on "
            "from the last checkpoint"
        ) from error


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because of another rank."""
    if isinstance(error, torch_dist.DistError):
        return True
    return any(sign in str(error) for sign in _SIGNS)
