"""An event loop on its own thread: how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading

import pytest

from fastgrpo.rewards.vlm.background import BackgroundLoop


def test_a_loop_ends_with_its_owner() -> None:
    async def one() -> int:
        return 1

    loop = BackgroundLoop("short-lived")
    assert loop.run(one()) == 1
    assert "short-lived" in {thread.name for thread in threading.enumerate()}
    del loop
    gc.collect()
    assert "short-lived" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.timeout(120)
def test_what_comes_while_a_loop_closes_is_refused_and_does_not_hang() -> None:
    """A task that is made after the others were cancelled would wait for a loop that has ended."""

    async def nothing() -> None:
        await asyncio.sleep(0)

    def ask(loop: BackgroundLoop) -> None:
        with contextlib.suppress(RuntimeError):
            while True:
                loop.run(nothing())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(60):
            loop = BackgroundLoop("closing")
            callers = [threading.Thread(target=ask, args=[loop], daemon=True) for _ in range(4)]
            for caller in callers:
                caller.start()
            loop.close(nothing())
            loop.close(nothing())
            for caller in callers:
                caller.join(20)
            assert not any(caller.is_alive() for caller in callers)
    finally:
        sys.setswitchinterval(interval)
