"""A judge behind one or many OpenAI-compatible servers: vLLM, or `fastgrpo serve_judge`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import openai
import torch

from fastgrpo.errors import UserError, require
from fastgrpo.rewards.vlm.answers import NUMBER, spelled_by_tokens
from fastgrpo.rewards.vlm.background import BackgroundLoop
from fastgrpo.rewards.vlm.endpoint_check import Finding, check_endpoint, needed_checks
from fastgrpo.rewards.vlm.endpoints import (
    Endpoint,
    EndpointPool,
    check_urls,
    read_key,
)
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.failures import LONGEST_ERROR, Refused, TryAgain, failure_of, hide
from fastgrpo.rewards.vlm.http_client import make_client
from fastgrpo.rewards.vlm.transport import (
    BEGUN,
    FROM_ONE,
    Answer,
    Video,
    chat_request,
    encode_clip,
    read_answer,
    read_models,
)

LEAST_PROBABILITY = 1e-6
"""Of a first "1": below it, the probability of what would follow is not requested."""

Result = TypeVar("Result")


class ServerEngine(Engine):
    """Asks a vision-language model behind OpenAI-compatible servers (`engine.Engine`).

    The first question about a clip goes ahead alone; the others follow together, to the endpoint
    that answered it, whose prefix cache then holds the video. These are tried again, on any
    endpoint that is well: connection errors, time-outs, statuses 408, 409, 425, 429 and 5xx, and
    answers that are no chat completion or longer than `http_client.LONGEST_BODY`. An endpoint that
    answers 401, 403, 404 or with a redirect, which is not followed, is set aside and the others are
    asked; if all do, the reply is an error at once. Any other status, and a question that cannot be
    sent, is an error of this question alone.

    When servers fail: an endpoint with two failures in a row is set aside, and questions go to the
    others (`endpoints.py`). A question that got no answer within `patience` seconds gets a reply
    with an error (`_until_patience_ends`). Its video then has no score (`judge.py`), is marked
    invalid (`rewards/queue.py`) and is left out of its group (`algorithm/self_paced.py`,
    `algorithm/advantages.py`). If more than `scoring.max_invalid_share` of an iteration's videos
    have no score, the run stops with a checkpoint (`training/loop.py`).

    Probabilities are those of a number: an answer whose probabilities are requested is constrained.
    A digit that is not among the 20 likeliest tokens counts as 0. vLLM masks what the constraint
    forbids before it takes probabilities: the digits of one place keep their proportions, but
    `Reply.ten` is then "0" against "." instead of against all that could follow a "1".

    Args:
        endpoints: Base URLs such as `http://host:8000/v1`; `/v1` is added to one without a path.
            All serve the same model.
        model: The model's name there (`/v1/models` lists it); "" for the only one.
        api_key_env: Name of the environment variable that holds the key of all endpoints, never the
            key itself. If it is not set, "none" is sent.
        concurrency: Videos that are asked about at a time.
        requests_in_flight: Requests at a time, to all endpoints together.
        timeout: Seconds for one request.
        patience: Seconds for which a question is tried again before its reply is an error. If no
            endpoint has answered any question for so long, the waiting questions fail too: `ask`
            then ends within another `timeout`.
        set_aside: Seconds for which an endpoint rests after two failures in a row. Doubled at every
            further one, up to a quarter of `patience`. The wait before a question's second try is
            at most a twentieth of it, doubled at every further try.
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
        set_aside: float = 10.0,
    ) -> None:
        require(concurrency >= 1, "concurrency", "at least 1", concurrency)
        require(requests_in_flight >= 1, "requests_in_flight", "at least 1", requests_in_flight)
        for name, seconds in (("timeout", timeout), ("patience", patience)):
            require(0 < seconds < math.inf, name, "a positive number of seconds", seconds)
        rest = f"seconds above 0 and below patience, {patience}"
        require(0 < set_aside < patience, "set_aside", rest, set_aside)
        if not re.fullmatch("[A-Z_][A-Z0-9_]*", api_key_env):
            # The value is not repeated: it may be the key.
            raise UserError(
                "api_key_env: expected the name of the environment variable that holds the key, "
                "in capitals"
            )
        self._urls = check_urls(endpoints)
        self._model, self._api_key_env = model, api_key_env
        self.concurrency, self._requests_in_flight = concurrency, requests_in_flight
        self._timeout, self._patience, self._set_aside = timeout, patience, set_aside
        self._servers: dict[str, dict[str, str]] = {}
        self._key = ""
        self._running: BackgroundLoop | None = None
        self._pool = EndpointPool((), set_aside, set_aside)
        self._asking = 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def load(self, device: torch.device) -> None:
        """Find the servers: at least one must answer within `patience` and serve the model.

        Args:
            device: Not used.

        Raises:
            UserError: No server does; with what each answered instead.
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
        """A reply to each question about each clip, in the order given.

        A failure is the `error` of its reply. May be called from several threads; the limits hold
        for all of them together. Without clips, as a judge calls it when it is loaded, the
        endpoints are checked for what answers of this kind need (`endpoint_check`).

        Raises:
            UserError: An endpoint fails a check.
            RuntimeError: `load` was not called, or `close` was meanwhile.
        """
        if not clips:
            for url, findings in self.check(needed_checks(decoding)).items():
                for finding in findings:
                    if finding.holds is False:
                        raise UserError(f"{url}: check {finding.check}: {finding.evidence}")
            return []
        # Copied on this thread: its stream is the one that the frames were made on.
        moved = [Clip(clip.frames.cpu(), clip.fps) for clip in clips]
        return self._run(lambda: self._ask(moved, questions, decoding))

    def check(self, names: Collection[str]) -> dict[str, list[Finding]]:
        """What the named checks find, for each endpoint that serves the model; not counted."""
        return self._run(lambda: self._check(names))

    def close(self) -> None:
        """Stop at once: an `ask` that waits in another thread raises RuntimeError."""
        running, self._running = self._running, None
        if running is not None:
            running.close(self._disconnect())

    def describe(self) -> dict[str, Any]:
        """Model, endpoints, and what the servers said of themselves at `load`."""
        return {
            "engine": "server",
            "model": self._model,
            "endpoints": list(self._urls),
            "servers": {url: dict(said) for url, said in self._servers.items()},
        }

    def counters(self) -> dict[str, int]:
        """Counts since the last call: requests, failed_requests, endpoints_set_aside.

        A request that was tried again is among the failed ones.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        names = ("requests", "failed_requests", "endpoints_set_aside")
        return {name: counts[name] for name in names}

    def last_errors(self) -> dict[str, str]:
        """The last error of each endpoint that had one."""
        return {e.url: e.last_error for e in self._pool.endpoints if e.last_error}

    def _run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Run a coroutine on the loop's thread, where all methods below live."""
        running = self._running  # once: `close` may take it away meanwhile
        if running is None:
            raise RuntimeError("ServerEngine: call load() before ask()")
        return running.run(work())

    async def _find(self) -> None:
        """Make the clients, and ask each endpoint what it serves, until one has answered."""
        endpoints = [
            Endpoint(url, make_client(url, self._key, self._timeout)) for url in self._urls
        ]
        longest = max(self._set_aside, self._patience / 4)
        self._pool = EndpointPool(endpoints, self._set_aside, longest)
        self._clips = asyncio.Semaphore(self.concurrency)
        self._slots = asyncio.Semaphore(self._requests_in_flight)
        self._asking, self._servers = 0, {}
        refused: dict[Endpoint, Refused] = {}

        async def look(endpoint: Endpoint) -> None:
            try:
                self._servers[endpoint.url] = await self._look(endpoint)
            except Refused as error:
                refused[endpoint] = error
            except TryAgain:
                pass

        async def ask_all() -> None:
            await asyncio.gather(*(look(e) for e in endpoints if e not in refused))
            if not self._servers and len(refused) < len(endpoints):
                raise TryAgain

        with contextlib.suppress(TryAgain):
            await self._until_patience_ends(ask_all)
        if not self._servers:
            said = "".join(f"\n  {error}" for error in self.last_errors().values())
            if any(error.status in (401, 403) for error in refused.values()):
                state = "set" if self._key else "not set"
                said += f"\nthe key is read from {self._api_key_env}, which is {state}"
            raise UserError(
                f"endpoints: expected a server of model {self._model!r} within "
                f"{self._patience:g} s, got{said}"
            )
        for endpoint in endpoints:
            if endpoint.url not in self._servers:
                self._note_failure(endpoint, time.monotonic(), endpoint in refused, at_once=True)

    async def _look(self, endpoint: Endpoint) -> dict[str, str]:
        """What a server says of itself: its version and where its model lies, if it does.

        Raises:
            Refused: It does not serve the model.
        """

        def read(body: bytes) -> str:
            try:
                roots = read_models(body)
            except ValueError as error:
                raise Refused(str(error)) from None
            if not self._model and len(roots) == 1:
                (self._model,) = roots
            if self._model not in roots:
                served = ", ".join(map(repr, roots))
                raise Refused(f"expected model {self._model!r}, it serves {served}")
            return roots[self._model]

        send = endpoint.client.models.with_raw_response.list
        said = {"root": await self._request(endpoint, send, read)}
        # Few servers have this page, and nothing depends on it.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._timeout):
                url = f"{endpoint.url.removesuffix('/v1')}/version"
                answer = await endpoint.client.get(url, cast_to=object)
            said["version"] = str(answer["version"] or "")
        endpoint.last_error = ""
        shown = {name: hide(value, self._key)[:LONGEST_ERROR] for name, value in said.items()}
        return {name: value for name, value in shown.items() if value}

    async def _disconnect(self) -> None:
        for endpoint in self._pool.endpoints:
            await endpoint.client.close()

    async def _check(self, names: Collection[str]) -> dict[str, list[Finding]]:
        with self._lock:
            counts = self._counts.copy()
        found = {
            endpoint.url: await check_endpoint(partial(self._send, endpoint), names)
            for endpoint in self._pool.endpoints
            if endpoint.url in self._servers
        }
        with self._lock:
            self._counts = counts
        return found

    async def _send(
        self, endpoint: Endpoint, clip: Clip, question: str, decoding: Decoding, regex: str
    ) -> Answer:
        """An answer of this endpoint and no other (`endpoint_check.Send`)."""
        video = await asyncio.to_thread(encode_clip, clip)
        request = chat_request(self._model, video, question, decoding, regex)
        others = [other for other in self._pool.endpoints if other is not endpoint]
        return (await self._complete(request, endpoint, others))[0]

    async def _ask(
        self, clips: list[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        if not self._asking:
            self._pool.down_since = None  # failures before a pause say nothing of now
        self._asking += 1
        asked = zip(clips, questions, strict=True)
        try:
            return await _gather(self._ask_clip(*one, decoding) for one in asked)
        finally:
            self._asking -= 1

    async def _ask_clip(
        self, clip: Clip, questions: Sequence[str], decoding: Decoding
    ) -> list[Reply]:
        async with self._clips:
            if not questions:
                return []
            video = await asyncio.to_thread(encode_clip, clip)
            first, home = await self._question(video, questions[0], decoding, None)
            others = await _gather(
                self._question(video, question, decoding, home) for question in questions[1:]
            )
            return [first, *(reply for reply, _ in others)]

    async def _question(
        self, video: Video, question: str, decoding: Decoding, home: Endpoint | None
    ) -> tuple[Reply, Endpoint | None]:
        """The reply to one question, and the endpoint that gave it."""
        # Probabilities are those along a number.
        regex = NUMBER if decoding.constrained or decoding.probabilities else ""
        try:
            request = chat_request(self._model, video, question, decoding, regex)
            answer, home = await self._complete(request, home)
            # What is no number is logged; no number is as long as a key.
            text = hide(answer.text, self._key) if len(self._key) > 5 else answer.text
            if not decoding.probabilities:
                return Reply(text, cut=answer.cut), home
            reply = Reply(text, answer.digits(), cut=answer.cut, tokens=answer.tokens)
            if spelled_by_tokens(reply, NUMBER):
                ten = await self._ten(reply, video, question, decoding, home)
                reply = replace(reply, ten=ten)
        except (TryAgain, Refused) as error:
            return Reply(error=str(error)), home
        return reply, home

    async def _ten(
        self, reply: Reply, video: Video, question: str, decoding: Decoding, home: Endpoint | None
    ) -> float:
        """The probability of "0" after a first "1"."""
        if reply.text[0] == "1":
            return reply.digits[1]["0"]
        if not reply.digits[0]["1"] >= LEAST_PROBABILITY:
            return 0.0
        # Only what follows a "1" is wanted of this answer, so two tokens do.
        two = replace(decoding, max_tokens=2)
        request = chat_request(self._model, video, question, two, FROM_ONE)
        forced = (await self._complete(request, home))[0]
        written = Reply(forced.text, forced.digits(), tokens=forced.tokens)
        if not spelled_by_tokens(written, BEGUN):
            raise Refused(
                "expected the probabilities of an answer that begins with 1, "
                f"got those of {hide(''.join(forced.tokens), self._key)[:LONGEST_ERROR]!r}"
            )
        return written.digits[1]["0"]

    async def _complete(
        self,
        arguments: dict[str, Any],
        home: Endpoint | None,
        without: Collection[Endpoint] = (),
    ) -> tuple[Answer, Endpoint]:
        """An answer, tried on endpoint after endpoint, and the endpoint that gave it.

        Args:
            arguments: Of `chat.completions.create`.
            home: The endpoint that is preferred.
            without: Endpoints that are not asked.

        Raises:
            TryAgain, Refused: The last error.
        """
        refused = set(without)
        errors: list[str] = []

        async def attempt() -> tuple[Answer, Endpoint]:
            async with self._slots:
                endpoint = self._pool.pick(home, refused)
                if endpoint is None:
                    raise TryAgain
                sent = time.monotonic()
                try:
                    create = endpoint.client.chat.completions.with_raw_response.create
                    answer = await self._request(endpoint, lambda: create(**arguments), read_answer)
                except TryAgain as error:
                    errors.append(str(error))
                    if error.pause is None:
                        self._note_failure(endpoint, sent)
                    else:
                        self._pool.busy(endpoint, min(error.pause, self._patience))
                    raise
                except Refused as error:
                    errors.append(str(error))
                    if not error.by_endpoint:
                        raise
                    refused.add(endpoint)
                    self._note_failure(endpoint, sent, refusing=True, at_once=True)
                    if len(refused) == len(self._pool.endpoints):
                        raise
                    raise TryAgain from None
                self._pool.answered(endpoint)
                return answer, endpoint

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
        """Try again after TryAgain until patience ends, and then once more.

        The waits have jitter and are no shorter than the rest of the endpoints.
        """
        start, longest = time.monotonic(), self._set_aside / 20
        while True:
            try:
                return await attempt()
            except TryAgain:
                since = min(start, self._pool.down_since or start)
                left = since + self._patience - time.monotonic()
                if left <= 0:
                    raise
            await asyncio.sleep(
                min(max(random.uniform(0, longest), self._pool.wait(without)), left)
            )
            longest = min(2 * longest, self._set_aside)

    async def _request(
        self,
        endpoint: Endpoint,
        send: Callable[[], Awaitable[Any]],
        read: Callable[[bytes], Result],
    ) -> Result:
        """What one request's answer says, counted.

        Raises:
            TryAgain, Refused: What went wrong and where; kept as the endpoint's last error, unless
                nothing was sent to it.
        """
        endpoint.in_flight += 1
        endpoint.requests += 1
        self._count("requests")
        try:
            async with asyncio.timeout(self._timeout):
                response = await send()
        except (TimeoutError, openai.OpenAIError) as error:
            failure = failure_of(error, endpoint.url, self._key)
        except Exception as error:  # of making the request, such as a text that is no UTF-8
            raise Refused(f"the question cannot be sent: {error}"[:LONGEST_ERROR]) from error
        else:
            try:
                return read(response.content)
            except Exception as error:  # a strange answer raises many kinds
                failure = failure_of(error, endpoint.url, self._key)
        finally:
            endpoint.in_flight -= 1
        self._count("failed_requests")
        endpoint.last_error = str(failure)
        raise failure

    def _note_failure(
        self, endpoint: Endpoint, sent: float, refusing: bool = False, at_once: bool = False
    ) -> None:
        if self._pool.failed(endpoint, sent, refusing, at_once):
            self._count("endpoints_set_aside")

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


async def _gather(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results, in order. If one raises, the others are cancelled and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]
