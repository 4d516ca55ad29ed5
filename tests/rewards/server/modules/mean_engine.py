"""Engines for tests of the server that need no model: the answer is 1 + 9 times the mean of the
frames, whatever is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply


class MeanEngine:
    """Answers from the frames' mean. calls: clips, questions, decoding of each; delay: seconds of
    one; gate: it waits for it.
    """

    concurrency = 1
    memory_bytes = 0
    delay = 0.0

    def __init__(self, model: str, ten: float = 0.25) -> None:
        self.model, self.ten = model, ten
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[list[Clip], list[list[str]], Decoding]] = []

    def load(self, device: torch.device) -> None:
        pass

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        self.calls.append((list(clips), [list(row) for row in questions], decoding))
        time.sleep(self.delay)
        self.gate.wait(30)
        if any("fail" in question for row in questions for question in row):
            raise RuntimeError("the engine was told to fail")
        return [
            [self.reply(clip, question, decoding) for question in row]
            for clip, row in zip(clips, questions, strict=True)
        ]

    def reply(self, clip: Clip, question: str, decoding: Decoding) -> Reply:
        if "no answer" in question:
            return Reply(error="there is no answer to this")
        text = f"{1 + 9 * clip.frames.double().mean().item() / 255:.2f}"
        places = tuple(
            {str(d): 0.91 if str(d) == c else 0.01 for d in range(10)} if c != "." else {"3": 0.5}
            for c in text
        )
        return Reply(
            text if decoding.constrained else f"{question}: {text}",
            places if decoding.probabilities else (),
            self.ten,
        )

    def close(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"engine": "mean", "model": self.model, "revision": None}

    def counters(self) -> dict[str, int]:
        return {}

    def last_errors(self) -> dict[str, str]:
        return {}


class SlowEngine(MeanEngine):
    """A quarter of a second a call."""

    delay = 0.25


class ForgetfulEngine(MeanEngine):
    """Keeps nothing of what it was asked."""

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        replies = super().ask(clips, questions, decoding)
        self.calls.clear()
        return replies


class StuckEngine(MeanEngine):
    """Never answers."""

    delay = 1e6


class UnloadedEngine(MeanEngine):
    """Is loaded when its gate is open."""

    def load(self, device: torch.device) -> None:
        self.gate.clear()
        self.gate.wait(30)


class MissingEngine(MeanEngine):
    """Cannot be loaded."""

    def load(self, device: torch.device) -> None:
        raise FileNotFoundError(f"expected a model, found none at {self.model}")


class FailingEngine(MeanEngine):
    """Fails to load in a way that nobody foresaw."""

    def load(self, device: torch.device) -> None:
        raise RuntimeError("out of memory")


class DyingEngine(MeanEngine):
    """Ends its thread at the first question."""

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        raise SystemExit("the driver has gone")
