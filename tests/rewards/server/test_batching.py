"""Questions of many clients to one engine: which are asked together, and what becomes of them when
it fails or ends.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastgrpo.rewards.server.batching import FAILURES, Batcher, Job, UnavailableError
from fastgrpo.rewards.vlm.engine import Clip, Decoding

NUMBER = Decoding(constrained=True)


def job(question: str = "?", level: int = 0, decoding: Decoding = NUMBER) -> Job:
    return Job(
        str(level),
        Clip(torch.full((2, 3, 28, 28), level, dtype=torch.uint8), 2.0),
        question,
        decoding,
    )


@pytest.fixture
def run() -> Iterator[Callable[..., Batcher]]:
    """run(engine, ...): a Batcher that has been started, and is ended with the test."""
    running: list[Batcher] = []

    def begin(engine: Any, **options: Any) -> Batcher:
        running.append(Batcher(engine, torch.device("cpu"), **({"linger": 0.0} | options)))
        running[-1].start()
        return running[-1]

    yield begin
    for batcher in running:
        getattr(batcher.engine, "gate", threading.Event()).set()
        batcher.stop(0)


def queue_behind_one(batcher: Batcher, chats: Any, *jobs: Job) -> Job:
    """Queue jobs while the engine is busy with another, which is returned; then let it go on."""
    gate = batcher.engine.gate  # type: ignore[attr-defined]
    assert batcher.settled.wait(10)
    gate.clear()
    first = job("first", 99)
    batcher.submit(first)
    chats.wait_for(lambda: len(batcher.engine.calls) == 1)  # type: ignore[attr-defined]
    for one in jobs:
        batcher.submit(one)
    assert batcher.waiting == len(jobs)
    gate.set()
    return first


def test_what_waits_is_asked_together_the_questions_of_a_clip_side_by_side(
    run: Any, engines: Any, chats: Any
) -> None:
    batcher = run(engines.MeanEngine("m"))
    jobs = [job(str(k), level) for k in range(3) for level in (10, 20, 30)]
    first = queue_behind_one(batcher, chats, *jobs)
    assert [one.reply.result(10).text for one in (first, *jobs)] == [
        chats.answer(v) for v in (99, *(10, 20, 30) * 3)
    ]
    _, (clips, questions, decoding) = batcher.engine.calls
    assert [int(clip.frames[0, 0, 0, 0]) for clip in clips] == [10, 20, 30]
    assert questions == [["0", "1", "2"]] * 3
    assert decoding == NUMBER


def test_a_call_has_a_bound_and_the_oldest_question_is_in_it(
    run: Any, engines: Any, chats: Any
) -> None:
    batcher = run(engines.MeanEngine("m"), batch_size=4)
    jobs = [job(str(k), level) for k in range(3) for level in (10, 20, 30)]
    queue_behind_one(batcher, chats, *jobs)
    for one in jobs:
        one.reply.result(10)
    assert [call[1] for call in batcher.engine.calls[1:]] == [
        [["0", "1", "2"], ["0"]],
        [["0", "1", "2"], ["1"]],
        [["2"]],
    ]


def test_what_is_decoded_otherwise_is_asked_apart(run: Any, engines: Any, chats: Any) -> None:
    batcher = run(engines.MeanEngine("m"))
    others = [
        Decoding(temperature=0.5, seed=1),
        NUMBER,
        Decoding(temperature=0.5, seed=2),
        Decoding(temperature=0.5, seed=1),
    ]
    jobs = [job(str(number), 10, decoding) for number, decoding in enumerate(others)]
    queue_behind_one(batcher, chats, *jobs)
    for one in jobs:
        one.reply.result(10)
    assert [call[1:] for call in batcher.engine.calls[1:]] == [
        ([["0", "3"]], others[0]),
        ([["1"]], others[1]),
        ([["2"]], others[2]),
    ]


def test_an_idle_engine_waits_a_moment_for_the_second_question(
    run: Any, engines: Any, chats: Any
) -> None:
    batcher = run(engines.MeanEngine("m"), batch_size=2, linger=9.0)
    assert batcher.settled.wait(10)
    jobs = [job("a"), job("b")]
    batcher.submit(jobs[0])
    assert batcher.engine.calls == []
    batcher.submit(jobs[1])  # which makes the batch full, so that nothing is waited for
    for one in jobs:
        one.reply.result(5)
    assert [call[1] for call in batcher.engine.calls] == [[["a", "b"]]]


def test_a_question_that_was_withdrawn_is_not_asked(run: Any, engines: Any, chats: Any) -> None:
    batcher = run(engines.MeanEngine("m"))
    gone, kept = job("gone", 10), job("kept", 20)
    gate = batcher.engine.gate
    assert batcher.settled.wait(10)
    gate.clear()
    asked = job("asked")
    batcher.submit(asked)
    chats.wait_for(lambda: len(batcher.engine.calls) == 1)
    batcher.submit(gone)
    batcher.submit(kept)
    assert gone.reply.cancel()
    assert not asked.reply.cancel()
    gate.set()
    assert kept.reply.result(10).text == chats.answer(20)
    assert [call[1] for call in batcher.engine.calls] == [[["asked"]], [["kept"]]]


def test_an_engine_s_error_is_that_of_its_call_and_three_break_it_until_it_answers(
    run: Any, engines: Any
) -> None:
    batcher = run(engines.MeanEngine("m"))
    assert batcher.settled.wait(10)
    for _ in range(FAILURES):
        assert batcher.state == "ready"
        failing = job("fail")
        batcher.submit(failing)
        assert "told to fail" in str(failing.reply.exception(10))
    assert batcher.state == "broken"
    mending = job()
    batcher.submit(mending)
    mending.reply.result(10)
    assert batcher.state == "ready"
    assert batcher.ended is None


def test_when_the_thread_ends_nobody_goes_on_waiting(run: Any, engines: Any, chats: Any) -> None:
    batcher = run(engines.DyingEngine("m"))
    assert batcher.settled.wait(10)
    asked = job()
    batcher.submit(asked)
    with pytest.raises(UnavailableError, match="the engine has ended"):
        asked.reply.result(10)
    assert batcher.join(10)
    assert isinstance(batcher.ended, SystemExit)
    assert batcher.state == "broken"
    with pytest.raises(UnavailableError, match="broken"):
        batcher.submit(job())


def test_before_the_model_is_loaded_nothing_is_taken(run: Any, engines: Any) -> None:
    batcher = run(engines.UnloadedEngine("m"))
    assert batcher.state == "loading"
    with pytest.raises(UnavailableError, match="loading"):
        batcher.submit(job())
    batcher.engine.gate.set()
    assert batcher.settled.wait(10)
    assert batcher.state == "ready"
    assert batcher.described == {"engine": "mean", "model": "m", "revision": None}


def test_a_model_that_cannot_be_loaded_is_the_end(run: Any, engines: Any) -> None:
    batcher = run(engines.MissingEngine("m"))
    assert batcher.settled.wait(10)
    assert batcher.join(10)
    assert isinstance(batcher.ended, FileNotFoundError)
    assert batcher.state == "broken"


@pytest.mark.parametrize("answered", [True, False])
def test_an_ending_queue_is_answered_or_refused(
    run: Any, engines: Any, chats: Any, answered: bool
) -> None:
    batcher = run(engines.MeanEngine("m"), batch_size=1)
    gate = batcher.engine.gate
    assert batcher.settled.wait(10)
    gate.clear()
    jobs = [job(str(number), number) for number in range(4)]
    for one in jobs:
        batcher.submit(one)
    batcher.stop(30.0 if answered else 0.05)
    batcher.stop(0.0)  # a second call is nothing
    assert batcher.state == "stopping"
    with pytest.raises(UnavailableError, match="stopping"):
        batcher.submit(job())
    if answered:
        gate.set()
        assert [one.reply.result(10).text for one in jobs] == [
            chats.answer(number) for number in range(4)
        ]
    else:
        for one in jobs:  # the first of them too, which the engine is still busy with
            with pytest.raises(UnavailableError, match="the server is ending"):
                one.reply.result(10)
        gate.set()
    assert batcher.join(10)


@pytest.mark.parametrize(("batch_size", "linger"), [(0, 0.0), (1, -1.0), (1, math.nan)])
def test_its_settings_are_checked(engines: Any, batch_size: int, linger: float) -> None:
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        Batcher(engines.MeanEngine("m"), torch.device("cpu"), batch_size, linger)
