"""The client follows no redirect, by any way to the server, and reads no answer without an end."""

from __future__ import annotations

import gzip
import threading
import tracemalloc
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.http_client import LONGEST_BODY, BoundedClient, make_client
from fastgrpo.rewards.vlm.served import ServerEngine

KEY = "sk-a-key-that-nobody-may-see"
Clips = Callable[..., Clip]
Engines = Callable[..., ServerEngine]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("direct", [True, False])
def test_no_redirect_is_followed(
    status: int,
    direct: bool,
    fake_endpoint: Any,
    fault: Any,
    server_engine: Engines,
    random_clip: Clips,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither by a client that passes the proxies by nor by one of another machine's."""
    monkeypatch.setenv("FASTGRPO_JUDGE_TOKEN", KEY)
    monkeypatch.setattr("fastgrpo.rewards.vlm.http_client.is_loopback", lambda host: direct)
    other, server, right = (fake_endpoint(answer=lambda _: "1.00") for _ in range(3))
    right.answer = lambda _: "8.00"
    away = (("Location", f"{other.url}/chat/completions?key={KEY}"),)
    judge = server_engine(server, patience=3600.0)
    server.always = fault(status=status, body=b"{}", headers=away)
    [[reply]] = judge.ask([random_clip()], [["a"]], Decoding())
    assert reply.error == f"{server.url}: status {status}: redirects to 127.0.0.1, not followed"
    assert (len(server.requests), judge.counters()["endpoints_set_aside"]) == (1, 1)
    pair = server_engine(server, right, patience=3600.0)
    assert pair.ask([random_clip()], [["a", "b"]], Decoding()) == [[Reply("8.00")] * 2]
    assert other.requests == []


def test_a_model_list_elsewhere_is_not_read(
    fake_endpoint: Any, fault: Any, server_engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, server = fake_endpoint(), fake_endpoint()
    monkeypatch.setattr(
        type(server),
        "_get",
        lambda endpoint, handler: endpoint._send(
            handler, fault(status=302, body=b"", headers=(("Location", f"{other.url}/models"),))
        ),
    )
    with pytest.raises(ValueError, match="status 302: redirects to 127"):
        server_engine(server, patience=3600.0)


def test_no_cookie_is_kept(
    fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    """A server could let them grow without an end."""
    server = fake_endpoint()
    judge = server_engine(server)
    server.faults.extend(fault(headers=(("Set-Cookie", f"a{i}=b"),)) for i in range(3))
    judge.ask([random_clip()], [["a", "b", "c"]], Decoding())
    assert [request.headers.get("cookie") for request in server.requests] == [None] * 3


@pytest.mark.parametrize("coding", ["", "Identity"])
def test_an_answer_that_is_named_plain_is_taken(
    coding: str, fake_endpoint: Any, fault: Any, server_engine: Engines, random_clip: Clips
) -> None:
    server = fake_endpoint()
    judge = server_engine(server)
    server.always = fault(headers=(("Content-Encoding", coding),))
    assert judge.ask([random_clip()], [["a"]], Decoding()) == [[Reply("7.25")]]


class Flood(BaseHTTPRequestHandler):
    """Answers /v1/models, and every question with what never ends or grows."""

    how = ""
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = b'{"data": [{"id": "judge"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.close_connection = True
        status = 500 if self.how == "error" else 200
        self.wfile.write(f"HTTP/1.1 {status} x\r\nConnection: close\r\n".encode())
        try:
            if self.how == "bomb":
                bomb = gzip.compress(b" " * (64 << 20))
                self.wfile.write(b"Content-Encoding: gzip\r\n\r\n" + bomb)
            elif self.how == "headers":
                for index in range(1_000_000):
                    self.wfile.write(f"X-{index}: {'x' * 1000}\r\n".encode())
            elif self.how == "chunks":
                self.wfile.write(b"Transfer-Encoding: chunked\r\n\r\n")
                for _ in range(1_000_000):
                    self.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
            else:
                self.wfile.write(b"\r\n")
                for _ in range(1_000_000):
                    self.wfile.write(b" " * 65536)
        except OSError:
            pass


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("endless", f"expected at most {LONGEST_BODY} bytes"),
        ("chunks", f"expected at most {LONGEST_BODY} bytes"),
        ("error", f"expected at most {LONGEST_BODY} bytes"),
        ("bomb", "expected an answer that is not compressed, got 'gzip'"),
        ("headers", "onnection error"),
    ],
)
def test_an_answer_without_an_end_takes_no_memory(
    how: str, words: str, random_clip: Clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flood, "how", how)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flood)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    judge = ServerEngine((url,), "judge", timeout=30.0, patience=0.3, set_aside=0.2)
    judge.load(torch.device("cpu"))
    if how != "bomb":  # which is made in this process
        tracemalloc.start()
    try:
        [[reply]] = judge.ask([random_clip()], [["a"]], Decoding())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        judge.close()
        server.shutdown()
        server.server_close()
    assert words in reply.error
    assert peak < 4 * LONGEST_BODY


@pytest.mark.parametrize(
    ("url", "direct"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://127.1.2.3/v1", True),
        ("http://10.0.0.1/v1", False),
        ("http://0.0.0.0/v1", False),
        ("http://[::]/v1", False),
        ("http://judge:8000/v1", False),
        ("https://127.0.0.1/v1", False),
        ("http://127.0.0.1.org/v1", False),
    ],
)
def test_only_this_machine_is_reached_around_the_proxies(url: str, direct: bool) -> None:
    client = make_client(url, "", 1.0)._client
    assert isinstance(client, BoundedClient)
    assert client.trust_env != direct
