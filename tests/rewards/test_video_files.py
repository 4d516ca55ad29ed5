"""Video files: every codec and container against the frames that went in, times, rotation, and bad
files by the dozen.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written_videos import Frames, moving, write

from fastgrpo.rewards.media import video_files
from fastgrpo.rewards.media.limits import Limits
from fastgrpo.rewards.media.video_files import Video, constant_rate, read_video


def grey(values: Iterable[int], height: int = 32, width: int = 48) -> list[Frames]:
    """A frame of one grey each: what tells frames apart through any codec."""
    return [np.full((height, width, 3), value, np.uint8) for value in values]


def every(step: int) -> Callable[[int, float], list[int]]:
    return lambda count, fps: list(range(0, count, step))


def pyav(
    path: Path, indices_of: Callable[[int, float], list[int]] | None = None, **options: Any
) -> Video:
    return read_video(path, indices_of or every(1), decoder="pyav", **options)


def greys(video: Video) -> list[int]:
    """To the nearest ten: the codecs change them by 1 or 2."""
    return (video.frames.double().mean(dim=(1, 2, 3)) / 10).round().mul(10).int().tolist()


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("b.mp4", "libsvtav1", "yuv420p"),
        ("c.mp4", "libx264", "yuv420p10le"),
        ("a.mov", "libx265", "yuv420p"),
        ("a.mkv", "libx264", "yuv422p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("b.webm", "libvpx", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("b.avi", "mpeg4", "yuv420p"),
        ("a.mpg", "mpeg2video", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.flv", "libx264", "yuv420p"),
        ("a.ogv", "libvpx", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
    ],
)
def test_every_codec_and_container(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    """The n-th frame out is the n-th in: nearer to it than to its neighbours, and near."""
    source, rate = moving(), 25 if codec == "mpeg2video" else 8
    video = pyav(write(tmp_path / name, source, codec, pixels, rate), every(3))
    assert (video.num_frames, video.frames.shape, video.frames.dtype) == (
        12,
        (4, 3, 48, 64),
        torch.uint8,
    )
    assert video.fps == pytest.approx(
        rate, rel=0.01 if codec == "gif" else 1e-9
    )  # GIF has hundredths of a second
    assert video.decoder == f"pyav {av.__version__}"
    error = (
        (video.frames.permute(0, 2, 3, 1)[:, None].double() - torch.from_numpy(source).double())
        .abs()
        .mean(dim=(2, 3, 4))
    )
    assert error.argmin(1).tolist() == [0, 3, 6, 9]
    assert error.amin(1).max() < 20


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("a.apng", "apng", "rgb24"), ("a.mov", "png", "rgb24"), ("a.mkv", "ffv1", "bgr0")],
)
@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_without_loss_not_a_bit_differs(
    tmp_path: Path, name: str, codec: str, pixels: str, size: tuple[int, int]
) -> None:
    source = moving(5, *size)
    video = pyav(write(tmp_path / name, source, codec, pixels), lambda count, fps: [3, 0, 0, 4])
    assert torch.equal(video.frames, torch.from_numpy(source).permute(0, 3, 1, 2)[[3, 0, 0, 4]])
    assert video.frames.is_contiguous()


@pytest.mark.parametrize("matrix", [1, 5])
@pytest.mark.parametrize("value_range", [1, 2])
def test_the_colour_matrix_and_range_that_a_file_names_are_heeded(
    tmp_path: Path, matrix: int, value_range: int
) -> None:
    source = np.concatenate(
        [
            np.full((2, 32, 16, 3), color, np.uint8)
            for color in ((200, 40, 40), (40, 190, 60), (50, 60, 200))
        ],
        axis=2,
    )
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=8, options={"crf": "2", "b": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, value_range
        for frame in source:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(
                stream.encode(
                    picture.reformat(
                        format="yuv420p", dst_colorspace=matrix, dst_color_range=value_range
                    )
                )
            )
        container.mux(stream.encode())
    inside = [8, 24, 40]  # away from edges, where chroma is shared
    got = pyav(path).frames[0, :, 16, inside].int()
    assert (got - torch.from_numpy(source[0, 16, inside]).T.int()).abs().max() <= 6


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_turned_video_is_shown_upright(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    source = moving(3)
    path = write(
        tmp_path / "a.mov",
        source,
        "png",
        "rgb24",
        prepare=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored),
    )
    expected = np.rot90(source, degrees // 90, axes=(1, 2))  # counter-clockwise, both
    expected = expected[:, :, ::-1] if mirrored else expected
    video = pyav(path)
    assert torch.equal(video.frames, torch.from_numpy(expected.copy()).permute(0, 3, 1, 2))
    assert video.frames.is_contiguous()


def test_only_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    asked: list[tuple[int, float]] = []

    def indices_of(count: int, fps: float) -> list[int]:
        asked.append((count, fps))
        return [7, 2]

    video = pyav(write(tmp_path / "a.mp4", grey(range(20, 220, 20)), "libx264"), indices_of)
    assert asked == [(10, 8.0)]
    assert greys(video) == [160, 60]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_variable_rate_is_seen_at_its_mean_rate(tmp_path: Path, name: str) -> None:
    """Five frames at 0, 1, 2, 3 and 11 tenths of a second, the last one shown for as long as its
    format says: by hand, below.
    """
    path = write(
        tmp_path / name, grey([40, 80, 120, 160, 200]), "libx264", rate=10, times=[0, 1, 2, 3, 11]
    )
    video = pyav(path)
    # 12 tenths in five parts of 2.4, whose middles are 1.2, 3.6, 6.0, 8.4 and 10.8.
    assert video.fps == pytest.approx(5 / 1.2, rel=0.02)
    assert greys(video) == [80, 160, 160, 160, 160]


def test_constant_rate_by_hand() -> None:
    assert constant_rate([0.0, 0.5, 1.0, 1.5], 0.5, None) == (2.0, [0, 1, 2, 3])
    assert constant_rate([3.0, 3.5, 4.0], 0.0, 0.0) == (2.0, [0, 1, 2])
    assert constant_rate([0.0, 0.033, 0.067, 0.1], 0.033, 30.0) == (
        30.0,
        [0, 1, 2, 3],
    )  # milliseconds, as in WebM
    assert constant_rate([0.0, 0.033, 0.067, 0.1], 0.033, 25.0)[0] == pytest.approx(
        30.0
    )  # the file's own rate is wrong
    assert constant_rate([0.0, 1.0, 2.0, 10.0], 2.0, 1.0) == (pytest.approx(4 / 12), [1, 2, 2, 3])
    assert constant_rate([0.0], 0.0, 24.0) == (24.0, [0])
    assert constant_rate([0.0, 0.017], 0.017, 60.0) == (60.0, [0, 1])
    assert constant_rate([0.0, 0.018], 0.018, 60.0)[0] == pytest.approx(1 / 0.018)
    assert constant_rate([0.0], 0.5, 0.0) == (2.0, [0])
    with pytest.raises(ValueError, match="no times"):
        constant_rate([1.0, 1.0, 1.0], 0.0, 25.0)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    st.integers(0, 1000),
    st.floats(-100, 100),
)
def test_constant_rate_takes_what_is_on_screen(gaps: list[int], tail: int, start: float) -> None:
    times = [start + sum(gaps[:i]) / 1000 for i in range(len(gaps) + 1)]
    n, mean = len(times), (times[-1] - times[0]) / len(gaps)
    fps, order = constant_rate(times, tail / 1000, None)
    if max(abs(t - times[0] - i * mean) for i, t in enumerate(times)) < 0.49 * mean:
        assert (fps, order) == (pytest.approx(1 / mean), list(range(n)))
    assert len(order) == n
    assert order == sorted(order)
    assert 0 <= order[0] <= order[-1] < n
    if order != list(range(n)):
        for i, index in enumerate(order):
            middle = times[0] + (i + 0.5) / fps
            near = {bisect.bisect_right(times, middle + e) - 1 for e in (-1e-9, 1e-9)}
            assert index in near


@pytest.mark.parametrize("count", [0, 7, 5000])
def test_a_container_that_counts_wrong_is_not_believed(tmp_path: Path, count: int) -> None:
    path = write(tmp_path / "a.avi", grey(range(20, 220, 20)), "mjpeg", "yuvj420p")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, count)
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, count)
    path.write_bytes(data)
    with av.open(path) as container:
        assert container.streams.video[0].frames == count
    video = pyav(path, every(3))
    assert (video.num_frames, video.fps, greys(video)) == (10, 8.0, [20, 80, 140, 200])


def test_packets_without_a_frame_are_not_counted(tmp_path: Path) -> None:
    """MPEG-4 has packets that say "nothing changed", for which libavcodec gives no frame."""
    frames, path = grey(range(20, 220, 20)), tmp_path / "a.mkv"
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=8, options={"g": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        packets = [
            packet
            for frame in frames
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        ]
        packets += stream.encode()
        nothing = av.Packet(bytes.fromhex("000001b6") + bytes([0b01_0_1_101_1, 0b0_0111111]))
        nothing.stream, nothing.time_base = stream, packets[0].time_base
        for i, packet in enumerate([*packets[:5], nothing, *packets[5:]]):
            packet.pts = packet.dts = i
            container.mux(packet)
    with av.open(path) as container:
        assert sum(bool(packet.size) for packet in container.demux(video=0)) == 11
    video = pyav(path)
    assert (video.num_frames, greys(video)) == (10, list(range(20, 220, 20)))


def image(path: Path) -> Path:
    with av.open(path, "w", format="image2") as container:
        stream: Any = container.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = 32, 48, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey([9])[0], format="rgb24")))
    return path


def sound(path: Path) -> Path:
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def two_sizes(path: Path) -> Path:
    """Two videos of different sizes, one after the other."""
    part = path.with_name("part.mpg")
    parts = [
        write(part, moving(8, height), "mpeg2video", rate=25).read_bytes() for height in (32, 48)
    ]
    path.write_bytes(b"".join(parts))
    return path


def askew(path: Path) -> Path:
    return write(
        path, moving(3), "png", "rgb24", prepare=lambda stream: stream.set_display_rotation(45)
    )


Maker = Callable[[Path], Path]
UNREAD = "no video file of a format that is read"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfirst.ts\n#EXT-X-ENDLIST\n"


def text(content: str, beside: str = "") -> Maker:
    """A file of text, and a video `beside` it."""

    def make(path: Path) -> Path:
        if beside:
            write(path.with_name(beside), moving(), "libx264")
        path.write_text(content)
        return path

    return make


def encoded(
    codec: str,
    pixels: str = "yuv420p",
    share: float = 1.0,
    change: Callable[[bytes], bytes] = bytes,
    **options: str,
) -> Maker:
    """The first `share` of a changed video file."""

    def make(path: Path) -> Path:
        data = change(write(path, moving(), codec, pixels, **options).read_bytes())
        path.write_bytes(data[: int(share * len(data))])
        return path

    return make


BAD: dict[str, tuple[Maker, str]] = {
    "missing.mp4": (lambda path: path, "expected a video file, found none"),
    "folder.mp4": (lambda path: (path.mkdir(), path)[1], "expected a video file, found none"),
    "empty.mp4": (text(""), "empty"),
    "text.mp4": (text("not a video\n" * 100), UNREAD),
    "text.txt": (text("libavformat would draw this\n" * 100), UNREAD),
    "page.html": (text("<html>404</html>"), UNREAD),
    "noise.webm": (
        lambda path: (path.write_bytes(np.random.default_rng(0).bytes(5000)), path)[1],
        "no video file",
    ),
    "playlist.m3u8": (text(PLAYLIST, "first.ts"), UNREAD),
    "playlist.mp4": (text(PLAYLIST, "first.ts"), UNREAD),
    "files.ffconcat": (text("ffconcat version 1.0\nfile first.ts\n", "first.ts"), UNREAD[:25]),
    "image.png": (image, UNREAD),
    "raw.h264": (encoded("libx264"), UNREAD),
    "sound.mp4": (sound, "audio only"),
    "one.mp4": (
        lambda path: write(path, moving(1), "libx264"),
        "too short: 1 frame, min_frames is 2",
    ),
    "no_index.mp4": (encoded("libx264", share=0.7), "cut off or damaged"),
    "index_first.mp4": (
        encoded("libx264", share=0.7, movflags="+faststart"),
        "packet .* is not whole",
    ),
    "cut.mkv": (encoded("libx264", share=0.8), "cut off: .* s of the length"),
    "cut.webm": (encoded("libvpx-vp9", share=0.6), "cut off: .* s of the length"),
    "cut.avi": (encoded("mjpeg", "yuvj420p", share=0.7), "cut off"),
    "cut.flv": (encoded("libx264", share=0.7), "cut off"),
    "cut.gif": (encoded("gif", "rgb8", share=0.7), "a GIF without its end"),
    "header.mp4": (encoded("libx264", share=0.02), "cut off or damaged"),
    "zeros.webm": (
        encoded("libvpx-vp9", change=lambda data: data[:600] + bytes(2000) + data[2600:]),
        "cut off|damaged",
    ),
    "sizes.mpg": (two_sizes, "change size"),
    "askew.mov": (askew, "rotated by 45 degrees"),
    "codec.mp4": (
        encoded("libx264", change=lambda data: data.replace(b"avc1", b"zzzz")),
        "a codec that is not known here",
    ),
    "huge.gif": (
        encoded("gif", "rgb8", change=lambda d: d[:6] + struct.pack("<HH", 15000, 15000) + d[10:]),
        "beyond max_pixels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_with_its_name(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    path = make(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        pyav(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(min_frames=13), "too short: 12 frames, min_frames is 13"),
        (Limits(max_frames=11), "too long: more than max_frames = 11"),
        (Limits(max_seconds=1.4), r"too long: 1.5 s, max_seconds is 1.4"),
        (Limits(max_pixels=48 * 64 - 1), "beyond max_pixels, 3071"),
        (Limits(max_bytes=1000), "too large: .* bytes, max_bytes is 1000"),
        (
            Limits(max_bytes=12 * 3 * 48 * 64 - 1),
            "too large: 12 frames of 64 x 48 take 110592 bytes",
        ),
    ],
)
def test_limits_are_kept_before_anything_is_decoded(
    tmp_path: Path, limits: Limits, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mp4", moving(), "libx264")
    assert pyav(path, limits=Limits(12, 12, 48 * 64, 1.5, 12 * 3 * 48 * 64)).num_frames == 12
    monkeypatch.setattr(
        "fastgrpo.rewards.media.video_files._decode_with_pyav", lambda *args: pytest.fail("decoded")
    )
    with pytest.raises(ValueError, match=message):
        pyav(path, limits=limits)


def test_a_file_that_names_hours_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Cut off, so that to read it would end in another error."""
    times = [*range(11), 8 * 36_000]
    path = write(tmp_path / "a.mkv", moving(), "mjpeg", "yuvj420p", times=times)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"too long: 36000\.\d s, max_seconds is 3600"):
        pyav(path)


def test_packets_without_times_have_the_nominal_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, open_file = write(tmp_path / "a.mp4", moving(), "libx264"), video_files._open

    class Untimed:
        """A container whose packets have lost their times."""

        def __init__(self, container: Any) -> None:
            self.container = container

        def __getattr__(self, name: str) -> Any:
            return getattr(self.container, name)

        def demux(self, stream: Any) -> Iterator[Any]:
            flags = {"is_corrupt": False, "is_discard": False}
            for packet in self.container.demux(stream):
                yield SimpleNamespace(size=packet.size, pts=None, dts=None, duration=None, **flags)

    @contextmanager
    def open_untimed(file: Path, limits: Limits) -> Iterator[tuple[Any, Any]]:
        with open_file(file, limits) as (container, stream):
            yield Untimed(container), stream

    expected = pyav(path, every(5))
    monkeypatch.setattr(video_files, "_open", open_untimed)
    video = pyav(path, every(5))
    assert (video.fps, video.num_frames) == (8.0, 12)
    assert torch.equal(video.frames, expected.frames)


def test_limits_are_positive() -> None:
    for key in ("min_frames", "max_frames", "max_pixels", "max_seconds", "max_bytes"):
        with pytest.raises(ValueError, match=f"limits.{key}: expected a positive number, got 0"):
            Limits(**{key: 0})
