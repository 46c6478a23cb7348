"""A trace of chosen steps by torch's profiler, one file per rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from dist_decoder.dist import World
from dist_decoder.files import explained


class StepProfiler:
    """Traces the steps ``first`` to ``last`` (0-based, both included) of a run."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None, world: World) -> None:
        """Prepare; ``steps`` None traces nothing."""
        self._folder = folder / "profile"
        self._steps = steps
        self._world = world
        self._profiler: Any = None

    def begin(self, step: int) -> None:
        """Call before a step."""
        if self._steps is None or self._profiler is not None:
            return
        first, last = self._steps
        if first <= step <= last:
            kinds = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(
                activities=kinds, record_shapes=True, profile_memory=True
            )
            self._profiler.start()

    def end(self, step: int) -> Path | None:
        """Call after a step; returns the file if the trace is complete with it."""
        if self._profiler is None or self._steps is None or step < self._steps[1]:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        first, last = self._steps
        # Chrome's trace viewer and Perfetto read the gzip form.
        path = self._folder / f"rank-{self._world.rank:02d}-steps-{first}-{last}.json.gz"
        partial = path.with_name(f".{path.name}.partial.json.gz")
        with explained(self._folder, "written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            os.replace(partial, path)
        return path

    def close(self) -> None:
        """Drop a trace whose last step was not reached."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
