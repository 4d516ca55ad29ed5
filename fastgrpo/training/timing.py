"""Wall-clock seconds by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds spent in named phases; a GPU's queued work is waited for, so that it
    counts where it was asked for.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` for each phase and `step_time` since the start, in seconds."""
        return {f"time/{name}": s for name, s in self.seconds.items()} | {
            "step_time": time.perf_counter() - self.started
        }
