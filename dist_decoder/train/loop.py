"""The loop that ``train`` and ``adapt`` share: batches, steps, logs, checkpoints, validation."""

from __future__ import annotations

import copy
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_decoder.batch import Batch
from dist_decoder.config.train import (
    CheckpointConfig,
    EngineConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    SourcesConfig,
)
from dist_decoder.data.members import TargetName
from dist_decoder.data.order import own_positions
from dist_decoder.data.targets import TargetStatistics
from dist_decoder.dist import World, any_rank, broadcast_object, sum_over_ranks
from dist_decoder.errors import CheckpointError, ConfigError, StoppedError, TrainingError
from dist_decoder.losses.objective import Losses, Term, active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.storage import atomic_write_json
from dist_decoder.train.canonical import (
    State,
    checkpoints_of,
    keep_last,
    owner_of,
    read_document,
    read_state,
    write_state,
)
from dist_decoder.train.checkpoint import CheckpointDocument, load_weights, target_tensors
from dist_decoder.train.class_terms import ClassTerms
from dist_decoder.train.engine import Engine
from dist_decoder.train.logs import Logs
from dist_decoder.train.optimizer import learning_rate
from dist_decoder.train.signals import StopFlag, catch_stop_signals
from dist_decoder.train.step import Plan, compute_losses

_START_SCORES = "validation.json"
_SKIPPED = "skipped_steps"


class BatchSource(Protocol):
    """Batches of this rank, without end."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


Batches = Callable[[int, tuple[TargetName, ...]], BatchSource]
"""(start step, targets that the losses need) -> batches of this rank from that step on."""
Validation = Callable[[Decoder], dict[str, float]]


@dataclass(frozen=True)
class Job:
    """One training run, ready to go."""

    folder: Path
    decoder: Decoder
    """With its start values, on CPU; frozen parameters do not train."""
    batches: Batches
    validation: Validation
    document: CheckpointDocument
    """Of the checkpoints; ``step`` is filled in."""
    targets: TargetStatistics
    data: SourcesConfig
    loss: LossConfig
    optim: OptimConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    save_frozen: bool = True
    """False for adapters: what is frozen belongs to the base."""
    classes: ClassTerms | None = None
    """What the losses on classes keep; None if they are off."""
    keep_start: bool = False
    """Save and validate the model at step 0, below ``start``."""
    label: str = ""


def fit(job: Job, world: World) -> dict[str, Any]:
    """Train to the last step, or go on from the newest complete checkpoint.

    Returns:
        ``step``, the ``losses`` of the last logged step, the ``validation`` scores, and with
        ``keep_start`` ``validation_at_start``.

    Raises:
        StoppedError: SIGTERM or SIGUSR1 came; a checkpoint was saved.
        KeyboardInterrupt: SIGINT came; a checkpoint was saved.
        ConfigError: the batch is smaller than the number of ranks.
        TrainingError: a loss or gradient is not finite.
        CheckpointError: the newest checkpoint is damaged or does not fit.
    """
    run = _Run(job, world)
    try:
        with catch_stop_signals() as flag:
            return run.train(flag)
    finally:
        run.close()


class _Run:
    def __init__(self, job: Job, world: World) -> None:
        self.job = job
        self.world = world
        self.folder = job.folder / "checkpoints"
        outputs = frozenset(_outputs_of(job.decoder))
        self.terms: tuple[Term, ...] = active_terms(job.loss, outputs)
        self.skipped = 0
        if not self.terms:
            raise TrainingError(
                "every loss term is switched off or has no output: nothing to learn"
            )
        names: tuple[TargetName, ...] = ("pooled", "tokens", "low_level")
        wanted = {term.target for term in self.terms}
        self.needed = tuple(name for name in names if name in wanted)
        counts = (
            len(own_positions(job.data.batch_size, rank, world.size)) for rank in range(world.size)
        )
        self.plan = Plan(tuple(counts))
        if min(self.plan.counts) == 0:
            # An empty backward pass may abort a rank without a word.
            raise ConfigError(
                f"data.batch_size {job.data.batch_size} leaves a rank of {world.size} without "
                "samples: raise it to at least the number of ranks, or start fewer ranks"
            )
        self.unused = job.decoder.train_only_for(job.loss)
        self.step, state = self._resume()
        # Validation predicts with a copy: at ZeRO stage 3 the trained one is in pieces.
        self.replica = copy.deepcopy(job.decoder) if world.is_first else None
        self.frozen = {
            name: p.detach().clone()
            for name, p in job.decoder.named_parameters()
            if not p.requires_grad
        }
        job.decoder.to(world.device).train()
        self.engine = Engine(job.decoder, job.engine, job.optim, world)
        if state is not None:
            self.engine.restore(state, self.step - self.skipped)
        self.saved = self.step if state is not None else -1

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()

    def train(self, flag: StopFlag) -> dict[str, Any]:
        job, steps = self.job, self.job.optim.steps
        first = self.world.is_first
        scores: dict[str, float] = {}
        losses: dict[str, float] = {}
        with ExitStack() as held:
            logs = held.enter_context(
                Logs(job.folder, job.log, steps, self.step, first, label=job.label)
            )
            self._announce(logs)
            if job.keep_start and self.step == 0:
                self._keep_start(logs)
            clock = _Clock(job.data.batch_size)
            source = held.enter_context(closing(job.batches(self.step, self.needed)))
            for batch in source if self.step < steps else ():
                norm, result = self._update(batch.to(self.world.device), logs)
                clock.count(batch.wait_s)
                self.step += 1
                if self.step % job.log.every_steps == 0 or self.step == steps:
                    losses = self._write(logs, result, norm, clock)
                stop = any_rank([flag.signal], self.world)[0]
                if stop or self.step % job.checkpoint.every_steps == 0 or self.step == steps:
                    self._save(logs)
                if self.step == steps:
                    break
                if stop:
                    self._stop(stop, logs)
                every = job.log.validate_every_steps
                if every and self.step % every == 0:
                    scores = self._validate(logs)
                    clock = _Clock(job.data.batch_size)
            scores = self._validate(logs)
        return {"step": self.step, "losses": losses, "validation": scores, **self._at_start()}

    def _at_start(self) -> dict[str, Any]:
        path = self.job.folder / "start" / _START_SCORES
        if not (self.job.keep_start and self.world.is_first and path.is_file()):
            return {}
        return {"validation_at_start": json.loads(path.read_text())}

    def _update(self, batch: Batch, logs: Logs) -> tuple[float, Losses]:
        if batch.step != self.step:
            raise TrainingError(f"the loader gave step {batch.step}, expected {self.step}")
        job = self.job
        losses = compute_losses(
            self.engine,
            batch,
            self.plan,
            self.terms,
            job.loss,
            job.document.seed,
            self.world,
            job.optim.steps,
            job.decoder.ridge.num_voxels,
            job.classes,
        )
        total = losses.shared + losses.own
        if job.optim.non_finite == "skip" and self._is_skipped(batch, losses, total, logs):
            return math.nan, losses
        norm = self.engine.update(total * self.world.size, self.step)
        if not (math.isfinite(norm) and norm >= 0):
            raise TrainingError(self._explain_non_finite(batch, losses))
        return norm, losses

    def _is_skipped(self, batch: Batch, losses: Losses, total: Tensor, logs: Logs) -> bool:
        """Return whether the loss of any rank is not finite, and count the step if so."""
        finite = bool(torch.isfinite(total))
        if not any_rank([0 if finite else 1], self.world)[0]:
            return False
        self.skipped += 1
        text = self._explain_non_finite(batch, losses)
        limit = self.job.optim.max_skipped
        if self.skipped > limit:
            raise TrainingError(f"{text}. Skipped {self.skipped} steps; optim.max_skipped={limit}")
        logs.say(f"{text}; skipped, {self.skipped} of at most {limit}")
        return True

    def _explain_non_finite(self, batch: Batch, losses: Losses) -> str:
        terms = self._whole_terms(losses)
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        samples = bad_samples(batch)
        where = f"loss term {', '.join(bad)}" if bad else "gradient"
        data = f"; samples with non-finite data: {', '.join(samples[:5])}" if samples else ""
        return (
            f"step {self.step}: the {where} is not finite{data}. Nothing was saved after the last "
            "checkpoint; lower optim.lr, set optim.clip_norm, repair the data, or set "
            "optim.non_finite=skip"
        )

    def _whole_terms(self, losses: Losses) -> dict[str, float]:
        own = [term.name for term in self.terms if term.scope == "own"]
        values = {name: float(value) for name, value in losses.terms.items()}
        if own:
            summed = sum_over_ranks(torch.stack([losses.terms[name] for name in own]), self.world)
            values |= dict(zip(own, summed.tolist(), strict=True))
        return values

    def _write(self, logs: Logs, losses: Losses, norm: float, clock: _Clock) -> dict[str, float]:
        terms = self._whole_terms(losses)
        total = sum(getattr(self.job.loss, name) * value for name, value in terms.items())
        rate, wait = clock.read()
        values = {
            "loss/total": total,
            **{f"loss/{name}": value for name, value in terms.items()},
            "lr": learning_rate(self.job.optim, self.step - 1),
            "grad_norm": norm,
            "skipped_steps": self.skipped,
            "samples_per_s": rate,
            "wait_share": wait,
        }
        logs.write(self.step, values)
        return {name: value for name, value in values.items() if name.startswith("loss/")}

    def _save(self, logs: Logs) -> None:
        if self.saved != self.step:
            self._write_checkpoint(logs, self.folder)
            self.saved = self.step

    def _keep_start(self, logs: Logs) -> None:
        folder = self.job.folder / "start"
        self._write_checkpoint(logs, folder / "checkpoints")
        scores = self._validate(logs)
        if self.world.is_first:
            atomic_write_json(folder / _START_SCORES, scores)

    def _write_checkpoint(self, logs: Logs, folder: Path) -> None:
        begun = time.monotonic()
        own: State = {}
        owners = owner_of(self.engine.names, self.world.size)
        for name in self.engine.names:
            tensors = self.engine.read(name)
            if owners[name] == self.world.rank:
                own[name] = tensors
        if self.world.is_first:
            own |= target_tensors(self.job.targets)
            own |= {_SKIPPED: {"memory": torch.tensor(float(self.skipped))}}
            if self.job.classes is not None:
                own |= self.job.classes.state()
            if self.job.save_frozen:
                own |= {name: {"frozen": value} for name, value in self.frozen.items()}
        document = self.job.document.model_copy(update={"step": self.step})
        written = document.model_dump(mode="json")
        write_state(folder, self.step, own, written, self.world)
        if self.world.is_first:
            keep_last(folder, self.job.checkpoint.keep_last)
        logs.say(f"step {self.step}: checkpoint saved in {time.monotonic() - begun:.1f} s")

    def _stop(self, number: int, logs: Logs) -> None:
        name = signal.Signals(number).name
        text = f"{name} at step {self.step}: checkpoint saved, the same command goes on from there"
        logs.say(text)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise StoppedError(text)

    def _validate(self, logs: Logs) -> dict[str, float]:
        kind = "ema" if self.job.optim.ema_decay > 0 else "master"
        weights = {name: self.engine.read(name)[kind] for name in self.engine.names}
        scores: dict[str, float] = {}
        if self.replica is not None:
            load_weights(self.replica, weights, self.job.folder, only=set(weights))
            scores = self.job.validation(self.replica.eval())
        scores = broadcast_object(scores, self.world)
        if scores:
            logs.write(self.step, scores)
        return scores

    def _resume(self) -> tuple[int, State | None]:
        found = checkpoints_of(self.folder) if self.world.is_first else []
        newest = broadcast_object(str(found[-1]) if found else None, self.world)
        if newest is None:
            return 0, None
        folder = Path(newest)
        document = CheckpointDocument.model_validate(read_document(folder))
        for key in ("manifest_fingerprint", "config_fingerprint", "base"):
            if getattr(document, key) != getattr(self.job.document, key):
                raise CheckpointError(
                    f"{folder} has another {key.replace('_', ' ')} ({getattr(document, key)}, now "
                    f"{getattr(self.job.document, key)}): the shards, configuration or base "
                    "changed since; choose another `run`"
                )
        state = read_state(folder)
        names = {name for name, p in self.job.decoder.named_parameters() if p.requires_grad}
        weights = {name: kinds["master"] for name, kinds in state.items() if "master" in kinds}
        load_weights(self.job.decoder, weights, folder, only=names)
        self.skipped = int(state[_SKIPPED]["memory"]) if _SKIPPED in state else 0
        if self.job.classes is not None:
            self.job.classes.load(state)
        return document.step, state

    def _announce(self, logs: Logs) -> None:
        if self.replica is None:
            return
        trained = sum(p.numel() for p in self.replica.parameters() if p.requires_grad)
        stage, size = self.job.engine.zero_stage, self.world.size
        logs.say(
            f"{trained:,} trainable parameters, {size} rank{'s' if size > 1 else ''}, ZeRO stage "
            f"{stage}, {self.job.engine.precision}, {self.world.device.type}"
        )
        if self.unused:
            logs.say(f"not trained, their losses are switched off: {', '.join(self.unused)}")
        if self.saved >= 0:
            logs.say(f"resumed from step {self.step}")


class _Clock:
    """Samples per second and share of waiting since the last reading."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._steps = 0
        self._wait_s = 0.0

    def count(self, wait_s: float) -> None:
        self._steps += 1
        self._wait_s += wait_s

    def read(self) -> tuple[float, float]:
        passed = max(time.monotonic() - self._since, 1e-9)
        result = (self._steps * self._batch_size / passed, self._wait_s / passed)
        self._reset()
        return result


def bad_samples(batch: Batch) -> list[str]:
    """Return the keys of samples whose voxels or targets are not finite."""
    bad = set()
    for subject, voxels in batch.voxels.items():
        rows = batch.rows[subject][~torch.isfinite(voxels).all(dim=1)]
        bad |= set(rows.tolist())
    for target in (batch.pooled_BE, batch.tokens_BTD):
        if target is not None:
            finite = torch.isfinite(target.flatten(1)).all(dim=1)
            bad |= set(torch.nonzero(~finite).flatten().tolist())
    return [batch.keys[row] for row in sorted(bad)]


def _outputs_of(decoder: Decoder) -> list[str]:
    outputs = ["subject_latents"]
    if decoder.pooled_dim is not None:
        outputs.append("pooled")
    if decoder.token_shape is not None:
        outputs += ["tokens", "retrieval"]
    if decoder.has_prior:
        outputs.append("prior")
    if decoder.middle.low_level is not None:
        outputs += ["low_level", "low_level_maps"]
    if decoder.ends.skip is not None:
        outputs.append("skip_latents")
    return outputs
