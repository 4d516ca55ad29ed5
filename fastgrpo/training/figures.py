"""What a run leaves behind in pictures: the look of its curves, sample videos with their stills,
before and after side by side.

Figures are matplotlib's, made without pyplot, so that nothing global changes. Colours are Okabe
and Ito's, told apart by colour-blind readers; what is drawn with them also differs in marker or
dashes.
"""

from __future__ import annotations

import io
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

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT, GRID = "#1f2933", "#6b7785", "#e3e7eb"

Row = Mapping[str, Any]
Series = tuple[list[int], list[float]]


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `<stem>.png` (160 dpi) and `<stem>.svg`; the same figure gives the same bytes. Returns
    both paths.
    """
    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    figure.savefig(png, dpi=160, metadata={"Software": None})
    svg.write_bytes(svg_bytes(figure))
    return png, svg


def svg_bytes(figure: Figure) -> bytes:
    """The figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": "fastgrpo"}
    ):  # otherwise the ids in the file are random
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def series(rows: Sequence[Row], key: str) -> Series:
    """Iterations and values of one metric, where a row of metrics.jsonl has a finite one."""
    points = [
        (row["iteration"], float(row[key]))
        for row in rows
        if row.get(key) is not None and math.isfinite(row[key])
    ]
    return [iteration for iteration, _ in points], [value for _, value in points]


def save_samples(
    folder: Path,
    videos: Tensor,
    prompts: Sequence[str],
    fps: float,
    scores: Sequence[Sequence[float]] | Tensor | None = None,
    stages: Sequence[str] | None = None,
) -> None:
    """Write N videos into `folder`: NN_<caption>.mp4, NN_<caption>.png and, last, samples.json (so
    a folder that has it is whole).

    The mp4 is H.264, yuv420p; a video whose shorter side is below 256 pixels is enlarged by
    whole pixels, and an odd side repeats its last line, as the codec needs even ones. The png is
    lossless at the video's own size: up to 8 frames, evenly spaced, from left to right.
    samples.json: {"fps", "stages" or null, "samples": [{"prompt", "scores" or null, "video",
    "still", "still_frames"}]}; a score that is not finite is null.

    Args:
        videos: [N, T, 3, H, W], uint8 or float in [0, 1] (values outside are clamped), on any
            device. prompts: N captions. fps: frames per second. scores: [N, K] of the judge;
            stages: their K names.

    Raises:
        ValueError: shapes, lengths or dtype that do not fit; a video that is not finite.
    """
    frames = _to_uint8(videos)
    table = None if scores is None else torch.as_tensor(scores, dtype=torch.float64).tolist()
    if len(prompts) != len(frames) or (table is not None and len(table) != len(frames)):
        counts = f"{len(prompts)} prompts" + (
            "" if table is None else f" and {len(table)} rows of scores"
        )
        raise ValueError(f"samples: expected one for each of {len(frames)} videos, got {counts}")
    if table is not None and (stages is None or any(len(row) != len(stages) for row in table)):
        raise ValueError(
            f"samples: expected one score for each stage of {stages}, got {[len(row) for row in table]}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(2, len(str(len(frames) - 1)))
    entries = []
    for index, (video, prompt) in enumerate(zip(frames, prompts, strict=True)):
        name = f"{index:0{digits}d}_{_slug(prompt)}"
        write_video(folder / f"{name}.mp4", video, fps)
        still = _strip(video)
        Image.fromarray(still).save(folder / f"{name}.png")
        row = (
            None
            if table is None
            else [value if math.isfinite(value) else None for value in table[index]]
        )
        count = still.shape[1] // video.shape[2]
        entries.append(
            {
                "prompt": prompt,
                "scores": row,
                "video": f"{name}.mp4",
                "still": f"{name}.png",
                "still_frames": count,
            }
        )
    summary = {"fps": fps, "stages": None if stages is None else list(stages), "samples": entries}
    temporary = folder / ".samples.json.tmp"
    temporary.write_text(
        json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    os.replace(temporary, folder / "samples.json")


def read_samples(folder: Path) -> dict[str, Any]:
    """samples.json of a folder that `save_samples` finished. FileNotFoundError for one that it did
    not.
    """
    summary: dict[str, Any] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    return summary


def write_video(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """H.264 yuv420p mp4 of frames [T, H, W, 3], enlarged and padded as `save_samples` says."""
    height, width = frames.shape[1:3]
    scale = max(1, math.ceil(256 / min(height, width)))
    if scale > 1 and (height * scale % 2 or width * scale % 2):
        scale += 1
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    frames = np.pad(
        frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge"
    )
    # imageio would be one call, but runs the garbage collector twice a file: 0.2 s each, 4 s an
    # evaluation.
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                )
            )
        container.mux(stream.encode())


def contact_sheet(before_folder: Path, after_folder: Path, path: Path) -> None:
    """One png: for every caption of both folders the stills before (above) and after (below)
    training, with their scores.

    Both folders come from `save_samples`, with the same noise for the same caption. ValueError
    where they share no caption.
    """
    comparison_sheet(
        {"before": before_folder, "after": after_folder},
        path,
        "Before and after: same captions, same noise",
    )


def comparison_sheet(folders: Mapping[str, Path], path: Path, title: str) -> None:
    """One png: for every caption of the first folder that others have too, a row of stills from
    each, with its name and scores.

    The folders come from `save_samples`. ValueError where no other shares a caption with the
    first.
    """
    summaries = {name: read_samples(folder) for name, folder in folders.items()}
    matched = [
        row
        for row in match_samples(list(summaries.values()))
        if sum(entry is not None for entry in row) > 1
    ]
    if not matched:
        shared = f"none shared by {' and '.join(map(str, folders.values()))}"
        raise ValueError(
            f"contact sheet: expected a caption that is in more than one folder, got {shared}"
        )
    font = _font(15)
    gutter = max(76, 14 + max(round(font.getlength(_short(name))) for name in folders))
    cells = []
    for row in matched:
        strips = [
            _scored_strip(folders[name], entry, name, gutter)
            for name, entry in zip(folders, row, strict=True)
            if entry is not None
        ]
        cells.append(_cell(next(entry["prompt"] for entry in row if entry), strips))
    columns = 2 if len(cells) > 3 and cells[0].width < 1000 else 1
    gap, margin, header = 28, 32, 88
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    lines = math.ceil(len(cells) / columns)
    sheet = Image.new(
        "RGB",
        (
            2 * margin + columns * width + (columns - 1) * gap,
            header + lines * (height + gap) + margin - gap,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 24), title, fill=INK, font=_font(22))
    stages = next((summary["stages"] for summary in summaries.values() if summary["stages"]), None)
    if stages:
        draw.text(
            (margin, 54),
            "Scores in order: " + ", ".join(map(_title, stages)),
            fill=FAINT,
            font=_font(14),
        )
    for index, cell in enumerate(cells):
        line, column = divmod(index, columns)
        sheet.paste(cell, (margin + column * (width + gap), header + line * (height + gap)))
    sheet.save(path)


def match_samples(summaries: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any] | None]]:
    """For each sample of the first samples.json, in its order: that entry, and from every other the
    one with the same caption or None.

    The n-th of a repeated caption meets the n-th.
    """
    rest = [list(summary["samples"]) for summary in summaries[1:]]
    rows: list[list[dict[str, Any] | None]] = []
    for first in summaries[0]["samples"]:
        row: list[dict[str, Any] | None] = [first]
        for entries in rest:
            match = next(
                (
                    index
                    for index, entry in enumerate(entries)
                    if entry["prompt"] == first["prompt"]
                ),
                None,
            )
            row.append(None if match is None else entries.pop(match))
        rows.append(row)
    return rows


def format_scores(scores: Sequence[float | None] | None) -> str:
    """'0.71  0.65  –': a missing score is a dash; no scores at all an empty text."""
    return (
        ""
        if scores is None
        else "  ".join("–" if score is None else f"{score:.2f}" for score in scores)
    )


def _new_figure(
    rows: int, width: float, height: float, columns: int = 1, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, sharex=sharex, squeeze=False).flat)


def _finish(axes: Axes, title: str, ylabel: str, xlabel: str = "iteration") -> None:
    entries = len(axes.get_legend_handles_labels()[0])
    lines = math.ceil(entries / 3)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=6 + 16 * lines)
    if (
        entries
    ):  # between title and curves, three a line: beside them it would take a fifth of the width
        place = {
            "loc": "lower left",
            "bbox_to_anchor": (-0.01, 1.0),
            "ncols": 3,
            "borderpad": 0,
            "borderaxespad": 0.3,
        }
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
    drawn = {
        float(x)
        for line in axes.lines
        if not str(line.get_gid()).startswith("threshold")
        for x in np.asarray(line.get_xdata())
    }
    if (
        len(drawn) == 1
    ):  # one iteration: a whole number to each side of it, and so whole numbers as ticks
        axes.set_xlim(min(drawn) - 1, min(drawn) + 1)
    if not (drawn or axes.collections or axes.patches):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(
            0.5,
            0.5,
            "no training iteration yet",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=FAINT,
        )


def _title(stage: str) -> str:
    return stage.replace("_", " ")


def _to_uint8(videos: Tensor) -> NDArray[np.uint8]:
    """[N, T, 3, H, W] -> [N, T, H, W, 3] uint8 on the host; floats are rounded to the nearest of
    256 levels.
    """
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
    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size
    )


def _scored_strip(folder: Path, entry: Mapping[str, Any], label: str, gutter: int) -> Image.Image:
    """A still at a height fit for a sheet (72 pixels and more by whole pixels, or shrunk to 120),
    with its label and scores at the left.
    """
    still = Image.open(folder / entry["still"]).convert("RGB")
    if still.height < 72:
        scale = math.ceil(72 / still.height)
        still = still.resize((still.width * scale, still.height * scale), Image.Resampling.NEAREST)
    elif still.height > 120:
        still = still.resize(
            (round(still.width * 120 / still.height), 120), Image.Resampling.LANCZOS
        )
    canvas = Image.new("RGB", (gutter + still.width, still.height), "white")
    canvas.paste(still, (gutter, 0))
    draw = ImageDraw.Draw(canvas)
    for frame in range(1, entry["still_frames"]):
        x = gutter + round(frame * still.width / entry["still_frames"])
        draw.line((x, 0, x, still.height), fill="white", width=2)
    draw.text((0, 2), _short(label), fill=FAINT if label == "before" else INK, font=_font(15))
    for index, score in enumerate(format_scores(entry["scores"]).split()):
        draw.text((0, 23 + 16 * index), score, fill=COLORS[index % len(COLORS)], font=_font(13))
    return canvas


def _short(label: str) -> str:
    """Both ends of a long label: names of runs often differ in the last letters."""
    return label if len(label) <= 32 else f"{label[:14]}…{label[-17:]}"


def _cell(prompt: str, strips: Sequence[Image.Image]) -> Image.Image:
    caption = textwrap.shorten(prompt, max(24, strips[0].width // 9), placeholder=" …")
    cell = Image.new(
        "RGB",
        (max(strip.width for strip in strips), 20 + sum(6 + strip.height for strip in strips)),
        "white",
    )
    ImageDraw.Draw(cell).text((0, 2), caption, fill=INK, font=_font(15))
    top = 26
    for strip in strips:
        cell.paste(strip, (0, top))
        top += strip.height + 6
    return cell
