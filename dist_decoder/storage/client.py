"""The obstore clients of this process, and the thread whose event loop serves them.

Source: obstore runs on one tokio runtime per process. Its threads do not survive a fork, and a
forked child that asks waits for ever.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

from dist_decoder.config.secrets import without_secrets
from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import StorageError

ResultT = TypeVar("ResultT")

_LEAVE_S = 0.05
"""What obstore's threads need to be done with Python's objects after their last answer."""
_lock = threading.Lock()
_serving: tuple[int, asyncio.AbstractEventLoop] | None = None
"""(process, loop) that obstore was first used with."""


def import_obstore(module: str) -> Any:
    """Return a module of obstore.

    Raises:
        StorageError: the extra ``object-store`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StorageError(
            "object-store URLs need the extra 'object-store':"
            " pip install 'dist-decoder[object-store]'"
        ) from error


def open_client(url: str, policy: StorageConfig, retrying: bool) -> Any:
    """Return an obstore client for a URL with the credentials of the environment.

    Args:
        url: without secrets.
        policy: its timeouts.
        retrying: obstore itself asks again, which uploads in parts need; reads are retried by us,
            where they can be counted, hedged and given up.

    Raises:
        StorageError: the URL or an environment variable does not make a client.
    """
    stores = import_obstore("obstore.store")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    plain_http = url.startswith("http://") or endpoint.startswith("http://")
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=policy.attempt_s),
        "connect_timeout": timedelta(seconds=min(5.0, policy.attempt_s)),
    }
    if plain_http:
        options["allow_http"] = True
    retry = {
        "max_retries": policy.retries if retrying else 0,
        "retry_timeout": timedelta(seconds=policy.deadline_s),
        "backoff": {
            "init_backoff": timedelta(seconds=policy.backoff_s),
            "max_backoff": timedelta(seconds=max(policy.backoff_s, policy.max_backoff_s)),
        },
    }
    try:
        return stores.from_url(url, client_options=options, retry_config=retry)
    except import_obstore("obstore.exceptions").BaseError as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        # Not chained: the original names the values that it could not parse.
        raise StorageError(f"{url} cannot be opened: {without_secrets(line)}") from None


def submit(work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
    """Start a coroutine on the event loop of this process.

    Raises:
        StorageError: this process was forked after its parent had used an object store.
    """
    try:
        loop = _loop()
    except StorageError:
        work.close()
        raise
    return asyncio.run_coroutine_threadsafe(work, loop)


def wait_for(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a coroutine on the event loop of this process and return its result.

    Raises:
        StorageError: as ``submit``.
    """
    future = submit(work)
    try:
        return future.result()
    except BaseException:
        # Ctrl-C must not leave the requests behind.
        future.cancel()
        raise


def _loop() -> asyncio.AbstractEventLoop:
    global _serving
    with _lock:
        if _serving is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="object store", daemon=True)
            thread.start()
            atexit.register(_leave, os.getpid(), loop, thread)
            _serving = (os.getpid(), loop)
        elif _serving[0] != os.getpid():
            raise StorageError(
                "this process was forked after its parent had used an object store, whose client"
                " does not survive that; start workers with the method 'spawn' or 'forkserver'"
            )
        return _serving[1]


def _leave(process: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End requests and the event loop before Python takes itself down.

    A thread of obstore that still wants the interpreter then would abort the process, after its
    work was done well.
    """
    if process != os.getpid() or not thread.is_alive():
        return

    async def end() -> None:
        work = asyncio.all_tasks() - {asyncio.current_task()}
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    thread.join(timeout=5)
    time.sleep(_LEAVE_S)
