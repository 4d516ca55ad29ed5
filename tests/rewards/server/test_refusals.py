"""What the judge's server refuses: strangers, addresses, and whatever it does not do or that would
cost too much.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from fastgrpo.cli.serve_judge import JudgeProtocol
from fastgrpo.rewards.server.completions import FROM_ONE
from fastgrpo.rewards.server.http_app import ServerLimits
from fastgrpo.rewards.vlm.answers import NUMBER

TOKEN = "a-token-of-the-test"
TEXT = {"type": "text", "text": "How good?"}
VIDEO = {"type": "video_url", "video_url": {"url": "A VIDEO"}}


def url(text: str, kind: str = "video_url") -> dict[str, Any]:
    return {"type": kind, kind: {"url": text}}


def content(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1], "\u00e4"])
def test_nothing_but_health_is_told_without_the_token(
    server: Any, chats: Any, token: str | None
) -> None:
    assert chats.token == TOKEN
    for status, text in (
        server.post(chats.request(), token),
        server.get("/v1/models", token),
        server.get("/metrics", token),
    ):
        assert status == 401
        assert json.loads(text)["error"]["type"] == "authentication_error"
        assert TOKEN not in text
    assert server.get("/health", token)[0] == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body: Invalid JSON"),
        (b'{"model": "mean"', "the body: Invalid JSON"),
        (b"[" * 100_000, "the body: Invalid JSON"),
        (b"\xff\xfe", "the body: Invalid JSON"),
        (b"[]", "the body: "),
        (b'{"model": "mean"}', "messages: Field required"),
    ],
)
def test_what_is_no_request_is_refused(server: Any, body: bytes, words: str) -> None:
    status, text = server.post(body)
    assert status == 400
    assert words in json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": content(VIDEO, TEXT)["messages"] * 2}, "messages"),
        ({"messages": [{"role": "system", "content": [TEXT]}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "How good?"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages.0.content.0.type",
        ),
        (content(TEXT), "one video"),
        (content(VIDEO), "one text"),
        (content(VIDEO, VIDEO, TEXT), "one video"),
        (content(VIDEO, url("data:image/png;base64,AA==", "image_url"), TEXT), "one video"),
        (content(VIDEO, TEXT, TEXT), "one text"),
        (content(TEXT, VIDEO), "the video before the text"),
        (content({"type": "text", "video_url": {"url": "x"}}, TEXT), "needs text and nothing else"),
        (content({**VIDEO, "text": "x"}, TEXT), "needs video_url and nothing else"),
        (content(url("http://127.0.0.1:1/a.mp4"), TEXT), "never fetched"),
        (content(url("https://example.org/a.mp4"), TEXT), "never fetched"),
        (content(url("file:///etc/passwd"), TEXT), "never fetched"),
        (content(url("data:video/jpeg;base64,????"), TEXT), "not valid base64"),
        (content(url("data:video/jpeg;base64,AAAA"), TEXT), "not a PNG or JPEG"),
        (
            content(url(f"data:video/jpeg;base64,{','.join(['AAAA'] * 10_000)}"), TEXT),
            "at most 40 frames",
        ),
        (content(url("TWO SIZES"), TEXT), "expected one size"),
        (
            content({"type": "image_url", "image_url": {"url": "data:", "detail": "low"}}, TEXT),
            "detail",
        ),
        ({"n": 2}, "n: only 1 is supported"),
        ({"stream": True}, "stream: only False is supported"),
        ({"tools": [{"type": "function"}]}, "tools: only"),
        ({"top_p": 0.5}, "top_p: only 1 is supported"),
        ({"stop": ["."]}, "stop: only"),
        ({"best_of": 2}, "best_of: it is not supported"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1025}, "max_tokens: expected at most 1024, got 1025"),
        (
            {"max_tokens": 4, "guided_regex": NUMBER},
            "max_tokens: expected at least 5 for a number, got 4",
        ),
        ({"seed": 2**63}, "seed"),
        ({"top_logprobs": 3}, "expected logprobs with it"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"guided_regex": ".*"}, "regex: expected"),
        ({"guided_regex": NUMBER, "structured_outputs": {"regex": FROM_ONE}}, "regex: expected"),
        ({"guided_regex": FROM_ONE, "max_tokens": 2}, "begin with 1 is for its probabilities"),
        (
            {"guided_regex": FROM_ONE, "logprobs": True, "max_tokens": 3},
            "begin with 1 is for its probabilities",
        ),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format: expected a regex"),
        ({"mm_processor_kwargs": {"fps": 0}}, "fps"),
        ({"mm_processor_kwargs": {"fps": 1e9}}, "fps"),
        ({"mm_processor_kwargs": {"max_pixels": 10**9}}, "max_pixels"),
        (
            {"mm_processor_kwargs": {"fps": 2}, "media_io_kwargs": {"video": {"fps": 3}}},
            "fps: expected the same",
        ),
        ({"media_io_kwargs": {"video": {"num_frames": 32}}}, "num_frames"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_what_is_not_supported_is_refused_with_words(
    server: Any, chats: Any, fields: dict[str, Any], words: str
) -> None:
    asked = len(server.engine.calls)
    sizes = f"data:video/jpeg;base64,{chats.picture()},{chats.picture(height=84)}"
    body = (
        json.dumps(chats.request(**fields))
        .replace("A VIDEO", chats.video()["video_url"]["url"])
        .replace("TWO SIZES", sizes)
    )
    status, text = server.post(body.encode())
    assert status == 400, text
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert len(server.engine.calls) == asked


def test_another_model_and_another_route_are_not_found(server: Any, chats: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="expected mean, got other"):
        server.client().chat.completions.create(model="other", messages=chats.messages())
    assert server.post({}, path="/v1/completions")[0] == 404
    status, text = server.get("/v1/chat/completions")
    assert (status, json.loads(text)["error"]["code"]) == (405, 405)
    assert server.get("/docs")[0] == 404


def chunks(size: int, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(size)


@pytest.mark.parametrize(
    "body", [bytes(200_001), chunks(10_000, 21)], ids=["with its length", "in chunks"]
)
def test_a_body_above_the_bound_is_refused(server: Any, chats: Any, body: Any) -> None:
    status, text = server.post(body)
    assert status == 413
    assert "at most 200000 bytes" in json.loads(text)["error"]["message"]


def raw_post(server: Any, headers: str, *parts: bytes) -> bytes:
    """Send a request's head and parts as they are; the first bytes that come back, or none where
    the connection is closed before.
    """
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{headers}\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            for data in (head.encode(), *parts):
                raw.sendall(data)
            return raw.recv(1000)
    except (BrokenPipeError, ConnectionResetError):
        return b""


def test_an_endless_body_is_cut_off(server: Any, chats: Any) -> None:
    chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
    before = server.counted(413)
    assert raw_post(server, "Transfer-Encoding: chunked", *[chunk] * 2000)[:12] in (
        b"",
        b"HTTP/1.1 413",
    )
    chats.wait_for(lambda: server.counted(413) == before + 1)


def test_a_request_that_does_not_end_is_refused(start: Any) -> None:
    server = start(limits=ServerLimits(timeout=0.2))
    assert raw_post(server, "Content-Length: 100", b"{").startswith(b"HTTP/1.1 408 ")


def test_a_head_that_does_not_come_ends_the_connection(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JudgeProtocol, "head_seconds", 0.5)
    server = start()
    head = b"GET /health HTTP/1.1\r\nHost: judge\r\n"
    for sent in (
        b"",
        head[:9],
        head + b"\r\n" + head,
    ):  # nothing; a part of the first one; one, answered, and a part of the next
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(sent)
            answered = b""
            with contextlib.suppress(ConnectionResetError):
                while part := raw.recv(1000):
                    answered += part
                    raw.sendall(head[:1])
            assert answered.count(b"200 OK") == sent.count(b"\r\n\r\n")
    server.engine.delay = 1.0  # an answer may take longer than a head
    assert server.ask().choices


def test_connections_are_bounded_below_what_the_process_may_open(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (JudgeProtocol.spare_descriptors + 2, 4096)
    )
    server = start()
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            server.get("/health")
    for _ in range(200):
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            assert server.get("/health")[0] == 200
            return
        time.sleep(0.02)
    pytest.fail("the closed connections were not forgotten")


@pytest.mark.parametrize("key", ["max_body", "max_requests", "timeout", "max_tokens"])
def test_limits_are_positive(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: expected a positive number, got 0"):
        ServerLimits(**{key: 0})
