"""Data URLs to frames, from a client that is not trusted: nothing is fetched, and no size is
believed before it is checked.

An image's size is read from its header before a pixel of it is decoded, frames are counted
before the first is opened, and a video file is decoded as MP4 only: FFmpeg's other formats hold
names of files and addresses that it would open.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.media.frames import FrameSettings, clip_of_frames, make_clip
from fastgrpo.rewards.vlm.engine import Clip

IMAGES = ("data:image/png", "data:image/jpeg")
"""Data URLs of one frame."""
IMAGE_LIST = "data:video/jpeg"
"""Data URLs of a video as images, PNG or JPEG, with commas between them, as vLLM reads them."""
VIDEO_FILE = "data:video/mp4"
"""Data URLs of a video file."""


@dataclass(frozen=True)
class MediaLimits:
    """What a request's video may be at most; more is refused."""

    max_frames: int = 768
    """Frames of it, of a file all that it holds."""
    max_pixels: int = 4096 * 4096
    """Pixels of a frame."""
    max_video_pixels: int = 1 << 27
    """Pixels of all its frames together: 400 MB decoded."""

    def __post_init__(self) -> None:
        for key in ("max_frames", "max_pixels", "max_video_pixels"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected at least 1, got {getattr(self, key)}")


def clip_of_urls(
    urls: Sequence[str], fps: float, settings: FrameSettings, limits: MediaLimits
) -> Clip:
    """The clip of one video: a single data URL of a video, or one of an image for each frame.

    fps: frames a second of a list of images, which are all looked at; of a file, which has its
    own rate, how many are looked at.

    Raises:
        ValueError: anything else, in words for the client.
    """
    kinds = {url[:99].partition(",")[0].partition(";")[0].lower() for url in urls}
    unknown = kinds - {*IMAGES, IMAGE_LIST, VIDEO_FILE}
    if unknown or not kinds:
        raise ValueError(
            f"expected URLs that start with {', '.join((*IMAGES, IMAGE_LIST))} or {VIDEO_FILE}; others are never fetched"
        )
    if kinds <= set(IMAGES):
        return clip_of_frames(_stack([_payload(url) for url in urls], limits), fps, settings)
    if len(urls) != 1:
        raise ValueError(
            f"expected one video, or nothing but its frames as images, got {len(urls)} parts"
        )
    if kinds == {IMAGE_LIST}:
        return clip_of_frames(
            _stack(_payload(urls[0]).split(",", limits.max_frames), limits), fps, settings
        )
    video, rate = _decode_file(_bytes(_payload(urls[0]), "the video"), limits)
    return make_clip(video, rate, dataclasses.replace(settings, fps=fps))


def _payload(url: str) -> str:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("expected a data URL of the form data:TYPE;base64,DATA")
    return payload


def _bytes(payload: str, what: str) -> bytes:
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{what} is not valid base64: {error}") from error


def _stack(payloads: Sequence[str], limits: MediaLimits) -> Tensor:
    """Frames [n, 3, H, W] uint8 of images in base64."""
    if len(payloads) > limits.max_frames:
        raise ValueError(f"expected at most {limits.max_frames} frames, got more")
    frames: list[Tensor] = []
    for number, payload in enumerate(payloads):
        image = _open(_bytes(payload, f"frame {number}"), f"frame {number}", limits)
        if not frames:
            _check_video(len(payloads), image.height, image.width, limits)
        elif (image.height, image.width) != tuple(frames[0].shape[1:]):
            size = f"{image.height}x{image.width}"
            raise ValueError(
                f"frame {number} is {size}, frame 0 {frames[0].shape[1]}x{frames[0].shape[2]}: expected one size"
            )
        frames.append(_pixels(image, f"frame {number}"))
    return torch.stack(frames)


def _open(data: bytes, what: str, limits: MediaLimits) -> Image.Image:
    """An image whose header has been read and accepted, and nothing else of it."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{what} is not a PNG or JPEG image that can be decoded: {error}"
        ) from error
    if image.width * image.height > limits.max_pixels:
        raise ValueError(
            f"{what} is {image.height}x{image.width}: expected at most {limits.max_pixels} pixels"
        )
    count = getattr(image, "n_frames", 1)
    if image.mode not in ("RGB", "L") or count != 1:
        raise ValueError(
            f"{what}: expected one RGB or grey image of 8 bits, got {count} of mode {image.mode}"
        )
    return image


def _pixels(image: Image.Image, what: str) -> Tensor:
    try:
        data = bytearray(image.convert("RGB").tobytes())
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, IndexError) as error:
        raise ValueError(f"{what} cannot be decoded: {error}") from error
    return (
        torch.frombuffer(data, dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


def _check_video(count: int, height: int, width: int, limits: MediaLimits) -> None:
    if height * width > limits.max_pixels or count * height * width > limits.max_video_pixels:
        raise ValueError(
            f"expected at most {limits.max_pixels} pixels a frame and {limits.max_video_pixels} a video, got {count} of {height}x{width}"
        )


def _decode_file(data: bytes, limits: MediaLimits) -> tuple[Tensor, float]:
    """All frames [n, 3, H, W] uint8 of an MP4 file, and their number a second."""
    try:
        import av
    except ImportError:
        raise ValueError(
            f"this server has no PyAV, which {VIDEO_FILE} needs: send images as {IMAGE_LIST}"
        ) from None
    try:
        with av.open(io.BytesIO(data), mode="r", format="mp4") as container:
            if not container.streams.video:
                raise ValueError("the file holds no video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError("the video is of a codec that is not known here")
            # Frames may grow on the way: the decoder itself refuses those far above. It counts
            # whole blocks, of up to 128 x 128.
            stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels + (1 << 16))}
            rate = stream.average_rate
            _check_video(
                max(stream.frames, 1), stream.height, stream.width, limits
            )  # what it says, before anything is decoded
            frames = list(_frames(container.decode(stream), limits))
    except (av.FFmpegError, EOFError) as error:
        raise ValueError(f"the video cannot be decoded: {error}") from error
    if not frames or not rate:
        raise ValueError("the video holds no frames, or does not say how many there are a second")
    return torch.stack(frames), float(rate)


def _frames(decoded: Iterator[Any], limits: MediaLimits) -> Iterator[Tensor]:
    size = None
    for number, frame in enumerate(decoded):
        size = size or (frame.height, frame.width)
        if number >= limits.max_frames:
            raise ValueError(f"expected at most {limits.max_frames} frames, got more")
        if (frame.height, frame.width) != size:
            raise ValueError(
                f"frame {number} is {frame.height}x{frame.width}, frame 0 {size[0]}x{size[1]}: expected one size"
            )
        _check_video(number + 1, *size, limits)
        yield _pixels(frame.to_image(), f"frame {number}")
