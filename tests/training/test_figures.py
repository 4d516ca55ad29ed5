"""Videos and stills decode to the frames that were given; sheets show all of them; figures are
files that do not change by chance.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastgrpo.training import figures

STAGES = ("visual_quality", "temporal_coherence", "text_alignment")


def test_saved_figures_are_png_and_svg_and_the_same_twice(tmp_path: Path) -> None:
    def figure() -> Figure:
        drawn = Figure(figsize=(8, 2))
        drawn.subplots().plot([1, 2], [0.5, 0.25], label="x")
        return drawn

    (tmp_path / "again").mkdir()
    png, svg = figures.save_figure(figure(), tmp_path / "a.b")
    again = figures.save_figure(figure(), tmp_path / "again" / "a.b")
    assert (png.name, svg.name) == ("a.b.png", "a.b.svg")
    assert Image.open(png).size[0] == 8 * 160
    assert svg.read_text().startswith("<?xml")
    assert [path.read_bytes() for path in (png, svg)] == [path.read_bytes() for path in again]
    assert figures.svg_bytes(figure()).startswith(b"<?xml")


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
    figures.save_samples(tmp_path, videos, ["first", "second"], fps)
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
    figures.save_samples(tmp_path, videos, ["x"], 15)
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
    figures.save_samples(tmp_path, videos, ["x"], 15)
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
    figures.save_samples(
        tmp_path / "a" / "b", blocks(4, 9, 16, 16), prompts, 7.5, scores, ("vq", "mq")
    )
    summary = figures.read_samples(tmp_path / "a" / "b")
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
        (torch.zeros(2, 2, 3, 8, 8), {}, "each of 2 videos, got 1 prompts"),
        (
            torch.zeros(1, 2, 3, 8, 8),
            {"scores": [[0.1], [0.2]], "stages": ["a"]},
            "each of 1 videos, got 1 prompts and 2 rows",
        ),
        (
            torch.zeros(1, 2, 3, 8, 8),
            {"scores": [[0.1, 0.2]], "stages": ["a"]},
            r"each stage of \['a'\], got \[2\]",
        ),
        (torch.zeros(1, 2, 3, 8, 8), {"scores": [[0.1]]}, "each stage of None"),
    ],
)
def test_wrong_samples_are_refused_before_anything_is_written(
    tmp_path: Path, videos: torch.Tensor, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        figures.save_samples(tmp_path / "x", videos, ["one"], 8, **arguments)
    assert not (tmp_path / "x").exists()


def test_contact_sheet_holds_both_stills_of_every_shared_caption(tmp_path: Path) -> None:
    """Each caption has its own colour; before is dark, after is bright: the sheet shows every one,
    before above after.
    """
    names = ["red", "green", "blue", "cyan", "only before"]
    tints = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1]])
    for folder, level, chosen in (("before", 100, [0, 1, 2, 3, 4]), ("after", 200, [3, 2, 1, 0])):
        videos = (
            (tints[chosen] * level)
            .to(torch.uint8)[:, None, :, None, None]
            .expand(-1, 8, -1, 16, 16)
        )
        scores = [[0.1, 0.2, 0.3]] * len(chosen)
        figures.save_samples(
            tmp_path / folder, videos, [names[i] for i in chosen], 8, scores, STAGES
        )
    figures.contact_sheet(tmp_path / "before", tmp_path / "after", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for tint in tints[:4].numpy():
        places = [np.argwhere((sheet == tint * level).all(axis=-1)) for level in (100, 200)]
        for place in places:  # 8 frames of 16 x 16 at 5 times, less the white lines between them
            assert 0.95 * 8 * 80 * 80 < len(place) <= 8 * 80 * 80
        assert places[0][:, 0].max() < places[1][:, 0].min()
        assert places[0][:, 1].min() == places[1][:, 1].min()
    assert not (sheet == np.array([100, 0, 100])).all(axis=-1).any()


def test_contact_sheet_of_large_videos_is_shrunk_and_without_shared_captions_refused(
    tmp_path: Path,
) -> None:
    figures.save_samples(
        tmp_path / "before", blocks(1, 9, 240, 416), ["a long " + "caption " * 60], 15
    )
    figures.save_samples(tmp_path / "after", blocks(1, 9, 240, 416), ["another"], 15)
    figures.contact_sheet(tmp_path / "before", tmp_path / "before", tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width < 8 * 208 + 200
    assert height < 450
    with pytest.raises(ValueError, match="none shared"):
        figures.contact_sheet(tmp_path / "before", tmp_path / "after", tmp_path / "no.png")
    with pytest.raises(FileNotFoundError):
        figures.read_samples(tmp_path / "nowhere")


def test_repeated_captions_are_paired_in_order() -> None:
    before = {
        "samples": [
            {"prompt": "a", "n": 0},
            {"prompt": "b", "n": 1},
            {"prompt": "a", "n": 2},
            {"prompt": "a", "n": 3},
        ]
    }
    after = {"samples": [{"prompt": "a", "n": 4}, {"prompt": "a", "n": 5}, {"prompt": "b", "n": 6}]}
    rows = figures.match_samples([before, after])
    assert [[entry and entry["n"] for entry in row] for row in rows] == [
        [0, 4],
        [1, 6],
        [2, 5],
        [3, None],
    ]


def test_scores_read_as_text() -> None:
    assert figures.format_scores([0.714, None, 1.0]) == "0.71  –  1.00"
    assert figures.format_scores(None) == ""


def test_a_sheet_of_several_folders_shows_each_where_it_has_the_caption(tmp_path: Path) -> None:
    """Captions b and c; the second folder lacks c, the third b's second copy. Each folder has its
    own grey, each row its place.
    """
    greys = {"untrained": 60, "a run with a name that is much too long": 120, "other": 180}
    captions = {
        "untrained": ["b", "b", "c", "d"],
        "a run with a name that is much too long": ["b", "b"],
        "other": ["c", "b"],
    }
    for name, grey in greys.items():
        figures.save_samples(
            tmp_path / name,
            torch.full((len(captions[name]), 8, 3, 16, 16), grey, dtype=torch.uint8),
            captions[name],
            8,
        )
    rows = figures.match_samples([figures.read_samples(tmp_path / name) for name in greys])
    found = [[entry and entry["video"][:2] for entry in row] for row in rows]
    assert found == [["00", "00", "01"], ["01", "01", None], ["02", None, "00"], ["03", None, None]]
    figures.comparison_sheet(
        {name: tmp_path / name for name in greys}, tmp_path / "sheet.png", "title"
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    strip = 8 * 80 * 80  # 8 frames of 16 x 16 at 5 times, less the white lines between them
    for name, count in (
        ("untrained", 3),
        ("a run with a name that is much too long", 2),
        ("other", 2),
    ):  # d stands alone, and is left out
        pixels = int((sheet == greys[name]).all(axis=-1).sum())
        assert 0.95 * count * strip < pixels <= 1.01 * count * strip
