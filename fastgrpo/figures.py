"""What a run leaves behind in pictures: curves of its metrics, sample videos with their stills, before and after side by side.

Curves are matplotlib figures made without pyplot, so that nothing global changes. Rows are those of metrics.jsonl (None: a value that was
not finite; it is left out of the curve). Colours are Okabe and Ito's, told apart by colour-blind readers; stages also differ in marker.
"""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgrpo.self_paced import smooth

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT, GRID = "#1f2933", "#6b7785", "#e3e7eb"

Row = Mapping[str, Any]
Series = tuple[list[int], list[float]]


def reward_curves(rows: Sequence[Row], stages: Sequence[str], thresholds: Sequence[float] = (), window: int = 10) -> Figure:
    """Mean score of each stage over iterations: as measured (faint), smoothed over `window` iterations, and held out (markers).

    The j-th threshold is a dashed line in the j-th stage's colour. The weighted reward, what the group advantages see, is dotted.
    """
    figure, (axes,) = _new_figure(1, 8.0, 4.4)
    for index, stage in enumerate(stages):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        iterations, values = series(rows, f"rewards/{stage}/mean")
        axes.plot(iterations, values, color=color, alpha=0.25, linewidth=1, gid=f"raw/{stage}")
        _line(axes, (iterations, smooth(values, window)), color, _title(stage), f"smooth/{stage}", width=2.2)
        iterations, values = series(rows, f"eval/rewards/{stage}/mean")
        dots = {"linestyle": "none", "marker": marker, "markersize": 7, "markeredgecolor": "white"}
        axes.plot(iterations, values, color=color, zorder=4, gid=f"eval/{stage}", **dots)  # type: ignore[arg-type]
        if index < len(thresholds):
            axes.axhline(thresholds[index], color=color, linestyle=(0, (5, 3)), linewidth=1, alpha=0.8, gid=f"threshold/{stage}")
    iterations, values = series(rows, "reward")
    axes.plot(iterations, smooth(values, window), color=INK, linewidth=1.4, linestyle=":", label="weighted reward", gid="smooth/reward")
    if any(series(rows, f"eval/rewards/{stage}/mean")[0] for stage in stages):
        axes.plot([], [], color=FAINT, linestyle="none", marker="o", markersize=7, markeredgecolor="white", label="evaluation captions")
    if thresholds:
        axes.plot([], [], color=FAINT, linestyle=(0, (5, 3)), linewidth=1, label="threshold")
    _finish(axes, "Stage rewards", "mean score")
    return figure


def weight_curves(rows: Sequence[Row], stages: Sequence[str], thresholds: Sequence[float] = ()) -> Figure:
    """Weight of each stage in the reward over iterations and, below, the competence that moves it with the thresholds (dashed)."""
    has_competence = any(series(rows, f"competence/{stage}")[0] for stage in stages)
    figure, panels = _new_figure(2 if has_competence else 1, 8.0, 5.6 if has_competence else 3.6, sharex=True)
    for index, stage in enumerate(stages):
        color = COLORS[index % len(COLORS)]
        _line(panels[0], series(rows, f"weights/{stage}"), color, _title(stage), f"weights/{stage}")
        if has_competence:
            _line(panels[1], series(rows, f"competence/{stage}"), color, None, f"competence/{stage}")
            if index < len(thresholds):
                panels[1].axhline(thresholds[index], color=color, linestyle=(0, (5, 3)), linewidth=1, gid=f"threshold/{stage}")
    panels[0].set_ylim(-0.03, 1.03)
    _finish(panels[0], "Stage weights", "weight")
    if has_competence:
        _finish(panels[1], "Competence (dashed: threshold that opens the next stage)", "running mean score")
    return figure


def ratio_drift(rows: Sequence[Row]) -> Figure:
    """Largest |ratio - 1| before the first optimizer step, by iteration and by denoising step. 0: training recomputes the rollout exactly.

    The scale is logarithmic above the smallest value that is not 0 and linear below it, so that zeros are drawn at 0.
    """
    figure, panels = _new_figure(1, 8.0, 3.4, columns=2)
    by_iteration = series(rows, "ratio_drift")
    keys = sorted({key for row in rows for key in row if key.startswith("ratio_drift/step_")})
    by_step = {int(key[len("ratio_drift/step_") :]): series(rows, key)[1] for key in keys}
    steps: Series = ([step for step, values in by_step.items() if values], [max(values) for values in by_step.values() if values])
    panels[0].plot(*by_iteration, color=COLORS[0], linewidth=1.2, marker=".", markersize=4, gid="by_iteration")
    panels[1].plot(*steps, color=COLORS[1], linewidth=0, marker="o", markersize=6, gid="by_step")
    panels[1].vlines(steps[0], 0, steps[1], color=COLORS[1], linewidth=1.5, alpha=0.6)
    for axes, values, what in ((panels[0], by_iteration[1], "iteration"), (panels[1], steps[1], "denoising step")):
        positive = [value for value in values if value > 0]
        if positive:
            axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(min(positive))))
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylim(-1, 1)
            axes.set_yticks([0])
            if values:
                axes.text(0.5, 0.62, f"exactly 0 at every {what}", transform=axes.transAxes, ha="center", color=INK, fontsize=11)
        _finish(axes, f"Ratio drift by {what}", "max |ratio − 1|", xlabel=what)
    return figure


def training_health(rows: Sequence[Row]) -> Figure:
    """Gradient norm before clipping, share of clipped loss terms, and seconds of each phase (stacked), over iterations."""
    figure, panels = _new_figure(3, 8.0, 7.0, sharex=True)
    norms = series(rows, "grad_norm")
    _line(panels[0], norms, COLORS[0], None, "grad_norm", width=1.2)
    positive = [value for value in norms[1] if value > 0]
    if positive and len(positive) == len(norms[1]) and max(positive) > 30 * min(positive):
        panels[0].set_yscale("log")
    _finish(panels[0], "Gradient norm before clipping", "2-norm")
    _line(panels[1], series(rows, "clip_ratio"), COLORS[1], None, "clip_ratio", width=1.2)
    panels[1].set_ylim(bottom=0)
    _finish(panels[1], "Clip fraction (loss terms whose gradient the clip removed)", "fraction")
    phases = ("rollout", "reward", "update")
    timed = [row for row in rows if all(row.get(f"time/{phase}") is not None for phase in phases)]
    if timed:
        seconds = [series(timed, f"time/{phase}")[1] for phase in phases]
        iterations = [row["iteration"] for row in timed]
        if len(timed) == 1:  # one iteration has no area
            bottoms = np.cumsum([0.0] + [values[0] for values in seconds])
            for phase, values, bottom, color in zip(phases, seconds, bottoms, COLORS, strict=False):
                panels[2].bar(iterations, values, bottom=bottom, width=0.1, color=color, label=phase, alpha=0.85)
        else:
            panels[2].stackplot(iterations, *seconds, labels=phases, colors=COLORS[:3], alpha=0.85, linewidth=0)
    panels[2].set_ylim(bottom=0)
    _finish(panels[2], "Time of an iteration", "seconds")
    return figure


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `<stem>.png` (160 dpi) and `<stem>.svg`; the same figure gives the same bytes. Returns both paths."""
    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    figure.savefig(png, dpi=160, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "fastgrpo"}):  # otherwise the ids in the file are random
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def series(rows: Sequence[Row], key: str) -> Series:
    """Iterations and values of one metric, where a row has a finite one."""
    points = [(row["iteration"], float(row[key])) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return [iteration for iteration, _ in points], [value for _, value in points]


def save_samples(
    folder: Path,
    videos: Tensor,
    prompts: Sequence[str],
    fps: float,
    scores: Sequence[Sequence[float]] | Tensor | None = None,
    stages: Sequence[str] | None = None,
) -> None:
    """Write N videos into `folder`: NN_<caption>.mp4, NN_<caption>.png and, last, samples.json (so a folder that has it is whole).

    The mp4 is H.264, yuv420p; a video whose shorter side is below 256 pixels is enlarged by whole pixels, and an odd side repeats its last
    line, as the codec needs even ones. The png is lossless at the video's own size: up to 8 frames, evenly spaced, from left to right.
    samples.json: {"fps", "stages" or null, "samples": [{"prompt", "scores" or null, "video", "still",
    "still_frames"}]}; a score that is not finite is null.

    Args:
        videos: [N, T, 3, H, W], uint8 or float in [0, 1] (values outside are clamped), on any device.
        prompts: N captions.
        fps: frames per second.
        scores: [N, K] of the judge; stages: their K names.

    Raises:
        ValueError: shapes, lengths or dtype that do not fit; a video that is not finite.
    """
    frames = _to_uint8(videos)
    table = None if scores is None else torch.as_tensor(scores, dtype=torch.float64).tolist()
    if len(prompts) != len(frames) or (table is not None and len(table) != len(frames)):
        counts = f"{len(prompts)} prompts" + ("" if table is None else f" and {len(table)} rows of scores")
        raise ValueError(f"samples: expected one for each of {len(frames)} videos, got {counts}")
    if table is not None and (stages is None or any(len(row) != len(stages) for row in table)):
        raise ValueError(f"samples: expected one score for each stage of {stages}, got {[len(row) for row in table]}")
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(2, len(str(len(frames) - 1)))
    entries = []
    for index, (video, prompt) in enumerate(zip(frames, prompts, strict=True)):
        name = f"{index:0{digits}d}_{_slug(prompt)}"
        _write_video(folder / f"{name}.mp4", video, fps)
        still = _strip(video)
        Image.fromarray(still).save(folder / f"{name}.png")
        row = None if table is None else [value if math.isfinite(value) else None for value in table[index]]
        count = still.shape[1] // video.shape[2]
        entries.append({"prompt": prompt, "scores": row, "video": f"{name}.mp4", "still": f"{name}.png", "still_frames": count})
    summary = {"fps": fps, "stages": None if stages is None else list(stages), "samples": entries}
    temporary = folder / ".samples.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "samples.json")


def read_samples(folder: Path) -> dict[str, Any]:
    """samples.json of a folder that `save_samples` finished. FileNotFoundError for one that it did not."""
    summary: dict[str, Any] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    return summary


def _write_video(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """H.264 yuv420p mp4 of frames [T, H, W, 3], enlarged and padded as `save_samples` says."""
    height, width = frames.shape[1:3]
    scale = max(1, math.ceil(256 / min(height, width)))
    if scale > 1 and (height * scale % 2 or width * scale % 2):
        scale += 1
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    # imageio would be one call, but runs the garbage collector twice a file: 0.2 s each, 4 s an evaluation.
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def contact_sheet(before_folder: Path, after_folder: Path, path: Path) -> None:
    """One png: for every caption of both folders the stills before (above) and after (below) training, with their scores.

    Both folders come from `save_samples`, with the same noise for the same caption. ValueError where they share no caption.
    """
    before, after = read_samples(before_folder), read_samples(after_folder)
    pairs = pair_samples(before, after)
    if not pairs:
        raise ValueError(f"contact sheet: expected a caption that is in both, got none shared by {before_folder} and {after_folder}")
    cells = [
        _cell(old["prompt"], _scored_strip(before_folder, old, "before"), _scored_strip(after_folder, new, "after")) for old, new in pairs
    ]
    columns = 2 if len(cells) > 3 and cells[0].width < 1000 else 1
    gap, margin, header = 28, 32, 88
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    lines = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (2 * margin + columns * width + (columns - 1) * gap, header + lines * (height + gap) + margin - gap), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 24), "Before and after: same captions, same noise", fill=INK, font=_font(22))
    stages = before["stages"] or after["stages"]
    if stages:
        draw.text((margin, 54), "Scores in order: " + ", ".join(map(_title, stages)), fill=FAINT, font=_font(14))
    for index, cell in enumerate(cells):
        line, column = divmod(index, columns)
        sheet.paste(cell, (margin + column * (width + gap), header + line * (height + gap)))
    sheet.save(path)


def pair_samples(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Entries of two samples.json with the same caption, in the first's order; the n-th of a repeated caption meets the n-th."""
    rest = list(after["samples"])
    pairs = []
    for old in before["samples"]:
        match = next((index for index, new in enumerate(rest) if new["prompt"] == old["prompt"]), None)
        if match is not None:
            pairs.append((old, rest.pop(match)))
    return pairs


def format_scores(scores: Sequence[float | None] | None) -> str:
    """'0.71  0.65  –': a missing score is a dash; no scores at all an empty text."""
    return "" if scores is None else "  ".join("–" if score is None else f"{score:.2f}" for score in scores)


def _new_figure(rows: int, width: float, height: float, columns: int = 1, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, sharex=sharex, squeeze=False).flat)


def _line(axes: Axes, points: Series, color: str, label: str | None, gid: str, width: float = 2.0) -> None:
    axes.plot(*points, color=color, linewidth=width, label=label, gid=gid, marker="o" if len(points[0]) == 1 else None)


def _finish(axes: Axes, title: str, ylabel: str, xlabel: str = "iteration") -> None:
    entries = len(axes.get_legend_handles_labels()[0])
    lines = math.ceil(entries / 3)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=6 + 16 * lines)
    if entries:  # between title and curves, three a line: beside them it would take a fifth of the width
        place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "ncols": 3, "borderpad": 0, "borderaxespad": 0.3}
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, **place)
    axes.set_ylabel(ylabel, fontsize=9, color=FAINT)
    if axes.get_subplotspec() is None or axes.get_subplotspec().is_last_row():  # type: ignore[union-attr]
        axes.set_xlabel(xlabel, fontsize=9, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=9, colors=FAINT, length=0)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    drawn = {float(x) for line in axes.lines if not str(line.get_gid()).startswith("threshold") for x in np.asarray(line.get_xdata())}
    if len(drawn) == 1:  # one iteration: a whole number to each side of it, and so whole numbers as ticks
        axes.set_xlim(min(drawn) - 1, min(drawn) + 1)
    if not (drawn or axes.collections or axes.patches):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no training iteration yet", transform=axes.transAxes, ha="center", va="center", color=FAINT)


def _title(stage: str) -> str:
    return stage.replace("_", " ")


def _to_uint8(videos: Tensor) -> NDArray[np.uint8]:
    """[N, T, 3, H, W] -> [N, T, H, W, 3] uint8 on the host; floats are rounded to the nearest of 256 levels."""
    if videos.ndim != 5 or videos.shape[2] != 3 or 0 in videos.shape[1:]:
        raise ValueError(f"samples: expected videos [N, T, 3, H, W], got {list(videos.shape)}")
    if videos.is_floating_point():
        if not torch.isfinite(videos).all():
            raise ValueError("samples: expected finite videos, got NaN or infinity")
        videos = videos.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    elif videos.dtype != torch.uint8:
        raise ValueError(f"samples: expected uint8 or float videos, got {videos.dtype}")
    return videos.movedim(2, -1).contiguous().cpu().numpy()


def _strip(frames: NDArray[np.uint8], most: int = 8) -> NDArray[np.uint8]:
    """[T, H, W, 3] -> [H, n W, 3]: n = min(T, most) frames, the first and the last among them."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), most)).round().astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-") or "sample"


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _scored_strip(folder: Path, entry: Mapping[str, Any], label: str) -> Image.Image:
    """A still at a height fit for a sheet (72 pixels and more by whole pixels, or shrunk to 120), with its label and scores at the left."""
    still = Image.open(folder / entry["still"]).convert("RGB")
    if still.height < 72:
        scale = math.ceil(72 / still.height)
        still = still.resize((still.width * scale, still.height * scale), Image.Resampling.NEAREST)
    elif still.height > 120:
        still = still.resize((round(still.width * 120 / still.height), 120), Image.Resampling.LANCZOS)
    gutter = 76
    canvas = Image.new("RGB", (gutter + still.width, still.height), "white")
    canvas.paste(still, (gutter, 0))
    draw = ImageDraw.Draw(canvas)
    for frame in range(1, entry["still_frames"]):
        x = gutter + round(frame * still.width / entry["still_frames"])
        draw.line((x, 0, x, still.height), fill="white", width=2)
    draw.text((0, 2), label, fill=INK if label == "after" else FAINT, font=_font(15))
    for index, score in enumerate(format_scores(entry["scores"]).split()):
        draw.text((0, 23 + 16 * index), score, fill=COLORS[index % len(COLORS)], font=_font(13))
    return canvas


def _cell(prompt: str, before: Image.Image, after: Image.Image) -> Image.Image:
    caption = textwrap.shorten(prompt, max(24, before.width // 9), placeholder=" …")
    cell = Image.new("RGB", (max(before.width, after.width), 26 + before.height + 6 + after.height), "white")
    ImageDraw.Draw(cell).text((0, 2), caption, fill=INK, font=_font(15))
    cell.paste(before, (0, 26))
    cell.paste(after, (0, 26 + before.height + 6))
    return cell
