"""One global step: losses, gradients, the decision whether it is taken, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_decoder.batch import Batch
from dist_decoder.dist import World
from dist_decoder.errors import TrainingError
from dist_decoder.losses.objective import Losses, Term
from dist_decoder.train.accumulate import accumulate
from dist_decoder.train.checkpoint import Progress
from dist_decoder.train.engine import Engine
from dist_decoder.train.guard import FiniteGuard
from dist_decoder.train.job import Job
from dist_decoder.train.step import Plan, Step, compute_losses


@dataclass(frozen=True)
class Update:
    """What came of one step."""

    losses: Losses
    norm: float
    """Of the gradient over all parameters, before clipping; NaN if the step was not taken."""
    part_norms: dict[str, float]
    """By part of the model; empty if they were not asked for."""


class Updater:
    """Takes the steps of a run, and counts those that are not taken."""

    def __init__(
        self, job: Job, engine: Engine, plan: Plan, terms: Sequence[Term], world: World
    ) -> None:
        self._job = job
        self._engine = engine
        self._plan = plan
        self._terms = tuple(terms)
        self._world = world
        self.guard = FiniteGuard(job.optim, terms, world)
        self.overflows = 0
        """Steps of this run whose gradient overflowed in fp16."""

    def take(
        self, batch: Batch, step: int, say: Callable[[str], None], by_part: bool = False
    ) -> Update:
        """Take global step ``step`` (0-based) with this rank's samples; a collective call.

        Raises:
            TrainingError: the batch is of another step.
            NonFiniteError: see ``FiniteGuard``.
        """
        if batch.step != step:
            raise TrainingError(f"the loader gave step {batch.step}, expected {step}")
        engine, guard = self._engine, self.guard
        losses = self._backward(batch)
        # Without `skip` one look at the gradient norm is enough, and saves a collective. With a
        # loss scale the norm alone does not tell whose fault it is.
        looks = self._job.optim.non_finite == "skip" or engine.loss_scale is not None
        if looks and guard.skips_loss(step, batch, losses, say):
            engine.step(step, usable=False)
            return Update(losses, math.nan, {})
        scale = engine.scale
        norm = engine.step(step, by_part=by_part)
        if engine.overflowed:
            self.overflows += 1
            say(
                f"step {step}: the gradient overflowed in fp16 at loss scale {scale:g}; not taken, "
                f"the scale is now {engine.scale:g}"
            )
            return Update(losses, math.nan, {})
        if guard.skips_gradient(step, batch, losses, norm, say):
            return Update(losses, math.nan, {})
        return Update(losses, norm, engine.part_norms if by_part else {})

    def progress(self) -> Progress:
        """Return what a checkpoint keeps of the steps that were not taken."""
        return Progress(
            skipped_steps=self.guard.skipped,
            overflow_steps=self.overflows,
            loss_scaler=self._engine.scaler(),
        )

    def load(self, progress: Progress) -> None:
        """Go on where ``progress`` was."""
        self.guard.skipped = progress.skipped_steps
        self.overflows = progress.overflow_steps
        self._engine.load_scaler(progress.loss_scaler)

    def values(self) -> dict[str, float]:
        """Return what is logged besides losses and norms."""
        found: dict[str, float] = {"skipped_steps": self.guard.skipped}
        if self._engine.loss_scale is not None:
            found |= {"loss_scale": self._engine.scale, "overflow_steps": self.overflows}
        return found

    def _backward(self, batch: Batch) -> Losses:
        job, engine, world = self._job, self._engine, self._world
        forward = self.guard.watched(engine)
        settings = (
            batch, self._plan, self._terms, job.loss, job.document.seed, world, job.optim.steps,
            job.decoder.ridge.num_voxels, job.classes,
        )  # fmt: skip
        size = job.engine.micro_batch_size
        if size is not None:
            factor = world.size * engine.scale
            return accumulate(Step(*settings), forward, engine.backward, size, factor)
        losses = compute_losses(forward, *settings)
        total = (losses.shared + losses.own) * world.size
        engine.backward(total if engine.loss_scale is None else total * engine.scale)
        return losses
