"""The queue in front of the judge: order, bounded memory, and every way in which a judge can be
wrong.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo.errors import UserError
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.queue import ScoringQueue


class Judge(RewardModel):
    """Scores (x, x / 2) of videos that are filled with x; `before` runs at each call, on the
    queue's thread.
    """

    stages = ("whole", "half")

    def __init__(self, before: Callable[[], Any] = lambda: None) -> None:
        self.before = before
        self.calls: list[list[str]] = []
        self.threads: set[int] = set()

    def load(self, device: torch.device) -> None:
        pass

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        self.before()
        self.calls.append(list(prompts))
        self.threads.add(threading.get_ident())
        x = videos.double().flatten(1).mean(1)
        return torch.stack([x, x / 2], dim=1), torch.ones(len(videos), dtype=torch.bool)


def videos(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None, None].expand(-1, 2, 3, 4, 4)


@pytest.fixture
def opened() -> Iterator[Callable[..., ScoringQueue]]:
    """opened(judge, ...): a queue that is closed at the end."""
    queues: list[ScoringQueue] = []

    def make(*args: Any, **kwargs: Any) -> ScoringQueue:
        queues.append(ScoringQueue(*args, **kwargs))
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()


def test_scores_come_in_groups_in_the_order_given(opened: Callable[..., ScoringQueue]) -> None:
    judge = Judge()
    queue = opened(judge)
    queue.submit(videos(0.125, 0.25, 0.5), ["a", "a", "b"], 8.0)
    queue.submit(videos(1.0), ["b"], 8.0)
    scores, valid = queue.collect(2)
    assert scores == [[[0.125, 0.0625], [0.25, 0.125]], [[0.5, 0.25], [1.0, 0.5]]]
    assert valid == [[True, True], [True, True]]
    assert judge.calls == [["a", "a", "b"], ["b"]]
    assert threading.get_ident() not in judge.threads  # sampling goes on meanwhile
    assert queue.collect(2) == ([], [])
    queue.submit(videos(0.75, 0.0), ["c", "c"], 8.0)
    assert queue.collect(2)[0] == [[[0.75, 0.375], [0.0, 0.0]]]


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    pauses=st.lists(st.sampled_from((0.0, 0.003)), min_size=6, max_size=6),
)
def test_neither_batches_nor_delays_change_the_order(sizes: list[int], pauses: list[float]) -> None:
    waits = iter(pauses)
    queue = ScoringQueue(Judge(lambda: time.sleep(next(waits))), max_pending=2)
    values = [i / 32 for i in range(sum(sizes))]
    at = 0
    for size in sizes:
        queue.submit(videos(*values[at : at + size]), ["a"] * size, 8.0)
        at += size
    scores, _ = queue.collect(len(values))
    queue.close()
    assert scores == [[[x, x / 2] for x in values]]


def test_no_more_than_max_pending_wait(opened: Callable[..., ScoringQueue]) -> None:
    """The judge stands still; the third batch of two has to wait until it has done one."""
    go = threading.Semaphore(0)
    queue = opened(Judge(go.acquire), max_pending=2)
    submitted: list[int] = []

    def sampler() -> None:
        for i in range(5):
            queue.submit(videos(i / 8), ["a"], 8.0)
            submitted.append(i)

    def reaches(count: int) -> bool:
        deadline = time.monotonic() + 10
        while len(submitted) < count and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.05)  # it may not run on
        return len(submitted) == count

    thread = threading.Thread(target=sampler)
    thread.start()
    try:
        assert reaches(2)
        for done in (1, 2):
            go.release()
            assert reaches(2 + done)
    finally:
        go.release(10)
        thread.join(10)
    assert queue.collect(5)[0] == [[[i / 8, i / 16] for i in range(5)]]


def test_a_judge_is_called_as_often_at_a_time_as_it_allows(
    opened: Callable[..., ScoringQueue],
) -> None:
    """Three calls meet at a barrier, which one thread alone would never pass; their order is that
    of submission all the same.
    """
    meet = threading.Barrier(3)
    judge = Judge(lambda: meet.wait(10))
    judge.concurrency = 3  # type: ignore[attr-defined]
    queue = opened(judge, max_pending=1)  # fewer than may run would leave threads idle
    for i in range(6):
        queue.submit(videos(i / 8), ["a"], 8.0)
    assert queue.collect(6)[0] == [[[i / 8, i / 16] for i in range(6)]]
    assert len(judge.threads) == 3


def test_the_wait_for_a_place_is_measured(opened: Callable[..., ScoringQueue]) -> None:
    queue = opened(Judge(lambda: time.sleep(0.1)), max_pending=1)
    queue.submit(videos(0.5), ["a"], 8.0)
    assert queue.blocked_seconds() == 0
    queue.submit(videos(0.5), ["a"], 8.0)
    assert queue.blocked_seconds() > 0.01
    assert queue.blocked_seconds() == 0  # since the last call
    queue.collect(2)


class Broken(Judge):
    """Answers whatever it was given."""

    def __init__(self, scores: Any, valid: Any = None) -> None:
        super().__init__()
        self.answer = (
            torch.tensor(scores),
            torch.ones(len(scores), dtype=torch.bool) if valid is None else torch.tensor(valid),
        )

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        return self.answer


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_makes_its_video_invalid(
    opened: Callable[..., ScoringQueue], bad: float
) -> None:
    """The scores of a video that the judge itself calls invalid are not read."""
    rows = [[0.5, 0.5], [0.5, bad], [bad, 0.5], [0.0, 1.0], [7.5, 0.5]]
    queue = opened(Broken(rows, [True, True, True, True, False]))
    queue.submit(videos(*[0] * 5), ["a"] * 5, 8.0)
    scores, valid = queue.collect(5)
    assert valid == [[True, False, False, True, False]]
    assert (scores[0][0], scores[0][3]) == (rows[0], rows[3])


@pytest.mark.parametrize(("score", "taken"), [(-1e-9, 0.0), (1.0000001, 1.0), (1.0, 1.0)])
def test_a_score_outside_0_to_1_by_rounding_is_taken_for_the_end(
    opened: Callable[..., ScoringQueue], score: float, taken: float
) -> None:
    queue = opened(Broken([[0.5, 0.5], [0.25, score]]))
    queue.submit(videos(0, 0), ["a"] * 2, 8.0)
    assert queue.collect(2) == ([[[0.5, 0.5], [0.25, taken]]], [[True, True]])
    assert (queue.counters(), queue.last_errors()) == ({}, {})


@pytest.mark.parametrize("bad", [-1e-5, 1.00001, 7.5, math.nan])
def test_a_score_outside_0_to_1_leaves_its_video_without_one(
    opened: Callable[..., ScoringQueue], bad: float
) -> None:
    queue = opened(Broken([[0.5, 0.5], [0.25, bad]]))
    queue.submit(videos(0, 0), ["a", "b"], 8.0)
    assert queue.collect(2)[1] == [[True, False]]
    (error,) = queue.last_errors().values()
    assert re.fullmatch(r"expected scores in \[0, 1\], got \[0\.25, .*\] for 'b'", error)
    assert (queue.counters(), queue.counters()) == ({"refused": 1}, {})


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        ((torch.rand(1, 2), torch.ones(1)), "a tensor (1, 2) and a tensor (1,)"),
        ((torch.rand(2, 3), torch.ones(2)), "a tensor (2, 3) and a tensor (2,)"),
        ((torch.rand(2), torch.ones(2)), "a tensor (2,) and a tensor (2,)"),
        ((torch.rand(2, 2), torch.ones(2, 1)), "a tensor (2, 2) and a tensor (2, 1)"),
        ((torch.rand(2, 2) * 1j, torch.ones(2)), "a tensor (2, 2) and a tensor (2,)"),
        (torch.rand(2, 2), "a tensor (2, 2)"),
        ((torch.rand(2, 2), [True, True]), "a tensor (2, 2) and [True, True]"),
        ([[0.5, 0.5], [0.5, 0.5]], "[[0.5, 0.5], [0.5, 0.5]]"),
        (None, "None"),
    ],
)
def test_what_is_no_scores_is_the_judges_error(
    opened: Callable[..., ScoringQueue], answer: Any, got: str
) -> None:
    judge = Broken([])
    judge.answer = answer
    queue = opened(judge)
    queue.submit(videos(0, 0), ["a"] * 2, 8.0)
    with pytest.raises(UserError, match=r"Broken\.score: expected .*\(2, 2\).*\(2,\)") as caught:
        queue.collect(2)
    assert str(caught.value).endswith(f", got {got}")


def fail() -> None:
    raise ConnectionError("no answer")


def test_the_judges_exception_comes_out_of_collect(opened: Callable[..., ScoringQueue]) -> None:
    queue = opened(Judge(fail))
    queue.submit(videos(0.5), ["a"], 8.0)
    with pytest.raises(ConnectionError, match="no answer"):
        queue.collect(1)


def test_a_full_queue_lets_it_out_of_submit(opened: Callable[..., ScoringQueue]) -> None:
    go = threading.Event()

    def wait_and_fail() -> None:
        go.wait(10)
        fail()

    queue = opened(Judge(wait_and_fail), max_pending=1)
    queue.submit(videos(0.5), ["a"], 8.0)
    threading.Timer(0.05, go.set).start()
    with pytest.raises(ConnectionError, match="no answer"):
        queue.submit(videos(0.5), ["a"], 8.0)


def test_scores_are_float64_on_the_host_without_a_gradient(
    opened: Callable[..., ScoringQueue],
) -> None:
    weight = torch.tensor(0.5, requires_grad=True)

    class Differentiable(Judge):
        def score(
            self, videos: Tensor, prompts: Sequence[str], fps: float
        ) -> tuple[Tensor, Tensor]:
            assert not torch.is_grad_enabled()
            return (weight * torch.tensor([[0.2, 0.4]])), torch.tensor([True])

    queue = opened(Differentiable())
    queue.submit(videos(0.0), ["a"], 8.0)
    scores, _ = queue.collect(1)
    assert scores == [[[pytest.approx(0.1, rel=1e-6), pytest.approx(0.2, rel=1e-6)]]]


def test_close_closes_a_judge_that_can_be(opened: Callable[..., ScoringQueue]) -> None:
    """A judge that waits for a server that is gone would hold up Python's exit, which waits for
    this thread.
    """
    gone, waits = threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        gone.wait(10)

    judge = Judge(wait)
    judge.close = gone.set  # type: ignore[attr-defined]
    queue = opened(judge)
    queue.submit(videos(0.5), ["a"], 8.0)
    assert waits.wait(10)
    queue.close()
    assert gone.is_set()


def test_a_judge_that_fails_at_its_end_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    judge = Judge()
    judge.close = fail  # type: ignore[method-assign]
    ScoringQueue(judge).close()
    assert caplog.messages == ["Judge failed at its end: no answer"]


def test_a_wait_for_a_judge_that_stands_still_has_an_end(
    opened: Callable[..., ScoringQueue],
) -> None:
    go = threading.Event()
    queue = opened(Judge(lambda: go.wait(10)), max_pending=2)
    assert queue.has_room(0)
    assert queue.is_done(0)
    queue.submit(videos(0.5), ["a"], 8.0)
    assert queue.has_room(0)
    assert not queue.is_done(0.01)
    queue.submit(videos(0.5), ["a"], 8.0)
    assert not queue.has_room(0.01)
    go.set()
    assert queue.has_room(10)
    assert queue.is_done(10)


def test_close_ends_the_thread_and_what_waits() -> None:
    go = threading.Event()
    judge = Judge(lambda: go.wait(10))
    queue = ScoringQueue(judge)
    before = {*threading.enumerate()}
    for _ in range(3):
        queue.submit(videos(0.5), ["a"], 8.0)
    (worker,) = {*threading.enumerate()} - before
    threading.Timer(0.05, go.set).start()
    queue.close()
    worker.join(5)
    assert not worker.is_alive()
    assert len(judge.calls) == 1  # the one that was running
    with pytest.raises(RuntimeError, match="shutdown"):
        queue.submit(videos(0.5), ["a"], 8.0)


def test_a_gpus_judge_has_a_stream_with_priority(
    opened: Callable[..., ScoringQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream for all batches, which waits for the frames and holds them; no GPU is needed."""
    made, log = [], []
    stream = SimpleNamespace(wait_event=lambda event: log.append(("waits", event)))
    event = SimpleNamespace(record=lambda: log.append("recorded"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *a, **k: made.append((a, k)) or stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "stream", lambda given: log.append(given) or nullcontext())
    frames = SimpleNamespace(
        is_cuda=True, device="cuda:3", record_stream=lambda given: log.append(("held", given))
    )
    score = lambda videos, prompts, fps: (torch.full((1, 1), 0.5), torch.ones(1))  # noqa: E731
    judge = SimpleNamespace(concurrency=1, stages=("a",), score=score, close=lambda: None)
    queue: Any = opened(judge)
    for _ in range(2):
        queue.submit(frames, ["a cat"], 8.0)
    assert queue.collect(1)[0] == [[[0.5]], [[0.5]]]
    assert made == [(("cuda:3",), {"priority": -1})]
    assert [x for x in log if x != "recorded"] == [stream, ("waits", event), ("held", stream)] * 2
    assert log.count("recorded") == 2
