"""What the reward networks VideoAlign and Aesthetic share: videos are computed one by one, in
frames and pixels as files have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def score_each(
    one: Callable[[Tensor, str], Tensor],
    width: int,
    device: torch.device,
    videos: Tensor,
    prompts: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """What `one` (video, prompt) -> scores [width] gives for each of B videos: [B, width] float64
    and validity [B], on the CPU.

    A video with a non-finite pixel or score is invalid and its row is 0. One at a time, so that
    no bit of a score depends on the others.

    Raises:
        ValueError: another number of prompts than of videos; whatever `one` raises.
    """
    if len(videos) != len(prompts):
        raise ValueError(
            f"expected one prompt a video, got {len(prompts)} prompts for {len(videos)} videos"
        )
    raw = torch.zeros(len(videos), width, dtype=torch.float64)
    valid = torch.tensor([bool(torch.isfinite(video).all()) for video in videos], dtype=torch.bool)
    with torch.autocast(
        device.type, enabled=False
    ):  # the trainer's, which would change the arithmetic
        for i in valid.nonzero()[:, 0].tolist():
            scores = one(videos[i], prompts[i]).double().cpu()
            valid[i] = bool(torch.isfinite(scores).all())
            raw[i] = scores if valid[i] else 0.0
    return raw, valid


def spread(num_frames: int, count: int) -> list[int]:
    """Indices of `count` of num_frames frames, evenly from the first to the last; with VideoAlign's
    rounding (half to even, in fp32).
    """
    return [int(index) for index in torch.linspace(0, num_frames - 1, count).round().tolist()]


def quantise(video: Tensor, indices: list[int]) -> Tensor:
    """The frames [n, 3, H, W] at `indices` as uint8, as a file would hold them; video [T, 3, H, W]
    uint8, or float in [0, 1].

    Raises:
        ValueError: another shape or dtype; a value out of [0, 1], infinite or NaN, in whichever
            frame.
    """
    if (
        video.ndim != 4
        or video.shape[1] != 3
        or not video.numel()
        or not (video.dtype == torch.uint8 or video.is_floating_point())
    ):
        raise ValueError(
            f"video: expected [T, 3, H, W] of uint8 or float, got {list(video.shape)} of {video.dtype}"
        )
    if video.dtype == torch.uint8:
        return video[indices]
    low, high = torch.stack(video.aminmax()).tolist()
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise ValueError(f"video: expected finite values in [0, 1], got {low} to {high}")
    return (video[indices].float() * 255).round().to(torch.uint8)


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames [n, 3, *size] uint8 of frames uint8: bicubic, antialiased, in float32 and rounded
    once, as torchvision's function does it.
    """
    if tuple(frames.shape[-2:]) == size:
        return frames
    resized = torch.nn.functional.interpolate(frames.float(), size, mode="bicubic", antialias=True)
    return resized.clamp_(0, 255).round_().to(torch.uint8)
