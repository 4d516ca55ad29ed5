"""A signal ends the wait for a judge that stands still, which may be for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import step
from fastgrpo.training.step import AbortableQueue, RolloutInterrupted

VIDEOS = torch.rand(1, 2, 3, 4, 4)


@pytest.mark.parametrize(
    ("wait", "batches"),
    [(lambda queue: queue.submit(VIDEOS, ["a"], 8.0), 2), (lambda queue: queue.collect(1), 1)],
    ids=["for room", "for scores"],
)
def test_a_wait_is_left_and_one_that_is_over_is_not(
    one_rank: Any,
    tiny_judge: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait: Callable[[AbortableQueue], object],
    batches: int,
) -> None:
    monkeypatch.setattr(step, "POLL", 0.01)
    go, judge = threading.Event(), tiny_judge()
    score = judge.score
    judge.score = lambda *args: (go.wait(10), score(*args))[1]
    queue, asked = ScoringQueue(judge, max_pending=2), [False] * 3
    for _ in range(batches):
        queue.submit(VIDEOS, ["a"], 8.0)
    with pytest.raises(RolloutInterrupted):
        wait(AbortableQueue(queue, lambda: not asked or asked.pop()))
    assert not asked, "three times nothing had asked to stop"
    go.set()
    wait(AbortableQueue(queue, lambda: False))
    queue.close()
