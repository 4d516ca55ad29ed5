"""A judge behind one or many OpenAI-compatible servers: `trtllm-serve`, vLLM, or `python -m
fastgrpo serve-judge`.

Run against a fake endpoint, with the faults that its tests name, and against our own server; not
against vLLM or TensorRT-LLM. What those two take is said in `transport.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import openai
import torch
from openai import AsyncOpenAI
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.background import BackgroundLoop
from fastgrpo.rewards.vlm.endpoints import (
    Endpoint,
    EndpointPool,
    check_urls,
    direct_client,
    read_key,
)
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.failures import LONGEST_ERROR, Refused, TryAgain, failure_of
from fastgrpo.rewards.vlm.transport import (
    Guided,
    Transport,
    Video,
    chat_request,
    check_transport,
    encode_clip,
    read_digits,
    read_text,
)

FROM_ONE = r"1\.[0-9]{2}|10\.00"
"""The numbers of NUMBER that begin with 1."""
LEAST_PROBABILITY = 1e-6
"""Of a first "1": below it, what would follow is not asked for."""

Result = TypeVar("Result")


class ServerEngine:
    """Asks a vision-language model behind OpenAI-compatible servers (engine.Engine).

    Of each clip the first question goes ahead alone; the others follow together, to the endpoint
    that answered it, whose prefix cache then holds the video. Connection errors, time-outs,
    statuses 408, 409, 425, 429 and 5xx, and answers that are no chat completion are tried again,
    on whichever endpoint is well. With 401, 403 and 404 an endpoint refuses all: it is set aside
    and the others are asked; where all refuse, that is the reply's error at once. Any other
    status is so at the first endpoint.

    Args:
        endpoints: base URLs, as `http://host:8000/v1`; `/v1` is added to one without a path. All
            serve the same model. model: its name there (`/v1/models` lists it). api_key_env:
            name of the environment variable with the key, never the key itself; where it is not
            set, "none" is sent. One for all. concurrency: videos that are asked about at a time.
            requests_in_flight: requests at a time, to all endpoints together. timeout: seconds
            for one request, all in all. patience: seconds for which a question is tried again
            before its reply is an error. Where no endpoint has answered any for so long, the
            questions that wait behind it fail too: `ask` then ends within another `timeout`.
            backoff: seconds, at most, before the second try; doubled at every further one, up to
            `set_aside`. set_aside: seconds for which an endpoint rests after two failures in a
            row; doubled at every further one, up to a quarter of `patience`; with jitter.
            transport: how a clip travels: frames (our server, vLLM), images, mp4 (trtllm-serve);
            see `transport.encode_clip`. guided: how a server is told what a constrained answer
            looks like: structured_outputs (ours, vLLM from 0.11), guided_regex (ours, vLLM
            before), response_format (ours, trtllm-serve with `guided_decoding_backend:
            xgrammar`); none leaves answers free.

    An answer whose probabilities are asked for is a number, constrained. They are those that a
    server gives for its 20 likeliest tokens; a digit that is not among them counts as 0 (our
    server always lists the ten digits). vLLM masks what a constraint forbids before it takes
    them: the digits of one place keep their proportions, but `ten` is then "0" against "."
    rather than against all that could follow a "1".
    """

    def __init__(
        self,
        endpoints: tuple[str, ...],
        model: str,
        api_key_env: str = "FASTGRPO_JUDGE_TOKEN",
        concurrency: int = 16,
        requests_in_flight: int = 32,
        timeout: float = 120.0,
        patience: float = 600.0,
        backoff: float = 0.5,
        set_aside: float = 10.0,
        transport: Transport = "frames",
        guided: Guided = "structured_outputs",
    ) -> None:
        for name, count in (
            ("concurrency", concurrency),
            ("requests_in_flight", requests_in_flight),
        ):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        for name, seconds in (
            ("timeout", timeout),
            ("patience", patience),
            ("backoff", backoff),
            ("set_aside", set_aside),
        ):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name}: expected a positive number of seconds, got {seconds}")
        if set_aside >= patience:
            raise ValueError(
                f"set_aside: expected less than patience, {patience}, or no endpoint is tried after it, got {set_aside}"
            )
        if not model:
            raise ValueError("model: expected the name that the server gives it, got none")
        if not re.fullmatch("[A-Z_][A-Z0-9_]*", api_key_env):
            # What was given is not repeated: it may be the key.
            raise ValueError(
                "api_key_env: expected the name of the environment variable that holds the key, in capitals"
            )
        check_transport(transport, guided)
        self._urls = check_urls(endpoints)
        self._model, self._api_key_env, self._transport, self._guided = (
            model,
            api_key_env,
            transport,
            guided,
        )
        self._concurrency, self._requests_in_flight = concurrency, requests_in_flight
        self._timeout, self._patience, self._backoff, self._set_aside = (
            timeout,
            patience,
            backoff,
            set_aside,
        )
        self._servers: dict[str, dict[str, str]] = {}
        self._key = ""
        self._running: BackgroundLoop | None = None
        self._pool = EndpointPool((), set_aside, set_aside)
        self._asking = 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def load(self, device: torch.device) -> None:
        """Find the servers: at least one must answer within `patience` and serve the model.
        `device` is not used.

        Raises:
            ValueError: none does; what each said instead.
        """
        self.close()
        self._key = read_key(self._api_key_env)
        self._running = BackgroundLoop("judge-requests")
        try:
            self._running.run(self._find())
        except BaseException:
            self.close()
            raise

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """A reply to each question about each clip, in the order given; a failure is the `error` of
        its reply.

        May be called from several threads; the limits hold for all of them together.

        Raises:
            ValueError: another number of lists of questions than of clips, frames that are not
                those of a clip, or probabilities without `guided`, which the second request, for
                the probability of a 10, needs. RuntimeError: `load` was not called, or `close`
                was meanwhile.
        """
        if len(clips) != len(questions):
            raise ValueError(
                f"expected a list of questions a clip, got {len(questions)} for {len(clips)} clips"
            )
        if decoding.probabilities and self._guided == "none":
            raise ValueError(
                "guided: expected structured_outputs, guided_regex or response_format for probabilities, got none"
            )
        running = self._running  # once: `close` may take it away meanwhile
        if running is None:
            raise RuntimeError("ServerEngine: call load() before ask()")
        # Copied on this thread: its stream is the one that the frames were made on.
        moved = [Clip(clip.frames.cpu(), clip.fps) for clip in clips]
        return running.run(self._ask(moved, questions, decoding))

    def close(self) -> None:
        """Stop at once: an `ask` that waits in another thread raises RuntimeError."""
        running, self._running = self._running, None
        if running is not None:
            running.close(self._disconnect())

    def describe(self) -> dict[str, Any]:
        """Model, endpoints, how they are asked, and what the servers said of themselves at `load`."""
        return {
            "engine": "server",
            "model": self._model,
            "endpoints": list(self._urls),
            "transport": self._transport,
            "guided": self._guided,
            "servers": {url: dict(said) for url, said in self._servers.items()},
        }

    @property
    def concurrency(self) -> int:
        """Calls of `ask` that may run at a time."""
        return self._concurrency

    @property
    def memory_bytes(self) -> int:
        """0: the model lies elsewhere."""
        return 0

    def counters(self) -> dict[str, int]:
        """Since the last call: requests, failed_requests (those that were tried again too) and
        endpoints_set_aside.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return {
            name: counts[name] for name in ("requests", "failed_requests", "endpoints_set_aside")
        }

    def last_errors(self) -> dict[str, str]:
        """The last error of each endpoint that had one."""
        return {
            endpoint.url: endpoint.last_error
            for endpoint in self._pool.endpoints
            if endpoint.last_error
        }

    # -------- from here on, on the loop's own thread

    async def _find(self) -> None:
        """Make the clients, and ask each endpoint what it serves, until one has answered."""
        # The library's own retries are off. Without a key of ours it would take that of another
        # service from the environment.
        options: dict[str, Any] = {
            "api_key": self._key or "none",
            "max_retries": 0,
            "timeout": self._timeout,
        }
        endpoints = [
            Endpoint(url, AsyncOpenAI(base_url=url, http_client=direct_client(url), **options))
            for url in self._urls
        ]
        self._pool = EndpointPool(
            endpoints, self._set_aside, longest=max(self._set_aside, self._patience / 4)
        )
        self._clips, self._slots = (
            asyncio.Semaphore(self._concurrency),
            asyncio.Semaphore(self._requests_in_flight),
        )
        self._asking, self._servers = 0, {}
        refused: dict[Endpoint, Refused] = {}

        async def ask_all() -> None:
            left = [endpoint for endpoint in endpoints if endpoint not in refused]
            for endpoint, found in zip(
                left,
                await asyncio.gather(*map(self._look, left), return_exceptions=True),
                strict=True,
            ):
                if isinstance(found, dict):
                    self._servers[endpoint.url] = found
                elif isinstance(found, Refused):
                    refused[endpoint] = found
                elif not isinstance(found, TryAgain):
                    raise found
            if not self._servers and len(refused) < len(endpoints):
                raise TryAgain

        with contextlib.suppress(TryAgain):
            await self._until_patience_ends(ask_all)
        if not self._servers:
            said = "".join(f"\n  {error}" for error in self.last_errors().values())
            keyed = any(error.status in (401, 403) for error in refused.values())
            hint = (
                f"\nthe key is read from {self._api_key_env}, which is {'set' if self._key else 'not set'}"
                if keyed
                else ""
            )
            raise ValueError(
                f"endpoints: expected a server of model {self._model!r} within {self._patience:g} s, got{said}{hint}"
            )
        for endpoint in endpoints:
            if endpoint.url not in self._servers:
                self._set_aside_after(
                    endpoint, time.monotonic(), at_once=True, refusing=endpoint in refused
                )

    async def _look(self, endpoint: Endpoint) -> dict[str, str]:
        """What a server says of itself: its version and where its model lies, if it does. Refused:
        it does not serve the model.
        """
        root, page = endpoint.url.removesuffix("/v1"), None
        try:
            page = await self._request(endpoint, lambda: endpoint.client.models.list())
        except Refused as error:
            if error.status != 404:
                raise
            await self._request(
                endpoint, lambda: endpoint.client.get(f"{root}/health", cast_to=object)
            )
        cards = {
            card.id: card for card in getattr(page, "data", None) or [] if getattr(card, "id", None)
        }
        if cards and self._model not in cards:
            endpoint.last_error = f"{endpoint.url}: expected model {self._model!r}, it serves {', '.join(map(repr, cards))[:LONGEST_ERROR]}"
            raise Refused(endpoint.last_error)
        said = {"root": getattr(cards.get(self._model), "root", None)}
        with contextlib.suppress(
            openai.OpenAIError, ValueError, TimeoutError
        ):  # few servers have it, and nothing depends on it
            async with asyncio.timeout(self._timeout):
                answer = await endpoint.client.get(f"{root}/version", cast_to=object)
            said["version"] = answer.get("version") if isinstance(answer, dict) else None
        endpoint.last_error = ""
        return {name: str(value)[:LONGEST_ERROR] for name, value in said.items() if value}

    async def _disconnect(self) -> None:
        for endpoint in self._pool.endpoints:
            await endpoint.client.close()

    async def _ask(
        self, clips: list[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        if not self._asking:
            self._pool.down_since = None  # failures before a pause say nothing of now
        self._asking += 1
        tasks = [
            asyncio.ensure_future(self._ask_clip(clip, row, decoding))
            for clip, row in zip(clips, questions, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            self._asking -= 1
            for task in tasks:
                task.cancel()

    async def _ask_clip(
        self, clip: Clip, questions: Sequence[str], decoding: Decoding
    ) -> list[Reply]:
        async with self._clips:
            if not questions:
                return []
            video = await asyncio.to_thread(encode_clip, clip, self._transport)
            first, home = await self._question(video, questions[0], decoding, None)
            others = await asyncio.gather(
                *(self._question(video, question, decoding, home) for question in questions[1:])
            )
            return [first, *(reply for reply, _ in others)]

    async def _question(
        self, video: Video, question: str, decoding: Decoding, home: Endpoint | None
    ) -> tuple[Reply, Endpoint | None]:
        """The reply to one question, and the endpoint that gave it."""
        regex = (
            NUMBER if decoding.constrained or decoding.probabilities else ""
        )  # probabilities are those along a number
        try:
            completion, home = await self._complete(
                chat_request(self._model, video, question, decoding, self._guided, regex), home
            )
            tokens, digits = read_digits(completion) if decoding.probabilities else ((), ())
            ten = 0.0
            if tokens and tokens[0] == "1" and len(tokens) > 1:
                ten = digits[1]["0"]
            elif tokens and digits[0]["1"] >= LEAST_PROBABILITY:
                # Only what follows a "1" is wanted of this answer, so two tokens do.
                forced = chat_request(
                    self._model,
                    video,
                    question,
                    replace(decoding, max_tokens=2),
                    self._guided,
                    FROM_ONE,
                )
                written, places = read_digits((await self._complete(forced, home))[0])
                if len(written) < 2 or written[0] != "1":
                    raise Refused(
                        f"expected the probabilities of an answer that begins with 1, got those of {''.join(written)!r}"
                    )
                ten = places[1]["0"]
        except (TryAgain, Refused) as error:
            return Reply(error=str(error)), home
        return Reply(
            read_text(completion), digits, ten, cut=completion.choices[0].finish_reason == "length"
        ), home

    async def _complete(
        self, arguments: dict[str, Any], home: Endpoint | None
    ) -> tuple[Any, Endpoint]:
        """A completion, tried on endpoint after endpoint. TryAgain, Refused: the last error."""
        refused: dict[Endpoint, Refused] = {}
        errors: list[str] = []

        async def attempt() -> tuple[Any, Endpoint]:
            async with self._slots:
                endpoint = self._pool.pick(home, refused)
                if endpoint is None:
                    raise TryAgain
                sent = time.monotonic()
                try:
                    completion = await self._request(
                        endpoint,
                        lambda: endpoint.client.chat.completions.create(**arguments),
                        read_text,
                    )
                except TryAgain as error:
                    errors.append(str(error))
                    if error.busy:
                        self._pool.busy(endpoint, min(error.pause, self._patience))
                    else:
                        self._set_aside_after(endpoint, sent)
                    raise
                except Refused as error:
                    errors.append(str(error))
                    if not error.by_endpoint:
                        raise
                    refused[endpoint] = error
                    self._set_aside_after(endpoint, sent, refusing=True)
                    if len(refused) == len(self._pool.endpoints):
                        raise
                    raise TryAgain from None
                self._pool.answered(endpoint)
                return completion, endpoint

        try:
            return await self._until_patience_ends(attempt, refused)
        except TryAgain:
            last = errors[-1] if errors else "; ".join(self.last_errors().values())
            raise TryAgain(
                f"no answer in {self._patience:g} s and {len(errors)} tries: {last}"
            ) from None

    async def _until_patience_ends(
        self, attempt: Callable[[], Awaitable[Result]], without: Collection[Endpoint] = ()
    ) -> Result:
        """Try again after TryAgain, with a jittered wait that is no shorter than the endpoints'
        rest, and once more when patience ends.
        """
        start = time.monotonic()
        backoff = wait_random_exponential(
            multiplier=self._backoff, max=max(self._set_aside, self._backoff)
        )

        def left() -> float:
            down = self._pool.down_since
            return (start if down is None else min(start, down)) + self._patience - time.monotonic()

        def wait(state: RetryCallState) -> float:
            return max(min(max(backoff(state), self._pool.wait(without)), left()), 0.0)

        again = retry_if_exception_type(TryAgain)
        return await AsyncRetrying(
            retry=again, wait=wait, stop=lambda _: left() <= 0, sleep=asyncio.sleep, reraise=True
        )(attempt)

    async def _request(
        self,
        endpoint: Endpoint,
        send: Callable[[], Awaitable[Any]],
        check: Callable[[Any], object] = lambda answer: None,
    ) -> Any:
        """One request, counted. TryAgain, Refused: what went wrong, and where; kept as the
        endpoint's last error.
        """
        endpoint.in_flight += 1
        endpoint.requests += 1
        self._count("requests")
        try:
            async with asyncio.timeout(self._timeout):
                answer = await send()
            check(answer)
            return answer
        except (
            TimeoutError,
            openai.OpenAIError,
            ValueError,
            RecursionError,
        ) as error:  # the last: JSON of brackets alone
            failure = failure_of(error, endpoint.url, self._key)
        finally:
            endpoint.in_flight -= 1
        self._count("failed_requests")
        endpoint.last_error = str(failure)
        raise failure

    def _set_aside_after(
        self, endpoint: Endpoint, sent: float, at_once: bool = False, refusing: bool = False
    ) -> None:
        if self._pool.failed(endpoint, sent, at_once, refusing):
            self._count("endpoints_set_aside")

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1
