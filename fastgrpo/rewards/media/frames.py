"""The frames that Qwen2.5-VL sees of a video: sampling, size, antialiased resize and patches, all
on the frames' own device.

Which frames are seen, and the rate that the model is told, are those of Qwen's own qwen-vl-utils
(0.0.14). Sizes and pixels equal the official video processor's (transformers,
Qwen2VLVideoProcessor), without torchvision. The hub folders of Qwen2.5-VL hold only an image
configuration (3,136 to 12,845,056 pixels), which a server that loads from them uses for videos
too; it keeps the size of a clip made here with the defaults, since that lies inside those bounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastgrpo.errors import UserError, require
from fastgrpo.rewards.vlm.engine import Clip

_PATCH = 14
_MERGE = 2
_PAIR = 2  # frames in one patch
_FACTOR = _PATCH * _MERGE
_MAX_ASPECT = 200
_VIDEO_PIXELS = 90_316_800
"""90 % of a context of 128,000 tokens of 28 x 28 pixels, for each of a pair's frames."""
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class FrameSettings:
    """How many frames the judge sees, and how large; the defaults are those of qwen-vl-utils.

    All stages see the same frames. Their questions share the keys and values of one video, so the
    densest clip is paid for once; a sparser clip for some stages would be another prefix, which
    costs more than it saves.
    """

    fps: float = 2.0
    """Frames per second that are looked at, about. A token of the language model sees 2 frames of
    28 x 28 pixels. Above 4, two or more time steps of 2 frames share a position in time, which the
    model counts in half seconds.
    """
    min_frames: int = 4
    """At least this many, rounded up to an even number, if the video has them."""
    max_frames: int = 768
    """At most this many."""
    min_pixels: int = 128 * 28 * 28
    """A smaller frame is enlarged to this many pixels."""
    max_pixels: int = 768 * 28 * 28
    """A larger frame is reduced to this many; beyond 300 frames to fewer, so that a whole video
    fits the model's context.
    """

    def __post_init__(self) -> None:
        fps, low, high = self.fps, self.min_frames, self.max_frames
        require(0 < fps < math.inf, "frames.fps", "a positive number", fps)
        expected = f"at least {_PAIR}, which share a patch"
        require(low >= _PAIR, "frames.min_frames", expected, low)
        require(high >= low, "frames.max_frames", f"at least min_frames = {low}", high)
        require(self.min_pixels >= 1, "frames.min_pixels", "at least 1", self.min_pixels)
        least, expected = max(self.min_pixels, _FACTOR**2), f"at least min_pixels and {_FACTOR}^2"
        require(self.max_pixels >= least, "frames.max_pixels", expected, self.max_pixels)


def frame_indices(num_frames: int, fps: float, settings: FrameSettings) -> list[int]:
    """Indices of the frames that are looked at: an even number of them, spread over the whole
    video, the first and the last among them.

    The sampling of qwen-vl-utils (0.0.14, `smart_nframes` and `_read_video_*`): `linspace(0, T - 1,
    n).round()`, without the error of fp32, which from some 10,000 frames on may name a neighbour.
    The only frame of an image is looked at twice.

    Args:
        num_frames: Of the video.
        fps: Of the video.
        settings: How many frames are wanted.

    Raises:
        ValueError: No frames, or a rate that is not a positive number.
    """
    if num_frames < 1 or not 0 < fps < math.inf:
        raise UserError(
            "video: expected at least one frame and a positive rate, "
            f"got {num_frames} frames at {fps} per second"
        )
    if num_frames == 1:
        return [0, 0]
    least = math.ceil(settings.min_frames / _PAIR) * _PAIR
    wanted = min(max(num_frames / fps * settings.fps, least), settings.max_frames, num_frames)
    count = math.floor(wanted / _PAIR) * _PAIR
    return [round(i * (num_frames - 1) / (count - 1)) for i in range(count)]


def clip_size(height: int, width: int, num_frames: int, settings: FrameSettings) -> tuple[int, int]:
    """Height and width, multiples of 28, to which num_frames sampled frames are resized.

    The official rule (`smart_resize`): the nearest multiples, scaled into the pixel budget with
    about the same aspect ratio. Above 300 frames a frame's budget is its share of the model's
    context (`cap_pixels_per_frame`, as in qwen-vl-utils).

    Raises:
        ValueError: A side is more than 200 times the other, or no size lies inside the budget,
            which only happens if it is narrow.
    """
    if min(height, width, num_frames) < 1 or max(height, width) > _MAX_ASPECT * min(height, width):
        raise UserError(
            f"video: expected frames whose sides are at most {_MAX_ASPECT}:1, "
            f"got {num_frames} of {height}x{width}"
        )
    low, high = _budget(num_frames, settings)
    sides = (height, width)
    size = [round(side / _FACTOR) * _FACTOR for side in sides]
    if math.prod(size) > high:
        shrink = math.sqrt(height * width / high)
        size = [max(_FACTOR, math.floor(side / shrink / _FACTOR) * _FACTOR) for side in sides]
    elif math.prod(size) < low:
        grow = math.sqrt(low / (height * width))
        size = [math.ceil(side * grow / _FACTOR) * _FACTOR for side in sides]
    if not low <= math.prod(size) <= high:
        raise UserError(
            "frames.min_pixels, frames.max_pixels: expected a budget that holds a size with sides "
            f"of {_FACTOR}n and the aspect ratio of {height}x{width}, got {low} to {high} pixels, "
            f"and {size[0]}x{size[1]} is nearest"
        )
    return size[0], size[1]


def quantise(video: Tensor, indices: list[int]) -> Tensor:
    """The frames at `indices` as uint8, as a file would hold them.

    Args:
        video: [T, 3, H, W], uint8, or float in [0, 1].
        indices: n of them.

    Returns:
        [n, 3, H, W] uint8.

    Raises:
        ValueError: Another shape or dtype; a value outside [0, 1] or not finite, in any frame.
    """
    shaped = video.ndim == 4 and video.shape[1] == 3 and video.numel()
    if not (shaped and (video.dtype == torch.uint8 or video.is_floating_point())):
        got = f"{list(video.shape)} of {video.dtype}"
        raise UserError(f"video: expected [T, 3, H, W] of uint8 or float, got {got}")
    if video.dtype == torch.uint8:
        return video[indices]
    low, high = torch.stack(video.aminmax()).tolist()
    if not (low >= 0 and high <= 1):  # also for NaN
        raise UserError(f"video: expected finite values in [0, 1], got {low} to {high}")
    return (video[indices].float() * 255).round().to(torch.uint8)


def preparing_bytes(videos: Tensor, num_seen: int, size: Sequence[int]) -> int:
    """Bytes that it takes to find a video's pixels finite, and to quantise and resize `num_seen` of
    its frames in float.

    Args:
        videos: [B, T, 3, H, W] float, on any device; they are prepared one after the other.
        num_seen: Of the T frames.
        size: Height and width after the resize.
    """
    frame = videos[0, 0]
    # torch.isfinite takes absolute values, and three truths of a byte. The frames seen are in fp32
    # twice, or before and after the resize.
    finite = (frame.element_size() + 3) * videos[0].numel()
    resized = frame.numel() + len(frame) * math.prod(size)
    return max(finite, 4 * num_seen * max(2 * frame.numel(), resized))


def make_clip(video: Tensor, fps: float, settings: FrameSettings) -> Clip:
    """The clip that the judge sees of a video, on the video's device.

    Float frames are rounded to uint8 before they are resized, as a file's would be. The rate, which
    the model is told, is the number of frames over the video's whole length, as qwen-vl-utils and
    transformers have it.

    Args:
        video: [T, 3, H, W], uint8 or float in [0, 1].
        fps: Frames per second.
        settings: How many frames are seen, and how large.

    Raises:
        ValueError: As `frame_indices`, `quantise` and `clip_size`.
    """
    indices = frame_indices(len(video), fps, settings)
    frames = quantise(video, indices)
    return clip_of_frames(frames, len(indices) / len(video) * fps, settings)


def clip_of_frames(frames: Tensor, fps: float, settings: FrameSettings) -> Clip:
    """The clip of frames [n, 3, H, W] uint8 that were sampled already, `fps` of them per second.

    A clip's own frames come back as they are. An odd number is made even by repeating the last
    frame.

    Raises:
        ValueError: Wrong shape or dtype, no frames, a rate that is not a positive number; as
            `clip_size`.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames) or frames.dtype != torch.uint8:
        got = f"{list(frames.shape)} of {frames.dtype}"
        raise UserError(f"frames: expected [n, 3, H, W] of uint8 with n > 0, got {got}")
    require(0 < fps < math.inf, "frames", "a positive number of them per second", fps)
    frames = torch.cat([frames, *[frames[-1:]] * (-len(frames) % _PAIR)])
    height, width = frames.shape[-2:]
    low, high = _budget(len(frames), settings)
    if height % _FACTOR or width % _FACTOR or not low <= height * width <= high:
        frames = _resize(frames, clip_size(height, width, len(frames), settings))
    return Clip(frames, fps)


def patches(clip: Clip) -> tuple[Tensor, tuple[int, int, int]]:
    """What the vision tower takes of a clip.

    Returns:
        pixel_values_videos [t*h*w, 1176] float32, and its grid (t, h, w) in patches. A row is one
        patch of 2 frames and 14 x 14 pixels, normalised, (channel, frame, y, x) flattened; rows run
        over t, then blocks of 2 x 2 patches, which the model merges into one token.
    """
    frames = clip.frames
    mean, std = _normalisation(frames.device)
    pixels = (frames.float() - mean).div_(std)
    t, h, w = len(frames) // _PAIR, frames.shape[2] // _PATCH, frames.shape[3] // _PATCH
    pixels = pixels.view(t, _PAIR, 3, h // _MERGE, _MERGE, _PATCH, w // _MERGE, _MERGE, _PATCH)
    rows = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * _PAIR * _PATCH**2)
    return rows, (t, h, w)


@functools.cache
def _normalisation(device: torch.device) -> list[Tensor]:
    """Mean and standard deviation of pixels, [3, 1, 1] each. Made once: a GPU's host would wait."""
    return [torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (_MEAN, _STD)]


def seconds_per_grid(clip: Clip) -> float:
    """Seconds of video that one step t of the grid covers: the model's `second_per_grid_ts`."""
    return _PAIR / clip.fps


def _budget(num_frames: int, settings: FrameSettings) -> tuple[int, int]:
    """Least and most pixels of a frame."""
    share = max(_VIDEO_PIXELS * _PAIR // num_frames, int(settings.min_pixels * 1.05))
    return settings.min_pixels, min(settings.max_pixels, share)


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to uint8 [n, 3, *size]: bicubic, antialiased; torchvision's arithmetic on each device.

    The CPU has a kernel for uint8, which rounds and clamps between its two passes; elsewhere
    torchvision goes through float32. So a pixel of the CPU may differ from one of the GPU by 1 of
    255, and by more where the first pass overshoots at a hard edge.
    """
    if frames.device.type == "cpu":
        return interpolate(frames, size, mode="bicubic", antialias=True)
    return resize_in_float(frames, size)


def resize_in_float(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize frames [n, 3, H, W] uint8 to [n, 3, *size]: bicubic, antialiased, in float32 and
    rounded once.
    """
    resized = interpolate(frames.float(), size, mode="bicubic", antialias=True)
    return resized.clamp_(0, 255).round_().to(torch.uint8)
