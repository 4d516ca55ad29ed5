"""Video files with transparent pixels: they are shown on black, whatever colour lies under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from written_videos import moving, write

from fastgrpo.rewards.media.video_files import read_video


def first_frame(path: Path) -> Tensor:
    return read_video(path, lambda count, fps: [0], decoder="pyav").frames[0].int()


def test_transparent_pixels_are_black(tmp_path: Path) -> None:
    source = np.zeros((3, 32, 48, 4), np.uint8)
    source[...] = (200, 100, 50, 255)
    source[:, :, 24:, 3] = 0
    source[:, :16, :24, 3] = 128
    frame = first_frame(write(tmp_path / "a.mov", source, "png", "rgba"))
    assert frame[:, 31, 0].tolist() == [200, 100, 50]
    assert frame[:, 0, 0].tolist() == [100, 50, 25]
    assert frame[:, :, 24:].max() == 0


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.webm", "libvpx", "yuva420p"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
        ("a.apng", "apng", "rgba"),
        ("a.gif", "", ""),
    ],
)
def test_no_codec_shows_the_colour_under_transparent_pixels(
    tmp_path: Path, name: str, codec: str, pixels: str
) -> None:
    source = np.full((6, 32, 48, 4), (200, 40, 90, 255), np.uint8)
    source[:, :, 24:, 3] = 0
    source[range(6), 0, 0, 0] = range(0, 180, 30)

    def prepare(stream: Any) -> None:
        if codec == "libvpx":
            stream.codec_context.options = {"auto-alt-ref": "0"}  # it has none with alpha

    if codec:
        write(tmp_path / name, source, codec, pixels, prepare=prepare)
    else:  # PyAV's encoder makes no transparent pixels
        first, *rest = (Image.fromarray(frame) for frame in source)
        first.save(tmp_path / name, save_all=True, append_images=rest, duration=100, disposal=2)
    frame = first_frame(tmp_path / name)
    assert (frame[:, 16, 8] - torch.tensor([200, 40, 90])).abs().max() <= 8
    assert frame[:, :, 32:].max() <= 2


def test_transparency_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", moving(4, 64, 64), "libsvtav1")
    size = bytes.fromhex("b08140ba8140")  # Matroska's PixelWidth and PixelHeight of 64
    assert path.read_bytes().count(size) == 1
    alpha = bytes.fromhex("53c08101ec80")  # AlphaMode 1, and nothing
    path.write_bytes(path.read_bytes().replace(size, alpha))
    with pytest.raises(ValueError, match=r"a\.mkv: its transparency cannot be read: .* av1"):
        first_frame(path)
    picture = write(tmp_path / "a.avif", moving(4, 64, 64), "libsvtav1")
    with pytest.raises(ValueError, match=r"a\.avif: an image, no video"):
        first_frame(picture)
