"""Frames of video files: decoded by DALI where it is installed and takes the file, by PyAV
elsewhere; only those that are wanted are kept.

PyAV reads every file first in either case: its packets (not decoded) give the true number of
frames and their times, its first frame the size, the colours and the rotation. Neither decoder
tone-maps HDR, and pixels are taken for square.
"""

from __future__ import annotations

import bisect
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrpo.rewards.media import dali

CONTAINERS = "mov,matroska,webm,avi,flv,asf,mpegts,mpeg,ogg,ivf,gif,apng"
"""libavformat's demuxers that may read a file. Not among them: playlists, which open other files;
raw streams, which have no times; images; and text, which would be drawn as ANSI art.
"""
Decoder = Literal["auto", "dali", "pyav"]


@dataclass(frozen=True)
class Limits:
    """What a file may have; any other is refused before its frames are decoded."""

    min_frames: int = 2
    """A shorter one is no video."""
    max_frames: int = 100_000
    """Frames in the file."""
    max_pixels: int = 4096 * 2304
    """Of a frame."""
    max_seconds: float = 3600.0
    """From the first frame to the last."""
    max_bytes: int = 8 * 2**30
    """Of the file, and of the decoded frames that are kept."""

    def __post_init__(self) -> None:
        for key in ("min_frames", "max_frames", "max_pixels", "max_seconds", "max_bytes"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(
                    f"limits.{key}: expected a positive number, got {getattr(self, key)!r}"
                )


@dataclass(frozen=True)
class Video:
    """The wanted frames of a file.

    frames: [n, 3, H, W] uint8 RGB, upright. fps: of the file, on average; num_frames: in the
    file. The frames kept come at n / num_frames * fps a second. decoder: what decoded them, with
    its version.
    """

    frames: Tensor
    fps: float
    num_frames: int
    decoder: str


@dataclass(frozen=True)
class _Look:
    """What the first decoded frame says. height, width: as stored, before any rotation. matrix:
    AVColorSpace.
    """

    height: int
    width: int
    codec: str
    pixels: str
    matrix: int
    turn: tuple[bool, bool, bool]


@dataclass(frozen=True)
class _Timeline:
    """times: seconds of each frame, ascending. tail: how long the last one is shown, 0 if unknown.
    nominal: frames a second, as named by the file, or None. plain: every packet is a frame to
    show.
    """

    times: list[float]
    tail: float
    nominal: float | None
    plain: bool


def read_video(
    path: str | Path,
    indices_of: Callable[[int, float], list[int]],
    *,
    decoder: Decoder = "auto",
    device: torch.device | str = "cpu",
    limits: Limits = Limits(),
) -> Video:
    """Decode the frames of a file that `indices_of(number of frames, fps)` names, in its order.

    A video whose frames are not evenly spaced is taken as one at its mean rate: frame i is the
    one on screen in the middle of the i-th of so many equal parts of its time. Transparent
    pixels are shown on black.

    Args:
        decoder: auto takes DALI where it is installed and decodes such a file, else PyAV; dali
            refuses the other files. device: where the frames shall lie; on a GPU, DALI decodes
            there.

    Raises:
        FileNotFoundError, ValueError: one line that names the file: missing, empty, no video,
            audio only, cut off or damaged, too short, or beyond a limit; a rotation by other
            than quarter turns; frames of changing size; or what `indices_of` raises.
    """
    file, device = Path(path).absolute(), torch.device(device)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: expected a video file, found none")
    size = file.stat().st_size
    if not 0 < size <= limits.max_bytes:
        raise ValueError(
            f"{path}: "
            + (
                f"too large: {size} bytes, max_bytes is {limits.max_bytes}"
                if size
                else "empty: 0 bytes"
            )
        )
    with _errors_of(path):
        look, timeline = _look(file, limits), _scan(file, limits)
        refusal = "not asked for" if decoder == "pyav" else _refusal(look, timeline, size, device)
        if decoder == "dali" and refusal:
            raise ValueError(f"DALI does not decode it: {refusal}; decoder auto would take PyAV")
        fps, wanted = _choose(timeline, look, indices_of, limits)
        frames = (
            None
            if refusal
            else _decode_with_dali(file, wanted, look, device, fall_back=decoder == "auto")
        )
        name = (
            f"pyav {av.__version__}" if frames is None else f"dali {dali.version()} ({device.type})"
        )
        if frames is None:
            frames, times = _decode_with_pyav(file, wanted, look, limits)
            if len(times) != len(timeline.times):  # some packets held no frame, or two
                timeline = _Timeline(times, timeline.tail, timeline.nominal, False)
                fps, wanted = _choose(timeline, look, indices_of, limits)
                frames, _ = _decode_with_pyav(file, wanted, look, limits)
        return Video(_upright(frames.to(device), look.turn), fps, len(timeline.times), name)


def constant_rate(
    times: Sequence[float], tail: float, nominal: float | None
) -> tuple[float, list[int]]:
    """A video's mean rate, and which of its frames to take for each of as many frames at that
    constant rate.

    Args:
        times: seconds of its n frames, ascending. tail: how long the last one is shown, 0 if
            unknown. nominal: the rate that the file names; it is kept to where the times agree
            within 1 %, for times are rounded (to milliseconds in WebM).

    Returns:
        Frames a second, and n indices: 0 ... n - 1 unless some frame is more than half a frame
            early or late.

    Raises:
        ValueError: no rate can be told.
    """
    n = len(times)
    gap = (times[-1] - times[0]) / (n - 1) if n > 1 else tail
    if not 0 < gap < math.inf:
        if nominal and n == 1:
            return nominal, [0]
        raise ValueError("its frames have no times")
    order = list(range(n))
    if max(abs(t - times[0] - i * gap) for i, t in enumerate(times)) > gap / 2:
        span = times[-1] - times[0] + (tail or gap)
        gap = span / n
        order = [bisect.bisect_right(times, times[0] + (i + 0.5) * gap) - 1 for i in order]
    return (nominal if nominal and abs(nominal * gap - 1) < 0.01 else 1 / gap), order


@contextmanager
def _errors_of(path: str | Path) -> Iterator[None]:
    """Every error about the file as a ValueError of one line that begins with its path."""
    try:
        yield
    except av.FFmpegError as error:
        raise ValueError(
            f"{path}: no video file of a format that is read, or cut off or damaged ({error.strerror})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


@contextmanager
def _open(file: Path, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. max_pixels also bounds what libavcodec allocates while it
    looks for the stream's properties.
    """
    allowed = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    with av.open(
        str(file), container_options=allowed, options={"max_pixels": str(limits.max_pixels)}
    ) as container:
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & stream.disposition.attached_pic:
            raise ValueError("no video in it: audio only, or damaged")
        if stream.codec_context is None:
            raise ValueError("its video is of a codec that is not known here")
        height, width = stream.codec_context.height, stream.codec_context.width
        if not height * width:
            raise ValueError(
                "its frames have no size that could be read: damaged, or beyond max_pixels"
            )
        if height * width > limits.max_pixels:
            raise ValueError(
                f"too large: {width} x {height} pixels, max_pixels is {limits.max_pixels}"
            )
        stream.thread_type = "AUTO"
        yield container, stream


def _look(file: Path, limits: Limits) -> _Look:
    with _open(file, limits) as (container, stream):
        for frame in container.decode(stream):
            codec = stream.codec_context.codec.canonical_name
            return _Look(
                frame.height,
                frame.width,
                codec,
                frame.format.name,
                int(frame.colorspace),
                _turn(frame),
            )
    raise ValueError("no frame in it")


def _scan(file: Path, limits: Limits) -> _Timeline:
    """The frames' times, from the packets alone: a container's own count may be missing or wrong."""
    shown: list[tuple[int | None, int | None]] = []
    lengths, plain = [], True
    with _open(file, limits) as (container, stream):
        declared = (container.duration or 0) / av.time_base
        if declared > limits.max_seconds:
            raise ValueError(f"too long: {declared:.1f} s, max_seconds is {limits.max_seconds:g}")
        for packet in container.demux(stream):
            if not packet.size:  # the end
                continue
            if packet.is_corrupt:
                raise ValueError(f"cut off or damaged: packet {len(shown) + 1} is not whole")
            if packet.is_discard:  # before the start that an edit list sets: decoded, not shown
                plain = False
                continue
            if len(shown) == limits.max_frames:
                raise ValueError(f"too long: more than max_frames = {limits.max_frames}")
            shown.append((packet.pts, packet.dts))
            lengths.append(packet.duration or 0)
        unit, nominal = float(stream.time_base), float(stream.average_rate or 0)
        name, alone = container.format.name, len(container.streams) == 1
    stamps = next((list(column) for column in zip(*shown, strict=True) if None not in column), None)
    if (
        stamps is None
    ):  # none of the formats above, as far as seen; then the file's own rate must do
        return _Timeline(
            [i / nominal for i in range(len(shown))] if nominal else [0.0] * len(shown),
            0.0,
            nominal,
            plain,
        )
    last = max(range(len(stamps)), key=stamps.__getitem__)
    times = sorted(stamp * unit for stamp in stamps)
    seconds = times[-1] - times[0] + lengths[last] * unit
    if seconds > limits.max_seconds:
        raise ValueError(f"too long: {seconds:.1f} s, max_seconds is {limits.max_seconds:g}")
    _check_end(
        file,
        name,
        declared - times[-1] - lengths[last] * unit if alone else 0.0,
        seconds / len(times),
    )
    return _Timeline(times, lengths[last] * unit, nominal, plain)


def _check_end(file: Path, container: str, missing: float, gap: float) -> None:
    """ValueError for a file that was cut off between two packets, where its format lets one see it:
    Matroska, WebM and FLV name their length, AVI its bytes, and GIF ends with a semicolon; MPEG
    and Ogg do not. missing: seconds that are not there; gap: seconds a frame.
    """
    if container.startswith(("matroska", "flv")) and missing > 1.5 * gap:
        raise ValueError(f"cut off: {missing:.3f} s of the length that it names are not there")
    with file.open("rb") as data:
        if (
            container == "avi"
            and int.from_bytes(data.read(8)[4:], "little") + 8 > file.stat().st_size
        ):
            raise ValueError("cut off: it names more bytes than it has")
        data.seek(-min(64, file.stat().st_size), 2)
        if container == "gif" and not data.read().rstrip(b"\0").endswith(b";"):
            raise ValueError("cut off: a GIF without its end")


def _refusal(look: _Look, timeline: _Timeline, size: int, device: torch.device) -> str:
    """Why DALI does not take the file, or an empty text."""
    if not timeline.plain:
        return "it has packets that are not shown"
    return dali.refusal(
        look.codec, look.pixels, look.matrix, (look.height, look.width), size, device
    )


def _choose(
    timeline: _Timeline, look: _Look, indices_of: Callable[[int, float], list[int]], limits: Limits
) -> tuple[float, list[int]]:
    """The rate, and which frames to keep, in order."""
    n = len(timeline.times)
    if n < limits.min_frames:
        raise ValueError(f"too short: {n} frame{'s' * (n != 1)}, min_frames is {limits.min_frames}")
    fps, order = constant_rate(timeline.times, timeline.tail, timeline.nominal)
    indices = indices_of(n, fps)
    if not indices or min(indices) < 0 or max(indices) >= n:
        raise ValueError(f"expected indices of its {n} frames, got {indices[:8]}")
    kept = len(indices) * 3 * look.height * look.width
    if kept > limits.max_bytes:
        raise ValueError(
            f"too large: {len(indices)} frames of {look.width} x {look.height} take {kept} bytes, max_bytes is {limits.max_bytes}"
        )
    return fps, [order[i] for i in indices]


def _decode_with_dali(
    file: Path, wanted: list[int], look: _Look, device: torch.device, fall_back: bool
) -> Tensor | None:
    """The wanted frames [n, 3, H, W] uint8; where DALI fails, None to fall back on PyAV, which
    reads the file or says what is wrong.
    """
    try:
        frames = dali.decode(file, wanted, device, look.matrix)
    except RuntimeError as error:
        if fall_back:
            return None
        raise ValueError(f"DALI does not decode it: {str(error).splitlines()[0]}") from error
    if frames.shape[2:] != (look.height, look.width):
        raise ValueError(
            f"expected frames of {look.width} x {look.height}, DALI made {frames.shape[3]} x {frames.shape[2]}"
        )
    return frames


def _decode_with_pyav(
    file: Path, wanted: list[int], look: _Look, limits: Limits
) -> tuple[Tensor, list[float]]:
    """The wanted frames [n, 3, H, W] uint8, and the times of all. Decodes to the end, so that
    damage anywhere is found.
    """
    places: dict[int, list[int]] = {}
    for place, index in enumerate(wanted):
        places.setdefault(index, []).append(place)
    frames = torch.empty(len(wanted), 3, look.height, look.width, dtype=torch.uint8)
    times: list[float] = []
    with _open(file, limits) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"cut off or damaged: frame {len(times) + 1} is not whole")
            if (frame.height, frame.width) != (look.height, look.width):
                raise ValueError(
                    f"its frames change size, from {look.width} x {look.height} to {frame.width} x {frame.height}"
                )
            if len(times) in places:
                frames[places[len(times)]] = torch.from_numpy(_rgb(frame)).permute(2, 0, 1)
            times.append(len(times) / 25 if frame.time is None else frame.time)
    return frames, times


def _rgb(frame: Any) -> NDArray[np.uint8]:
    """[H, W, 3], on black where the frame is transparent."""
    if not frame.format.has_palette and not any(
        component.is_alpha for component in frame.format.components
    ):
        return frame.to_ndarray(format="rgb24")
    rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
    return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """Transpose, then flip rows, then columns: what a frame's display matrix asks for. ValueError
    for another angle.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack(
        "<9i", bytes(data)
    )  # a pixel (p, q) is shown at (a p + c q, b p + d q)
    if b == c == 0 and a and d:
        return False, d < 0, a < 0
    if a == d == 0 and b and c:
        return True, b < 0, c < 0
    raise ValueError(f"rotated by {frame.rotation} degrees; expected a quarter turn")


def _upright(frames: Tensor, turn: tuple[bool, bool, bool]) -> Tensor:
    transpose, rows, columns = turn
    frames = frames.transpose(2, 3) if transpose else frames
    flipped = [dim for dim, flip in ((2, rows), (3, columns)) if flip]
    return (frames.flip(flipped) if flipped else frames).contiguous()
