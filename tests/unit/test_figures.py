"""Curves hold the data of the rows; videos and stills decode to the frames that were given."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fastgrpo import figures

STAGES = ("visual_quality", "temporal_coherence", "text_alignment")
THRESHOLDS = (0.54, 0.35)


def make_rows(count: int = 30) -> list[dict]:
    """Iteration 0 and `count` trained ones, by formulas that the tests repeat."""
    rows: list[dict] = [{"iteration": 0, **{f"eval/rewards/{stage}/mean": 0.1 * index for index, stage in enumerate(STAGES)}}]
    for i in range(1, count + 1):
        row: dict = {"iteration": i, "reward": math.sin(i), "grad_norm": 1 + 0.1 * i, "clip_ratio": 0.01 * i, "ratio_drift": 0.0}
        for index, stage in enumerate(STAGES):
            row[f"rewards/{stage}/mean"] = math.cos(i + index)
            row[f"weights/{stage}"] = (i % (index + 2)) / 5
            row[f"competence/{stage}"] = 0.01 * i + index
            if i % 10 == 0:
                row[f"eval/rewards/{stage}/mean"] = 0.1 * index + 0.01 * i
        row |= {f"ratio_drift/step_{step:02d}": 0.0 for step in range(i % 2, 15, 2)}
        rows.append(row | {"time/rollout": 0.25 + 0.01 * i, "time/reward": 0.05, "time/update": 0.2})
    return rows


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_gid()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}  # type: ignore[arg-type]


def texts(figure: Figure) -> str:
    return " | ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean by a sum of shifted copies, cut at the ends (an even window reaches one further back)."""
    total, count = np.zeros(len(values)), np.zeros(len(values))
    for shift in range(-(window // 2), (window - 1) // 2 + 1):
        here = np.arange(len(values)) + shift
        inside = (here >= 0) & (here < len(values))
        total[inside] += values[here[inside]]
        count += inside
    return total / count


@pytest.mark.parametrize("window", [1, 4, 5, 100])
def test_reward_curves_hold_the_rows(window: int) -> None:
    rows = make_rows()
    (axes,) = figures.reward_curves(rows, STAGES, THRESHOLDS, window).axes
    drawn = lines(axes)
    iterations = list(range(1, 31))
    for index, stage in enumerate(STAGES):
        raw = [math.cos(i + index) for i in iterations]
        assert drawn[f"raw/{stage}"] == (iterations, raw)
        assert drawn[f"smooth/{stage}"][0] == iterations
        np.testing.assert_allclose(drawn[f"smooth/{stage}"][1], moving_average(np.array(raw), window), atol=1e-12)
        assert drawn[f"eval/{stage}"] == ([0, 10, 20, 30], [0.1 * index, *(0.1 * index + 0.01 * i for i in (10, 20, 30))])
    np.testing.assert_allclose(drawn["smooth/reward"][1], moving_average(np.sin(iterations), window), atol=1e-12)
    assert [drawn[f"threshold/{stage}"][1] for stage in STAGES[:2]] == [[0.54, 0.54], [0.35, 0.35]]
    assert f"threshold/{STAGES[2]}" not in drawn
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "visual quality",
        "temporal coherence",
        "text alignment",
        "weighted reward",
        "evaluation captions",
        "threshold",
    ]


def test_values_that_are_not_there_are_left_out() -> None:
    rows = make_rows(5)
    rows[2]["rewards/visual_quality/mean"] = None
    del rows[4]["rewards/visual_quality/mean"]
    rows[5]["rewards/visual_quality/mean"] = math.nan
    (axes,) = figures.reward_curves(rows, STAGES, window=1).axes
    assert lines(axes)["raw/visual_quality"] == ([1, 3], [math.cos(1), math.cos(3)])
    assert figures.series(rows, "rewards/visual_quality/mean")[0] == [1, 3]


def test_weight_curves_hold_weights_competence_and_thresholds() -> None:
    top, bottom = figures.weight_curves(make_rows(), STAGES, THRESHOLDS).axes
    iterations = list(range(1, 31))
    for index, stage in enumerate(STAGES):
        assert lines(top)[f"weights/{stage}"] == (iterations, [(i % (index + 2)) / 5 for i in iterations])
        assert lines(bottom)[f"competence/{stage}"] == (iterations, [0.01 * i + index for i in iterations])
    assert lines(bottom)["threshold/temporal_coherence"][1] == [0.35, 0.35]
    without = [{key: value for key, value in row.items() if not key.startswith("competence")} for row in make_rows()]
    assert len(figures.weight_curves(without, STAGES).axes) == 1


def test_ratio_drift_says_exactly_zero_in_words() -> None:
    figure = figures.ratio_drift(make_rows())
    assert "exactly 0 at every iteration" in texts(figure)
    assert "exactly 0 at every denoising step" in texts(figure)
    assert lines(figure.axes[1])["by_step"] == (list(range(15)), [0.0] * 15)
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear"]


def test_ratio_drift_with_some_zeros_draws_them_at_zero_on_a_log_scale() -> None:
    rows = make_rows(4)  # odd iterations train the odd steps, even ones the even steps
    rows[1] |= {"ratio_drift": 2e-7, "ratio_drift/step_03": 2e-7}
    rows[3] |= {"ratio_drift": 5e-4, "ratio_drift/step_03": 1e-7, "ratio_drift/step_05": 5e-4}
    figure = figures.ratio_drift(rows)
    left, right = figure.axes
    assert "exactly" not in texts(figure)
    assert lines(left)["by_iteration"] == ([1, 2, 3, 4], [2e-7, 0.0, 5e-4, 0.0])
    expected = [0.0] * 15
    expected[3], expected[5] = 2e-7, 5e-4
    assert lines(right)["by_step"] == (list(range(15)), expected)
    for axes in (left, right):
        heights = axes.transData.transform([(1, value) for value in (0.0, 2e-7, 2e-6, 5e-4)])[:, 1]
        assert heights[0] == pytest.approx(axes.bbox.y0)
        assert np.all(np.diff(heights) > 0.05 * axes.bbox.height)  # a linear scale would put the first three on one spot
    figure.draw_without_rendering()


def test_training_health_holds_norms_clips_and_seconds() -> None:
    rows = make_rows()
    norm, clip, seconds = figures.training_health(rows).axes
    iterations = list(range(1, 31))
    assert lines(norm)["grad_norm"] == (iterations, [1 + 0.1 * i for i in iterations])
    assert lines(clip)["clip_ratio"] == (iterations, [0.01 * i for i in iterations])
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in seconds.collections]  # type: ignore[union-attr,index]
    np.testing.assert_allclose(tops, [0.55, 0.60, 0.80])
    assert norm.get_yscale() == "linear"
    rows[7]["grad_norm"] = 900.0
    assert figures.training_health(rows).axes[0].get_yscale() == "log"
    rows[7]["grad_norm"] = 0.0
    assert figures.training_health(rows).axes[0].get_yscale() == "linear"  # a log scale would hide the zero


@pytest.mark.parametrize("rows", [[], make_rows(0), make_rows(1)], ids=["none", "untrained", "one"])
def test_runs_in_progress_draw_without_a_warning(rows: list[dict], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    drawn = [figures.reward_curves(rows, STAGES, THRESHOLDS), figures.weight_curves(rows, STAGES, THRESHOLDS)]
    drawn += [figures.ratio_drift(rows), figures.training_health(rows)]
    for index, figure in enumerate(drawn):
        figures.save_figure(figure, tmp_path / str(index))
        assert ("no training iteration yet" in texts(figure)) == (len(rows) < 2 and (index > 0 or not rows))
    assert not recwarn.list
    if len(rows) == 2:  # one iteration: a line of one point has no length, so it gets a marker; its area is a bar
        assert drawn[1].axes[0].lines[0].get_marker() == "o"
        assert [bar.get_height() for bar in drawn[3].axes[2].patches] == pytest.approx([0.26, 0.05, 0.2])  # type: ignore[attr-defined]


def test_saved_figures_are_png_and_svg_and_the_same_twice(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    png, svg = figures.save_figure(figures.weight_curves(make_rows(), STAGES), tmp_path / "a.b")
    again = figures.save_figure(figures.weight_curves(make_rows(), STAGES), tmp_path / "again" / "a.b")
    assert (png.name, svg.name) == ("a.b.png", "a.b.svg")
    assert Image.open(png).size[0] == 8 * 160
    assert svg.read_text().startswith("<?xml")
    assert [path.read_bytes() for path in (png, svg)] == [path.read_bytes() for path in again]


def test_no_pyplot_and_no_global_setting(tmp_path: Path) -> None:
    script = (
        "import sys, matplotlib\nfrom pathlib import Path\n"
        # reading the setting `backend` would itself import pyplot
        "settings = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\n"
        "from fastgrpo import figures\n"
        "figures.save_figure(figures.training_health([{'iteration': 1, 'grad_norm': 1.0}]), Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=True, cwd=root)
    assert (tmp_path / "x.svg").exists()


def decode(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), stream


def blocks(count: int, num_frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 videos [N, T, 3, H, W] of 4 large patches each, whose colours change from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(30, 226, (count, num_frames, 3, 2, 2), generator=generator, dtype=torch.uint8)
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
def test_mp4_decodes_to_the_frames(tmp_path: Path, num_frames: int, height: int, width: int, fps: float, size: tuple[int, int]) -> None:
    videos = blocks(2, num_frames, height, width)
    figures.save_samples(tmp_path, videos, ["first", "second"], fps)
    for index, name in enumerate(("00_first.mp4", "01_second.mp4")):
        frames, stream = decode(tmp_path / name)
        assert frames.shape == (num_frames, *size, 3)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate or 0) == pytest.approx(fps)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the middle of each patch, away from the codec's blur at edges
            inside = (slice(None), (2 * row + 1) * size[0] // 4, (2 * column + 1) * size[1] // 4)
            wanted = videos[index, :, :, (2 * row + 1) * height // 4, (2 * column + 1) * width // 4].numpy()
            assert np.abs(frames[inside].astype(int) - wanted.astype(int)).max() <= 8


@pytest.mark.parametrize(
    ("num_frames", "chosen"), [(1, [0]), (8, list(range(8))), (15, list(range(0, 15, 2))), (53, [0, 7, 15, 22, 30, 37, 45, 52])]
)
def test_stills_are_exact(tmp_path: Path, num_frames: int, chosen: list[int]) -> None:
    videos = torch.randint(0, 256, (1, num_frames, 3, 9, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    figures.save_samples(tmp_path, videos, ["x"], 15)
    still = np.asarray(Image.open(tmp_path / "00_x.png"))
    assert still.shape == (9, 16 * len(chosen), 3)
    for position, frame in enumerate(chosen):
        assert np.array_equal(still[:, 16 * position : 16 * (position + 1)], videos[0, frame].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float_videos_are_rounded_to_levels(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([-0.5, 0.0, 0.25, 0.5, 1.0, 7.0], dtype=dtype)
    videos = values.view(1, 1, 1, 1, 6).expand(1, 1, 3, 4, 6)
    figures.save_samples(tmp_path, videos, ["x"], 15)
    assert np.asarray(Image.open(tmp_path / "00_x.png"))[0, :, 0].tolist() == [0, 0, 64, 128, 255, 255]


def test_samples_json_and_file_names(tmp_path: Path) -> None:
    prompts = ["A red Square, moving  right!", "été / ../../etc", "猫", "word " * 40]
    scores = torch.tensor([[0.25, 0.5], [1.0, math.nan], [0.0, 0.0], [0.1, 0.2]], dtype=torch.float64)
    figures.save_samples(tmp_path / "a" / "b", blocks(4, 9, 16, 16), prompts, 7.5, scores, ("vq", "mq"))
    summary = figures.read_samples(tmp_path / "a" / "b")
    stems = ["00_a-red-square-moving-right", "01_t-etc", "02_sample", "03_" + "word-" * 9 + "wor"]
    assert summary == {
        "fps": 7.5,
        "stages": ["vq", "mq"],
        "samples": [
            {"prompt": prompt, "scores": row, "video": f"{stem}.mp4", "still": f"{stem}.png", "still_frames": 8}
            for prompt, row, stem in zip(prompts, [[0.25, 0.5], [1.0, None], [0.0, 0.0], [0.1, 0.2]], stems, strict=True)
        ],
    }
    names = {f"{stem}.{kind}" for stem in stems for kind in ("mp4", "png")}
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == names | {"samples.json"}
    assert json.loads((tmp_path / "a" / "b" / "samples.json").read_text(encoding="utf-8"))["samples"][2]["prompt"] == "猫"


@pytest.mark.parametrize(
    ("videos", "arguments", "message"),
    [
        (torch.zeros(1, 4, 16, 16, 3), {}, r"expected videos \[N, T, 3, H, W\], got \[1, 4, 16, 16, 3\]"),
        (torch.zeros(1, 0, 3, 16, 16), {}, "expected videos"),
        (torch.full((1, 2, 3, 8, 8), math.nan), {}, "finite"),
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.int64), {}, "uint8 or float videos, got torch.int64"),
        (torch.zeros(2, 2, 3, 8, 8), {}, "each of 2 videos, got 1 prompts"),
        (torch.zeros(1, 2, 3, 8, 8), {"scores": [[0.1], [0.2]], "stages": ["a"]}, "each of 1 videos, got 1 prompts and 2 rows"),
        (torch.zeros(1, 2, 3, 8, 8), {"scores": [[0.1, 0.2]], "stages": ["a"]}, r"each stage of \['a'\], got \[2\]"),
        (torch.zeros(1, 2, 3, 8, 8), {"scores": [[0.1]]}, "each stage of None"),
    ],
)
def test_wrong_samples_are_refused_before_anything_is_written(tmp_path: Path, videos: torch.Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.save_samples(tmp_path / "x", videos, ["one"], 8, **arguments)
    assert not (tmp_path / "x").exists()


def test_contact_sheet_holds_both_stills_of_every_shared_caption(tmp_path: Path) -> None:
    """Each caption has its own colour; before is dark, after is bright: the sheet shows every one, before above after."""
    names = ["red", "green", "blue", "cyan", "only before"]
    tints = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1]])
    for folder, level, chosen in (("before", 100, [0, 1, 2, 3, 4]), ("after", 200, [3, 2, 1, 0])):
        videos = (tints[chosen] * level).to(torch.uint8)[:, None, :, None, None].expand(-1, 8, -1, 16, 16)
        scores = [[0.1, 0.2, 0.3]] * len(chosen)
        figures.save_samples(tmp_path / folder, videos, [names[i] for i in chosen], 8, scores, STAGES)
    figures.contact_sheet(tmp_path / "before", tmp_path / "after", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for tint in tints[:4].numpy():
        places = [np.argwhere((sheet == tint * level).all(axis=-1)) for level in (100, 200)]
        for place in places:  # 8 frames of 16 x 16 at 5 times, less the white lines between them
            assert 0.95 * 8 * 80 * 80 < len(place) <= 8 * 80 * 80
        assert places[0][:, 0].max() < places[1][:, 0].min()
        assert places[0][:, 1].min() == places[1][:, 1].min()
    assert not (sheet == np.array([100, 0, 100])).all(axis=-1).any()


def test_contact_sheet_of_large_videos_is_shrunk_and_without_shared_captions_refused(tmp_path: Path) -> None:
    figures.save_samples(tmp_path / "before", blocks(1, 9, 240, 416), ["a long " + "caption " * 60], 15)
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
    before = {"samples": [{"prompt": "a", "n": 0}, {"prompt": "b", "n": 1}, {"prompt": "a", "n": 2}, {"prompt": "a", "n": 3}]}
    after = {"samples": [{"prompt": "a", "n": 4}, {"prompt": "a", "n": 5}, {"prompt": "b", "n": 6}]}
    assert [(old["n"], new["n"]) for old, new in figures.pair_samples(before, after)] == [(0, 4), (1, 6), (2, 5)]


def test_scores_read_as_text() -> None:
    assert figures.format_scores([0.714, None, 1.0]) == "0.71  –  1.00"
    assert figures.format_scores(None) == ""
