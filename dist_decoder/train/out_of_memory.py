"""Running out of memory, said in terms of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dist_decoder.dist import World
from dist_decoder.errors import OutOfMemory
from dist_decoder.train.job import Job

_CPU_SIGNS = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


@contextmanager
def memory_explained(job: Job, world: World) -> Iterator[None]:
    """Turn every form of running out of memory into one error that says which key to change.

    Raises:
        OutOfMemory: instead of torch's, Python's and the CPU allocator's errors.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemory(explain(job, world, str(error))) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory, of a GPU or of the host, is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _CPU_SIGNS)


def explain(job: Job, world: World, cause: str) -> str:
    """Return what ran out, what ``estimate`` predicted, and which keys make a rank smaller."""
    place = "GPU memory" if world.device.type == "cuda" else "memory"
    predicted = ""
    if job.expectation is not None:
        size = job.expectation(world.size).memory_bytes
        predicted = f" `dist-decoder estimate` predicts {size / 1e9:.2f} GB per rank here;"
    first_line = (cause.splitlines() or ["no further detail"])[0]
    return (
        f"rank {world.rank} of {world.size} ran out of {place} ({first_line});{predicted} "
        f"{'; '.join(_knobs(job, world))}. Then run the same command: it goes on from the last "
        "checkpoint"
    )


def _knobs(job: Job, world: World) -> list[str]:
    knobs = []
    if job.decoder.has_prior and not job.engine.checkpoint_prior:
        knobs.append("set engine.checkpoint_prior=true (activation checkpointing)")
    held = -(-job.data.batch_size // world.size)
    size = job.engine.micro_batch_size or held
    if min(size, held) > 1:
        knobs.append(f"set engine.micro_batch_size below {min(size, held)}")
    if job.engine.zero_stage < 3 and world.size > 1:
        knobs.append(f"raise engine.zero_stage (now {job.engine.zero_stage})")
    knobs.append("start more ranks")
    knobs.append(
        f"in a new run, lower data.batch_size (now {job.data.batch_size}) or the model's sizes"
    )
    return knobs
