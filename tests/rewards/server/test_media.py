"""Data URLs to clips: what is sent is what is seen, and whatever else comes is refused before it
costs anything.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from fastgrpo.rewards.media.frames import FrameSettings, clip_of_frames, make_clip
from fastgrpo.rewards.server.media import IMAGE_LIST, IMAGES, VIDEO_FILE, MediaLimits, clip_of_urls

FRAMES = FrameSettings(min_pixels=28 * 28)
LIMITS = MediaLimits()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def encoded(frame: Tensor, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """A frame [3, H, W] uint8 as an image file."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).convert(mode).save(file, kind, **options)
    return file.getvalue()


def video(count: int = 4, height: int = 56, width: int = 84) -> Tensor:
    return torch.randint(
        0,
        256,
        (count, 3, height, width),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


def as_list(*images: bytes) -> list[str]:
    return [f"{IMAGE_LIST};base64,{','.join(map(b64, images))}"]


def as_images(*images: bytes, kind: str = "png") -> list[str]:
    return [f"data:image/{kind};base64,{b64(image)}" for image in images]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, rows: int | None = None) -> bytes:
    """A small PNG of a large black image, RGB."""
    packer = zlib.compressobj(9)
    data = b"".join(
        [packer.compress(bytes(1 + 3 * width)) for _ in range(height if rows is None else rows)]
        + [packer.flush()]
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def mp4(frames: Tensor, rate: int = 8) -> bytes:
    """An MP4 file whose frames come back bit for bit."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(rate))
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt, stream.options = "rgb24", {"qp": "0", "preset": "ultrafast"}
        for frame in frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("urls", [as_list, as_images])
@pytest.mark.parametrize("fps", [2.0, 1.5])
def test_images_are_the_frames_that_were_sent(urls: Any, fps: float) -> None:
    clip = clip_of_urls(urls(*map(encoded, video())), fps, FRAMES, LIMITS)
    assert torch.equal(clip.frames, video())
    assert clip.fps == fps


def test_frames_of_another_size_are_resized_as_the_judge_resizes_them() -> None:
    frames = video(3, 50, 75)
    clip = clip_of_urls(as_list(*map(encoded, frames)), 2.0, FRAMES, LIMITS)
    expected = clip_of_frames(frames, 2.0, FRAMES)
    assert torch.equal(clip.frames, expected.frames)
    assert clip.frames.shape[0] == 4  # the odd frame out is repeated


def test_a_list_may_hold_jpeg_and_grey_images() -> None:
    grey = torch.full((3, 56, 84), 77, dtype=torch.uint8)
    images = [
        encoded(grey, "JPEG", quality=100),
        encoded(grey),
        encoded(grey, mode="L"),
        encoded(grey, "JPEG", "L", quality=100),
    ]
    clip = clip_of_urls(as_list(*images), 2.0, FRAMES, LIMITS)
    assert torch.equal(clip.frames, grey.expand(4, -1, -1, -1))
    assert {url.partition(";")[0] for url in as_images(b"", b"", kind="jpeg")} < set(IMAGES)


def test_a_file_is_sampled_at_the_rate_that_is_asked_for() -> None:
    frames = video(16)
    clip = clip_of_urls([f"{VIDEO_FILE};base64,{b64(mp4(frames))}"], 4.0, FRAMES, LIMITS)
    expected = make_clip(frames, 8.0, FrameSettings(fps=4.0, min_pixels=28 * 28))
    assert len(expected.frames) == 8
    assert torch.equal(clip.frames, expected.frames)
    assert clip.fps == expected.fps == 4.0


PNG = encoded(video()[0])
JPEG = encoded(video()[0], "JPEG")
OTHER_SIZE = encoded(video(1, 56, 56)[0])


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        ([], "expected URLs that start with"),
        (["http://example.org/a.mp4"], "never fetched"),
        (["https://example.org/a.png"], "never fetched"),
        (["file:///etc/passwd"], "never fetched"),
        (["/etc/passwd"], "never fetched"),
        (["data:text/html;base64,AAAA"], "never fetched"),
        (["data:image/svg+xml;base64,AAAA"], "never fetched"),
        ([*as_images(PNG), "file:///etc/passwd"], "never fetched"),
        ([*as_images(PNG), *as_list(PNG)], "expected one video"),
        (as_list(PNG) * 2, "got 2 parts"),
        (["data:image/png,abc"], "data:TYPE;base64,DATA"),
        (["data:image/png;base64"], "data:TYPE;base64,DATA"),
        (["data:image/png;base64,!!!!"], "frame 0 is not valid base64"),
        (["data:image/png;base64,AAA"], "frame 0 is not valid base64"),
        (["data:image/png;base64,\u00e4\u00e4\u00e4\u00e4"], "frame 0 is not valid base64"),
        ([as_list(PNG)[0] + ","], "frame 1 is not a PNG or JPEG"),
        (as_list(PNG, b"GIF89a" + bytes(99)), "frame 1 is not a PNG or JPEG"),
        (as_list(b"no image at all"), "frame 0 is not a PNG or JPEG"),
        (as_list(encoded(video()[0], "BMP")), "frame 0 is not a PNG or JPEG"),
        (as_list(PNG, PNG[:-400]), "frame 1 cannot be decoded"),
        (as_list(JPEG[: len(JPEG) // 2]), "frame 0 cannot be decoded"),
        (as_list(PNG[:20]), "frame 0"),
        (as_list(encoded(video()[0], mode="RGBA")), "mode RGBA"),
        (as_list(encoded(video()[0], mode="P")), "mode P"),
        (as_list(PNG, OTHER_SIZE), "frame 1 is 56x56, frame 0 56x84"),
        (as_list(*[PNG] * 769), "at most 768 frames"),
        (as_images(*[PNG] * 769), "at most 768 frames"),
        (as_list(bomb(5000, 5000, 1)), "at most 16777216 pixels"),
        (as_list(bomb(20000, 20000, 1)), "frame 0"),
        (as_list(encoded(video(1, 1, 300)[0])), "200:1"),
        ([f"{VIDEO_FILE};base64,{b64(b'#EXTM3U')}"], "cannot be decoded"),
        ([f"{VIDEO_FILE};base64,"], "cannot be decoded"),
        ([f"{VIDEO_FILE};base64,{b64(PNG)}"], "cannot be decoded"),
    ],
)
def test_anything_else_is_refused_with_words(urls: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        clip_of_urls(urls, 2.0, FRAMES, LIMITS)


def test_an_animated_image_is_refused() -> None:
    file = io.BytesIO()
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video()]
    pictures[0].save(file, "PNG", save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match="got 4 of mode RGB"):
        clip_of_urls(as_list(file.getvalue()), 2.0, FRAMES, LIMITS)


@pytest.mark.parametrize(
    "data",
    [bomb(4000, 4000), bomb(30000, 30000, 200)],
    ids=["two frames of it", "larger than a frame may be"],
)
def test_a_bomb_is_refused_before_it_is_decoded(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 x 4,000 black pixels are 48 MB decoded; the limits below take no two of them."""

    def load(_: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert len(data) < 200_000
    with pytest.raises(ValueError, match=r"expected at most|frame 0"):
        clip_of_urls(as_list(data, data), 2.0, FRAMES, MediaLimits(max_video_pixels=20_000_000))


def test_ten_thousand_frames_are_refused_before_the_first_is_opened() -> None:
    url = f"{IMAGE_LIST};base64,{','.join(['!'] * 10_000)}"
    with pytest.raises(ValueError, match="at most 768 frames"):
        clip_of_urls([url], 2.0, FRAMES, LIMITS)


def test_a_file_is_bounded_too() -> None:
    urls = [f"{VIDEO_FILE};base64,{b64(mp4(video(12)))}"]
    for limits, words in (
        (MediaLimits(max_frames=11), "at most 11 frames"),
        (MediaLimits(max_pixels=56 * 84 - 1), "4703 pixels a frame"),
        (MediaLimits(max_video_pixels=12 * 56 * 84 - 1), "12 of 56x84"),
    ):
        with pytest.raises(ValueError, match=words):
            clip_of_urls(urls, 2.0, FRAMES, limits)
    clip_of_urls(urls, 2.0, FRAMES, MediaLimits(12, 56 * 84, 12 * 56 * 84))


def test_frames_that_grow_on_the_way_are_refused_before_they_are_decoded() -> None:
    """An MP4 that says 64x64, whose fifth packet brings H.264 parameter sets of 512x512."""
    av = pytest.importorskip("av")
    streams = [io.BytesIO(), io.BytesIO()]
    for file, side in zip(streams, (64, 512), strict=True):
        with av.open(file, "w", format="h264") as raw:
            encoder = raw.add_stream("libx264", rate=4)
            encoder.width = encoder.height = side
            encoder.pix_fmt, encoder.options = (
                "yuv420p",
                {"preset": "ultrafast", "x264-params": "repeat-headers=1:bframes=0"},
            )
            for _ in range(4):
                raw.mux(
                    encoder.encode(
                        av.VideoFrame.from_ndarray(
                            np.zeros((side, side, 3), np.uint8), format="rgb24"
                        )
                    )
                )
            raw.mux(encoder.encode())
    whole = io.BytesIO()
    with av.open(whole, "w", format="mp4") as container:
        time, stream = 0, None
        for file in streams:
            file.seek(0)
            with av.open(file, format="h264") as raw:
                stream = stream or container.add_stream_from_template(raw.streams.video[0])
                for packet in raw.demux(video=0):
                    if packet.size:
                        packet.stream, packet.pts, packet.dts, time = (
                            stream,
                            time,
                            time,
                            time + 25000,
                        )
                        container.mux(packet)
    url = f"{VIDEO_FILE};base64,{b64(whole.getvalue())}"
    with pytest.raises(ValueError, match="frame 4 is 512x512"):
        clip_of_urls([url], 2.0, FRAMES, LIMITS)
    with pytest.raises(ValueError, match="the video cannot be decoded"):
        clip_of_urls([url], 2.0, FRAMES, MediaLimits(max_pixels=64 * 64))


def test_an_unknown_codec_is_refused() -> None:
    data = mp4(video(12)).replace(b"avc1", b"zzzz")
    with pytest.raises(ValueError, match="codec that is not known"):
        clip_of_urls([f"{VIDEO_FILE};base64,{b64(data)}"], 2.0, FRAMES, LIMITS)


def test_a_file_that_is_cut_off_is_refused() -> None:
    data = mp4(video(12))
    with pytest.raises(ValueError, match="cannot be decoded"):
        clip_of_urls([f"{VIDEO_FILE};base64,{b64(data[: len(data) // 2])}"], 2.0, FRAMES, LIMITS)


@pytest.mark.parametrize("key", ["max_frames", "max_pixels", "max_video_pixels"])
def test_limits_are_positive(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: expected at least 1, got 0"):
        MediaLimits(**{key: 0})
