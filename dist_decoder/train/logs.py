"""What a run says while it trains: progress line, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dist_decoder.config.run import LogConfig
from dist_decoder.files import explained
from dist_decoder.train.run_folder import METRICS_NAME, cut_metrics
from dist_decoder.train.trackers import Tracker, open_trackers


class Logs:
    """Writes of rank 0; on other ranks every method does nothing."""

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        total_steps: int,
        start_step: int,
        active: bool = True,
        stream: TextIO | None = None,
        label: str = "",
        tracker_ids: Mapping[str, str] | None = None,
    ) -> None:
        """Open the files; lines about steps after ``start_step`` are dropped first.

        Raises:
            ConfigError: a tracker cannot be opened.
        """
        self._active = active
        self._total = total_steps
        self._label = label
        self._stream = stream if stream is not None else sys.stderr
        self._trackers: list[Tracker] = []
        self._bar: Any = None
        if not active:
            return
        self._path = folder / METRICS_NAME
        with explained(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
            cut_metrics(folder, start_step)
            # Unbuffered: nothing is left over that closing could fail to write.
            self._file = self._path.open("ab", buffering=0)
        self._trackers = open_trackers(folder, config, start_step, tracker_ids or {})
        if self._stream.isatty():
            self._bar = _make_bar(self._stream)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step)

    def __enter__(self) -> Logs:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._active:
            return
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
        if self._bar is not None:
            self._bar.stop()

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        by_rank: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Log flat values of one step everywhere, and lists with one number per rank as JSON."""
        if not self._active:
            return
        more = {} if by_rank is None else {"ranks": by_rank}
        with explained(self._path, "written"):
            self._file.write((json.dumps({"step": step, **values, **more}) + "\n").encode())
        for tracker in self._trackers:
            tracker.log(step, values)
        shown = {name: value for name, value in values.items() if _is_shown(name)}
        text = " ".join(f"{_short(name)} {value:.4g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step}/{self._total} {text}")

    def sync(self) -> None:
        """Bring the metrics to disk: a checkpoint that outlives the machine must find its rows."""
        if self._active:
            with explained(self._path, "written"):
                os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """Print one line."""
        if not self._active:
            return
        line = f"{self._label}{text}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


def _is_shown(name: str) -> bool:
    """Return whether the progress line has room for it; ``metrics.jsonl`` has everything."""
    return not name.startswith(("lr/", "grad_norm/", "step_s/", "memory/"))


def _short(name: str) -> str:
    return name.removeprefix("loss/").removeprefix("validation/")


def _make_bar(stream: TextIO) -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=20),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
        console=Console(file=stream),
    )
