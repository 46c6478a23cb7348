"""A checkpoint written in the background: slices are copied aside, training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_decoder.dist import World
from dist_decoder.errors import DistDecoderError, StorageError
from dist_decoder.train.canonical import publish, rank_is_done, write_rank
from dist_decoder.train.fence import Fence
from dist_decoder.train.places import Place, inside, open_place, step_name
from dist_decoder.train.slices import Slice

_POLL_S = 0.05


class Staging:
    """Memory on the CPU that holds a copy of this rank's slices while they are written.

    Allocated once and touched at once, so that a save costs the copy and no page fault; pinned
    where the slices are on a GPU.
    """

    def __init__(self, slices: Iterable[Slice]) -> None:
        """Make room for slices of these sizes."""
        sizes, on_gpu = [], False
        for piece in slices:
            sizes.append(piece.values_n.numel())
            on_gpu = on_gpu or piece.values_n.is_cuda
        self._memory = torch.empty(sum(sizes), pin_memory=on_gpu)
        self._memory.zero_()

    @torch.no_grad()
    def copy(self, slices: Iterable[Slice]) -> list[Slice]:
        """Return the slices with their values copied aside."""
        copied, position, on_gpu = [], 0, False
        for piece in slices:
            count = piece.values_n.numel()
            target = self._memory[position : position + count]
            on_gpu = on_gpu or piece.values_n.is_cuda
            target.copy_(piece.values_n, non_blocking=piece.values_n.is_cuda)
            copied.append(Slice(piece.name, piece.kind, piece.start, piece.shape, target))
            position += count
        if on_gpu:
            torch.cuda.synchronize()
        return copied


@dataclass
class Writing:
    """A checkpoint on its way to the disk; filled by the thread that writes it."""

    step: int
    begun: float = field(default_factory=time.monotonic)
    stall_s: float = 0.0
    """How long training waited."""
    write_s: float = 0.0
    """From the beginning of the save until it was published (rank 0) or this rank was done."""
    num_bytes: int = 0
    """Of this rank."""
    error: DistDecoderError | None = None
    abandoned: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def run(self, work: Callable[[Writing], None], background: bool) -> None:
        """Do ``work``, now or in a thread; what it raises is kept in ``error``."""

        def guarded() -> None:
            try:
                work(self)
            except DistDecoderError as error:
                self.error = error
            except OSError as error:
                self.error = StorageError(f"checkpoint of step {self.step}: {error}")
            except Exception as error:
                # A thread has nobody to raise to: the loop raises it at its next step.
                self.error = DistDecoderError(
                    f"checkpoint of step {self.step}: {type(error).__name__}: {error}"
                )
                self.error.__cause__ = error
            self.write_s = time.monotonic() - self.begun

        if background:
            # A daemon: a rank that dies of another error must not wait for its peers' files.
            self.thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
            self.thread.start()
        else:
            guarded()


def write_checkpoint(
    writing: Writing,
    folder: Place,
    fence: Fence,
    world: World,
    slices: Sequence[Slice],
    document: Mapping[str, Any],
    published: Callable[[], None],
) -> None:
    """Write this rank's part; on rank 0 wait for the others and publish the checkpoint.

    The ranks tell each other that they are done by files, so that no collective runs beside those
    of the training.

    Args:
        writing: of this save; ``abandoned`` ends the waiting.
        folder: of the checkpoints.
        fence: of this attempt.
        world: this rank.
        slices: of this rank.
        document: ``meta.json``.
        published: called by rank 0 while it holds the fence, to remove old checkpoints.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
        SupersededError: a newer attempt of the run has begun.
    """
    storage = open_place(inside(folder, step_name(writing.step)))
    number = fence.number
    writing.num_bytes = write_rank(storage, number, world.rank, world.size, slices)
    if not world.is_first:
        return
    pause = _POLL_S
    for rank in range(1, world.size):
        while not rank_is_done(storage, number, rank, world.size):
            if writing.abandoned.wait(pause):
                return
            pause = min(2 * pause, 1.0)
    with fence.held():
        publish(storage, number, world.size, document)
        published()
