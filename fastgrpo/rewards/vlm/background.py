"""An event loop on a thread of its own, for code that is not asynchronous."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundLoop:
    """An event loop on a daemon thread, which ends with this object or with Python.

    Several threads may run coroutines on it and wait for them.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        thread.start()
        self._closed, self._lock = False, threading.Lock()
        self._end = weakref.finalize(self, _end, self._loop, thread)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of a coroutine; an interrupted wait cancels it.

        Raises:
            RuntimeError: `close` was called, before or meanwhile.
        """
        # With the lock, `close` cancels what was begun before it, and nothing begins after it:
        # that would wait for a loop that has ended.
        with self._lock:
            if self._closed:
                work.close()
                raise RuntimeError("closed before it was asked")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return _result(future)

    def close(self, last: Coroutine[Any, Any, object]) -> None:
        """Cancel all that runs, then run `last`, then end the loop."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed or not self._end.alive:
            last.close()
            return
        _result(asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop))
        _result(asyncio.run_coroutine_threadsafe(last, self._loop))
        self._end()


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except CancelledError:
        raise RuntimeError("closed while it waited for an answer") from None
    finally:
        future.cancel()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    cancelled = asyncio.run_coroutine_threadsafe(_cancel_all(), loop)
    cancelled.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    if thread is threading.current_thread():  # a task of the loop dropped the last reference
        return
    thread.join(timeout=5.0)
    if not thread.is_alive():
        loop.close()
