"""SIGINT, SIGTERM and SIGHUP (a terminal that is closed) as a request to stop at the next good
moment.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

logger = logging.getLogger("fastgrpo")

PATIENCE = 5.0
"""Seconds after a signal for which a rollout goes on. Schedulers kill after 30 or more."""


class StopRequest:
    """Whether a signal has asked this process to stop (`requested`), and how long ago."""

    def __init__(self) -> None:
        self.requested = False
        self.requested_at = 0.0

    def must_abort_rollout(self) -> bool:
        """True if the signal is older than PATIENCE seconds: abort the rollout."""
        return self.requested and time.monotonic() - self.requested_at > PATIENCE

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        # Ctrl-C reaches a worker twice, from the terminal and from torchrun: the first one counts.
        if self.requested:
            return
        self.requested, self.requested_at = True, time.monotonic()
        # Python raises RuntimeError for a print inside a print. Then the message is lost, no more.
        with suppress(RuntimeError):
            name = signal.Signals(number).name
            logger.info(
                f"{name}: finishing this iteration, or leaving its rollout if that takes long"
            )


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take the signals as requests to stop inside a `with` block."""
    stop = StopRequest()
    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        handled.append(signal.SIGHUP)
    previous = {number: signal.signal(number, stop.receive) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
