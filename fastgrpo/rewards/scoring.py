"""Score videos in the background, in the order given whatever the order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastgrpo.interfaces import RewardModel

Scores = list[list[float]]


class ScoringQueue:
    """Hands videos to a judge on a thread of its own, so that the next ones are sampled meanwhile.

    max_pending: batches that may wait; `submit` blocks beyond it, which bounds memory. Results do not depend on timing.
    """

    def __init__(self, reward: RewardModel, max_pending: int = 4) -> None:
        self.reward = reward
        self.max_pending = max_pending
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._batches: list[Future[tuple[Tensor, Tensor]]] = []

    def submit(self, videos: Tensor, prompts: Sequence[str]) -> None:
        """Queue videos [n, T, 3, H, W] with their n captions."""
        waiting = [f for f in self._batches if not f.done()]
        if len(waiting) >= self.max_pending:
            waiting[0].result()
        self._batches.append(self._worker.submit(self._score, videos, list(prompts)))

    def collect(self, num_generations: int) -> tuple[list[Scores], list[list[bool]]]:
        """Scores [P][G][K] and validity [P][G] of all that was submitted since the last call, in that order, G = num_generations at a time.

        Raises:
            Exception: whatever the judge raised; a score outside [0, 1] or of the wrong shape is its error too.
        """
        batches, self._batches = self._batches, []
        results = [batch.result() for batch in batches]
        scores = [row for scores, _ in results for row in scores.tolist()]
        valid = [ok for _, flags in results for ok in flags.tolist()]
        groups = range(0, len(scores), num_generations)
        return [scores[i : i + num_generations] for i in groups], [valid[i : i + num_generations] for i in groups]

    def close(self) -> None:
        """End the thread when its present batch is done, without waiting for it."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    @torch.no_grad()
    def _score(self, videos: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        scores, valid = self.reward.score(videos, prompts)
        expected = (len(prompts), len(self.reward.stages))
        if tuple(scores.shape) != expected or tuple(valid.shape) != expected[:1]:
            raise ValueError(
                f"reward: expected scores {expected} and validity {expected[:1]} from {type(self.reward).__name__}, "
                f"got {tuple(scores.shape)} and {tuple(valid.shape)}"
            )
        scores, valid = scores.double().cpu(), valid.cpu().bool() & torch.isfinite(scores.cpu()).all(dim=1)
        outside = valid & ((scores < 0) | (scores > 1)).any(dim=1)
        if outside.any():
            raise ValueError(f"reward: expected scores in [0, 1] from {type(self.reward).__name__}, got {scores[outside][0].tolist()}")
        return scores, valid
