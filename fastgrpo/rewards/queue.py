"""Score videos in the background, in the order given whatever the order of arrival."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext

import torch
from torch import Tensor

from fastgrpo.errors import UserError
from fastgrpo.interfaces import RewardModel

Scores = list[list[float]]


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

    def submit(self, videos: Tensor, prompts: Sequence[str], fps: float) -> None:
        """Queue videos [n, T, 3, H, W] of `fps` with their n prompts."""
        waiting = [f for f in self._batches if not f.done()]
        if len(waiting) >= self.max_pending:
            began = time.perf_counter()
            for scored in wait(waiting, return_when=FIRST_COMPLETED).done:
                scored.result()
            self._blocked += time.perf_counter() - began
        made = None
        if videos.is_cuda:
            # On the trainer's stream, the judge would wait for the sampling it is to overlap with.
            self._stream = self._stream or torch.cuda.Stream(videos.device)
            made = torch.cuda.Event()
            made.record()
        self._batches.append(self._workers.submit(self._score, videos, list(prompts), fps, made))

    def collect(self, num_generations: int) -> tuple[list[Scores], list[list[bool]]]:
        """Wait for all that was submitted since the last call.

        Returns:
            Scores [P][G][K] and validity [P][G], in the order of submission, G = num_generations.

        Raises:
            Exception: Whatever the judge raised; ValueError for a score outside [0, 1] or of the
                wrong shape.
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
        for them.

        Python waits for such threads when it exits, so a judge that waits for its server has to be
        told that nobody waits for it.
        """
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.reward.close()

    def blocked_seconds(self) -> float:
        """Seconds that `submit` has waited for the judge since the last call."""
        seconds, self._blocked = self._blocked, 0.0
        return seconds

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
        name, count = type(self.reward).__name__, len(prompts)
        shapes, got = ((count, len(self.reward.stages)), (count,)), (scores.shape, valid.shape)
        if got != shapes:
            raise UserError(
                f"reward: expected scores {shapes[0]} and validity {shapes[1]} from {name}, "
                f"got {tuple(got[0])} and {tuple(got[1])}"
            )
        # An invalid video is left out of its group: algorithm/self_paced.py, advantages.py; see
        # training/step.py, item 5.
        valid = valid.bool() & torch.isfinite(scores).all(dim=1)
        outside = valid & ((scores < 0) | (scores > 1)).any(dim=1)
        if outside.any():
            bad = scores[outside][0].tolist()
            raise UserError(f"reward: expected scores in [0, 1] from {name}, got {bad}")
        return scores, valid
