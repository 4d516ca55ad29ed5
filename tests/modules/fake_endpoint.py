"""A fake OpenAI-compatible server on a real socket that fails as it is told to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fastgrpo.rewards.vlm.endpoint_check import QUESTION


@dataclass(frozen=True)
class Fault:
    """What happens instead of an answer, after `delay` seconds.

    A status with a body, a closed connection (`close`), or, by default, a late answer. cut: only so
    many bytes of the answer are sent, of those that the header promises (`hang_up`) or as all there
    is. drip: seconds between one byte and the next.
    """

    status: int = 200
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    close: bool = False
    cut: int | None = None
    hang_up: bool = False
    drip: float = 0.0


@dataclass
class Request:
    """One chat request: JSON, headers, time, and the requests at work with it, itself included."""

    body: dict[str, Any]
    headers: dict[str, str]
    began: float
    at_work: int
    ended: float = 0.0

    @property
    def text(self) -> str:
        return str(self.body["messages"][0]["content"][-1]["text"])

    @property
    def media(self) -> list[dict[str, Any]]:
        return list(self.body["messages"][0]["content"][:-1])


@dataclass
class FakeEndpoint:
    """Answers every question with `answer(request)`.

    An answer is a text, pairs of a token and the log-probabilities of what could stand in its
    place, or fields of the completion. The questions of `endpoint_check` are kept in `checks`,
    apart from `requests`, and meet no fault but `always`. faults: used up one per request, in
    order. always: thereafter, for every request. models: what /v1/models lists. key: the token that
    requests must carry. delay: seconds to an answer.
    """

    models: list[str] = field(default_factory=lambda: ["judge"])
    answer: Callable[[Request], Any] = lambda request: "7.25"
    key: str = ""
    delay: float = 0.0
    faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None
    requests: list[Request] = field(default_factory=list)
    checks: list[Request] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work = 0
        self._sockets: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def most_at_work(self) -> int:
        return max((request.at_work for request in self.requests), default=0)

    def start(self) -> None:
        """Listen; on the same port as before."""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                endpoint._sockets.add(self.connection)

            def finish(self) -> None:
                endpoint._sockets.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def handle(self) -> None:
                with suppress(OSError, ValueError):  # killed while it answers
                    super().handle()

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                endpoint._get(self)

            def do_POST(self) -> None:
                endpoint._post(self)

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def kill(self) -> None:
        """Stop listening and break every connection, as the end of a process does."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        cards = [
            {"id": m, "object": "model", "created": 0, "owned_by": "fake", "root": f"there/{m}"}
            for m in self.models
        ]
        pages: dict[str, Any] = {
            "/version": {"version": "0.0.fake"},
            "/v1/models": {"object": "list", "data": cards},
        }
        if self.key and handler.headers.get("authorization") != f"Bearer {self.key}":
            self._send(handler, self._unauthorized(handler))
        elif handler.path in pages:
            self._send(handler, Fault(body=json.dumps(pages[handler.path]).encode()))
        else:
            self._send(handler, Fault(404, b'{"error": {"message": "no such page"}}'))

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            self._at_work += 1
            request = Request(
                body,
                {name.lower(): value for name, value in handler.headers.items()},
                time.monotonic(),
                self._at_work,
            )
            check = request.text.startswith(QUESTION)
            (self.checks if check else self.requests).append(request)
            fault = self.faults.popleft() if self.faults and not check else self.always
        try:
            time.sleep(self.delay + (fault.delay if fault else 0.0))
        finally:
            with self._lock:
                self._at_work -= 1
                request.ended = time.monotonic()
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            fault = self._unauthorized(handler)
        fault = fault or Fault()
        self._send(
            handler,
            fault,
            fault.body
            if fault.body is not None
            else json.dumps(self._completion(request)).encode(),
        )

    def _unauthorized(self, handler: BaseHTTPRequestHandler) -> Fault:
        """As impolite as a server can be: it repeats what it was given."""
        given = handler.headers.get("authorization", "nothing")
        return Fault(
            401,
            json.dumps({"error": {"message": f"bad credentials: {given}", "code": given}}).encode(),
        )

    def _send(
        self, handler: BaseHTTPRequestHandler, fault: Fault, body: bytes | None = None
    ) -> None:
        handler.close_connection = fault.close or fault.hang_up
        if fault.close:
            return
        content = fault.body if body is None else body
        assert content is not None
        sent = content if fault.cut is None else content[: fault.cut]
        handler.send_response(fault.status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content) if fault.hang_up else len(sent)))
        for name, value in fault.headers:
            handler.send_header(name, value)
        handler.end_headers()
        for piece in [sent] if not fault.drip else [sent[i : i + 1] for i in range(len(sent))]:
            handler.wfile.write(piece)
            time.sleep(fault.drip)

    def _completion(self, request: Request) -> dict[str, Any]:
        answer, logprobs, fields = self.answer(request), None, {}
        if isinstance(answer, dict):
            answer, fields = answer["answer"], {"usage": answer["usage"]}
        if not isinstance(answer, str):
            entries = [
                {
                    "token": token,
                    "logprob": places[token],
                    "top_logprobs": [{"token": t, "logprob": p} for t, p in places.items()],
                }
                for token, places in answer
            ]
            logprobs = {"content": entries} if request.body.get("logprobs") else None
            answer = "".join(token for token, _ in answer).removesuffix("<|im_end|>")
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": logprobs,
            "message": {"role": "assistant", "content": answer},
        }
        return {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [choice],
        } | fields
