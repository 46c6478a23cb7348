"""One rank of a training run on made-up data: ``fit_worker.py FOLDER JSON``.

With ``stop_at`` the run is stopped by a signal when that step is finished. ``overflow_at`` trains
in fp16 and makes the gradient of rank 1's ends infinite at that step. ``order.txt`` gets the
keys of every global batch, in the order of their positions, and ``held-RANK.json`` how many
elements of what this rank held at the end.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from half_on_cpu import OverflowingEnds, accelerator, yes
from made_job import GLOBAL_BATCH, MadeBatches, made_job

from dist_decoder import dist
from dist_decoder.batch import Batch
from dist_decoder.config.engine import EngineConfig
from dist_decoder.dist import World
from dist_decoder.errors import StoppedError
from dist_decoder.train import engine as engine_module
from dist_decoder.train import loop
from dist_decoder.train.engine import Engine


class Counting(Engine):
    """Says what it holds before it goes."""

    def close(self) -> None:
        middle = list(self.decoder.middle.parameters())
        held = {
            "ends": sum(p.numel() for p in self.decoder.ends.parameters()),
            "ends_moments": sum(m.numel() for m in self.ends.masters.values()),
            "middle_moments": sum(s["exp_avg"].numel() for s in self.optimizer.state.values()),
            "middle": sum(getattr(p, "ds_tensor", p).numel() for p in middle),
        }
        (Path(sys.argv[1]) / f"held-{self.world.rank}.json").write_text(json.dumps(held))
        super().close()


class Recorded(MadeBatches):
    """Notes the samples of every step, and asks for a stop."""

    def __init__(
        self, folder: Path, world: World, start_step: int, stop_at: int | None, size: int
    ) -> None:
        super().__init__(world.rank, world.size, start_step, size=size)
        self._folder, self._world, self._stop_at = folder, world, stop_at

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            own = list(zip(batch.positions_B.tolist(), batch.keys, strict=True))
            all_keys: list[Any] = [None] * self._world.size
            torch_dist.all_gather_object(all_keys, own)
            if self._world.is_first:
                with (self._folder / "order.txt").open("a") as file:
                    file.write(" ".join(key for _, key in sorted(chain(*all_keys))) + "\n")
            if batch.step + 1 == self._stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    options = json.loads(sys.argv[2])
    engine = EngineConfig(device="cpu", **options.pop("engine", {}))
    stop_at = options.pop("stop_at", None)
    size = options.get("batch_size", GLOBAL_BATCH)
    world = dist.start("cpu", timeout_s=60)
    overflow_at = options.pop("overflow_at", None)
    if overflow_at is not None:
        accelerator().is_fp16_supported = yes  # type: ignore[attr-defined]
        OverflowingEnds.at = overflow_at
        engine_module.ShardedEnds = OverflowingEnds  # type: ignore[misc]
    try:
        loop.Engine = Counting  # type: ignore[misc]
        loop.fit(
            made_job(
                folder,
                world,
                engine=engine,
                batches=lambda step, needed: Recorded(folder, world, step, stop_at, size),
                **options,
            ),
            world,
        )
    except StoppedError:
        if stop_at is None:
            raise
    finally:
        dist.stop()
