"""Progress of work that takes longer than seconds: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_LINE_EVERY_S = 10.0


class Progress:
    """Counts done work. Made by ``progress``."""

    def __init__(self, description: str, total: int | None, show: Callable[[Progress], None]):
        self.description = description
        self.total = total
        self.done = 0
        self._show = show

    def advance(self, amount: int = 1, description: str | None = None) -> None:
        """Count ``amount`` more units as done; ``description`` replaces the text of the bar."""
        self.done += amount
        if description is not None:
            self.description = description
        self._show(self)


@contextmanager
def progress(
    description: str, total: int | None = None, stream: TextIO | None = None
) -> Iterator[Progress]:
    """Show the progress of a loop on stderr, so that stdout keeps only results.

    On a terminal this is a bar with the time left. Elsewhere it is silent for the first
    10 s, then writes one plain line every 10 s, so that a log file stays short.

    Args:
        description: what is being done, for example ``"embed nsd"``.
        total: units of work, or None if unknown.
        stream: where to write; None is stderr.

    Yields:
        An object whose ``advance(amount=1)`` counts finished units.
    """
    stream = stream if stream is not None else sys.stderr
    if stream.isatty():
        with _bar(description, total, stream) as counter:
            yield counter
        return
    counter = Progress(description, total, _Lines(stream))
    yield counter


@contextmanager
def _bar(description: str, total: int | None, stream: TextIO) -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(file=stream)) as live:
        task = live.add_task(description, total=total)

        def show(counter: Progress) -> None:
            live.update(task, completed=counter.done, description=counter.description)

        yield Progress(description, total, show)


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = self._last = time.monotonic()

    def __call__(self, counter: Progress) -> None:
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        elapsed = now - self._start
        line = f"{counter.description}: {counter.done}"
        if counter.total:
            left = elapsed * max(counter.total - counter.done, 0) / max(counter.done, 1)
            line += f"/{counter.total} ({100 * counter.done / counter.total:.0f} %)"
            line += f", {elapsed:.0f} s, about {left:.0f} s left"
        else:
            line += f", {elapsed:.0f} s"
        self._stream.write(line + "\n")
        self._stream.flush()
