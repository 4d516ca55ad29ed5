"""Questions of many clients to one engine: a thread takes what waits, and asks what is decoded
alike in one call.

Questions about one clip go together, so that the engine sees the clip once; a question whose
client has gone is not asked.
"""

from __future__ import annotations

import threading
import time
import traceback
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply

FAILURES = 3
"""Calls of the engine that fail one after the other before it counts as broken; one that succeeds
mends it.
"""


class UnavailableError(Exception):
    """The engine cannot answer: not yet, not any more, or not before the server ends."""


@dataclass(frozen=True, eq=False)
class Job:
    """One question about one clip. key: equal for equal clips. reply: cancelled by a client that
    has gone.
    """

    key: str
    clip: Clip
    question: str
    decoding: Decoding
    reply: Future[Reply] = field(default_factory=Future)


class Batcher:
    """Owns the engine, and the only thread that calls it.

    batch_size: questions of one call at most. linger: seconds that the first question of an idle
    engine waits for others of its kind. ended: why the thread has ended, if not because of
    `stop`. described: what the engine says of itself, once it is loaded. settled: set when it is
    loaded, or cannot be.
    """

    def __init__(
        self, engine: Engine, device: torch.device, batch_size: int = 64, linger: float = 0.01
    ) -> None:
        if batch_size < 1 or not 0 <= linger < 10:
            raise ValueError(
                f"expected a batch_size of at least 1 and a linger of 0 to 10 seconds, got {batch_size} and {linger}"
            )
        self.engine, self.device, self.batch_size, self.linger = engine, device, batch_size, linger
        self.ended: BaseException | None = None
        self.described: dict[str, Any] = {}
        self.settled = threading.Event()
        self._waiting: list[Job] = []
        self._asked: list[Job] = []
        self._changed = threading.Condition()
        self._loaded = self._stopping = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the engine, and answer from then on, on a thread of its own."""
        self._thread.start()

    @property
    def state(self) -> Literal["loading", "ready", "broken", "stopping"]:
        """loading; ready; broken: not loaded, its thread ended, or FAILURES calls failed in a row;
        stopping.
        """
        if self._stopping:
            return "stopping"
        if self.ended is not None or self._failures >= FAILURES:
            return "broken"
        return "ready" if self._loaded else "loading"

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a question; `job.reply` gets the answer, or the error. UnavailableError: the engine
        takes none now.
        """
        with self._changed:
            if not self._loaded or self._stopping or self.ended is not None:
                raise UnavailableError(f"the judge is {self.state}")
            self._waiting.append(job)
            self._changed.notify()

    def stop(self, grace: float) -> None:
        """Take no more questions; what is queued is answered, or after `grace` seconds refused.
        Returns at once.
        """
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify()
        last = threading.Timer(grace, self._abandon, ["the server is ending"])
        last.daemon = True
        last.start()

    def join(self, timeout: float) -> bool:
        """Wait until the thread has ended; whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.engine.load(self.device)
            self.described = self.engine.describe()
            self._loaded = True
            self.settled.set()
            while jobs := self._take():
                self._answer(jobs)
        except BaseException as error:  # whatever it is, those who wait must hear of it
            with self._changed:
                self.ended = error
            if self._loaded or not isinstance(
                error, ValueError | OSError | ImportError
            ):  # what `load` says in words
                traceback.print_exc()
        finally:
            self.settled.set()
            self._abandon("the engine has ended")

    def _take(self) -> list[Job]:
        """The questions of the next call, those about one clip side by side; empty: the end."""
        with self._changed:
            while True:
                idle = not self._waiting
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if idle:
                    self._linger()
                if not self._waiting:
                    return []
                alike = [job for job in self._waiting if job.decoding == self._waiting[0].decoding]
                first: dict[str, int] = {}
                for job in alike:
                    first.setdefault(job.key, len(first))
                taken = sorted(alike, key=lambda job: first[job.key])[: self.batch_size]
                self._waiting = [job for job in self._waiting if job not in taken]
                self._asked = [job for job in taken if job.reply.set_running_or_notify_cancel()]
                if self._asked:
                    return self._asked

    def _linger(self) -> None:
        end = time.monotonic() + self.linger
        while (
            (left := end - time.monotonic()) > 0
            and len(self._waiting) < self.batch_size
            and not self._stopping
        ):
            self._changed.wait(left)

    def _answer(self, jobs: list[Job]) -> None:
        """One call of the engine; its error is that of all the questions in it."""
        clips: dict[str, list[Job]] = {}
        for job in jobs:
            clips.setdefault(job.key, []).append(job)
        groups = list(clips.values())
        try:
            with torch.no_grad():
                replies = self.engine.ask(
                    [g[0].clip for g in groups],
                    [[j.question for j in g] for g in groups],
                    jobs[0].decoding,
                )
            for group, row in zip(groups, replies, strict=True):
                for job, reply in zip(group, row, strict=True):
                    _settle(job, reply)
            self._failures = 0
        except Exception as error:  # an engine's own error: the next call may succeed
            self._failures += 1
            traceback.print_exc()
            for job in jobs:
                _settle(job, error)
        self._asked = []  # not where the thread ends of it: `_abandon` refuses them then

    def _abandon(self, why: str) -> None:
        """Refuse whatever is queued or asked."""
        with self._changed:
            left, self._waiting = [*self._asked, *self._waiting], []
            self._changed.notify()
        for job in left:
            _settle(job, UnavailableError(why))


def _settle(job: Job, outcome: Reply | Exception) -> None:
    """Give a waiting client its answer, unless it has gone, or was refused when the server began to
    end.
    """
    try:
        if isinstance(outcome, Reply):
            job.reply.set_result(outcome)
        else:
            job.reply.set_exception(outcome)
    except InvalidStateError:
        pass
