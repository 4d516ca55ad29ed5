"""The served judge against a fake server: what is sent, in which order, and what faults do."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.vlm.endpoints import FAILURES
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.failures import LONGEST_ERROR
from fastgrpo.rewards.vlm.http_client import LONGEST_BODY
from fastgrpo.rewards.vlm.served import ServerEngine
from fastgrpo.rewards.vlm.transport import encode_clip

Clips = Callable[..., Clip]
Engines = Callable[..., ServerEngine]


def decode(url: str) -> Tensor:
    """Frames [n, 3, H, W] of a data URL, by PIL."""
    head, data = url.split(",", 1)
    assert head == "data:video/jpeg;base64"
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(part)))) for part in data.split(",")
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


# What is sent


def test_frames_arrive_bit_equal_and_before_the_text(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server, clip = fake_endpoint(), Clip(random_clip(n=4).frames, 7.2)
    decoding = Decoding(max_tokens=9, temperature=0.7, seed=11)
    asked = server_engine(server, timeout=5.0).ask([clip], [["Why?", "How?"]], decoding)
    assert asked == [[Reply("7.25"), Reply("7.25")]]
    for request, question in zip(server.requests, ("Why?", "How?"), strict=True):
        video, text = request.body["messages"][0]["content"]
        assert torch.equal(decode(video["video_url"]["url"]), clip.frames)
        assert text == {"type": "text", "text": question}
        assert {key: request.body[key] for key in request.body.keys() - {"messages"}} == {
            "model": "judge",
            "max_tokens": 9,
            "temperature": 0.7,
            "seed": 11,
            "mm_processor_kwargs": {"fps": 7.2},
            "media_io_kwargs": {"video": {"num_frames": -1, "fps": 7.2}},
        }


def test_pictures_are_encoded_once_per_clip(
    fake_endpoint: Any, server_engine: Engines, monkeypatch: pytest.MonkeyPatch, random_clip: Clips
) -> None:
    calls: list[Clip] = []
    monkeypatch.setattr(
        "fastgrpo.rewards.vlm.served.encode_clip",
        lambda clip: calls.append(clip) or encode_clip(clip),
    )
    server_engine(fake_endpoint()).ask(
        [random_clip(i) for i in range(3)], [["a", "b", "c"]] * 3, Decoding()
    )
    assert len(calls) == 3


# Order and concurrency


def video_of(request: Any) -> str:
    return str(request.media[0]["video_url"]["url"])


def pixel(clip: Clip) -> int:
    return int(clip.frames[0, 0, 0, 0])


def answer_pixel(request: Any) -> str:
    """What tells clips apart whose answers came in another order."""
    return f"{int(decode(video_of(request))[0, 0, 0, 0])}{request.text}"


def test_64_clips_at_a_time_none_lost_and_in_order(
    fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    servers = [fake_endpoint(answer=answer_pixel) for _ in range(2)]
    for server in servers:
        server.faults.extend(fault(delay=0.1 if i % 3 == 0 else 0.0) for i in range(64))
    clips = [random_clip(i) for i in range(64)]
    judge = server_engine(
        *servers, concurrency=64, requests_in_flight=64, timeout=5.0, patience=20.0
    )
    replies = judge.ask(clips, [["a", "b"]] * 64, Decoding())
    assert replies == [[Reply(f"{pixel(clip)}{question}") for question in "ab"] for clip in clips]
    assert sorted(len(server.requests) for server in servers) == [
        64,
        64,
    ]  # the least busy one is next
    assert judge.counters() == {"requests": 128 + 2, "failed_requests": 0, "endpoints_set_aside": 0}
    assert judge.counters() == {"requests": 0, "failed_requests": 0, "endpoints_set_aside": 0}


def test_the_first_question_goes_ahead_and_the_others_follow_to_the_same_endpoint(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    servers = [fake_endpoint(delay=0.2) for _ in range(3)]
    clips = [random_clip(i) for i in range(6)]
    server_engine(*servers, timeout=5.0).ask(clips, [["a", "b", "c"]] * 6, Decoding())
    seen: dict[str, list[Any]] = {}
    for server in servers:
        for request in server.requests:
            seen.setdefault(video_of(request), []).append((server.port, request))
    assert len(seen) == 6
    for requests in seen.values():
        (_, first), *others = requests
        assert len({port for port, _ in requests}) == 1
        assert (first.text, sorted(request.text for _, request in others)) == ("a", ["b", "c"])
        assert all(request.began >= first.ended for _, request in others)
        assert max(request.at_work for _, request in others) > 1


def test_both_limits_hold_for_all_callers_together(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint(delay=0.05, answer=answer_pixel)
    judge = server_engine(server, concurrency=2, requests_in_flight=3, timeout=5.0)
    replies: dict[int, Any] = {}

    def ask(caller: int) -> None:
        clips = [random_clip(10 * caller + i) for i in range(3)]
        replies[caller] = (clips, judge.ask(clips, [["a", "b", "c"]] * 3, Decoding()))

    callers = [threading.Thread(target=ask, args=(caller,)) for caller in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for clips, answers in replies.values():
        assert answers == [
            [Reply(f"{pixel(clip)}{question}") for question in "abc"] for clip in clips
        ]
    assert len(server.requests) == 27
    assert server.most_at_work == 3
    videos = [
        {video_of(other) for other in server.requests if other.began <= r.began < other.ended}
        for r in server.requests
    ]
    assert max(map(len, videos)) == 2


# Faults


COMPLETION = (
    b'{"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": %s}'
)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"status": 500}, "status 500"),
        ({"status": 503, "headers": (("Retry-After", "0.1"),)}, "status 503"),
        ({"status": 408}, "status 408"),
        ({"status": 409}, "status 409"),
        ({"status": 429}, "status 429"),
        ({"body": b" " * (LONGEST_BODY + 1)}, f"expected at most {LONGEST_BODY} bytes"),
        ({"headers": (("Content-Encoding", "gzip"),)}, "not compressed, got 'gzip'"),
        ({"delay": 1.5}, "timed out|no answer in time"),
        ({"drip": 0.02}, "no answer in time"),
        ({"close": True}, "onnection"),
        ({"cut": 40, "hang_up": True}, "onnection|peer closed"),
        ({"cut": 40}, "JSONDecodeError"),
        ({"body": b"<html>busy</html>"}, "JSONDecodeError"),
        ({"body": b""}, "."),
        ({"body": b"[]"}, "expected a chat completion"),
        ({"body": b"[" * 100_000}, "RecursionError|JSONDecodeError"),
        *[
            ({"body": body}, "expected a chat completion with a text, got")
            for body in (
                *(b"null", b'"text"', b"5", b'{"choices": 5}', b'{"error": "busy"}'),
                *[
                    COMPLETION % choices
                    for choices in (
                        *(b"[]", b"null", b"{}", b'{"0": 1}', b'"a"', b"[null]", b"[[]]", b"[{}]"),
                        b'[{"message": "8.50"}]',
                        b'[{"message": {}}]',
                        b'[{"message": {"content": "3"}}, {"message": {"content": "8"}}]',
                        b'[{"message": {"content": 8.5}}]',
                        b'[{"message": {"content": ["8.50"]}}]',
                    )
                ],
            )
        ],
        ({"body": COMPLETION % rb'[{"message": {"content": "\ud800"}}]'}, "UnicodeEncodeError"),
    ],
)
def test_what_may_pass_is_tried_again(
    broken: dict,
    words: str,
    fake_endpoint: Any,
    fault: Any,
    server_engine: Engines,
    random_clip: Clips,
) -> None:
    server = fake_endpoint(answer=answer_pixel)
    judge = server_engine(server)
    judge.counters()
    bad = fault(**{"body": b"{}", **broken} if "status" in broken else broken)
    server.faults.extend([fault(), bad])
    assert judge.ask([random_clip()], [["a", "b", "c"]], Decoding()) == [
        [Reply(f"{pixel(random_clip())}{q}") for q in "abc"]
    ]
    assert judge.counters() == {"requests": 4, "failed_requests": 1, "endpoints_set_aside": 0}
    (url, error), *others = judge.last_errors().items()
    assert (url, others) == (server.url, [])
    assert error.startswith(f"{url}: ")
    assert re.search(words, error)


def test_an_error_cancels_the_other_questions(
    fake_endpoint: Any,
    server_engine: Engines,
    monkeypatch: pytest.MonkeyPatch,
    random_clip: Clips,
) -> None:
    """Of the same clip and of the others; the caller sees the error itself."""
    waiting, cancelled = asyncio.Semaphore(0), []

    async def answer(engine: ServerEngine, video: Any, question: str, *rest: Any) -> Any:
        if question == "fail":
            await waiting.acquire()
            await waiting.acquire()
            raise KeyError(question)
        if question.startswith("wait"):
            waiting.release()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(question)
                raise
        return Reply(question), None

    monkeypatch.setattr(ServerEngine, "_question", answer)
    judge = server_engine(fake_endpoint())
    with pytest.raises(KeyError, match="fail"):
        judge.ask([random_clip()] * 2, [["a", "fail", "wait 1"], ["wait 2"]], Decoding())
    assert sorted(cancelled) == ["wait 1", "wait 2"]


def test_retry_after_is_waited_for(
    fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint()
    server.faults.append(fault(status=429, body=b"{}", headers=(("Retry-After", "0.4"),)))
    assert server_engine(server).ask([random_clip()], [["a"]], Decoding()) == [[Reply("7.25")]]
    assert server.requests[1].began - server.requests[0].ended >= 0.4


def test_a_busy_endpoint_leaves_the_work_to_the_other(
    fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    busy, other = (
        fake_endpoint(always=fault(status=429, body=b"{}", headers=(("Retry-After", "60"),))),
        fake_endpoint(),
    )
    judge = server_engine(busy, other)
    assert (
        judge.ask([random_clip(i) for i in range(6)], [["a", "b"]] * 6, Decoding())
        == [[Reply("7.25")] * 2] * 6
    )
    assert len(busy.requests) < 6
    assert judge.counters()["endpoints_set_aside"] == 0


@pytest.mark.parametrize("status", [400, 413, 422, 401, 403, 404])
def test_what_would_fail_again_is_an_error_at_once(
    status: int, fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    """Not tried for the hour of patience. A server may repeat the whole video in its error."""
    server = fake_endpoint()
    judge = server_engine(server, patience=3600.0)
    judge.counters()
    server.always = fault(status=status, body=json.dumps({"error": "x" * 10_000}).encode())
    replies = judge.ask([random_clip()], [["a", "b"]], Decoding())
    for reply in replies[0]:
        assert reply.error.startswith(f"{server.url}: status {status}: ")
        assert (reply.text, len(reply.error) < LONGEST_ERROR + 100) == ("", True)
    assert len(server.requests) == 2
    assert judge.counters()["failed_requests"] == 2
    server.always = None
    assert judge.ask([random_clip()], [["a"]], Decoding()) == [[Reply("7.25")]]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_leaves_the_work_to_the_other(
    status: int, fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    refusing, other = fake_endpoint(), fake_endpoint()
    judge = server_engine(refusing, other, set_aside=1.0, patience=30.0)
    refusing.always = fault(status=status, body=b"{}")
    assert (
        judge.ask([random_clip(i) for i in range(5)], [["a", "b"]] * 5, Decoding())
        == [[Reply("7.25")] * 2] * 5
    )
    assert len(other.requests) == 10
    assert judge.counters()["endpoints_set_aside"] >= 1
    assert f"status {status}" in judge.last_errors()[refusing.url]


@pytest.mark.parametrize("bad", ["a \ud800 cat", {1j}])
def test_a_question_that_cannot_be_sent_is_an_error_of_its_own(
    bad: Any, fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint()
    judge = server_engine(server, patience=3600.0)
    for _ in range(FAILURES + 1):
        [[reply, other]] = judge.ask([random_clip()], [[bad, "b"]], Decoding())
        assert reply.error.startswith("the question cannot be sent: ")
        assert other == Reply("7.25")
    assert [request.text for request in server.requests] == ["b"] * (FAILURES + 1)
    counts = judge.counters()
    assert (counts["failed_requests"], counts["endpoints_set_aside"]) == (0, 0)
    assert judge.last_errors() == {}


def test_a_question_that_is_refused_sets_nothing_aside(
    fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint()
    judge = server_engine(server)
    for _ in range(FAILURES + 1):
        server.faults.append(fault(status=400, body=b"{}"))
        [[reply, other]] = judge.ask([random_clip()], [["a", "b"]], Decoding())
        assert "status 400" in reply.error
        assert other == Reply("7.25")
    assert judge.counters()["endpoints_set_aside"] == 0


def test_one_of_two_endpoints_dies(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    dies, lives = (
        fake_endpoint(answer=answer_pixel, delay=0.02),
        fake_endpoint(answer=answer_pixel, delay=0.02),
    )
    judge = server_engine(dies, lives, set_aside=0.5, patience=20.0)
    threading.Timer(0.1, dies.kill).start()
    clips = [random_clip(i) for i in range(40)]
    assert judge.ask(clips, [["a", "b"]] * 40, Decoding()) == [
        [Reply(f"{pixel(clip)}{q}") for q in "ab"] for clip in clips
    ]
    assert list(judge.last_errors()) == [dies.url]
    counts = judge.counters()
    assert counts["endpoints_set_aside"] >= 1
    assert counts["failed_requests"] >= FAILURES
    assert counts["requests"] - counts["failed_requests"] == 80 + 2


@pytest.mark.timeout(60)
def test_killed_and_restarted_while_it_is_asked(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint(answer=answer_pixel, delay=0.01)
    judge = server_engine(server, patience=30.0)
    clips = [random_clip(i) for i in range(40)]
    killed = threading.Event()

    def restart() -> None:
        while len(server.requests) < 10:
            time.sleep(0.005)
        server.kill()
        killed.set()
        time.sleep(0.3)
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    assert judge.ask(clips, [["a", "b"]] * 40, Decoding()) == [
        [Reply(f"{pixel(clip)}{q}") for q in "ab"] for clip in clips
    ]
    thread.join()
    assert killed.is_set()
    counts = judge.counters()
    assert counts["endpoints_set_aside"] >= 1
    assert counts["failed_requests"] >= FAILURES


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["killed", "hung", "broken"])
def test_all_dead_is_an_error_in_every_reply(
    how: str, fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    """In bounded time: waiting questions have no patience of their own, most are not even sent."""
    servers = [fake_endpoint() for _ in range(2)]
    judge = server_engine(*servers, timeout=0.2, patience=0.8, concurrency=4)
    for server in servers:
        if how == "killed":
            server.kill()
        server.always = fault(delay=1.0) if how == "hung" else fault(status=500, body=b"{}")
    replies = judge.ask([random_clip(i) for i in range(32)], [["a", "b", "c"]] * 32, Decoding())
    assert [len(row) for row in replies] == [3] * 32
    for reply in (reply for row in replies for reply in row):
        assert (reply.text, reply.digits) == ("", ())
        assert re.match(
            r"no answer in 0\.8 s and \d+ tries: .*http://127\.0\.0\.1:\d+/v1: ", reply.error
        )
    assert sum("and 0 tries" in reply.error for row in replies for reply in row) > 64
    assert sorted(judge.last_errors()) == sorted(server.url for server in servers)


@pytest.mark.timeout(60)
def test_after_a_failure_the_next_call_has_its_own_patience(
    fake_endpoint: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint()
    judge = server_engine(server, patience=1.0)
    server.kill()
    assert "no answer in 1 s" in judge.ask([random_clip()], [["a"]], Decoding())[0][0].error
    server.start()
    assert judge.ask([random_clip()], [["a"]], Decoding()) == [[Reply("7.25")]]


# Interrupt and close


def hung(fake_endpoint: Any, fault: Any, server_engine: Engines) -> tuple[Any, ServerEngine]:
    server = fake_endpoint()
    judge = server_engine(server, timeout=600.0, patience=600.0)
    server.faults.append(fault(delay=3.0, close=True))
    return server, judge


@pytest.mark.timeout(30)
def test_an_interrupt_ends_the_wait(
    fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server, judge = hung(fake_endpoint, fault, server_engine)
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs are started with it ignored
    try:
        threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            judge.ask([random_clip()], [["a"]], Decoding())
    finally:
        signal.signal(signal.SIGINT, before)
    assert judge.ask([random_clip()], [["a"]], Decoding()) == [[Reply("7.25")]]
    assert len(server.requests) == 2


@pytest.mark.timeout(30)
def test_close_ends_the_wait_of_another_thread(
    fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server, judge = hung(fake_endpoint, fault, server_engine)
    threads = threading.active_count()
    errors: list[str] = []

    def ask() -> None:
        try:
            judge.ask([random_clip()], [["a"]], Decoding())
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.requests:
        time.sleep(0.005)
    judge.close()
    thread.join()
    assert errors == ["closed while it waited for an answer"]
    assert "judge-requests" not in {thread.name for thread in threading.enumerate()}
    assert threading.active_count() <= threads + 2  # the server's two
    judge.close()
    with pytest.raises(RuntimeError, match="load"):
        judge.ask([random_clip()], [["a"]], Decoding())
    judge.load(torch.device("cpu"))
    assert judge.ask([random_clip()], [["a"]], Decoding()) == [[Reply("7.25")]]
