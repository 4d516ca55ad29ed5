"""Videos and stills decode to the frames that were given."""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.training.sample_files import format_scores, match_samples, read_samples, save_samples

STAGES = ("visual_quality", "temporal_coherence", "text_alignment")


def decode(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        ), stream


def blocks(count: int, num_frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 videos [N, T, 3, H, W] of 4 large patches each, whose colours change from frame to
    frame.
    """
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(
        30, 226, (count, num_frames, 3, 2, 2), generator=generator, dtype=torch.uint8
    )
    rows, columns = torch.arange(height) * 2 // height, torch.arange(width) * 2 // width
    return colors[..., rows, :][..., columns]


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "fps", "size"),
    [
        (8, 16, 16, 8, (256, 256)),  # tiny: enlarged 16 times
        (5, 15, 21, 15, (270, 378)),  # 18 and not 18.06 times: odd sides need an even factor
        (3, 255, 301, 7.5, (510, 602)),
        (1, 256, 320, 24, (256, 320)),
        (4, 257, 299, 15, (258, 300)),  # large and odd: the last line is repeated
        (9, 240, 416, 15, (480, 832)),
    ],
)
def test_mp4_decodes_to_the_frames(
    tmp_path: Path, num_frames: int, height: int, width: int, fps: float, size: tuple[int, int]
) -> None:
    videos = blocks(2, num_frames, height, width)
    save_samples(tmp_path, videos, ["first", "second"], fps)
    for index, name in enumerate(("00_first.mp4", "01_second.mp4")):
        frames, stream = decode(tmp_path / name)
        assert frames.shape == (num_frames, *size, 3)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(fps)
        for row, column in (
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 1),
        ):  # the middle of each patch, away from the codec's blur at edges
            inside = (slice(None), (2 * row + 1) * size[0] // 4, (2 * column + 1) * size[1] // 4)
            wanted = videos[
                index, :, :, (2 * row + 1) * height // 4, (2 * column + 1) * width // 4
            ].numpy()
            assert np.abs(frames[inside].astype(int) - wanted.astype(int)).max() <= 8


@pytest.mark.parametrize(
    ("num_frames", "chosen"),
    [
        (1, [0]),
        (8, list(range(8))),
        (15, list(range(0, 15, 2))),
        (53, [0, 7, 15, 22, 30, 37, 45, 52]),
    ],
)
def test_stills_are_exact(tmp_path: Path, num_frames: int, chosen: list[int]) -> None:
    videos = torch.randint(
        0,
        256,
        (1, num_frames, 3, 9, 16),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )
    save_samples(tmp_path, videos, ["x"], 15)
    still = np.asarray(Image.open(tmp_path / "00_x.png"))
    assert still.shape == (9, 16 * len(chosen), 3)
    for position, frame in enumerate(chosen):
        assert np.array_equal(
            still[:, 16 * position : 16 * (position + 1)], videos[0, frame].permute(1, 2, 0).numpy()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float_videos_are_rounded_to_levels(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([-0.5, 0.0, 0.25, 0.5, 1.0, 7.0], dtype=dtype)
    videos = values.view(1, 1, 1, 1, 6).expand(1, 1, 3, 4, 6)
    save_samples(tmp_path, videos, ["x"], 15)
    assert np.asarray(Image.open(tmp_path / "00_x.png"))[0, :, 0].tolist() == [
        0,
        0,
        64,
        128,
        255,
        255,
    ]


def test_samples_json_and_file_names(tmp_path: Path) -> None:
    prompts = ["A red Square, moving  right!", "été / ../../etc", "猫", "word " * 40]
    scores = torch.tensor(
        [[0.25, 0.5], [1.0, math.nan], [0.0, 0.0], [0.1, 0.2]], dtype=torch.float64
    )
    save_samples(tmp_path / "a" / "b", blocks(4, 9, 16, 16), prompts, 7.5, scores, ("vq", "mq"))
    summary = read_samples(tmp_path / "a" / "b")
    stems = ["00_a-red-square-moving-right", "01_t-etc", "02_sample", "03_" + "word-" * 9 + "wor"]
    assert summary == {
        "fps": 7.5,
        "stages": ["vq", "mq"],
        "samples": [
            {
                "prompt": prompt,
                "scores": row,
                "video": f"{stem}.mp4",
                "still": f"{stem}.png",
                "still_frames": 8,
            }
            for prompt, row, stem in zip(
                prompts, [[0.25, 0.5], [1.0, None], [0.0, 0.0], [0.1, 0.2]], stems, strict=True
            )
        ],
    }
    names = {f"{stem}.{kind}" for stem in stems for kind in ("mp4", "png")}
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == names | {"samples.json"}
    assert (
        json.loads((tmp_path / "a" / "b" / "samples.json").read_text(encoding="utf-8"))["samples"][
            2
        ]["prompt"]
        == "猫"
    )


@pytest.mark.parametrize(
    ("videos", "arguments", "message"),
    [
        (
            torch.zeros(1, 4, 16, 16, 3),
            {},
            r"expected videos \[N, T, 3, H, W\], got \[1, 4, 16, 16, 3\]",
        ),
        (torch.zeros(1, 0, 3, 16, 16), {}, "expected videos"),
        (torch.full((1, 2, 3, 8, 8), math.nan), {}, "finite"),
        (
            torch.zeros(1, 2, 3, 8, 8, dtype=torch.int64),
            {},
            "uint8 or float videos, got torch.int64",
        ),
        (torch.zeros(2, 2, 3, 8, 8), {}, "expected 2 prompts, got 1"),
        (
            torch.zeros(1, 2, 3, 8, 8),
            {"scores": [[0.1], [0.2]], "stages": ["a"]},
            r"scores \[1, 1\].* got \[1, 1\]",
        ),
        (
            torch.zeros(1, 2, 3, 8, 8),
            {"scores": [[0.1, 0.2]], "stages": ["a"]},
            r"scores \[1, 1\].* got \[2\]",
        ),
        (torch.zeros(1, 2, 3, 8, 8), {"scores": [[0.1]]}, r"scores \[1, 0\]"),
    ],
)
def test_wrong_samples_are_refused_before_anything_is_written(
    tmp_path: Path, videos: torch.Tensor, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_samples(tmp_path / "x", videos, ["one"], 8, **arguments)
    assert not (tmp_path / "x").exists()


def test_repeated_prompts_are_matched_in_order() -> None:
    def summary(prompts: str) -> dict:
        return {"samples": [{"prompt": p, "n": n} for n, p in enumerate(prompts)]}

    rows = match_samples([summary("abaa"), summary("aab"), summary("b")])
    found = [[entry and entry["n"] for entry in row] for row in rows]
    assert found == [[0, 0, None], [1, 2, 0], [2, 1, None], [3, None, None]]


def test_scores_read_as_text() -> None:
    assert format_scores([0.714, None, 1.0]) == "0.71  –  1.00"
    assert format_scores(None) == ""
