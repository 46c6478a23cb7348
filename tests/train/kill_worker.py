"""Runs that are killed: ``kill_worker.py train FOLDER JSON`` or ``save FOLDER KILLS SEED``.

The process imports once and forks one child per run, since starting costs more than the runs.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from made_job import MadeBatches, made_job

from dist_decoder import dist
from dist_decoder.batch import Batch
from dist_decoder.config.engine import EngineConfig
from dist_decoder.config.run import CheckpointConfig
from dist_decoder.dist import World
from dist_decoder.train.canonical import StateReader
from dist_decoder.train.loop import fit
from dist_decoder.train.places import checkpoints_of, step_of
from dist_decoder.train.saving import Saver
from dist_decoder.train.slices import Slice
from dist_decoder.train.survey import verify

STEPS = 24


class Suicidal(MadeBatches):
    """Kills its process before the batch of a step."""

    def __init__(self, start_step: int, at: int) -> None:
        super().__init__(0, 1, start_step)
        self._at = at

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def in_child(work: Callable[[], None], after: Callable[[int], None] | None = None) -> int:
    """Run ``work`` in a forked process; ``after`` gets its id. Return the wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if after is not None:
        after(child)
    return os.waitpid(child, 0)[1]


def train(folder: Path, options: dict[str, Any]) -> None:
    """Train once whole, and once with a kill at every step that is named.

    With ``location`` checkpoints go below it, into ``whole`` and ``parts``.
    """
    engine = EngineConfig(device="cpu", **options["engine"])
    location = options.get("location")

    def run(name: str, at: int | None) -> None:
        world = dist.start("cpu", timeout_s=60)
        changes: dict[str, Any] = {
            "steps": STEPS, "engine": engine, "optim": {"ema_decay": 0.9},
        }  # fmt: skip
        place = f"{location}/{name}" if location else None
        changes["checkpoint"] = CheckpointConfig(every_steps=3, location=place)
        if at is not None:
            changes["batches"] = lambda step, needed: Suicidal(step, at)
        fit(made_job(folder / name, world, **changes), world)

    assert in_child(lambda: run("whole", None)) == 0
    killed = 0
    for at in options["kills"]:
        status = in_child(lambda at=at: run("parts", at))  # type: ignore[misc]
        killed += os.WIFSIGNALED(status)
    assert in_child(lambda: run("parts", None)) == 0
    assert killed == len(options["kills"]), "not every run was killed"


def save(folder: Path, num_kills: int, seed: int) -> None:
    """Kill a process that does nothing but save, at random delays; what is there must load."""
    shape = (3, 700_001)
    config = CheckpointConfig(keep_last=2)

    def work(num_steps: int) -> None:
        world = World(0, 1, torch.device("cpu"))
        saver = Saver(folder, config, world, lambda text: None)
        done = max((step_of(place) for place in checkpoints_of(folder)), default=0)
        values = torch.empty(shape[0] * shape[1])
        own = [Slice("x", kind, 0, shape, values) for kind in ("master", "exp_avg")]
        saver.make_room(own)
        document = made_job(folder.parent / "job", world).document
        for step in range(done + 1, done + 1 + num_steps):
            values.fill_(step)
            saver.save(own, [], document.model_copy(update={"step": step}), wait=num_steps == 1)

    begun = time.monotonic()
    assert in_child(lambda: work(1)) == 0
    longest_s = min(time.monotonic() - begun, 0.6)
    generator = random.Random(seed)
    cut = 0
    for number in range(2, num_kills + 2):

        def kill(child: int, number: int = number) -> None:
            while not list(folder.glob(f"step-*/attempt-{number:04d}/.*")):
                time.sleep(0.001)
            time.sleep(generator.uniform(0, longest_s))
            os.kill(child, signal.SIGKILL)

        assert os.WIFSIGNALED(in_child(lambda: work(10**6), kill)), "saving ended by itself"
        cut += any(not (place / "COMPLETE").is_file() for place in folder.glob("step-*"))
        newest = checkpoints_of(folder)[-1]
        assert verify(newest)["problems"] == [], newest
        assert float(StateReader(newest).read("x", "exp_avg", 5, 1)) == step_of(newest)
    result = {"kills": num_kills, "in a write": cut, "steps": step_of(newest)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    if sys.argv[1] == "train":
        train(place, json.loads(sys.argv[3]))
    else:
        save(place, int(sys.argv[3]), int(sys.argv[4]))
