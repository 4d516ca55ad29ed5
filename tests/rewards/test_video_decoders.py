"""Which decoder reads a video file, with a fake of DALI; its colours. The real one: tests/dali."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from written_videos import moving, write

from fastgrpo.errors import UserError
from fastgrpo.rewards.media import dali
from fastgrpo.rewards.media.video_files import read_video


def every(step: int) -> Callable[[int, float], list[int]]:
    return lambda count, fps: list(range(0, count, step))


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "version", lambda: "")


@pytest.fixture
def fake_dali(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A DALI that returns black frames; the indices that it was asked for."""
    asked: list[list[int]] = []

    def decode(file: Path, indices: list[int], device: torch.device, matrix: int) -> torch.Tensor:
        asked.append(indices)
        return torch.zeros(len(indices), 3, 48, 64, dtype=torch.uint8)

    monkeypatch.setattr(dali, "version", lambda: "2.4.0")
    monkeypatch.setattr(dali, "decode", decode)
    return asked


def test_without_dali(tmp_path: Path, no_dali: None) -> None:
    path = write(tmp_path / "a.webm", moving(), "libvpx-vp9")
    assert read_video(path, every(4)).decoder.startswith("pyav")
    with pytest.raises(
        ValueError, match=r"a\.webm: DALI does not decode it: DALI is not installed"
    ):
        read_video(path, every(4), decoder="dali")


def test_auto_takes_dali_for_what_it_decodes(tmp_path: Path, fake_dali: list[list[int]]) -> None:
    turned = write(
        tmp_path / "a.mov",
        moving(),
        "mjpeg",
        "yuvj420p",
        prepare=lambda stream: stream.set_display_rotation(90),
    )
    video = read_video(turned, every(4))
    assert (video.decoder, video.num_frames, video.frames.shape, video.frames.max()) == (
        "dali 2.4.0 (cpu)",
        12,
        (3, 3, 64, 48),
        0,
    )
    assert fake_dali == [[0, 4, 8]]
    h264 = write(tmp_path / "a.mp4", moving(), "libx264")
    assert read_video(h264, every(4)).decoder.startswith("pyav")
    assert read_video(turned, every(4), decoder="pyav").decoder.startswith("pyav")
    with pytest.raises(ValueError, match="the codec h264, on cpu"):
        read_video(h264, every(4), decoder="dali")
    assert len(fake_dali) == 1


def test_where_dali_fails_auto_takes_pyav(
    tmp_path: Path, fake_dali: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("Assert failed\nand a stack")

    monkeypatch.setattr(dali, "decode", fail)
    path = write(tmp_path / "a.webm", moving(), "libvpx-vp9")
    assert read_video(path, every(4)).decoder.startswith("pyav")
    with pytest.raises(ValueError, match=r"DALI does not decode it: Assert failed$"):
        read_video(path, every(4), decoder="dali")


def test_frames_of_another_size_from_dali_are_refused(
    tmp_path: Path, fake_dali: list[list[int]]
) -> None:
    path = write(tmp_path / "a.webm", moving(height=32), "libvpx-vp9")
    with pytest.raises(UserError, match=r"a\.webm: expected frames of 64 x 32, DALI made 64 x 48$"):
        read_video(path, every(4))


@pytest.mark.parametrize(
    ("changed", "device", "message"),
    [
        ({}, "cpu", ""),
        ({"codec": "h264"}, "cuda", ""),
        ({"codec": "h264"}, "cpu", "the codec h264, on cpu"),
        ({"codec": "gif"}, "cuda", "the codec gif, on cuda"),
        ({"pixels": "yuva420p"}, "cpu", "the pixel format yuva420p"),
        ({"matrix": 9}, "cpu", ""),
        ({"matrix": 8}, "cpu", "colour matrix 8"),
        ({"size": (33, 48)}, "cpu", ""),
        ({"size": (33, 48)}, "cuda", "the odd size 48 x 33"),
        ({"file_bytes": 2**31}, "cpu", "2147483648 bytes"),
    ],
)
def test_what_dali_refuses(
    fake_dali: Any, changed: dict[str, Any], device: str, message: str
) -> None:
    usual: dict[str, Any] = {
        "codec": "vp9",
        "pixels": "yuv420p",
        "matrix": 2,
        "size": (32, 48),
        "file_bytes": 1000,
    }
    said = dali.unsupported_reason(**(usual | changed), device=torch.device(device))
    assert (message in said) if message else not said
    assert usual["codec"] in dali.CODECS["cpu"]


@pytest.mark.parametrize(
    ("matrix", "coefficients"),
    [(1, (1.5748, 0.1873, 0.4681, 1.8556)), (9, (1.4746, 0.1646, 0.5714, 1.8814))],
)
def test_another_matrix_than_bt601(matrix: int, coefficients: tuple[float, ...]) -> None:
    """The coefficients are those printed in BT.709 and BT.2020, and for BT.601 in the JPEG
    standard.
    """
    luma, blue, red = (
        np.random.default_rng(0).uniform((0.3, -0.15, -0.15), (0.7, 0.15, 0.15), (500, 3)).T
    )

    def rgb(
        to_red: float, blue_to_green: float, red_to_green: float, to_blue: float
    ) -> NDArray[np.float64]:
        return 255 * np.stack(
            [
                luma + to_red * red,
                luma - blue_to_green * blue - red_to_green * red,
                luma + to_blue * blue,
            ]
        )

    wrong = torch.from_numpy(rgb(1.402, 0.344136, 0.714136, 1.772).round().astype(np.uint8)).view(
        1, 3, 20, 25
    )
    right = dali.to_matrix(wrong.clone(), matrix).view(3, 500).double()
    assert (right - torch.from_numpy(rgb(*coefficients))).abs().max() < 1.6
    assert (wrong.view(3, 500) - right).abs().max() > 8
