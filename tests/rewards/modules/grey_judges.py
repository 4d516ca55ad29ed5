"""What the tests of `score` name by dotted path: an engine that answers by how bright a clip is,
and a judge without answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply


class GreyEngine(Engine):
    """1 + 9 times the mean of the frames, to a question that does not tell it otherwise.

    mode: works; silent, which gives no reply to anything; broken, which cannot be loaded.
    """

    pause = 0.0

    def __init__(self, mode: str = "works") -> None:
        self.mode = mode
        self.seen: list[Clip] = []

    def load(self, device: torch.device) -> None:
        if self.mode == "broken":
            raise ConnectionError("nothing there")

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        self.seen += clips
        time.sleep(self.pause)
        return [
            [self.reply(clip, question) for question in row]
            for clip, row in zip(clips, questions, strict=True)
        ]

    def reply(self, clip: Clip, question: str) -> Reply:
        if "break down" in question:
            raise RuntimeError("broken\ndown")
        if self.mode == "silent" or "say nothing" in question:
            return Reply(error="timed out")
        return Reply(
            "lovely"
            if "write prose" in question
            else f"{1 + 9 * clip.frames.double().mean().item() / 255:.2f}"
        )

    def describe(self) -> dict[str, Any]:
        return {"engine": "grey", "mode": self.mode}


class SlowGreyEngine(GreyEngine):
    """A fifth of a second a call."""

    pause = 0.2


class PlainJudge(RewardModel):
    """interfaces.RewardModel with one stage: the mean of all frames, and their number and fps far
    behind the point; below 0.2 no score.
    """

    stages = ("brightness",)

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def load(self, device: torch.device) -> None:
        pass

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        mean = videos.double().mean(dim=(1, 2, 3, 4))[:, None] / 255 * self.scale
        return mean + len(videos[0]) / 1e3 + fps / 1e6, mean[:, 0] >= 0.2


class PublishedJudge(PlainJudge):
    """A judge with a scale of its own: brightness from -1 to 1, of which the reward is half of one
    more.
    """

    component_names = ("light",)

    def components(
        self, videos: Tensor, prompts: Sequence[str], fps: float
    ) -> tuple[Tensor, Tensor]:
        raw = 2 * videos.double().mean(dim=(1, 2, 3, 4))[:, None] / 255 - 1
        return raw, raw[:, 0] >= -0.6

    def rewards(self, raw: Tensor) -> Tensor:
        return (raw + 1) / 2
