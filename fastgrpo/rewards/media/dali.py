"""Decoding of video files by NVIDIA's DALI (2.4): NVDEC on a GPU, libavcodec on the CPU, which has
fewer codecs there.

Colours. DALI reads every file as BT.601, and tells full range from limited. PyAV's swscale heeds
the matrix that a file names, and reads one that names none as BT.601. So the frames of a file that
names BT.709 or BT.2020 are corrected here by a 3 x 3 matrix. The remaining difference between the
two decoders is stated and measured in tests/dali.

Only the CPU path has been run, not the one with NVDEC.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CODECS = {"cpu": ("vp8", "vp9", "mjpeg"), "cuda": ("vp8", "vp9", "mjpeg", "h264", "hevc", "av1")}
"""What DALI decodes on each device."""

_BT601 = (2, 5, 6)  # AVColorSpace: unspecified, BT.470BG, SMPTE 170M
_LUMA = {5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}
"""Weights of red and blue in BT.601, 709 and 2020."""


@functools.cache
def version() -> str:
    """The version of the installed DALI, or ""."""
    try:
        return str(importlib.import_module("nvidia.dali").__version__)
    except ImportError:
        return ""


def unsupported_reason(
    codec: str,
    pixels: str,
    matrix: int,
    size: tuple[int, int],
    file_bytes: int,
    device: torch.device,
) -> str:
    """Why DALI does not decode a file, or "".

    Args:
        codec: libavcodec's name.
        pixels: libavcodec's name of the pixel format.
        matrix: AVColorSpace.
        size: Height and width.
        file_bytes: Of the file.
        device: Where DALI would decode.
    """
    if not version():
        return 'DALI is not installed (pip install "fastgrpo[dali]")'
    if codec not in CODECS[device.type]:
        return f"the codec {codec}, on {device.type}"
    if pixels not in ("yuv420p", "yuvj420p") or matrix not in (*_BT601, *_LUMA):
        return f"the pixel format {pixels} of colour matrix {matrix}"
    if device.type == "cuda" and (size[0] % 2 or size[1] % 2):
        return f"the odd size {size[1]} x {size[0]}"
    return f"{file_bytes} bytes" if file_bytes >= 2**31 else ""  # it counts them in 32 bits


def decode(file: Path, indices: list[int], device: torch.device, matrix: int) -> Tensor:
    """The frames of these indices, in that order.

    Args:
        file: The video file.
        indices: Of n frames.
        device: Where to decode.
        matrix: AVColorSpace of the file.

    Returns:
        [n, 3, H, W] uint8 on the device.

    Raises:
        RuntimeError: Whatever DALI has against the file, or an index past its end.
    """
    dali = importlib.import_module("nvidia.dali.experimental.dynamic")
    where = dali.Device("gpu", device.index) if device.type == "cuda" else dali.Device("cpu")
    with where, dali.EvalMode.sync_full:
        data = dali.tensor(np.fromfile(file, dtype=np.uint8))
        # pad_mode: otherwise a frame that does not exist comes back black.
        decoded = dali.decoders.video(
            data, device=where.device_type, frames=indices, pad_mode="none"
        ).torch(copy=True)
    frames: Tensor = decoded.permute(0, 3, 1, 2).contiguous()
    return frames if matrix in _BT601 else to_matrix(frames, matrix)


def to_matrix(frames: Tensor, matrix: int) -> Tensor:
    """Turn frames that were made from YCbCr as if by BT.601 into those that `matrix` gives.

    Exact up to rounding, where the first conversion did not clip.

    Args:
        frames: [n, 3, H, W] uint8, changed in place.
        matrix: 1 for BT.709, 9 for BT.2020.
    """
    change = (_to_rgb(matrix) @ torch.linalg.inv(_to_rgb(5))).float().to(frames.device)
    for frame in frames:  # one by one: in float they take four times the memory
        frame.copy_((change @ frame.flatten(1).float()).round_().clamp_(0, 255).view_as(frame))
    return frames


def _to_rgb(matrix: int) -> Tensor:
    """[3, 3] float64: (R, G, B) = it times (Y, Cb, Cr), Y in [0, 1] and chroma in [-1/2, 1/2]."""
    red, blue = _LUMA[matrix]
    green = 1 - red - blue
    to_green = [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green]
    rows = [[1, 0, 2 * (1 - red)], to_green, [1, 2 * (1 - blue), 0]]
    return torch.tensor(rows, dtype=torch.float64)
