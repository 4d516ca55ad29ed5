"""The judge as a server: the FastAPI application in front of one engine (`batching.Batcher`).

POST /v1/chat/completions, GET /v1/models, /metrics, and /health, which alone needs no token.
Errors have OpenAI's form. A request is read up to a bound, its video decoded on a few threads,
and its question queued; nothing that it names is ever fetched.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastgrpo.rewards.media.frames import FrameSettings
from fastgrpo.rewards.server.batching import Batcher, Job, UnavailableError
from fastgrpo.rewards.server.completions import Question, completion, read_question
from fastgrpo.rewards.server.media import MediaLimits, clip_of_urls
from fastgrpo.rewards.vlm.engine import Reply

GONE = 499
"""Status, in the metrics alone, of a request whose client went away before its answer."""
_DECODERS = 4
_LONGEST_MESSAGE = 1000  # characters; some repeat what the client sent


@dataclass(frozen=True)
class ServerLimits:
    """What the server takes on at a time; more is refused."""

    max_body: int = 64 << 20
    """Bytes of a request."""
    max_requests: int = 128
    """Requests that are read, queued or being answered; more get status 429."""
    timeout: float = 300.0
    """Seconds for reading a request, and again for answering it."""
    max_tokens: int = 1024
    """Tokens of an answer."""
    media: MediaLimits = field(default_factory=MediaLimits)
    """Of a request's video."""

    def __post_init__(self) -> None:
        for key in ("max_body", "max_requests", "timeout", "max_tokens"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"{key}: expected a positive number, got {getattr(self, key)}")


CLIENT_SIZES = FrameSettings(min_pixels=28 * 28, max_pixels=16384 * 28 * 28)
"""Frames within these bounds and with sides of 28n are seen as they come, for the client has
decided on their size (vLLM does likewise).
"""


class _RefusedError(Exception):
    """Why a request gets no answer: an HTTP status, and words for the client."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers

    def response(self) -> JSONResponse:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {
            "message": str(self)[:_LONGEST_MESSAGE],
            "type": kind,
            "param": None,
            "code": self.status,
        }
        return JSONResponse({"error": error}, self.status, self.headers)


class _Meters:
    """What /metrics tells: requests by status, seconds, the queue, and the process (memory, CPU)."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        names: dict[str, Any] = {"namespace": "fastgrpo_judge", "registry": self.registry}
        self.requests = Counter(
            "requests",
            "Chat completions by HTTP status; 499: the client went away.",
            ["status"],
            **names,
        )
        self.seconds = Histogram(
            "request_seconds",
            "From a request's arrival to its answer.",
            buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            **names,
        )
        Gauge("queue_length", "Questions that wait for the engine.", **names).set_function(
            lambda: batcher.waiting
        )
        self.taken = Gauge(
            "requests_taken", "Requests that are read, queued or being answered.", **names
        )


def create_app(
    batcher: Batcher,
    model: str,
    token: str | None = None,
    limits: ServerLimits | None = None,
    frames: FrameSettings = CLIENT_SIZES,
) -> FastAPI:
    """The application. model: the name that requests have to give. token: what clients have to send
    as a bearer token; None: nothing.
    """
    app = FastAPI(title="fastgrpo judge", openapi_url=None)
    meters = _Meters(batcher)
    answering = _Answering(batcher, model, token, limits or ServerLimits(), frames, meters)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        began, status = time.monotonic(), GONE
        try:
            response = await answering.answer(request)
            status = response.status_code
        except _RefusedError as refusal:
            response, status = refusal.response(), refusal.status
        except (
            Exception
        ):  # a fault of this server's: the client hears of it, and the operator reads where
            traceback.print_exc()
            response, status = _RefusedError(500, "the server failed, see its log").response(), 500
        finally:
            meters.requests.labels(status).inc()
            meters.seconds.observe(time.monotonic() - began)
        return response

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        answering.authorise(request)
        if (
            batcher.state == "loading"
        ):  # what it is made of is not known yet, and it is no server to begin with
            raise _RefusedError(503, "the judge is loading", {"Retry-After": "5"})
        root = ", ".join(
            f"{key} {value}" for key, value in batcher.described.items() if value is not None
        )
        card = {
            "id": model,
            "object": "model",
            "created": started,
            "owned_by": "fastgrpo",
            "root": root,
        }
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        answering.authorise(request)
        return Response(
            generate_latest(meters.registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/health")
    async def health() -> Response:
        state = batcher.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.exception_handler(_RefusedError)
    async def refused(_: Request, error: _RefusedError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def no_such_route(_: Request, error: HTTPException) -> Response:
        return _RefusedError(error.status_code, str(error.detail), error.headers).response()

    return app


class _Answering:
    """Answers a chat completion, or raises why not (_RefusedError)."""

    def __init__(
        self,
        batcher: Batcher,
        model: str,
        token: str | None,
        limits: ServerLimits,
        frames: FrameSettings,
        meters: _Meters,
    ) -> None:
        self.batcher, self.model, self.token = batcher, model, token
        self.limits, self.frames, self.meters = limits, frames, meters
        self.taken = 0
        self._decoders = anyio.CapacityLimiter(_DECODERS)

    def authorise(self, request: Request) -> None:
        """_RefusedError: the request does not carry the token."""
        given = request.headers.get("authorization", "")
        if self.token is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {self.token}".encode()
        ):
            raise _RefusedError(
                401,
                "expected the judge's token, as `Authorization: Bearer TOKEN`",
                {"WWW-Authenticate": "Bearer"},
            )

    async def answer(self, request: Request) -> Response:
        """The answer to a chat completion."""
        try:
            self.authorise(request)
            self._admit()
        except _RefusedError:
            await self._body(
                request, keep=0
            )  # a client that is still sending does not read what is answered
            raise
        self.taken += 1
        self.meters.taken.set(self.taken)
        try:
            return await self._answer(request)
        finally:
            self.taken -= 1
            self.meters.taken.set(self.taken)

    def _admit(self) -> None:
        """_RefusedError: no request can be taken now."""
        state = self.batcher.state
        if state in ("loading", "stopping"):
            raise _RefusedError(503, f"the judge is {state}", {"Retry-After": "5"})
        if self.taken >= self.limits.max_requests:
            raise _RefusedError(
                429,
                f"{self.taken} requests are being answered, which is all that this server takes",
                {"Retry-After": "1"},
            )

    async def _answer(self, request: Request) -> Response:
        body = await self._body(request, keep=self.limits.max_body)
        if body is None:
            raise _RefusedError(413, f"expected at most {self.limits.max_body} bytes, got more")
        try:
            question, job = await run_sync(self._prepare, body, limiter=self._decoders)
        except ValueError as error:
            raise _RefusedError(400, str(error)) from error
        del body
        try:
            self.batcher.submit(job)
        except UnavailableError as error:
            raise _RefusedError(503, str(error), {"Retry-After": "5"}) from error
        reply = await self._wait(request, job)
        if reply.error:  # of this question, so that asking again would not help
            raise _RefusedError(400, reply.error)
        return JSONResponse(completion(question, reply, self.model))

    def _prepare(self, body: bytes) -> tuple[Question, Job]:
        question = read_question(body, self.limits.max_tokens)
        if question.model != self.model:
            raise _RefusedError(404, f"model: expected {self.model}, got {question.model}")
        clip = clip_of_urls(question.urls, question.fps, self.frames, self.limits.media)
        key = hashlib.sha256(repr((question.fps, question.urls)).encode()).hexdigest()
        return dataclasses.replace(question, urls=()), Job(
            key, clip, question.text, question.decoding
        )

    async def _body(self, request: Request, keep: int) -> bytes | None:
        """The body, of at most `keep` bytes; None: it is larger, and what came of it within bounds
        has been thrown away.
        """
        parts: list[bytes] = []
        read = 0
        try:
            async with asyncio.timeout(self.limits.timeout if keep else 5):
                async for part in request.stream():
                    read += len(part)
                    if read <= keep:
                        parts.append(part)
                        continue
                    parts.clear()
                    if read > keep + self.limits.max_body:
                        break
        except ClientDisconnect:
            raise _RefusedError(GONE, "the client went away") from None
        except TimeoutError:
            if keep:
                raise _RefusedError(
                    408, f"expected the request within {self.limits.timeout} s"
                ) from None
        return b"".join(parts) if read <= keep else None

    async def _wait(self, request: Request, job: Job) -> Reply:
        """The engine's reply, unless time runs out or the client goes away; then the question is
        withdrawn.
        """
        answer: asyncio.Future[Reply] = asyncio.wrap_future(job.reply)
        gone: asyncio.Future[None] = asyncio.ensure_future(_gone(request))
        try:
            either: list[asyncio.Future[Any]] = [answer, gone]
            await asyncio.wait(
                either, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done():
                return answer.result()
            if gone.done():
                raise _RefusedError(GONE, "the client went away")
            raise _RefusedError(504, f"no answer within {self.limits.timeout} s")
        except UnavailableError as error:
            raise _RefusedError(503, str(error), {"Retry-After": "5"}) from error
        except _RefusedError:
            raise
        except Exception as error:  # the engine's own
            raise _RefusedError(
                500, f"the engine failed: {type(error).__name__}: {error}"
            ) from error
        finally:
            gone.cancel()
            job.reply.cancel()  # at once; by way of `answer` it would be some time later
            answer.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection; for a request whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
