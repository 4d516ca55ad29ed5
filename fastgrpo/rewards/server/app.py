"""A judge's engine behind one HTTP route that takes what `ServerEngine` sends, and nothing else.

POST /v1/chat/completions takes one question about one video, given as PNG frames; GET /v1/models
names the model. Nothing that a request names is fetched. Clients are not trusted: body, queue,
frames and time are bounded, and an image's size is read before a pixel of it is decoded.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import io
import json
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from PIL import Image
from starlette.requests import ClientDisconnect

from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.transport import FROM_ONE, VIDEO_TYPE, Video, chat_request

logger = logging.getLogger("fastgrpo")
NO_LOGPROB = -9999.0  # OpenAI's, of what is impossible or not known


@dataclass(frozen=True)
class Limits:
    """What the server takes; more is refused."""

    body: int = 64 << 20
    """Bytes of a request."""
    parts: int = 10_000
    """Commas and brackets in a request: parsed JSON takes far more memory than its text."""
    requests: int = 64
    """Requests that are read, queued or being answered; one more gets status 429."""
    seconds: float = 300.0
    """For a request, from its first byte to its answer."""
    frames: int = 768
    """Frames of a video."""
    pixels: int = 1 << 25
    """Pixels of all frames of a video together: 100 MB decoded."""
    tokens: int = 1024
    """Tokens of an answer."""


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


def read_question(body: bytes, model: str, limits: Limits) -> Question:
    """The question in a request's JSON, which has to be what `transport.chat_request` makes of it.

    Raises:
        ValueError: It is not, in words for the client.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.parts:
        raise ValueError(f"expected at most {limits.parts} commas and brackets in a request")
    try:
        request = json.loads(body)
        video, question = request["messages"][0]["content"]
        url, text = str(video["video_url"]["url"]), str(question["text"])
        fps = float(request["mm_processor_kwargs"]["fps"])
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
        known = chat_request(model, Video(url, fps), text, decoding, regex)
        known |= known.pop("extra_body") | {"max_tokens": tokens}
    except Exception as error:  # a strange request raises many kinds
        raise ValueError(f"expected a request of ServerEngine, got {error!r}") from error
    wrong = sorted(key for key in {*known, *request} if known.get(key) != request.get(key))
    if wrong or regex not in ("", NUMBER, FROM_ONE):
        raise ValueError(f"expected a request of ServerEngine for {model}, got others: {wrong}")
    if not 1 <= tokens <= limits.tokens or not 1e-3 < fps <= 1000:
        raise ValueError(f"expected up to {limits.tokens} tokens and 1000 frames/s")
    return Question(text, read_clip(url, fps, limits), decoding, regex == FROM_ONE)


def read_clip(url: str, fps: float, limits: Limits) -> Clip:
    """The clip of a data URL of PNG frames. All sizes are read before a pixel is decoded.

    Raises:
        ValueError: Anything else, in words for the client.
    """
    kind, _, data = url.partition(",")
    pictures = data.split(",", limits.frames)
    if kind != VIDEO_TYPE or len(pictures) > limits.frames:
        raise ValueError(f"video_url: expected {VIDEO_TYPE}, up to {limits.frames} PNG images")
    try:
        files = [io.BytesIO(base64.b64decode(picture, validate=True)) for picture in pictures]
        images = [Image.open(file, formats=["PNG"]) for file in files]
        width, height = images[0].size
        kinds = {(image.mode, image.size, getattr(image, "n_frames", 1)) for image in images}
        if kinds != {("RGB", (width, height), 1)} or width % 28 or height % 28 or len(images) % 2:
            raise ValueError(f"expected an even number of RGB images of 28n x 28m, got {kinds}")
        if len(images) * width * height > limits.pixels:
            raise ValueError(f"expected at most {limits.pixels} pixels in all frames")
        pixels = bytearray().join(image.tobytes() for image in images)
    except Exception as error:  # decoders raise many kinds for a broken file
        raise ValueError(f"video_url: {error}") from error
    frames = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, 3)
    return Clip(frames.permute(0, 3, 1, 2), fps)


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
            rows: Sequence[Sequence[Reply | None]] = [[None]] * len(jobs)
            clips, texts = [j.question.clip for j in jobs], [[j.question.text] for j in jobs]
            try:
                rows = await asyncio.to_thread(engine.ask, clips, texts, decoding) if jobs else []
            except Exception:  # the next call may succeed
                logger.exception("judge: the engine failed")
            for job, (reply,) in zip(jobs, rows, strict=True):
                if not job.reply.done():
                    job.reply.set_result(reply)


def create_app(engine: Engine, model: str, token: str | None, limits: Limits = Limits()) -> FastAPI:
    """The application.

    Args:
        engine: Loaded.
        model: The name that requests have to give.
        token: What clients have to send as a bearer token, or None.
        limits: What is taken.
    """
    queue: asyncio.Queue[_Job] = asyncio.Queue()
    places = asyncio.Semaphore(limits.requests)

    def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "expected the judge's token, as `Authorization: Bearer TOKEN`")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_ask(queue, engine))
        yield
        task.cancel()

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
                async for part in http.stream():
                    body += part
                    if len(body) > limits.body:
                        raise HTTPException(413, f"expected at most {limits.body} bytes")
                question = await asyncio.to_thread(read_question, bytes(body), model, limits)
                job = _Job(question, http, asyncio.Future())
                queue.put_nowait(job)
                reply = await job.reply
        except TimeoutError:
            raise HTTPException(504, f"no answer within {limits.seconds} s") from None
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
