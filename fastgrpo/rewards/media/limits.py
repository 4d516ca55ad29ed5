"""Which video files are read, and by which decoder; without torch, for `score --help`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastgrpo.errors import require

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
        for key, value in vars(self).items():
            require(0 < value < math.inf, f"limits.{key}", "a positive number", value)
