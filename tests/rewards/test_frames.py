"""What the judge sees of a video, against Qwen's own qwen-vl-utils, against the official
Qwen2.5-VL video processor, and against other makers of the same thing.

Both need torchvision, which breaks the imports of other libraries beside torch's CPU wheel. So the
comparison is in two:

- `official_frames.json` holds their results (a hash of every pixel, the grid, the frames taken, the
  rate) for the videos of CASES, and the frames taken of the lengths and rates of SAMPLED. Every run
  of the tests compares with it. This file wrote it, beside torch 2.13.0+cpu and transformers
  5.23.0: `FASTGRPO_TORCHVISION=FOLDER python tests/rewards/test_frames.py`, FOLDER from `pip
  install --no-deps --target FOLDER torchvision==0.28.0 qwen-vl-utils==0.0.14`.
- Where torchvision can be imported, by itself or from $FASTGRPO_TORCHVISION, both run in another
  process and every pixel is compared; else that test is skipped.

Apart from that: sizes against transformers' own `smart_resize`, pixels against PIL and against
float64 sums, patches against loops.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo.rewards.media.frames import (
    FrameSettings,
    clip_of_frames,
    clip_size,
    frame_indices,
    make_clip,
    patches,
    resize_in_float,
    seconds_per_grid,
)

OFFICIAL = Path(__file__).with_name("official_frames.json")
DEFAULT = FrameSettings()
SMALL = FrameSettings(fps=4.0, min_frames=2, max_frames=6, min_pixels=28 * 28, max_pixels=56 * 56)
CASES: dict[str, tuple[int, int, int, float, FrameSettings]] = {  # frames, height, width, fps
    "480x832": (53, 480, 832, 15, DEFAULT),
    "240x416": (53, 240, 416, 15, DEFAULT),
    "portrait": (49, 832, 480, 16, DEFAULT),
    "odd": (7, 333, 201, 3, DEFAULT),
    "large": (30, 720, 1280, 29.97, DEFAULT),
    "tiny": (9, 16, 16, 8, DEFAULT),
    "wide": (3, 30, 4000, 1, DEFAULT),
    "tall": (2, 601, 4, 24, DEFAULT),
    "right already": (8, 280, 364, 2, DEFAULT),
    "small budget": (21, 64, 90, 10, SMALL),
}
SAMPLED = [
    (num_frames, fps, wanted)
    for num_frames in (2, 3, 4, 5, 13, 16, 25, 53, 61, 81, 129, 997)
    for fps, wanted in (
        (8, 2.0),
        (15, 2.0),
        (15, 4.0),
        (15, 8.0),
        (29.97, 2.0),
        (30, 0.5),
        (24, 60),
    )
]
# Reads the cases, writes what qwen-vl-utils and the official processor make of each. torchvision's
# compiled part does not load beside another build of torch; all that is needed of it is that these
# two operators exist. Its reader of files, which is gone from it, is replaced by the tensor.
SCRIPT = """
import importlib.util, os, sys
import torch
sys.path.append(os.environ.get("FASTGRPO_TORCHVISION", ""))
if importlib.util.find_spec("torchvision") is None:
    sys.exit(3)
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from qwen_vl_utils import vision_process
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
def sample(video, video_fps, **how):
    vision_process.io.read_video = lambda *_, **__: (video, None, {"video_fps": video_fps})
    frames, about, rate = vision_process._read_video_torchvision({"video": "a.mp4", **how})
    return frames, about["frames_indices"].tolist(), rate
cases, sampled = torch.load(sys.argv[1])
results = {}
for name, case in cases.items():
    how = {key: case[key] for key in ("min_frames", "max_frames", "fps")}
    video, indices, rate = sample(case["video"], case["video_fps"], **how)
    size = {"shortest_edge": case["min_pixels"], "longest_edge": case["max_pixels"]}
    processor = Qwen2VLVideoProcessor(size=size, do_sample_frames=False, cap_pixels_per_frame=True)
    made = processor(videos=[video])
    results[name] = {
        "pixels": made["pixel_values_videos"], "grid": made["video_grid_thw"][0].tolist(),
        "fps": rate, "indices": indices,
    }
taken = [sample(torch.empty(n, 0), fps, fps=wanted)[1] for n, fps, wanted in sampled]
torch.save((results, taken), sys.argv[2])
"""


def picture(num_frames: int, height: int, width: int) -> Tensor:
    """[T, 3, H, W] uint8: edges of every height and direction, another shade in each frame and
    channel.
    """
    y, x = torch.arange(height)[:, None], torch.arange(width)
    plane = (7 * x + 13 * y + x * y // 16 + x * x // 50).to(torch.uint8)
    shade = (29 * torch.arange(num_frames)[:, None] + 80 * torch.arange(3)).to(torch.uint8)
    return plane + shade[:, :, None, None]  # uint8 wraps


def official(
    cases: dict[str, tuple[int, int, int, float, FrameSettings]], folder: Path
) -> tuple[dict[str, Any], list[list[int]]] | None:
    """The references' results for the cases, and the frames taken for SAMPLED, from a process of
    its own; None where there is no torchvision.
    """
    asked = {
        name: {**asdict(how), "video": picture(*video), "video_fps": fps}
        for name, (*video, fps, how) in cases.items()
    }
    torch.save((asked, SAMPLED), folder / "cases.pt")
    command = [sys.executable, "-c", SCRIPT, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        return None
    assert done.returncode == 0, done.stderr
    results: tuple[dict[str, Any], list[list[int]]] = torch.load(folder / "results.pt")
    return results


def summary(pixels: Tensor) -> dict[str, Any]:
    """A hash of every bit of float32 pixels, and some of them for the eye."""
    values = pixels.flatten()[:: max(1, pixels.numel() // 16)][:16]
    return {
        "sha256": hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest(),
        "values": [round(v, 6) for v in values.tolist()],
    }


@pytest.mark.parametrize("name", CASES)
def test_equal_to_what_the_references_made(name: str) -> None:
    """Every bit of every pixel (the CPU's resize of uint8 is integer arithmetic), the grid, the
    frames taken and their rate.
    """
    expected = json.loads(OFFICIAL.read_text())["cases"][name]
    *video, fps, how = CASES[name]
    clip = make_clip(picture(*video), fps, how)
    pixels, grid = patches(clip)
    assert frame_indices(video[0], fps, how) == expected["indices"]
    assert list(grid) == expected["grid"]
    assert clip.fps == expected["fps"]
    assert pixels.dtype == torch.float32
    assert summary(pixels) == {key: expected[key] for key in ("sha256", "values")}


def test_the_frames_taken_are_those_of_qwen_vl_utils() -> None:
    expected = json.loads(OFFICIAL.read_text())["sampled"]
    for (num_frames, fps, wanted), indices in zip(SAMPLED, expected, strict=True):
        assert frame_indices(num_frames, fps, FrameSettings(fps=wanted)) == indices


def test_equal_to_the_references_as_they_run(tmp_path: Path) -> None:
    made = official(CASES, tmp_path)
    if made is None:
        pytest.skip(
            "no torchvision here, nor in $FASTGRPO_TORCHVISION; official_frames.json is compared "
            "with instead"
        )
    results, _ = made
    for name, (*video, fps, how) in CASES.items():
        clip = make_clip(picture(*video), fps, how)
        pixels, grid = patches(clip)
        assert torch.equal(pixels, results[name]["pixels"]), name
        assert (list(grid), clip.fps) == (results[name]["grid"], results[name]["fps"]), name


@pytest.mark.parametrize(
    ("size", "wanted", "indices", "tokens"),
    [
        ((480, 832), 2.0, [0, 10, 21, 31, 42, 52], 1530),
        ((480, 832), 4.0, list(range(0, 53, 4)), 3570),
        ((240, 416), 4.0, list(range(0, 53, 4)), 945),
    ],
)
def test_the_papers_sizes(
    size: tuple[int, int], wanted: float, indices: list[int], tokens: int
) -> None:
    """53 frames at 15 per second: which are seen, and what they cost."""
    how = FrameSettings(fps=wanted)
    assert frame_indices(53, 15, how) == indices
    clip = make_clip(picture(53, *size), 15, how)
    assert seconds_per_grid(clip) == pytest.approx(2 * 53 / len(indices) / 15)
    assert math.prod((len(clip.frames), *clip.frames.shape[2:])) == tokens * 2 * 28 * 28


@given(
    st.integers(1, 5000),
    st.floats(1, 120),
    st.floats(0.5, 30),
    st.integers(2, 9),
    st.integers(0, 900),
)
def test_frames_are_an_even_number_from_the_first_to_the_last(
    total: int, fps: float, wanted: float, low: int, more: int
) -> None:
    how = FrameSettings(fps=wanted, min_frames=low, max_frames=low + more)
    indices = frame_indices(total, fps, how)
    if total == 1:
        assert indices == [0, 0]
        return
    count = len(indices)
    assert indices == [round(Fraction(i * (total - 1), count - 1)) for i in range(count)]
    assert (indices[0], indices[-1], count % 2) == (0, total - 1, 0)
    most = min(how.max_frames, total)
    assert min(low, most - 1) <= count <= most
    if low < total / fps * wanted <= most:
        assert total / fps * wanted - 2 < count <= max(total / fps * wanted, low + 1)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([2, 6, 300, 301, 500, 768]))
@settings(max_examples=200, deadline=None)
def test_sizes_are_those_of_smart_resize(height: int, width: int, frames: int) -> None:
    """transformers' function, with the share of 90 % of 128,000 tokens that qwen-vl-utils gives to
    each frame of a long video.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    most = min(DEFAULT.max_pixels, int(0.9 * 128_000 * 28 * 28) * 2 // frames)
    try:
        expected = smart_resize(height, width, 28, DEFAULT.min_pixels, most)
    except ValueError:
        with pytest.raises(ValueError, match=f"200:1, got {frames} of {height}x{width}"):
            clip_size(height, width, frames, DEFAULT)
        return
    assert clip_size(height, width, frames, DEFAULT) == expected


def test_long_videos_have_smaller_frames() -> None:
    sizes = [clip_size(720, 1280, frames, DEFAULT) for frames in (300, 302, 768)]
    assert sizes == [(560, 1008), (560, 1008), (336, 644)]
    assert 768 // 2 * 336 * 644 // 784 <= 0.9 * 128_000


def test_a_budget_that_holds_no_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"frames\.min_pixels, frames\.max_pixels.* 30x50.*1000 to 1100 pixels"
    ):
        clip_size(30, 50, 2, FrameSettings(min_pixels=1000, max_pixels=1100))


def bicubic(old: int, new: int) -> Tensor:
    """[new, old] float64: the cubic kernel with a = -1/2, widened by the scale where it shrinks,
    rows summing to one.
    """
    scale = old / new
    wide = max(scale, 1.0)
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    away = ((torch.arange(old) + 0.5 - centres[:, None]) / wide).abs()
    near, far = 1.5 * away**3 - 2.5 * away**2 + 1, -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
    weights = torch.where(away < 1, near, torch.where(away < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("height", "width"), [(120, 90), (300, 290), (411, 530)], ids=["up", "about as it was", "down"]
)
def test_resized_pixels(height: int, width: int) -> None:
    """The CPU's against PIL, which also rounds between its passes; the GPU's arithmetic (run here)
    against sums in float64.
    """
    import numpy
    from PIL import Image

    frames = picture(2, height, width)
    size = clip_size(height, width, 2, FrameSettings(max_pixels=150_000))
    made = clip_of_frames(frames, 1.0, FrameSettings(max_pixels=150_000)).frames
    assert made.shape[2:] == size
    for frame, got in zip(frames, made, strict=True):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        assert (
            torch.from_numpy(numpy.array(image)).permute(2, 0, 1).int() - got.int()
        ).abs().max() <= 2
    exact = (bicubic(height, size[0]) @ frames.double() @ bicubic(width, size[1]).T).clamp(0, 255)
    assert (resize_in_float(frames, size) - exact).abs().max() <= 0.51  # float32 has its error too


def test_patches_element_by_element() -> None:
    clip = make_clip(picture(4, 56, 84), 2.0, SMALL)
    pixels, (t, h, w) = patches(clip)
    assert (t, h, w) == (2, *(side // 14 for side in clip.frames.shape[2:]))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    row = 0
    for step, block_y, block_x, in_y, in_x in torch.cartesian_prod(
        *map(torch.arange, (t, h // 2, w // 2, 2, 2))
    ).tolist():
        top, left = 14 * (2 * block_y + in_y), 14 * (2 * block_x + in_x)
        patch = (
            clip.frames[2 * step : 2 * step + 2, :, top : top + 14, left : left + 14].double() / 255
        )
        expected = torch.stack(
            [(patch[:, c] - mean[c]) / std[c] for c in range(3)]
        )  # [channel, frame, y, x]
        assert torch.allclose(pixels[row].double(), expected.flatten(), atol=1e-6)
        row += 1
    assert row == len(pixels)


def test_float_frames_are_rounded_before_they_are_resized() -> None:
    video = picture(4, 50, 70)
    expected = make_clip(video, 2.0, DEFAULT).frames
    off = (torch.rand(video.shape, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.98
    assert torch.equal(make_clip(((video + off) / 255).clamp(0, 1), 2.0, DEFAULT).frames, expected)
    assert torch.equal(make_clip(video.double() / 255, 2.0, DEFAULT).frames, expected)
    half = (
        video.float() / 255
    ).half()  # 255 times a half, in half precision, would round to other numbers
    assert torch.equal(make_clip(half, 2.0, DEFAULT).frames, expected)


@given(
    st.integers(1, 6), st.integers(1, 120), st.integers(1, 120), st.sampled_from([DEFAULT, SMALL])
)
@settings(max_examples=25, deadline=None)
def test_a_clip_made_of_a_clips_frames_is_that_clip(
    count: int, height: int, width: int, how: FrameSettings
) -> None:
    try:
        clip = clip_of_frames(picture(count, height, width), 3.5, how)
    except ValueError:  # no size in the small budget
        assert how is SMALL
        return
    again = clip_of_frames(clip.frames, clip.fps, how)
    assert torch.equal(again.frames, clip.frames)
    assert again.fps == clip.fps == 3.5


def test_a_clip_beyond_the_aspect_ratio_stays_as_it_is() -> None:
    """199:1 becomes 390:1, which as a video would be refused."""
    clip = clip_of_frames(picture(2, 60, 199 * 60), 1.0, DEFAULT)
    assert clip.frames.shape[2:] == (28, 390 * 28)
    assert torch.equal(clip_of_frames(clip.frames, 1.0, DEFAULT).frames, clip.frames)


def test_an_odd_number_of_frames_repeats_the_last() -> None:
    still = make_clip(picture(1, 60, 60), 2.0, SMALL)
    assert len(still.frames) == 2
    assert torch.equal(still.frames[0], still.frames[1])
    frames = picture(3, 56, 56)
    clip = clip_of_frames(frames, 2.0, SMALL)
    assert torch.equal(clip.frames, torch.cat([frames, frames[2:]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_leaves_it() -> None:
    video = picture(9, 200, 300)
    clip = make_clip(video.cuda(), 8.0, DEFAULT)
    pixels, _ = patches(clip)
    assert clip.frames.is_cuda
    assert pixels.is_cuda
    expected = resize_in_float(
        video[frame_indices(9, 8.0, DEFAULT)], clip_size(200, 300, 4, DEFAULT)
    )
    assert (clip.frames.cpu().int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.01, 1.01])
def test_a_broken_frame_is_refused_even_where_nobody_looks(bad: float) -> None:
    video = torch.full((10, 3, 30, 30), 0.5)
    video[8, 2, 29, 29] = bad
    assert 8 not in frame_indices(10, 10, DEFAULT)
    with pytest.raises(ValueError, match=r"finite values in \[0, 1\]"):
        make_clip(video, 10, DEFAULT)


@pytest.mark.parametrize(
    ("video", "fps", "words"),
    [
        (torch.zeros(4, 30, 30, 3), 2.0, r"expected \[T, 3, H, W\].*got \[4, 30, 30, 3\]"),
        (torch.zeros(3, 30, 30), 2.0, r"got \[3, 30, 30\]"),
        (torch.zeros(4, 3, 30, 30, dtype=torch.int32), 2.0, r"got .* torch\.int32"),
        (torch.zeros(0, 3, 30, 30), 2.0, "0 frames"),
        (torch.zeros(4, 3, 0, 30), 2.0, "0, 30"),
        (torch.zeros(4, 3, 30, 30), 0.0, "positive rate"),
        (torch.zeros(4, 3, 30, 30), math.nan, "positive rate"),
        (torch.zeros(4, 3, 1, 201), 2.0, "200:1, got 4 of 1x201"),
    ],
)
def test_what_is_no_video(video: Tensor, fps: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_clip(video, fps, DEFAULT)


def test_what_are_no_frames() -> None:
    frames = picture(4, 56, 56)
    for wrong in (frames.float(), frames[:0], frames[:, :1]):
        with pytest.raises(ValueError, match="of uint8 with n > 0, got"):
            clip_of_frames(wrong, 2.0, DEFAULT)
    with pytest.raises(ValueError, match="positive number"):
        clip_of_frames(frames, math.inf, DEFAULT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fps", 0.0),
        ("fps", math.nan),
        ("min_frames", 1),
        ("max_frames", 3),
        ("min_pixels", 0),
        ("max_pixels", 100_000),
    ],
)
def test_settings_that_make_no_sense_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"frames\.{key}: expected .*, got {value!r}"):
        FrameSettings(**{key: value})


if __name__ == "__main__":  # writes official_frames.json
    with tempfile.TemporaryDirectory() as scratch:
        found = official(CASES, Path(scratch))
    if found is None:
        sys.exit(
            "expected torchvision, or its folder in FASTGRPO_TORCHVISION"
            + f"={os.environ.get('FASTGRPO_TORCHVISION')!r}"
        )
    results, taken = found
    lines = [
        f'    "{name}": {json.dumps({**summary(result.pop("pixels")), **result})}'
        for name, result in results.items()
    ]
    about = "qwen-vl-utils 0.0.14, transformers 5.23.0, torchvision 0.28.0"
    OFFICIAL.write_text(
        f'{{\n  "made by": "{about}",\n  "cases": {{\n'
        + ",\n".join(lines)
        + f'\n  }},\n  "sampled": {json.dumps(taken)}\n}}\n'
    )
