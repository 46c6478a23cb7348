"""The loop that ``train`` and ``adapt`` share: batches, steps, logs, checkpoints, validation."""

from __future__ import annotations

import json
import math
import secrets
import signal
import time
from contextlib import ExitStack, closing
from typing import Any

import torch

from dist_decoder.data.members import TargetName
from dist_decoder.data.order import own_positions
from dist_decoder.dist import (
    World,
    any_rank,
    broadcast_object,
    run_on_all,
    run_on_first,
    sum_over_ranks,
)
from dist_decoder.errors import ConfigError, StoppedError, TrainingError
from dist_decoder.losses.objective import Losses, Term, active_terms
from dist_decoder.nn.decoder import Decoder
from dist_decoder.storage import atomic_write_json
from dist_decoder.train.canonical import whole_slices
from dist_decoder.train.checkpoint import (
    CheckpointDocument,
    target_tensors,
)
from dist_decoder.train.engine import Engine
from dist_decoder.train.evaluating import evaluating
from dist_decoder.train.frozen import frozen_slices
from dist_decoder.train.job import Job
from dist_decoder.train.logs import Logs
from dist_decoder.train.lost_peer import lost_peer_explained
from dist_decoder.train.measure import SlowRanks, StepClock
from dist_decoder.train.optimizer import learning_rate, part_learning_rates
from dist_decoder.train.out_of_memory import memory_explained
from dist_decoder.train.patience import Patience
from dist_decoder.train.peak_flops import peak_flops
from dist_decoder.train.profiling import StepProfiler
from dist_decoder.train.saving import Resumed, Saver, check_shapes
from dist_decoder.train.signals import StopFlag, catch_stop_signals
from dist_decoder.train.slices import Slice
from dist_decoder.train.step import Plan
from dist_decoder.train.trackers import tracker_ids
from dist_decoder.train.update import Update, Updater
from dist_decoder.train.watchdog import Watchdog

_START_SCORES = "validation.json"


def fit(job: Job, world: World) -> dict[str, Any]:
    """Train to the last step, or go on from the newest complete checkpoint.

    Returns:
        ``step``, the ``losses`` of the last logged step, the ``validation`` scores, with
        ``keep_start`` ``validation_at_start``, and ``stopped_early`` if patience ran out.

    Raises:
        StoppedError: SIGTERM, SIGUSR1 or SIGUSR2 came; a checkpoint was saved.
        KeyboardInterrupt: SIGINT came; a checkpoint was saved.
        ConfigError: a tracker is not installed, or patience has no validations to count.
        NonFiniteError: a loss or gradient is not finite, once or too often.
        OutOfMemory: this rank has not enough memory.
        LateRankError: another rank is gone.
        CheckpointError: the newest checkpoint is damaged or does not fit.
    """
    token = broadcast_object(secrets.token_hex(8), world)
    with (
        catch_stop_signals() as flag,
        lost_peer_explained(world),
        memory_explained(job, world),
        Watchdog(world, job.engine, token) as watchdog,
    ):
        run = _Run(job, world, watchdog)
        try:
            return run.train(flag)
        finally:
            run.close()


class _Run:
    def __init__(self, job: Job, world: World, watchdog: Watchdog) -> None:
        self.job = job
        self.world = world
        self.watchdog = watchdog
        self.folder = job.folder / "checkpoints"
        outputs = frozenset(_outputs_of(job.decoder))
        self.terms: tuple[Term, ...] = active_terms(job.loss, outputs)
        if not self.terms:
            raise TrainingError(
                "every loss term is switched off or has no output: nothing to learn"
            )
        if job.optim.patience and not job.log.validate_every_steps:
            raise ConfigError(
                "optim.patience counts validations: set log.validate_every_steps above 0"
            )
        self.patience = Patience(job.optim.patience)
        names: tuple[TargetName, ...] = ("pooled", "tokens", "low_level")
        wanted = {term.target for term in self.terms}
        self.needed = tuple(name for name in names if name in wanted)
        self.plan = _plan(job, world)
        self.unused = job.decoder.train_only_for(job.loss)
        self.logs: Logs | None = None
        self.saver = Saver(self.folder, job.checkpoint, world, self._say)
        resumed = self.saver.newest(job.document)
        self.step = resumed.document.step if resumed is not None else 0
        known = resumed.document.progress.trackers if resumed is not None else {}
        self.tracker_ids = run_on_first(lambda: tracker_ids(job.folder, job.log, known), world)
        self.begun, self.validating_s = time.perf_counter(), 0.0
        job.decoder.to(world.device).train()
        narrow = job.engine.precision != "fp32"
        self.frozen = frozen_slices(job.decoder, world, narrow) if job.save_frozen else []
        if job.decoder.middle.prior is not None:
            job.decoder.middle.prior.net.recompute = job.engine.checkpoint_prior
        self.engine = Engine(job.decoder, job.engine, job.optim, world)
        self.updater = Updater(job, self.engine, self.plan, self.terms, world)
        self.is_resumed = resumed is not None
        if resumed is not None:
            self._go_on_from(resumed)
        self.saver.make_room(self.engine.slices())
        self.scores: dict[str, float] = {}
        self.slow = SlowRanks()
        self.peak = _peak_flops(job, world)
        self.flops_per_sample = 0
        if self.peak is not None and job.expectation is not None and world.is_first:
            self.flops_per_sample = job.expectation(world.size).flops_per_sample

    def close(self) -> None:
        self.saver.close()
        if hasattr(self, "engine"):
            self.engine.close()

    def train(self, flag: StopFlag) -> dict[str, Any]:
        with ExitStack() as held:
            logs = self._open_logs(held)
            self._announce(logs)
            if self.job.keep_start and self.step == 0:
                self._keep_start(logs)
            losses = self._take_steps(flag, logs, held)
            if self.patience.validated != self.step:
                self._validate(logs)
            self.saver.finish(must=True)
        early = {"stopped_early": True} if self.step < self.job.optim.steps else {}
        done = {"step": self.step, "losses": losses, "validation": self.scores}
        return {**done, **early, **self._at_start()}

    def _open_logs(self, held: ExitStack) -> Logs:
        job = self.job

        opened: list[Logs] = []

        def open_logs() -> None:
            logs = Logs(
                job.folder, job.log, job.optim.steps, self.step, self.world.is_first,
                label=job.label, tracker_ids=self.tracker_ids,
            )  # fmt: skip
            opened.append(held.enter_context(logs))

        # A tracker that cannot be opened on rank 0 ends every rank.
        run_on_all(open_logs, self.world)
        (logs,) = opened
        self.watchdog.say = logs.say
        self.logs = logs
        return logs

    def _take_steps(self, flag: StopFlag, logs: Logs, held: ExitStack) -> dict[str, float]:
        job, steps = self.job, self.job.optim.steps
        losses: dict[str, float] = {}
        if self._validation_is_due() and self.step > 0:
            # The stop signal came first: the run was saved without it.
            self._validate(logs)
        if self.step >= steps or self.patience.exhausted:
            return losses
        clock = StepClock()
        profiler = StepProfiler(job.folder, job.log.profile, self.world)
        held.callback(profiler.close)
        source = held.enter_context(closing(job.batches(self.step, self.needed)))
        batches = iter(source)
        while True:
            profiler.begin(self.step)
            self.watchdog.enter(self.step, "data")
            with clock.waiting_for_data():
                batch = next(batches)
            self.watchdog.enter(self.step, "update")
            logged = (self.step + 1) % job.log.every_steps == 0 or self.step + 1 == steps
            with clock.working():
                update = self.updater.take(
                    batch.to(self.world.device), self.step, logs.say, by_part=logged
                )
            self.step += 1
            trace = profiler.end(self.step - 1)
            if trace is not None:
                logs.say(f"step {self.step}: profiler traces are in {trace.parent}")
            self.watchdog.enter(self.step, "log")
            if logged:
                losses = self._write(logs, update, clock)
            stop, failed = any_rank([flag.signal, self.saver.failed], self.world)
            self.saver.settle(failed)
            if self._validation_is_due() and not stop:
                self._validate(logs)
            last = self.step == steps or self.patience.exhausted
            if stop or last or self.step % job.checkpoint.every_steps == 0:
                self._save(wait=bool(stop) or last)
            if last:
                break
            if stop:
                self._stop(stop, logs)
        if self.patience.exhausted:
            logs.say(
                f"step {self.step}: stopped early, no validation after step "
                f"{self.patience.best_step} raised the score {self.patience.best:.4g}"
            )
        return losses

    def _validation_is_due(self) -> bool:
        every = self.job.log.validate_every_steps
        return bool(every) and self.step % every == 0 and self.patience.validated < self.step

    def _at_start(self) -> dict[str, Any]:
        path = self.job.folder / "start" / _START_SCORES
        if not (self.job.keep_start and self.world.is_first and path.is_file()):
            return {}
        return {"validation_at_start": json.loads(path.read_text())}

    def _whole_terms(self, losses: Losses) -> dict[str, float]:
        own = [term.name for term in self.terms if term.scope == "own"]
        values = {name: float(value) for name, value in losses.terms.items()}
        if own:
            summed = sum_over_ranks(torch.stack([losses.terms[name] for name in own]), self.world)
            values |= dict(zip(own, summed.tolist(), strict=True))
        return values

    def _write(self, logs: Logs, update: Update, clock: StepClock) -> dict[str, float]:
        terms = self._whole_terms(update.losses)
        total = sum(getattr(self.job.loss, name) * value for name, value in terms.items())
        rates = clock.read(self.world)
        parts = part_learning_rates(self.job.optim, self.step - 1)
        values = {
            "loss/total": total,
            **{f"loss/{name}": value for name, value in terms.items()},
            "lr": learning_rate(self.job.optim, self.step - 1),
            **{f"lr/{part}": rate for part, rate in parts.items()},
            "grad_norm": update.norm,
            **{f"grad_norm/{part}": norm for part, norm in update.part_norms.items()},
            **self.updater.values(),
            **rates.values(self.plan.global_size, self.world, self.flops_per_sample, self.peak),
            **self.saver.timings(),
        }
        logs.write(self.step, values, rates.by_rank if self.world.size > 1 else None)
        for line in self.slow.look(rates):
            logs.say(line)
        return {name: value for name, value in values.items() if name.startswith("loss/")}

    def _save(self, wait: bool) -> None:
        self.watchdog.enter(self.step, "save")
        if self.logs is not None:
            self.logs.sync()
        self.saver.save(self.engine.slices(), self._rest(), self._document(), wait)

    def _keep_start(self, logs: Logs) -> None:
        folder = self.job.folder / "start"
        self.saver.write_aside(
            folder / "checkpoints", self.engine.slices(), self._rest(), self._document()
        )
        scores = self._validate(logs)
        if self.world.is_first:
            atomic_write_json(folder / _START_SCORES, scores)

    def _document(self) -> CheckpointDocument:
        progress = self.updater.progress().model_copy(
            update={"patience": self.patience.state(), "trackers": self.tracker_ids}
        )
        return self.job.document.model_copy(update={"step": self.step, "progress": progress})

    def _rest(self) -> list[Slice]:
        """Return what this rank saves besides the trained tensors; none of it ever changes."""
        memories = {} if self.job.classes is None else self.job.classes.state(self.world)
        targets = target_tensors(self.job.targets) if self.world.is_first else {}
        return [*whole_slices(targets | memories), *self.frozen]

    def _say(self, text: str) -> None:
        if self.logs is not None:
            self.logs.say(text)

    def _stop(self, number: int, logs: Logs) -> None:
        name = signal.Signals(number).name
        text = f"{name} at step {self.step}: checkpoint saved, the same command goes on from there"
        logs.say(text)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise StoppedError(text)

    def _validate(self, logs: Logs) -> dict[str, float]:
        self.watchdog.enter(self.step, "validate")
        begun = time.perf_counter()
        with evaluating(self.engine):
            scores = self.job.validation(self.engine)
        scores = broadcast_object(scores, self.world)
        now = time.perf_counter()
        self.validating_s += now - begun
        if scores:
            cost = {
                "validation_s": now - begun,
                "validation_share": self.validating_s / (now - self.begun),
            }
            logs.write(self.step, scores | cost)
        elif self.job.optim.patience:
            raise ConfigError(
                "optim.patience needs validation images, and these shards have none: set "
                "split.validation_prob above 0, or optim.patience=0"
            )
        self.scores = scores
        self.patience.update(self.step, scores)
        if self.step and self.saver.score(self.step, scores):
            self._save(wait=False)
        return scores

    def _go_on_from(self, resumed: Resumed) -> None:
        reader, progress = resumed.reader, resumed.document.progress
        check_shapes(reader, self.engine.shapes())
        self.updater.load(progress)
        self.patience.load(progress.patience)
        self.engine.load(reader.read, resumed.document.updates)
        if self.job.classes is not None:
            self.job.classes.load(reader.state(("memory",)), self.world)
        self.saver.saved_step = self.step

    def _announce(self, logs: Logs) -> None:
        trained = sum(math.prod(shape) for shape in self.engine.shapes().values())
        stage, size = self.job.engine.zero_stage, self.world.size
        logs.say(
            f"{trained:,} trainable parameters, {size} rank{'s' if size > 1 else ''}, ZeRO stage "
            f"{stage}, {self.job.engine.precision}, {self.world.device.type}"
        )
        if self.unused:
            logs.say(f"not trained, their losses are switched off: {', '.join(self.unused)}")
        if self.is_resumed:
            logs.say(f"resumed from step {self.step}")


def _plan(job: Job, world: World) -> Plan:
    size = job.data.batch_size
    return Plan(tuple(len(own_positions(size, rank, world.size)) for rank in range(world.size)))


def _peak_flops(job: Job, world: World) -> float | None:
    if job.log.peak_tflops is not None:
        return job.log.peak_tflops * 1e12
    if world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(world.device), job.engine.precision)


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
