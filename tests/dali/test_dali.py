"""DALI against PyAV: `make test-dali`, which installs DALI apart from the ordinary environment;
without it these tests are skipped.

What the two may differ by is stated here, in levels of 255: on pictures of smooth waves and a
hard-edged square of saturated colour, whose 4:2:0 chroma PyAV's swscale interpolates and the one
of DALI repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

pytest.importorskip("nvidia.dali")

from fastgrpo.rewards.media import dali
from fastgrpo.rewards.media.video_files import Decoder, Video, read_video

MEAN, MOST, AT_EDGES = 3.0, 12.0, 120.0
"""The mean difference, that of 99 % of values, and the greatest."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with NVDEC")


def moving(count: int = 20, height: int = 96, width: int = 128) -> NDArray[np.uint8]:
    y, x, t = np.mgrid[0:height, 0:width, 0:count].astype(np.float64)
    waves = [np.sin((x + 7 * t) / 17), np.cos((y - 6 * t) / 13), np.sin((x + y + 8 * t) / 23)]
    frames = np.moveaxis((128 + 100 * np.stack(waves, -1)).round().astype(np.uint8), 2, 0)
    for i, frame in enumerate(frames):
        frame[8:24, 4 * i : 4 * i + 20] = (230, 30, 30)
    return frames


def write(
    path: Path,
    codec: str,
    pixels: str = "yuv420p",
    frames: NDArray[np.uint8] | None = None,
    matrix: int = 0,
    value_range: int = 0,
    times: list[int] | None = None,
) -> Path:
    """matrix and value_range: libavutil's AVColorSpace and AVColorRange, which the file shall name;
    0: neither. times: in eighths.
    """
    options = {"libvpx-vp9": {"crf": "4", "b": "0"}, "libvpx": {"crf": "4", "b": "4M"}}.get(
        codec, {}
    )
    with av.open(path, "w") as container:
        stream: Any = container.add_stream(codec, rate=8, options=options)
        frames = moving() if frames is None else frames
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        colors = {"dst_colorspace": matrix, "dst_color_range": value_range} if matrix else {}
        if matrix:
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, value_range
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format=pixels, **colors
            )
            picture.pts, picture.time_base = (times[i] if times else i), Fraction(1, 8)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def both(
    path: Path,
    device: str = "cpu",
    indices: Callable[[int], list[int]] = lambda n: list(range(0, n, 3)),
) -> tuple[Video, Video]:
    def read(decoder: Decoder) -> Video:
        return read_video(path, lambda n, fps: indices(n), decoder=decoder, device=device)

    ours, theirs = read("pyav"), read("dali")
    assert theirs.decoder == f"dali {dali.version()} ({device})"
    assert (ours.fps, ours.num_frames, ours.frames.shape) == (
        theirs.fps,
        theirs.num_frames,
        theirs.frames.shape,
    )
    assert (ours.frames.device, ours.frames.dtype) == (theirs.frames.device, theirs.frames.dtype)
    return ours, theirs


def differences(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    difference = (ours.double() - theirs.double()).abs().flatten()
    return (
        difference.mean().item(),
        torch.quantile(difference, 0.99).item(),
        difference.max().item(),
    )


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    mean, most, greatest = differences(ours, theirs)
    print(f"mean {mean:.2f}, 99 % within {most:.0f}, greatest {greatest:.0f}")
    assert mean < MEAN
    assert most <= MOST
    assert greatest <= AT_EDGES


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mp4", "libvpx-vp9", "yuv420p"),
        ("a.mkv", "libvpx", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mov", "mjpeg", "yuvj420p"),
    ],
)
def test_the_same_frames(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    ours, theirs = both(write(tmp_path / name, codec, pixels))
    assert_close(ours.frames, theirs.frames)
    for i in range(1, len(ours.frames)):  # a frame's neighbours are farther off than the tolerance
        assert differences(ours.frames[i], theirs.frames[i - 1])[0] > 3 * MEAN


@pytest.mark.parametrize("value_range", [1, 2])
@pytest.mark.parametrize("matrix", [1, 5, 6, 9])
def test_the_matrix_and_range_that_a_file_names(
    tmp_path: Path, matrix: int, value_range: int
) -> None:
    ours, theirs = both(
        write(tmp_path / "a.mp4", "libvpx-vp9", matrix=matrix, value_range=value_range)
    )
    assert_close(ours.frames, theirs.frames)
    if matrix in (1, 9):  # DALI by itself takes it for BT.601
        path, indices = tmp_path / "a.mp4", list(range(0, 20, 3))
        assert (
            differences(ours.frames, dali.decode(path, indices, torch.device("cpu"), 2))[0]
            > 2 * MEAN
        )


def test_an_odd_size_is_nearly_equal(tmp_path: Path) -> None:
    """Both take swscale's slow and exact path then: equal to the bit with DALI 2.4.0 and PyAV
    18.1.0.
    """
    ours, theirs = both(
        write(tmp_path / "a.webm", "libvpx-vp9", frames=moving(height=95, width=127))
    )
    assert differences(ours.frames, theirs.frames)[2] <= 2


def test_order_and_repeats(tmp_path: Path) -> None:
    ours, theirs = both(
        write(tmp_path / "a.webm", "libvpx-vp9"), indices=lambda n: [n - 1, 4, 4, 0]
    )
    assert_close(ours.frames, theirs.frames)
    assert torch.equal(theirs.frames[1], theirs.frames[2])


def test_a_variable_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", "libvpx-vp9", times=[i + 30 * (i > 9) for i in range(20)])
    ours, theirs = both(path, indices=lambda n: list(range(n)))
    assert_close(ours.frames, theirs.frames)
    assert len({frame.numpy().tobytes() for frame in theirs.frames}) < 20


def test_many_threads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.webm", "libvpx-vp9")
    with ThreadPoolExecutor(4) as pool:
        videos = list(
            pool.map(
                lambda _: read_video(path, lambda n, fps: [0, 9, 19], decoder="dali"), range(16)
            )
        )
    assert all(torch.equal(video.frames, videos[0].frames) for video in videos)


def test_what_dali_does_not_decode_goes_to_pyav(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", "libx264")
    assert read_video(path, lambda n, fps: [0, 1]).decoder.startswith("pyav")
    with pytest.raises(ValueError, match="the codec h264, on cpu"):
        read_video(path, lambda n, fps: [0, 1], decoder="dali")
    with pytest.raises(RuntimeError):
        dali.decode(path, [0, 1], torch.device("cpu"), 2)


def test_a_frame_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out-of-bounds"):
        dali.decode(write(tmp_path / "a.webm", "libvpx-vp9"), [0, 20], torch.device("cpu"), 2)


@needs_gpu
@pytest.mark.parametrize("matrix", [0, 1])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "libvpx-vp9", "libvpx"])
def test_the_same_frames_on_a_gpu(tmp_path: Path, codec: str, matrix: int) -> None:
    """Not run on the machine that this was written on, which has none."""
    frames = moving(height=192, width=256)
    ours, theirs = both(
        write(tmp_path / "a.mkv", codec, frames=frames, matrix=matrix, value_range=bool(matrix)),
        "cuda",
    )
    assert_close(ours.frames, theirs.frames)
