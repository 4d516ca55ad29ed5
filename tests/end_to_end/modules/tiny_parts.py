"""Judges of the test runs, named in their recipes by dotted path; a process finds them through
PYTHONPATH.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.interfaces import Conditioning
from fastgrpo.shapes.judge import ShapesJudge
from fastgrpo.shapes.policy import ShapesPolicy


class SmoothJudge(ShapesJudge):
    """Brightness, times movement, times redness: no two videos score the same, so that no group is
    without signal.
    """

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        scores = torch.tensor(
            [self.score_one(video.double()) for video in videos], dtype=torch.float64
        )
        valid = torch.isfinite(scores).all(1)
        return torch.where(valid[:, None], scores, 0.0), valid

    def score_one(self, video: Tensor) -> list[float]:
        bright = float(video.mean()) ** 0.5
        moving = bright * float((video[1:] - video[:-1]).abs().mean()) ** 0.25
        return [bright, moving, moving * float(video[:, 0].mean()) ** 0.25]


class RedJudge(SmoothJudge):
    """Prefers red pictures at every stage."""

    def score_one(self, video: Tensor) -> list[float]:
        red = float(video[:, 0].mean() - video[:, 1:].mean())
        return [min(max(0.5 + 2 * red, 0.0), 1.0)] * 3


class CaptionJudge(SmoothJudge):
    """Has no score for captions with `blind` in them, and one and the same score for those with
    `flat` in them.
    """

    def __init__(self, blind: str = "", flat: str = "") -> None:
        super().__init__()
        self.blind, self.flat = blind, flat

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        scores, valid = super().score(videos, prompts, fps)
        flat = torch.tensor([bool(self.flat) and self.flat in prompt for prompt in prompts])
        seen = torch.tensor([not (self.blind and self.blind in prompt) for prompt in prompts])
        return torch.where(flat[:, None], 0.5, scores), valid & seen


class HalfJudge(SmoothJudge):
    """Has no score for the first half of a batch; counts what it is asked, and says `error`."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.error, self.asked = error, 0

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        self.asked += len(videos)
        scores, valid = super().score(videos, prompts, fps)
        return scores, valid & (torch.arange(len(videos)) >= len(videos) // 2)

    def describe(self) -> dict[str, str]:
        return {"error": self.error}

    def counters(self) -> dict[str, int]:
        asked, self.asked = self.asked, 0
        return {"asked": asked}

    def last_errors(self) -> dict[str, str]:
        return {"the judge": self.error}


class BrokenJudge(SmoothJudge):
    """Fails on rank 1 once training has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if os.environ.get("RANK") == "1" and self.calls == 4:
            raise RuntimeError("this judge broke on purpose")
        return super().score(videos, prompts, fps)


class WitnessPolicy(ShapesPolicy):
    """Writes a hash of its weights to <folder>/rank_<r>.txt at the start of every rollout."""

    def __init__(self, folder: str, checkpoint: str | None = None) -> None:
        super().__init__(checkpoint)
        self.folder = folder

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        digest = hashlib.sha256()
        for parameter in self.transformer.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        with open(Path(self.folder) / f"rank_{os.environ.get('RANK', '0')}.txt", "a") as file:
            file.write(digest.hexdigest() + "\n")
        return super().encode(prompts)
