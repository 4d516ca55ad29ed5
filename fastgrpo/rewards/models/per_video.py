"""What the reward networks VideoAlign and Aesthetic share: videos are computed one by one, from
frames and pixels as files have them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgrpo.errors import UserError
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.media.frames import resize_in_float


class PerVideoReward(RewardModel):
    """A published network that is run on one video at a time, so that no bit of a score depends on
    the other videos.

    Attributes:
        loaded: The network, its head and their device; None before `load`.
    """

    loaded: tuple[Any, Any, torch.device] | None = None

    @abstractmethod
    def score_one(self, video: Tensor, prompt: str, fps: float) -> Tensor:
        """Raw scores [len(component_names)] of one video [T, 3, H, W]."""

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """Stage scores [B, K] float64 in [0, 1] and validity [B], as `rewards` and `components`."""
        raw, valid = self.components(videos, prompts, fps)
        return self.rewards(raw), valid

    @torch.no_grad()
    def components(
        self, videos: Tensor, prompts: Sequence[str], fps: float
    ) -> tuple[Tensor, Tensor]:
        """Raw scores [B, len(component_names)] float64 and validity [B], on the CPU.

        A video with a pixel or score that is not finite is invalid and its row is 0.

        Raises:
            ValueError: A size, rate or range of pixels that the network cannot take.
        """
        assert self.loaded is not None, "load() comes before score()"
        raw = torch.zeros(len(videos), len(self.component_names), dtype=torch.float64)
        valid = torch.zeros(len(videos), dtype=torch.bool)
        # Without the trainer's autocast, which would change the arithmetic.
        with torch.autocast(self.loaded[2].type, enabled=False):
            for i, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
                if torch.isfinite(video).all():
                    scores = self.score_one(video, prompt, fps).double().cpu()
                    valid[i] = torch.isfinite(scores).all()
                    raw[i] = scores if valid[i] else 0.0
        return raw, valid


def read_tensors(path: Path, key: str, mmap: bool = False) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or from a file of torch without running its code.

    Args:
        path: The file.
        key: The configuration key, for the message.
        mmap: Map a file of torch into memory; one in the old format cannot be.

    Raises:
        ValueError: Unreadable, or something else than tensors in it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        values = stored.values() if isinstance(stored, Mapping) else [None]
        if not all(isinstance(value, Tensor) for value in values):
            raise ValueError("no mapping of names to tensors")
    except Exception as error:  # whatever a damaged file brings about in zip, pickle or safetensors
        name = type(error).__name__
        raise UserError(
            f"{key}: expected readable weights in {path}, got {name}: {error}"
        ) from error
    return dict(stored)


def spread(num_frames: int, count: int) -> list[int]:
    """Indices of `count` of num_frames frames, evenly from the first to the last; with VideoAlign's
    rounding (half to even, in fp32).
    """
    return [int(index) for index in torch.linspace(0, num_frames - 1, count).round().tolist()]


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize frames [n, 3, H, W] uint8 to [n, 3, *size] as torchvision does it; those of that size
    already come back as they are.
    """
    return frames if tuple(frames.shape[-2:]) == size else resize_in_float(frames, size)
