"""The frames that Qwen2.5-VL sees of a video: sampling, size, antialiased resize and patches, all
on the frames' own device.

Equal to the official video processor (transformers, Qwen2VLVideoProcessor) with
`do_sample_frames=True`, without torchvision. The defaults are that class's. The hub folders of
Qwen2.5-VL hold an image configuration only (3,136 to 12,845,056 pixels), which a server that
loads from them takes for videos too; it leaves the size of a clip made here with the defaults as
it is, since that lies inside those bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastgrpo.rewards.vlm.engine import Clip

_PATCH = 14
_MERGE = 2
_PAIR = 2  # frames in one patch
_FACTOR = _PATCH * _MERGE
_MAX_ASPECT = 200
_VIDEO_PIXELS = (
    90_316_800  # 90 % of a context of 128,000 tokens of 28 x 28 pixels, for each of a pair's frames
)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class FrameSettings:
    """How many frames the judge sees, and how large; the defaults are the official video
    processor's.
    """

    fps: float = 2.0
    """Frames a second that are looked at, about."""
    min_frames: int = 4
    """At least so many, where the video has them."""
    max_frames: int = 768
    """At most so many."""
    min_pixels: int = 128 * 28 * 28
    """A smaller frame is enlarged to so many pixels."""
    max_pixels: int = 768 * 28 * 28
    """A larger frame is reduced to so many; beyond 300 frames less, so that a whole video fits the
    model's context.
    """

    def __post_init__(self) -> None:
        for key, ok, expected in (
            ("fps", 0 < self.fps < math.inf, "a positive number"),
            ("min_frames", self.min_frames >= _PAIR, f"at least {_PAIR}, which share a patch"),
            (
                "max_frames",
                self.max_frames >= self.min_frames,
                f"at least min_frames = {self.min_frames}",
            ),
            ("min_pixels", self.min_pixels >= 1, "at least 1"),
            (
                "max_pixels",
                self.max_pixels >= max(self.min_pixels, _FACTOR**2),
                f"at least min_pixels and {_FACTOR}^2",
            ),
        ):
            if not ok:
                raise ValueError(f"frames.{key}: expected {expected}, got {getattr(self, key)!r}")


def frame_indices(num_frames: int, fps: float, settings: FrameSettings) -> list[int]:
    """Indices, ascending and an even number of them, of the frames that are looked at in a video of
    num_frames at fps.

    The official sampling, in exact arithmetic: its own floating point gives an index past the
    end for some lengths (61 frames at 8 fps), and beyond about 50,000 frames sometimes the next
    index. The only frame of an image is looked at twice.

    Raises:
        ValueError: no frames, or a rate that is not a positive number.
    """
    if num_frames < 1 or not 0 < fps < math.inf:
        raise ValueError(
            f"video: expected at least one frame and a positive rate, got {num_frames} frames at {fps} a second"
        )
    if num_frames == 1:
        return [0, 0]
    wanted = max(num_frames / fps * settings.fps, settings.min_frames)
    count = math.floor(min(wanted, settings.max_frames, num_frames) / _PAIR) * _PAIR
    return [i * num_frames // count for i in range(count)]


def clip_size(height: int, width: int, num_frames: int, settings: FrameSettings) -> tuple[int, int]:
    """Height and width, multiples of 28, to which num_frames sampled frames are resized.

    The official rule (`smart_resize`): the nearest multiples, scaled into the pixel budget with
    the aspect ratio about kept. Above 300 frames a frame's budget is its share of the model's
    context (`cap_pixels_per_frame`, as in qwen-vl-utils).

    Raises:
        ValueError: a side is more than 200 times the other, or no size lies inside the budget,
            which only a narrow one brings about.
    """
    if min(height, width, num_frames) < 1 or max(height, width) > _MAX_ASPECT * min(height, width):
        raise ValueError(
            f"video: expected frames whose sides are at most {_MAX_ASPECT}:1, got {num_frames} of {height}x{width}"
        )
    low, high = _budget(num_frames, settings)
    size = [round(side / _FACTOR) * _FACTOR for side in (height, width)]
    if math.prod(size) > high:
        shrink = math.sqrt(height * width / high)
        size = [
            max(_FACTOR, math.floor(side / shrink / _FACTOR) * _FACTOR) for side in (height, width)
        ]
    elif math.prod(size) < low:
        grow = math.sqrt(low / (height * width))
        size = [math.ceil(side * grow / _FACTOR) * _FACTOR for side in (height, width)]
    if not low <= math.prod(size) <= high:
        raise ValueError(
            f"frames.min_pixels, frames.max_pixels: expected a budget that holds a size with sides of {_FACTOR}n and the aspect ratio of "
            f"{height}x{width}, got {low} to {high} pixels, and {size[0]}x{size[1]} is nearest"
        )
    return size[0], size[1]


def make_clip(video: Tensor, fps: float, settings: FrameSettings) -> Clip:
    """The clip that the judge sees of a video [T, 3, H, W], uint8 or float in [0, 1], of `fps`
    frames a second.

    Float frames are rounded to uint8 before they are resized, as a file's would be. All on the
    video's device.

    Raises:
        ValueError: wrong shape or dtype; a float out of [0, 1], infinite or NaN, in whichever
            frame; as `frame_indices`, `clip_size`.
    """
    if (
        video.ndim != 4
        or video.shape[1] != 3
        or not (video.dtype == torch.uint8 or video.is_floating_point())
    ):
        raise ValueError(
            f"video: expected [T, 3, H, W] of uint8 or float, got {list(video.shape)} of {video.dtype}"
        )
    indices = frame_indices(len(video), fps, settings)
    frames = video[indices]
    if video.is_floating_point():
        low, high = torch.stack(video.aminmax()).tolist() if video.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):  # false for NaN too
            raise ValueError(f"video: expected finite values in [0, 1], got {low} to {high}")
        frames = (frames.float() * 255).round().to(torch.uint8)
    return clip_of_frames(frames, len(indices) / len(video) * fps, settings)


def clip_of_frames(frames: Tensor, fps: float, settings: FrameSettings) -> Clip:
    """The clip of frames [n, 3, H, W] uint8 that were sampled already, `fps` of them a second; a
    clip's own frames come back as they are.

    An odd number is made even by repeating the last frame.

    Raises:
        ValueError: wrong shape or dtype, no frames, a rate that is not a positive number; as
            `clip_size`.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames) or frames.dtype != torch.uint8:
        raise ValueError(
            f"frames: expected [n, 3, H, W] of uint8 with n > 0, got {list(frames.shape)} of {frames.dtype}"
        )
    if not 0 < fps < math.inf:
        raise ValueError(f"frames: expected a positive number of them a second, got {fps}")
    frames = torch.cat([frames, *[frames[-1:]] * (-len(frames) % _PAIR)])
    height, width = frames.shape[-2:]
    low, high = _budget(len(frames), settings)
    if height % _FACTOR or width % _FACTOR or not low <= height * width <= high:
        frames = _resize(frames, clip_size(height, width, len(frames), settings))
    return Clip(frames, fps)


def patches(clip: Clip) -> tuple[Tensor, tuple[int, int, int]]:
    """What the vision tower takes of a clip: pixel_values_videos [t*h*w, 1176] float32, and its
    grid (t, h, w) in patches.

    A row is one patch of 2 frames and 14 x 14 pixels, normalised, (channel, frame, y, x)
    flattened; rows run over t, then blocks of 2 x 2 patches, which the model merges into one
    token.
    """
    frames = clip.frames
    mean, std = (
        torch.tensor(values, device=frames.device).view(3, 1, 1) * 255 for values in (_MEAN, _STD)
    )
    pixels = (frames.float() - mean).div_(std)
    t, h, w = len(frames) // _PAIR, frames.shape[2] // _PATCH, frames.shape[3] // _PATCH
    pixels = pixels.view(t, _PAIR, 3, h // _MERGE, _MERGE, _PATCH, w // _MERGE, _MERGE, _PATCH)
    return pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * _PAIR * _PATCH**2), (
        t,
        h,
        w,
    )


def seconds_per_grid(clip: Clip) -> float:
    """Seconds of video that one step t of the grid covers: the model's `second_per_grid_ts`."""
    return _PAIR / clip.fps


def _budget(num_frames: int, settings: FrameSettings) -> tuple[int, int]:
    """Pixels of a frame, least and most."""
    share = max(_VIDEO_PIXELS * _PAIR // num_frames, int(settings.min_pixels * 1.05))
    return settings.min_pixels, min(settings.max_pixels, share)


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, antialiased, uint8 [n, 3, *size]; the same arithmetic as torchvision's on each
    device.

    The CPU has a kernel for uint8, which rounds and clamps between its two passes; elsewhere
    torchvision goes through float32. So a pixel of the CPU may differ from one of the GPU by 1
    of 255, and by more where the first pass overshoots at a hard edge.
    """
    if frames.device.type == "cpu":
        return interpolate(frames, size, mode="bicubic", antialias=True)
    return _resize_in_float(frames, size)


def _resize_in_float(frames: Tensor, size: tuple[int, int]) -> Tensor:
    return (
        interpolate(frames.float(), size, mode="bicubic", antialias=True)
        .clamp_(0, 255)
        .round_()
        .to(torch.uint8)
    )
