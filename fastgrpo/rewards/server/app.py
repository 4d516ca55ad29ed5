"""A judge's engine behind one HTTP route that takes what `ServerEngine` sends, and nothing else.

POST /v1/chat/completions takes one question about one video, given as PNG frames; GET /v1/models
names the model. Nothing that a request names is fetched. Clients are not trusted: body, queue,
frames, memory and time are bounded, and requests are taken apart in other processes (`decoder.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import h11
import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastgrpo.rewards.server.decoder import Decoders, Limits
from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.transport import FROM_ONE, VIDEO_TYPE, Video, chat_request

logger = logging.getLogger("fastgrpo")
NO_LOGPROB = -9999.0  # OpenAI's, of what is impossible or not known


class Question(NamedTuple):
    """One question about one clip; from_one: only P("0" after a first "1") is wanted."""

    text: str
    clip: Clip
    decoding: Decoding
    from_one: bool


class _Job(NamedTuple):
    question: Question
    http: Request
    reply: asyncio.Future[Reply | None]  # None: there will be none


def read_question(
    request: Mapping[str, Any], shape: Sequence[int], pixels: bytes, model: str, limits: Limits
) -> Question:
    """The question in a request, which has to be what `transport.chat_request` makes of it.

    Args:
        request: Without its frames, as `decoder.split_request` gives it.
        shape: Frames, height, width.
        pixels: RGB.
        model: The name that the request has to give.
        limits: What is taken.

    Raises:
        ValueError: It is not, in words for the client.
    """
    try:
        text = str(request["messages"][0]["content"][1]["text"])
        fps = float(request["media_io_kwargs"]["video"]["fps"])
        regex = request.get("structured_outputs", {"regex": ""})["regex"]
        tokens = int(request["max_tokens"])
        decoding = Decoding(
            # A whole number is written, also where two of its tokens are wanted.
            max(tokens, len("10.00")) if regex else tokens,
            constrained=bool(regex),
            probabilities="logprobs" in request,
            temperature=float(request["temperature"]),
            seed=int(request["seed"]),
        )
        text.encode()  # no lone surrogates
        known = chat_request(model, Video(VIDEO_TYPE, fps), text, decoding, regex)
        known |= known.pop("extra_body") | {"max_tokens": tokens}
    except Exception as error:  # a strange request raises many kinds
        raise ValueError(f"expected a request of ServerEngine, got {error!r}") from error
    wrong = sorted(key for key in {*known, *request} if known.get(key) != request.get(key))
    if regex not in ("", NUMBER, FROM_ONE):
        wrong.append("structured_outputs")
    if wrong:
        raise ValueError(f"expected a request of ServerEngine for {model}, got others: {wrong}")
    if not 1 <= tokens <= limits.tokens or not 1e-3 < fps <= 1000:
        raise ValueError(f"expected up to {limits.tokens} tokens and 1000 frames/s")
    if not 0 <= decoding.temperature <= 100 or not 0 <= decoding.seed < 2**63:
        raise ValueError("expected a temperature from 0 to 100 and a seed below 2^63")
    frames = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(*shape, 3)
    return Question(text, Clip(frames.permute(0, 3, 1, 2), fps), decoding, regex == FROM_ONE)


def completion(question: Question, reply: Reply) -> dict[str, Any]:
    """The JSON of an answer.

    With probabilities, each place lists the ten digits with the model's own, before any constraint.
    The tokens of a number are its characters; those of another answer are not known.
    """
    text, digits = reply.text, list(reply.digits)
    if question.from_one:
        text, digits = ("10" if reply.ten > 0.5 else "1."), [*digits[:1], {"0": reply.ten}]
    tokens = list(text) if len(text) == len(digits) else [""] * len(digits)
    content = [
        _entry(token, place) | {"top_logprobs": [_entry(digit, place) for digit in place]}
        for token, place in zip(tokens, digits, strict=True)
    ]
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    choice["finish_reason"] = "length" if reply.cut else "stop"
    choice["logprobs"] = {"content": content} if content else None
    return {"object": "chat.completion", "choices": [choice]}


def _entry(token: str, place: Mapping[str, float]) -> dict[str, Any]:
    p = place.get(token, 0.0)
    return {"token": token, "logprob": math.log(p) if p > 0 else NO_LOGPROB}


async def _ask(queue: asyncio.Queue[_Job], engine: Engine) -> None:
    """Ask the engine, one call at a time, all that waits and is decoded alike, until cancelled."""
    while True:
        waiting = [await queue.get()]
        while not queue.empty():
            waiting.append(queue.get_nowait())
        for job in waiting:
            if not job.reply.done() and await job.http.is_disconnected():
                job.reply.set_result(None)
        for decoding in dict.fromkeys(job.question.decoding for job in waiting):
            jobs = [j for j in waiting if j.question.decoding == decoding and not j.reply.done()]
            await _answer(engine, jobs, decoding)


async def _answer(engine: Engine, jobs: Sequence[_Job], decoding: Decoding) -> None:
    """Ask the engine, and set the replies."""
    if not jobs:
        return
    rows: Sequence[Sequence[Reply | None]] = [[None]]
    clips, texts = [j.question.clip for j in jobs], [[j.question.text] for j in jobs]
    try:
        rows = await asyncio.to_thread(engine.ask, clips, texts, decoding)
    except Exception:  # the next call may succeed
        logger.exception("judge: the engine failed")
        if len(jobs) > 1:  # one question of them may be at fault
            for job in jobs:
                await _answer(engine, [job], decoding)
            return
    for job, (reply,) in zip(jobs, rows, strict=True):
        if not job.reply.done():
            job.reply.set_result(reply)


class _Memory:
    """Bytes of requests and frames that may be held at a time."""

    def __init__(self, size: int) -> None:
        self._left = size

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that sets how many of them one request holds."""
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            if size - own > self._left:
                raise HTTPException(429, "the memory is full", {"Retry-After": "1"})
            self._left, own = self._left - size + own, size

        try:
            yield hold
        finally:
            hold(0)


class _Parser(h11.Connection):
    """Refuses bodies in chunks: a megabyte of chunks of one byte keeps it busy for seconds, in
    which no other client is heard. The trainer's client names a body's length.
    """

    def next_event(self) -> Any:
        """As of the base."""
        event = super().next_event()
        if isinstance(event, h11.Request) and dict(event.headers).get(b"transfer-encoding"):
            raise h11.RemoteProtocolError("expected a Content-Length")
        return event


class Connection(H11Protocol):
    """A connection that is closed when no request on it has begun or ended for a while; uvicorn by
    itself would wait for the rest of a request's head for ever.
    """

    IDLE = 15.0
    """Seconds; it may be twice as many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch it."""
        super().connection_made(transport)
        self.conn = _Parser(h11.SERVER)
        self.loop.call_later(self.IDLE, self._watch, self)

    def _watch(self, last: object) -> None:
        """last: The request of the last look, if none was being answered then, else this."""
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and last is self.cycle:
            self.transport.close()
        else:
            self.loop.call_later(self.IDLE, self._watch, self.cycle if idle else self)


def create_app(
    engine: Engine,
    model: str,
    token: str | None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> FastAPI:
    """The application.

    Args:
        engine: Loaded.
        model: The name that requests have to give.
        token: What clients have to send as a bearer token, or None.
        limits: What is taken.
    """
    queue: asyncio.Queue[_Job] = asyncio.Queue()
    places, memory = asyncio.Semaphore(limits.requests), _Memory(limits.held)
    decoders = Decoders(limits)

    def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "expected the judge's token, as `Authorization: Bearer TOKEN`")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_ask(queue, engine))
        yield
        task.cancel()
        await decoders.close()

    app = FastAPI(openapi_url=None, lifespan=lifespan, dependencies=[Depends(authorise)])

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        root = ", ".join(f"{key} {value}" for key, value in engine.describe().items())
        return {"object": "list", "data": [{"id": model, "object": "model", "root": root}]}

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> dict[str, Any]:
        if places.locked():
            raise HTTPException(429, "the queue is full", {"Retry-After": "1"})
        body = bytearray()
        try:
            async with places, asyncio.timeout(limits.seconds):
                with memory.share() as hold:
                    async with asyncio.timeout(limits.upload):
                        async for part in http.stream():
                            if len(body) + len(part) > limits.body:
                                raise HTTPException(413, f"expected at most {limits.body} bytes")
                            hold(len(body) + len(part))
                            body += part
                    request, shape, pixels = await decoders.split(bytes(body))
                    body.clear()
                    hold(len(pixels))
                    question = read_question(request, shape, pixels, model, limits)
                    job = _Job(question, http, asyncio.Future())
                    queue.put_nowait(job)
                    reply = await job.reply
        except TimeoutError:
            raise HTTPException(504, "the request took too long") from None
        except ConnectionError as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
        except ClientDisconnect:
            raise HTTPException(499, "the client went away") from None
        except ValueError as error:
            raise HTTPException(400, str(error)[:1000]) from error
        if reply is None:
            raise HTTPException(500, "the engine failed, see the server's log")
        if reply.error:
            raise HTTPException(400, reply.error)
        return completion(question, reply)

    return app
