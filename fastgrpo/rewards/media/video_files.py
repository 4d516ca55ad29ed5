"""Frames of video files: decoded by DALI if it is installed and takes the file, else by PyAV; only
those that are wanted are kept.

In either case PyAV reads the file first: its packets (not decoded) give the true number of frames
and their times, its first frame the size, the colours and the rotation. Neither decoder tone-maps
HDR, and pixels are taken for square.
"""

from __future__ import annotations

import bisect
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrpo.errors import UserError
from fastgrpo.rewards.media import dali
from fastgrpo.rewards.media.limits import Decoder, Limits

CONTAINERS = "mov,matroska,webm,avi,flv,asf,mpegts,mpeg,ogg,ivf,gif,apng"
"""libavformat's demuxers that may read a file. Not among them: playlists, which open other files;
raw streams, which have no times; images; and text, which would be drawn as ANSI art.
"""
_IMAGE_BRANDS = ("avif", "avis", "heic", "heix", "hevc", "hevx", "mif1", "msf1")
"""Images that the demuxer of MP4 reads too. Their transparency is in a track of its own."""
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""libavcodec's own decoders of these skip the plane of transparency."""


@dataclass(frozen=True)
class Video:
    """The wanted frames of a file.

    Attributes:
        frames: [n, 3, H, W] uint8 RGB, upright.
        fps: Of the file, on average; the frames kept come at n / num_frames * fps per second.
        num_frames: In the file.
        decoder: What decoded them, with its version.
    """

    frames: Tensor
    fps: float
    num_frames: int
    decoder: str


@dataclass(frozen=True)
class _Format:
    """What the first decoded frame says.

    Attributes:
        height, width: As stored, before any rotation.
        codec, pixels: libavcodec's names of the codec and the pixel format.
        matrix: AVColorSpace.
        turn: Transpose, then flip rows, then flip columns.
    """

    height: int
    width: int
    codec: str
    pixels: str
    matrix: int
    turn: tuple[bool, bool, bool]


@dataclass(frozen=True)
class _Timeline:
    """When a file's frames are shown.

    Attributes:
        times: Seconds of each frame, ascending.
        tail: How long the last one is shown, 0 if unknown.
        nominal: Frames per second as the file names them, or None.
        plain: Every packet is a frame to show.
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
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> Video:
    """Decode some frames of a file.

    A video whose frames are not evenly spaced is read as one at its mean rate: frame i is the one
    on screen in the middle of the i-th of so many equal parts of its time. Transparent pixels are
    shown on black, as players show them: colour times alpha, the colour not yet multiplied by it.

    Args:
        path: The file.
        indices_of: (number of frames, fps) -> indices of the wanted frames, in the wanted order.
        decoder: auto uses DALI if it is installed and decodes such a file, else PyAV; dali refuses
            the other files.
        device: Where the frames shall lie; on a GPU, DALI decodes there.
        limits: What a file may have.

    Raises:
        FileNotFoundError, ValueError: One line that names the file: missing, empty, no video, audio
            only, cut off or damaged, too short, or beyond a limit; a rotation by other than quarter
            turns; frames of changing size; or what `indices_of` raises.
    """
    file, device = Path(path).absolute(), torch.device(device)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: expected a video file, found none")
    with _errors_of(path):
        size = file.stat().st_size
        if not size:
            raise UserError("empty: 0 bytes")
        if size > limits.max_bytes:
            raise UserError(f"too large: {size} bytes, max_bytes is {limits.max_bytes}")
        format, timeline = _read_format(file, limits), _scan(file, limits)
        reason = "not asked for"
        if decoder != "pyav":
            reason = _unsupported_reason(file, format, timeline, device)
        if decoder == "dali" and reason:
            raise UserError(f"DALI does not decode it: {reason}; decoder auto would use PyAV")
        fps, wanted = _select(timeline, format, indices_of, limits)
        frames, name = None, f"dali {dali.version()} ({device.type})"
        if not reason:
            frames = _decode_with_dali(file, wanted, format, device, fall_back=decoder == "auto")
        if frames is None:
            name = f"pyav {av.__version__}"
            frames, times = _decode_with_pyav(file, wanted, format, limits)
            if len(times) != len(timeline.times):  # some packets held no frame, or two
                timeline = _Timeline(times, timeline.tail, timeline.nominal, False)
                fps, wanted = _select(timeline, format, indices_of, limits)
                frames, _ = _decode_with_pyav(file, wanted, format, limits)
        return Video(_upright(frames.to(device), format.turn), fps, len(timeline.times), name)


def constant_rate(
    times: Sequence[float], tail: float, nominal: float | None
) -> tuple[float, list[int]]:
    """A video's mean rate, and which of its frames to take for each of as many frames at that
    constant rate.

    Args:
        times: Seconds of its n frames, ascending.
        tail: How long the last one is shown, 0 if unknown.
        nominal: The rate that the file names. It is used if the times agree within 1 %, or within
            a millisecond in all, to which they are rounded in WebM.

    Returns:
        Frames per second, and n indices: 0 ... n - 1 unless some frame is more than half a frame
        early or late.

    Raises:
        ValueError: No rate can be told.
    """
    n = len(times)
    gap = (times[-1] - times[0]) / (n - 1) if n > 1 else tail
    if not 0 < gap < math.inf:
        if nominal and n == 1:
            return nominal, [0]
        raise UserError("its frames have no times")
    order = list(range(n))
    if max(abs(t - times[0] - i * gap) for i, t in enumerate(times)) > gap / 2:
        span = times[-1] - times[0] + (tail or gap)
        gap = span / n
        order = [bisect.bisect_right(times, times[0] + (i + 0.5) * gap) - 1 for i in order]
    if nominal and abs(gap - 1 / nominal) <= max(0.01 / nominal, 1.001e-3 / max(n - 1, 1)):
        return nominal, order
    return 1 / gap, order


@contextmanager
def _errors_of(path: str | Path) -> Iterator[None]:
    """Turn every error about the file into a ValueError of one line that begins with its path."""
    try:
        yield
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: no video file of a format that is read, or cut off or damaged "
            f"({error.strerror})"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


@contextmanager
def _open(file: Path, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream."""
    allowed = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    # This also bounds what libavcodec allocates while it looks for the stream's properties.
    most = {"max_pixels": str(limits.max_pixels)}
    with av.open(str(file), container_options=allowed, options=most) as container:
        if container.metadata.get("major_brand") in _IMAGE_BRANDS:
            raise UserError("an image, no video")
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & stream.disposition.attached_pic:
            raise UserError("no video in it: audio only, or damaged")
        if stream.codec_context is None:
            raise UserError("its video is of a codec that is not known here")
        height, width = stream.codec_context.height, stream.codec_context.width
        if not 0 < height * width <= limits.max_pixels:  # with `most`, a larger one may be 0 x 0
            raise UserError(
                f"frames of {width} x {height} pixels: damaged, or beyond max_pixels, "
                f"{limits.max_pixels}"
            )
        stream.thread_type = "AUTO"
        yield container, stream


def _decoded(container: Any, stream: Any, limits: Limits) -> Iterator[Any]:
    """The frames of a stream, with their transparency if it has any."""
    if stream.metadata.get("alpha_mode") != "1":
        yield from container.decode(stream)
        return
    codec = stream.codec_context.codec.canonical_name
    if _ALPHA_DECODERS.get(codec) not in av.codecs_available:
        raise UserError(f"its transparency cannot be read: alpha of the codec {codec}")
    context: Any = av.CodecContext.create(_ALPHA_DECODERS[codec], "r")
    context.options = {"max_pixels": str(limits.max_pixels)}
    for packet in container.demux(stream):
        yield from context.decode(packet if packet.size else None)


def _read_format(file: Path, limits: Limits) -> _Format:
    with _open(file, limits) as (container, stream):
        for frame in _decoded(container, stream, limits):
            return _Format(
                frame.height,
                frame.width,
                stream.codec_context.codec.canonical_name,
                frame.format.name,
                int(frame.colorspace),
                _turn(frame),
            )
    raise UserError("no frame in it")


def _scan(file: Path, limits: Limits) -> _Timeline:
    """The frames' times, from the packets: a container's own count may be missing or wrong."""
    shown: list[tuple[int | None, int | None]] = []
    lengths, plain = [], True
    with _open(file, limits) as (container, stream):
        declared = (container.duration or 0) / av.time_base
        if declared > limits.max_seconds:  # before hours of packets are read
            raise UserError(f"too long: {declared:.1f} s, max_seconds is {limits.max_seconds:g}")
        for packet in container.demux(stream):
            if not packet.size:  # the end
                continue
            if packet.is_corrupt:
                raise UserError(f"cut off or damaged: packet {len(shown) + 1} is not whole")
            if packet.is_discard:  # before the start that an edit list sets: decoded, not shown
                plain = False
                continue
            if len(shown) == limits.max_frames:
                raise UserError(f"too long: more than max_frames = {limits.max_frames}")
            shown.append((packet.pts, packet.dts))
            lengths.append(packet.duration or 0)
        unit, nominal = float(stream.time_base), float(stream.average_rate or 0)
        name, alone = container.format.name, len(container.streams) == 1
    stamps = next((column for column in zip(*shown, strict=True) if None not in column), ())
    if not stamps:  # then the file's own rate must do
        times = [i / nominal if nominal else 0.0 for i in range(len(shown))]
        return _Timeline(times, 0.0, nominal, plain)
    tail = lengths[stamps.index(max(stamps))] * unit
    times = sorted(stamp * unit for stamp in stamps)
    seconds = times[-1] - times[0] + tail
    if seconds > limits.max_seconds:
        raise UserError(f"too long: {seconds:.1f} s, max_seconds is {limits.max_seconds:g}")
    missing = declared - times[-1] - tail if alone else 0.0
    _check_end(file, name, missing, seconds / len(times))
    return _Timeline(times, tail, nominal, plain)


def _check_end(file: Path, container: str, missing: float, gap: float) -> None:
    """Refuse a file that was cut off between two packets, if its format lets one see it: Matroska,
    WebM and FLV name their length, AVI its bytes, and GIF ends with a semicolon; MPEG and Ogg do
    not.

    Args:
        file: The file.
        container: libavformat's name.
        missing: Seconds that are not there.
        gap: Seconds per frame.
    """
    if container.startswith(("matroska", "flv")) and missing > 1.5 * gap:
        raise UserError(f"cut off: {missing:.3f} s of the length that it names are not there")
    size = file.stat().st_size
    with file.open("rb") as data:
        if container == "avi" and int.from_bytes(data.read(8)[4:], "little") + 8 > size:
            raise UserError("cut off: it names more bytes than it has")
        data.seek(-min(64, size), 2)
        if container == "gif" and not data.read().rstrip(b"\0").endswith(b";"):
            raise UserError("cut off: a GIF without its end")


def _unsupported_reason(
    file: Path, format: _Format, timeline: _Timeline, device: torch.device
) -> str:
    """Why DALI does not take the file, or ""."""
    if not timeline.plain:
        return "it has packets that are not shown"
    size, file_bytes = (format.height, format.width), file.stat().st_size
    return dali.unsupported_reason(
        format.codec, format.pixels, format.matrix, size, file_bytes, device
    )


def _select(
    timeline: _Timeline,
    format: _Format,
    indices_of: Callable[[int, float], list[int]],
    limits: Limits,
) -> tuple[float, list[int]]:
    """The rate, and which frames to keep, in order."""
    n = len(timeline.times)
    if n < limits.min_frames:
        raise UserError(f"too short: {n} frame{'s' * (n != 1)}, min_frames is {limits.min_frames}")
    fps, order = constant_rate(timeline.times, timeline.tail, timeline.nominal)
    indices = indices_of(n, fps)
    assert 0 <= min(indices) <= max(indices) < n
    kept = len(indices) * 3 * format.height * format.width
    if kept > limits.max_bytes:
        raise UserError(
            f"too large: {len(indices)} frames of {format.width} x {format.height} take {kept} "
            f"bytes, max_bytes is {limits.max_bytes}"
        )
    return fps, [order[i] for i in indices]


def _decode_with_dali(
    file: Path, wanted: list[int], format: _Format, device: torch.device, fall_back: bool
) -> Tensor | None:
    """The wanted frames [n, 3, H, W] uint8. If DALI fails: None to fall back on PyAV, which reads
    the file or says what is wrong.
    """
    try:
        frames = dali.decode(file, wanted, device, format.matrix)
    except RuntimeError as error:
        if fall_back:
            return None
        raise UserError(f"DALI does not decode it: {str(error).splitlines()[0]}") from error
    if frames.shape[2:] != (format.height, format.width):
        raise UserError(
            f"expected frames of {format.width} x {format.height}, "
            f"DALI made {frames.shape[3]} x {frames.shape[2]}"
        )
    return frames


def _decode_with_pyav(
    file: Path, wanted: list[int], format: _Format, limits: Limits
) -> tuple[Tensor, list[float]]:
    """The wanted frames [n, 3, H, W] uint8, and the times of all. Decodes to the end, so that
    damage anywhere is found.
    """
    is_wanted = set(wanted)
    indices = torch.tensor(wanted)
    frames = torch.empty(len(wanted), 3, format.height, format.width, dtype=torch.uint8)
    times: list[float] = []
    with _open(file, limits) as (container, stream):
        for frame in _decoded(container, stream, limits):
            if frame.is_corrupt:
                raise UserError(f"cut off or damaged: frame {len(times) + 1} is not whole")
            if (frame.height, frame.width) != (format.height, format.width):
                raise UserError(
                    f"its frames change size, from {format.width} x {format.height} to "
                    f"{frame.width} x {frame.height}"
                )
            if len(times) in is_wanted:
                frames[indices == len(times)] = torch.from_numpy(_rgb(frame)).permute(2, 0, 1)
            times.append(len(times) / 25 if frame.time is None else frame.time)
    return frames, times


def _rgb(frame: Any) -> NDArray[np.uint8]:
    """[H, W, 3], on black where the frame is transparent."""
    format = frame.format
    if not format.has_palette and not any(component.is_alpha for component in format.components):
        return frame.to_ndarray(format="rgb24")
    rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
    return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """Transpose, then flip rows, then columns: what a frame's display matrix asks for."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    # A pixel (p, q) is shown at (a p + c q, b p + d q).
    a, b, _, c, d, *_ = struct.unpack("<9i", bytes(data))
    if b == c == 0 and a and d:
        return False, d < 0, a < 0
    if a == d == 0 and b and c:
        return True, b < 0, c < 0
    raise UserError(f"rotated by {frame.rotation} degrees; expected a quarter turn")


def _upright(frames: Tensor, turn: tuple[bool, bool, bool]) -> Tensor:
    transpose, rows, columns = turn
    frames = frames.transpose(2, 3) if transpose else frames
    flipped = [dim for dim, flip in ((2, rows), (3, columns)) if flip]
    return (frames.flip(flipped) if flipped else frames).contiguous()
