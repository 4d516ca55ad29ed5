"""Score videos in the background, in the order given whatever the order of arrival."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext

import torch
from torch import Tensor

from fastgrpo.interfaces import RewardModel

Scores = list[list[float]]


class ScoringQueue:
    """Hands videos to a judge on threads of its own (as many as its `concurrency`, or one), so that
    the next ones are sampled meanwhile.

    max_pending: batches that may be unscored, or as many as the judge takes at a time where that
    is more; `submit` blocks beyond it, which bounds memory. Results do not depend on timing.
    """

    def __init__(self, reward: RewardModel, max_pending: int = 4) -> None:
        self.reward = reward
        workers = int(getattr(reward, "concurrency", 1))
        self.max_pending = max(max_pending, workers)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self._batches: list[Future[tuple[Tensor, Tensor]]] = []
        self._stream: torch.cuda.Stream | None = None
        self._blocked = 0.0

    def submit(self, videos: Tensor, prompts: Sequence[str], fps: float) -> None:
        """Queue videos [n, T, 3, H, W] of `fps` with their n captions."""
        waiting = [f for f in self._batches if not f.done()]
        if len(waiting) >= self.max_pending:
            began = time.perf_counter()
            for scored in wait(waiting, return_when=FIRST_COMPLETED).done:
                scored.result()
            self._blocked += time.perf_counter() - began
        made = None
        # a judge on the trainer's stream would stand in line with the sampling it is to overlap
        # with
        if videos.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(videos.device)
            made = torch.cuda.Event()
            made.record()
        self._batches.append(self._workers.submit(self._score, videos, list(prompts), fps, made))

    def collect(self, num_generations: int) -> tuple[list[Scores], list[list[bool]]]:
        """Scores [P][G][K] and validity [P][G] of all that was submitted since the last call, in
        that order, G = num_generations at a time.

        Raises:
            Exception: whatever the judge raised; a score outside [0, 1] or of the wrong shape is
                its error too.
        """
        batches, self._batches = self._batches, []
        results = [batch.result() for batch in batches]
        scores = [row for scores, _ in results for row in scores.tolist()]
        valid = [ok for _, flags in results for ok in flags.tolist()]
        groups = range(0, len(scores), num_generations)
        return [scores[i : i + num_generations] for i in groups], [
            valid[i : i + num_generations] for i in groups
        ]

    def close(self) -> None:
        """End the threads when their present batches are done, without waiting for them; and the
        judge, where it has a `close`.

        Python waits for such threads when it exits: a judge that waits for its server has to be
        told that nobody waits for it.
        """
        self._workers.shutdown(wait=False, cancel_futures=True)
        getattr(self.reward, "close", lambda: None)()

    def blocked_seconds(self) -> float:
        """Time that `submit` has waited for the judge since the last call, in seconds."""
        seconds, self._blocked = self._blocked, 0.0
        return seconds

    def counters(self) -> dict[str, int]:
        """The judge's counts since the last call, where it counts."""
        counts: dict[str, int] = getattr(self.reward, "counters", dict)()
        return counts

    def last_errors(self) -> dict[str, str]:
        """The last error of each of the judge's endpoints, where it has any."""
        errors: dict[str, str] = getattr(self.reward, "last_errors", dict)()
        return errors

    @torch.no_grad()
    def _score(
        self, videos: Tensor, prompts: list[str], fps: float, made: torch.cuda.Event | None
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(self._stream) if made else nullcontext():
            if made and self._stream:
                self._stream.wait_event(made)
                videos.record_stream(self._stream)
            scores, valid = self.reward.score(videos, prompts, fps)
            scores, valid = scores.double().cpu(), valid.cpu()
        expected = (len(prompts), len(self.reward.stages))
        if tuple(scores.shape) != expected or tuple(valid.shape) != expected[:1]:
            raise ValueError(
                f"reward: expected scores {expected} and validity {expected[:1]} from {type(self.reward).__name__}, "
                f"got {tuple(scores.shape)} and {tuple(valid.shape)}"
            )
        valid = valid.bool() & torch.isfinite(scores).all(dim=1)
        outside = valid & ((scores < 0) | (scores > 1)).any(dim=1)
        if outside.any():
            raise ValueError(
                f"reward: expected scores in [0, 1] from {type(self.reward).__name__}, got {scores[outside][0].tolist()}"
            )
        return scores, valid
