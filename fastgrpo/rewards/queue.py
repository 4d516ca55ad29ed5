"""Score videos in the background, in the order given whatever the order of arrival."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastgrpo.errors import UserError, one_line
from fastgrpo.interfaces import RewardModel

logger = logging.getLogger("fastgrpo")

Scores = list[list[float]]
ROUNDING = 1e-6
"""How far outside [0, 1] a score may lie and still be taken, for the nearer end."""


class ScoringQueue:
    """Hands videos to a judge on threads of its own (as many as its `concurrency`), so that the
    next videos are sampled meanwhile. Results do not depend on timing.

    Args:
        reward: The judge.
        max_pending: Batches that may be unscored, at least the judge's `concurrency`; `submit`
            blocks beyond it, which bounds memory.
    """

    def __init__(self, reward: RewardModel, max_pending: int = 4) -> None:
        self.reward = reward
        self.max_pending = max(max_pending, reward.concurrency)
        self._workers = ThreadPoolExecutor(reward.concurrency, thread_name_prefix="judge")
        self._batches: list[Future[tuple[Tensor, Tensor]]] = []
        self._stream: torch.cuda.Stream | None = None
        self._blocked = 0.0
        self._refused: list[str] = []  # since `counters` was called
        self._last_refused = ""

    def submit(self, videos: Tensor, prompts: Sequence[str], fps: float) -> None:
        """Queue videos [n, T, 3, H, W] of `fps` with their n prompts, once there is room."""
        self.has_room(None)
        made = None
        if videos.is_cuda:
            # On the trainer's stream, the judge would wait for the sampling it is to overlap with.
            # With priority: a judge's many small kernels would each queue behind one that takes
            # milliseconds and fills the GPU.
            self._stream = self._stream or torch.cuda.Stream(videos.device, priority=-1)
            made = torch.cuda.Event()
            made.record()
        self._batches.append(self._workers.submit(self._score, videos, list(prompts), fps, made))

    def has_room(self, seconds: float | None) -> bool:
        """Wait at most `seconds` until `submit` would not block; whether it would not.

        Raises:
            Exception: Whatever the judge raised.
        """
        waiting = [f for f in self._batches if not f.done()]
        if len(waiting) < self.max_pending:
            return True
        began = time.perf_counter()
        scored = wait(waiting, seconds, return_when=FIRST_COMPLETED).done
        self._blocked += time.perf_counter() - began
        for batch in scored:
            batch.result()
        return bool(scored)

    def is_done(self, seconds: float) -> bool:
        """Wait at most `seconds` until `collect` would not block; whether it would not."""
        return not wait(self._batches, seconds).not_done

    def collect(self, num_generations: int) -> tuple[list[Scores], list[list[bool]]]:
        """Wait for all that was submitted since the last call.

        Returns:
            Scores [P][G][K] and validity [P][G], in the order of submission, G = num_generations.

        Raises:
            Exception: Whatever the judge raised; UserError if what it returned is no scores.
        """
        batches, self._batches = self._batches, []
        results = [batch.result() for batch in batches]
        scores = [row for scores, _ in results for row in scores.tolist()]
        valid = [ok for _, flags in results for ok in flags.tolist()]
        groups = range(0, len(scores), num_generations)
        return (
            [scores[i : i + num_generations] for i in groups],
            [valid[i : i + num_generations] for i in groups],
        )

    def close(self) -> None:
        """Close the judge, and end the threads when their present batches are done, without waiting
        for them. A judge that cannot be closed is a warning: nobody needs it any more.

        Python waits for such threads when it exits, so a judge that waits for its server has to be
        told that nobody waits for it.
        """
        self._workers.shutdown(wait=False, cancel_futures=True)
        try:
            self.reward.close()
        except Exception as error:
            logger.warning(f"{type(self.reward).__name__} failed at its end: {one_line(error)}")

    def blocked_seconds(self) -> float:
        """Seconds that a batch has waited for the judge since the last call."""
        seconds, self._blocked = self._blocked, 0.0
        return seconds

    def counters(self) -> dict[str, int]:
        """The judge's counts since the last call, and how many of its scores were refused, if any
        were.
        """
        refused, self._refused = len(self._refused), []
        return self.reward.counters() | ({"refused": refused} if refused else {})

    def last_errors(self) -> dict[str, str]:
        """The last error of each part of the judge, and the last of its scores that was refused."""
        refused = {type(self.reward).__name__: self._last_refused} if self._last_refused else {}
        return self.reward.last_errors() | refused

    @torch.no_grad()
    def _score(
        self, videos: Tensor, prompts: list[str], fps: float, made: torch.cuda.Event | None
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(self._stream) if made else nullcontext():
            if made and self._stream:
                self._stream.wait_event(made)
                videos.record_stream(self._stream)
            answer = self.reward.score(videos, prompts, fps)
            name, shape = type(self.reward).__name__, (len(prompts), len(self.reward.stages))
            expected = f"a tensor of scores {shape} and one of validity {shape[:1]}"
            if not _are_tensors(answer, shape, shape[:1]):
                raise UserError(f"reward: {name}.score: expected {expected}, got {_shown(answer)}")
            scores, valid = answer[0].double().cpu(), answer[1].bool().cpu()
        # An invalid video is left out of its group: algorithm/self_paced.py, advantages.py; see
        # training/step.py, item 5.
        inside = ((scores >= -ROUNDING) & (scores <= 1 + ROUNDING)).all(dim=1)  # NaN is not
        for index in (valid & ~inside).nonzero().flatten().tolist():
            row, prompt = scores[index].tolist(), prompts[index]
            self._last_refused = f"expected scores in [0, 1], got {row} for {prompt!r}"
            self._refused.append(self._last_refused)
        valid = valid & inside
        return torch.where(valid[:, None], scores.clamp(0, 1), scores), valid


def _are_tensors(answer: Any, *shapes: tuple[int, ...]) -> bool:
    """Whether this is a tuple or list of real tensors of these shapes."""
    return (
        isinstance(answer, tuple | list)
        and len(answer) == len(shapes)
        and all(isinstance(part, Tensor) and not part.is_complex() for part in answer)
        and [part.shape for part in answer] == [*shapes]
    )


def _shown(answer: Any) -> str:
    """What a judge returned, briefly: shapes of tensors, else the value."""
    if isinstance(answer, Tensor):
        return f"a tensor {tuple(answer.shape)}"
    if isinstance(answer, tuple | list) and any(isinstance(part, Tensor) for part in answer):
        return " and ".join(map(_shown, answer))
    text = repr(answer)
    return text if len(text) < 200 else f"{text[:200]}…"
