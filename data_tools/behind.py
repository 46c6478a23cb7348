"""Work that goes on behind the caller: files are written while the next ones are made."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any


class Behind:
    """A few threads; the caller waits when all are busy, which bounds the memory.

    Leaving the block waits for everything and raises the first error. After an error in the block
    itself what has begun is finished, so that it need not be done again; Ctrl-C waits for nothing.

    Args:
        threads: pieces of work under way at the same time.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._under_way: deque[Future[Any]] = deque()

    def do(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Start a piece of work as soon as a thread is free.

        Raises:
            Exception: that of an earlier piece.
        """
        while len(self._under_way) >= self._threads:
            self._under_way.popleft().result()
        future: Future[Any] = Future()
        # Daemons: Ctrl-C ends the process although an upload takes a minute more.
        threading.Thread(target=_run, args=(future, work, arguments), daemon=True).start()
        self._under_way.append(future)

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            errors = [future.exception() for future in self._under_way]
            for first in filter(None, errors):
                raise first
        elif isinstance(error, Exception):
            for future in self._under_way:
                future.exception()


def _run(future: Future[Any], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        future.set_result(work(*arguments))
    except BaseException as error:  # the caller raises it
        future.set_exception(error)
