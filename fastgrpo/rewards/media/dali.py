"""Decoding of video files by NVIDIA's DALI (2.4): NVDEC on a GPU, libavcodec on the CPU, which has
fewer codecs there.

Colours. DALI takes every file for BT.601, and knows full range from limited. PyAV's swscale
heeds the matrix that a file names, and takes one that names none for BT.601. So the frames of a
file that names BT.709 or BT.2020 are put right here by a 3 x 3 matrix. What is left between the
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
_LUMA = {
    5: (0.299, 0.114),
    1: (0.2126, 0.0722),
    9: (0.2627, 0.0593),
}  # the weights of red and blue in BT.601, 709 and 2020


@functools.cache
def version() -> str:
    """The version of DALI that can be imported, or an empty text."""
    try:
        return str(importlib.import_module("nvidia.dali").__version__)
    except ImportError:
        return ""


def refusal(
    codec: str,
    pixels: str,
    matrix: int,
    size: tuple[int, int],
    file_bytes: int,
    device: torch.device,
) -> str:
    """Why DALI does not decode such a file, or an empty text.

    Args:
        codec, pixels: libavcodec's names of the codec and of the pixel format. matrix:
            AVColorSpace. size: height and width.
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
    """The frames [n, 3, H, W] uint8 of these indices, in that order, on the device; matrix:
    AVColorSpace of the file.

    Raises:
        RuntimeError: whatever DALI has against the file, an index past its end among it.
    """
    dali = importlib.import_module("nvidia.dali.experimental.dynamic")
    where = dali.Device("gpu", device.index) if device.type == "cuda" else dali.Device("cpu")
    with where, dali.EvalMode.sync_full:
        data = dali.tensor(np.fromfile(file, dtype=np.uint8))
        # pad_mode: otherwise a frame that is not there comes back black.
        decoded = dali.decoders.video(
            data, device=where.device_type, frames=indices, pad_mode="none"
        ).torch(copy=True)
    frames: Tensor = decoded.permute(0, 3, 1, 2).contiguous()
    return frames if matrix in _BT601 else to_matrix(frames, matrix)


def to_matrix(frames: Tensor, matrix: int) -> Tensor:
    """Frames [n, 3, H, W] uint8, in place, that were made from YCbCr as if by BT.601, as if made by
    `matrix` (1: BT.709, 9: BT.2020).

    Exact but for rounding, where the first conversion did not clip.
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
    return torch.tensor(
        [[1, 0, 2 * (1 - red)], to_green, [1, 2 * (1 - blue), 0]], dtype=torch.float64
    )
