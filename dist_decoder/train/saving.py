"""Saves of a run: begun at a step boundary, written beside the training, agreed by all ranks.

The loop calls ``save`` when a checkpoint is due, hands ``failed`` to the agreement that it makes
at every step anyway, and gives what was agreed to ``settle``. Everything else happens in one
thread per rank (``writer.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_decoder.config.run import CheckpointConfig
from dist_decoder.dist import World, any_rank, run_on_all, run_on_first
from dist_decoder.errors import CheckpointError, DistDecoderError, SupersededError
from dist_decoder.train import retention
from dist_decoder.train.canonical import StateReader, publish, write_rank
from dist_decoder.train.checkpoint import CheckpointDocument, read_checked
from dist_decoder.train.fence import Fence
from dist_decoder.train.places import (
    Place,
    checkpoints_of,
    followed,
    inside,
    is_complete,
    open_place,
    place_of,
    point_to,
    step_name,
)
from dist_decoder.train.resume_rules import changed_keys
from dist_decoder.train.slices import Slice
from dist_decoder.train.writer import Staging, Writing, write_checkpoint

_POLL_S = 0.02
_LAST_WAIT_S = 30.0
"""How long the end of a failed run waits for a checkpoint that is being written."""


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from."""

    reader: StateReader
    document: CheckpointDocument


class Saver:
    """Writes the checkpoints of a run and finds the newest. Made at the same time on all ranks."""

    def __init__(
        self, folder: Path, config: CheckpointConfig, world: World, say: Callable[[str], None]
    ) -> None:
        """Begin a new attempt of the run.

        Args:
            folder: the run's ``checkpoints``.
            config: where checkpoints go and how many stay.
            world: this rank.
            say: prints one line on rank 0.

        Raises:
            StorageError: the place cannot be written.
            CheckpointError: ``location`` changed while there are checkpoints.
        """
        self._config = config
        self._world = world
        self.say = say
        self.place = place_of(run_on_first(lambda: str(_place(folder, config)), world))
        storage = open_place(self.place)

        def claim() -> tuple[int, str]:
            fence = Fence.claim(storage)
            return fence.number, fence.token

        number, token = run_on_first(claim, world)
        self.fence = Fence(storage, number, token)
        self._staging: Staging | None = None
        self._writing: Writing | None = None
        self._last: Writing | None = None
        self.saved_step = -1

    def newest(self, now: CheckpointDocument) -> Resumed | None:
        """Return the checkpoint to go on from, if there is one; a collective call.

        Args:
            now: what the run would write itself.

        Raises:
            CheckpointError: the newest is damaged, or belongs to other shards, another
                configuration or another base.
        """

        def find() -> str | None:
            found = checkpoints_of(self.place)
            if found:
                check_resume(found[-1], read_checked(found[-1]), now)
            return str(found[-1]) if found else None

        text = run_on_first(find, self._world)
        if text is None:
            return None
        place = place_of(text)
        return Resumed(StateReader(place), read_checked(place))

    def make_room(self, slices: Iterable[Slice]) -> None:
        """Allocate what asynchronous saves copy to, so that the first one costs no more."""
        if self._config.asynchronous:
            self._staging = Staging(slices)

    def save(
        self,
        slices: Iterable[Slice],
        rest: Sequence[Slice],
        document: CheckpointDocument,
        wait: bool,
    ) -> None:
        """Begin to save ``document.step``; a collective call.

        Args:
            slices: this rank's, by ``Engine.slices``.
            rest: what this rank saves besides; never changed, so it is not copied.
            document: what the checkpoint knows about itself.
            wait: return when the checkpoint is complete, whatever ``on_failure`` says about it.

        Raises:
            DistDecoderError: the checkpoint before, or with ``wait`` this one, was not written.
        """
        if document.step == self.saved_step:
            if wait:
                self.finish(must=True)
            return
        begun = time.monotonic()
        self.finish()
        writing = Writing(document.step, begun)
        background = self._staging is not None
        held = self._staging.copy(slices) if self._staging is not None else list(slices)
        work = partial(
            write_checkpoint,
            folder=self.place,
            fence=self.fence,
            world=self._world,
            slices=[*held, *rest],
            document=document.model_dump(mode="json"),
            published=partial(retention.keep_last, self.place, self._config.keep_last),
        )
        self._writing = writing
        self.saved_step = document.step
        # Without a copy training must not change the values before they are written.
        writing.run(work, background or self._world.size > 1)
        if not background:
            self.finish()
        writing.stall_s = time.monotonic() - begun
        if wait:
            self.finish(must=True)

    @property
    def failed(self) -> int:
        """1 if this rank could not write, for the agreement of the next step boundary."""
        writing = self._writing
        return int(writing is not None and not writing.is_running and writing.error is not None)

    def settle(self, failed: int, must: bool = False) -> None:
        """Say that a checkpoint is complete, or deal with one that is not; never waits.

        Args:
            failed: the largest ``failed`` of all ranks.
            must: raise whatever ``on_failure`` says.

        Raises:
            DistDecoderError: the checkpoint was not written, and the run is to stop.
        """
        writing = self._writing
        if failed:
            # Also on ranks that are done with their part: all of them clear up together.
            self._writing = None
            self._give_up(writing, must)
        elif writing is not None and not writing.is_running:
            self._writing = None
            self._last = writing
            self.say(
                f"step {writing.step}: checkpoint saved in {writing.write_s:.1f} s, training "
                f"waited {writing.stall_s:.2f} s"
            )

    def finish(self, must: bool = False) -> None:
        """Wait until nothing is being written; a collective call.

        Raises:
            DistDecoderError: see ``settle``.
        """
        while True:
            running = self._writing is not None and self._writing.is_running
            failed, busy = any_rank([self.failed, int(running)], self._world)
            if failed or not busy:
                self.settle(failed, must)
                return
            time.sleep(_POLL_S)

    def timings(self) -> dict[str, float]:
        """Return seconds of the last save that was not asked for before; empty without one."""
        last, self._last = self._last, None
        if last is None:
            return {}
        return {"checkpoint/stall_s": last.stall_s, "checkpoint/write_s": last.write_s}

    def score(self, step: int, scores: dict[str, float]) -> bool:
        """Note the validation score of a step; return whether the step is to be saved as the best.

        Raises:
            CheckpointError: ``keep_best`` names no score of this run.
        """
        metric = self._config.keep_best
        if metric is None:
            return False
        if metric not in scores:
            raise CheckpointError(
                f"checkpoint.keep_best={metric} is no score of this run; there are "
                f"{', '.join(sorted(scores)) or 'none'}"
            )

        def note() -> bool:
            before = retention.best_score(self.place)
            with self.fence.held():
                retention.note_score(self.place, metric, step, scores[metric])
            return before is None or scores[metric] > before

        return run_on_first(note, self._world)

    def write_aside(
        self,
        folder: Path,
        slices: Iterable[Slice],
        rest: Sequence[Slice],
        document: CheckpointDocument,
    ) -> None:
        """Write a checkpoint elsewhere and wait for it: the model at its start. Collective."""
        final = inside(folder, step_name(document.step))
        if run_on_first(lambda: is_complete(final), self._world):
            return
        storage, number, world = open_place(final), self.fence.number, self._world
        held = [*slices, *rest]

        def write() -> None:
            write_rank(storage, number, world.rank, world.size, held)

        run_on_all(write, world)
        values = document.model_dump(mode="json")
        run_on_first(lambda: publish(storage, number, world.size, values), world)

    def close(self) -> None:
        """End the run without its peers: a checkpoint on its way has some time to arrive."""
        writing = self._writing
        if writing is None or writing.thread is None:
            return
        writing.thread.join(_LAST_WAIT_S)
        writing.abandoned.set()
        writing.thread.join(_LAST_WAIT_S)
        self._writing = None

    def _give_up(self, writing: Writing | None, must: bool) -> None:
        step = self.saved_step
        self.saved_step = -1
        if writing is not None and writing.thread is not None:
            writing.abandoned.set()
            writing.thread.join()

        def clean() -> None:
            place = inside(self.place, step_name(step))
            if not is_complete(place):
                with self.fence.held():
                    retention.remove(place)

        def own() -> None:
            if writing is not None and writing.error is not None:
                raise writing.error

        try:
            run_on_all(own, self._world)
        except SupersededError:
            raise
        except DistDecoderError as error:
            run_on_first(clean, self._world)
            text = (
                f"step {step}: the checkpoint could not be written ({error}); the last good one "
                "stays"
            )
            if must or self._config.on_failure == "stop":
                error.add_note(text)
                raise
            self.say(f"{text}, and training goes on (checkpoint.on_failure=continue)")


def check_resume(place: Place, before: CheckpointDocument, now: CheckpointDocument) -> None:
    """Raise if a run cannot go on from a checkpoint.

    Raises:
        CheckpointError: it belongs to other shards, another configuration or another base; says
            which keys.
    """
    for key in ("manifest_fingerprint", "config_fingerprint", "base"):
        old, new = getattr(before, key), getattr(now, key)
        if old == new:
            continue
        keys = changed_keys(before.config, now.config) if key == "config_fingerprint" else []
        changed = f"; changed: {', '.join(keys)}" if keys else ""
        raise CheckpointError(
            f"{place} has another {key.replace('_', ' ')} ({old}, now {new}){changed}: the "
            "shards, configuration or base changed since; choose another `run`"
        )


def check_shapes(reader: StateReader, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise if a checkpoint's trained parameters are not those of the model.

    Raises:
        CheckpointError: a name is missing, unknown, or of another shape.
    """
    stored = {name: reader.shape(name) for name in reader.names("master")}
    missing, extra = sorted(shapes.keys() - stored), sorted(stored.keys() - shapes)
    if missing or extra:
        raise CheckpointError(
            f"{reader.place} does not fit this model: missing {missing[:5]}, unknown {extra[:5]}"
        )
    for name, shape in shapes.items():
        if stored[name] != shape:
            raise CheckpointError(
                f"{reader.place}: {name} has shape {stored[name]}, this model needs {shape}"
            )


def _place(folder: Path, config: CheckpointConfig) -> Place:
    if config.location is None:
        return followed(folder)
    return point_to(folder, config.location)
