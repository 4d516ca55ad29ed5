"""Video files of frames that a test knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def write(
    path: Path,
    frames: Iterable[Frames],
    codec: str,
    pixels: str = "yuv420p",
    rate: int = 8,
    times: Sequence[int] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    **container_options: str,
) -> Path:
    """Encode frames [H, W, 3 or 4]; times: of each frame in units of 1 / rate."""
    with av.open(path, "w", container_options=container_options) as container:
        stream: Any = None
        for i, frame in enumerate(frames):
            if stream is None:
                stream = container.add_stream(codec, rate=rate)
                stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], pixels
                stream.codec_context.time_base = Fraction(1, rate)
                prepare(stream)
            picture = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(frame), format="rgba" if frame.shape[2] == 4 else "rgb24"
            )
            picture.pts, picture.time_base = (i if times is None else times[i]), Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def moving(count: int = 12, height: int = 48, width: int = 64) -> Frames:
    """Smooth waves that move by about a tenth of their length a frame."""
    y, x, t = np.mgrid[0:height, 0:width, 0:count].astype(np.float64)
    waves = [np.sin((x + 7 * t) / 11), np.cos((y - 6 * t) / 9), np.sin((x + y + 8 * t) / 15)]
    return np.moveaxis((128 + 100 * np.stack(waves, -1)).round().astype(np.uint8), 2, 0)
