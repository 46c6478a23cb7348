"""Batches read ahead by processes of their own.

They come from a fork server that has never held a collective or a client. Batches lie in blocks of
shared memory that have no name, so that nothing is left behind when everything is killed. Which
numbers lie where follows from the visits, which both sides compute: only step numbers and errors
travel.
"""

from __future__ import annotations

import dataclasses
import gc
import signal
import traceback
import warnings
from collections import deque
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from dist_decoder.batch import Batch
from dist_decoder.data.arena import Recycled, handed_out
from dist_decoder.data.reader import BatchReader, ReaderSpec
from dist_decoder.errors import DataError, DistDecoderError

_MOST_DEATHS = 5
"""Of reader processes without a batch in between."""
_END_S = 5.0
_COUNTERS = -1
"""Asked for in place of a step."""
_SPARE_BLOCKS = 2
"""Blocks that the training process may hold without a copy being made."""


class ReaderProcesses:
    """Reader processes of one loader.

    Args:
        reader: of this process; it says what is where, and its spec is what they are made from.
        workers: number of processes.
        ahead: batches that each has under way.
    """

    def __init__(self, reader: BatchReader, workers: int, ahead: int) -> None:
        self._reader = reader
        self._context: Any = torch.multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["dist_decoder.data.reader_processes"])
        self._spec = _share_of(reader.spec, workers)
        size = reader.batch_floats()
        count = workers * ahead
        self._blocks = [torch.empty(size).share_memory_() for _ in range(count + _SPARE_BLOCKS)]
        self._free = deque(range(len(self._blocks)))
        self._copies = Recycled(size, pinned=reader.spec.pinned)
        self._num_workers = workers
        self._workers: list[_Worker] = []
        self._deaths = 0
        self._most_under_way = count
        self._under_way: dict[int, int] = {}
        """Step -> block."""
        self._done: set[int] = set()

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, and have the steps behind it read.

        Raises:
            DataError: a reader found one, or readers died again and again.
        """
        if self._under_way and min(self._under_way) != step:
            self.close()
        if not self._workers:
            self._start()
        while len(self._under_way) < self._most_under_way and self._free:
            self._ask(step + len(self._under_way))
        while step not in self._done:
            self._hear()
        self._done.discard(step)
        return self._hand_out(step, self._under_way.pop(step))

    def _ask(self, step: int) -> None:
        self._under_way[step] = self._free.popleft()
        self._worker_of(step).ask(step, self._under_way[step])

    def _worker_of(self, step: int) -> _Worker:
        return self._workers[step % len(self._workers)]

    def _hear(self) -> None:
        """Wait for something from any reader: batches, an error, or its death."""
        ready = wait([one.connection for one in self._workers])
        for worker in list(self._workers):
            if worker.connection not in ready:
                continue
            try:
                step, error = worker.connection.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            self._take(step, error)

    def _take(self, step: int, error: Exception | None) -> None:
        if error is not None:
            self.close()
            raise error
        self._done.add(step)
        self._deaths = 0

    def _replace(self, worker: _Worker) -> None:
        """Start a reader anew that died, and ask it for what it owes."""
        self._deaths += 1
        text = worker.describe_death()
        if self._deaths > _MOST_DEATHS:
            self.close()
            raise DataError(
                f"{text}, and {_MOST_DEATHS} others before it without a batch in between; if the"
                " system ran out of memory, lower data.workers, data.cache_mb or data.batch_size,"
                " or set data.worker_kind=threads"
            )
        warnings.warn(f"{text}; it is started again", RuntimeWarning, stacklevel=2)
        number = worker.number
        self._workers[number] = _Worker(self._context, self._spec, self._blocks, number)
        for step, block in self._under_way.items():
            if step not in self._done and self._worker_of(step).number == number:
                self._workers[number].ask(step, block)

    def _hand_out(self, step: int, index: int) -> Batch:
        visits = self._reader.visits(step)
        block = self._blocks[index]
        if self._reader.spec.pinned or not self._free:
            # Whoever holds many batches holds copies: the readers need their blocks.
            copy = self._copies.block()
            copy.copy_(block)
            self._free.append(index)
            return self._reader.batch(step, visits, self._reader.place(visits, copy))
        held = handed_out(block.numpy(), lambda _: self._free.append(index))
        return self._reader.batch(step, visits, self._reader.place(visits, held))

    def counters(self) -> list[dict[str, Any]]:
        """Return what each reader counted, as ``BatchReader.counters``."""
        found = []
        for worker in self._workers:
            worker.ask(_COUNTERS, -1)
            while True:
                step, answer = worker.connection.recv()
                if step == _COUNTERS:
                    break
                self._take(step, answer)
            found.append(answer)
        return found

    def _start(self) -> None:
        self._workers = [
            _Worker(self._context, self._spec, self._blocks, number)
            for number in range(self._num_workers)
        ]

    def close(self) -> None:
        """End all readers."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        self._free.extend(self._under_way.values())
        self._under_way.clear()
        self._done.clear()


class _Worker:
    """One reader process and the pipe to it."""

    def __init__(self, context: Any, spec: ReaderSpec, blocks: list[Tensor], number: int) -> None:
        self.number = number
        self.connection, theirs = context.Pipe()
        # Daemons end with this process; if it is killed, the end of the pipe tells them.
        self._process = context.Process(
            target=_serve, args=(theirs, spec, blocks), name=f"reader-{number}", daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, step: int, block: int) -> None:
        try:
            self.connection.send((step, block))
        except OSError:
            # It died; reading from the pipe says so, and then it is asked again.
            return

    def describe_death(self) -> str:
        self._process.join(_END_S)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        end = (
            f"was killed by {signal.Signals(-code).name}"
            if code and code < 0
            else f"ended ({code})"
        )
        self.connection.close()
        return f"reader process {self.number} (pid {self._process.pid}) {end}"

    def close(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(connection: Connection, spec: ReaderSpec, blocks: list[Tensor]) -> None:
    """Fill blocks as they are asked for, until the pipe ends."""
    # Ctrl-C is for the training process, which ends its readers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    reader: BatchReader | None = None
    while True:
        try:
            step, index = connection.recv()
            if reader is None:
                reader = BatchReader(spec)
                # The indexes live as long as the process: the collector need not walk them.
                gc.freeze()
            if step == _COUNTERS:
                connection.send((step, reader.counters()))
                continue
            reader.fill(step, reader.visits(step), blocks[index])
            connection.send((step, None))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except DistDecoderError as error:
            connection.send((step, error))
        except Exception as error:
            # Whatever it is, the training process must hear of it, with the place.
            text = "".join(traceback.format_exception(error))
            connection.send((step, RuntimeError(f"in a reader process:\n{text}")))


def _share_of(spec: ReaderSpec, workers: int) -> ReaderSpec:
    """Return the spec of one reader: the memory of a rank is divided over its readers."""
    config = spec.config.model_copy(update={"cache_mb": spec.config.cache_mb / workers})
    return dataclasses.replace(spec, config=config, pinned=False)
