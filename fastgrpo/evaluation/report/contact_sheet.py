"""Contact sheets: stills of the same prompts from several sample folders, in one png."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from fastgrpo.errors import UserError
from fastgrpo.evaluation.figures import COLORS, FAINT, INK
from fastgrpo.training.sample_files import format_scores, match_samples, read_samples

COLUMN_GAP, MARGIN, HEADER = 28, 32, 88
"""Pixels between the sheet's cells, around them, and above them."""


def contact_sheet(
    folders: Mapping[str, Path],
    path: Path,
    title: str = "Before and after: same prompts, same noise",
) -> None:
    """Write one png: for each prompt of the first folder that others have too, a row of stills
    from each folder, with its label and scores.

    Args:
        folders: Label -> a folder of `save_samples`.
        path: The png.
        title: Stands above the stills.

    Raises:
        ValueError: No other folder shares a prompt with the first.
    """
    summaries = [read_samples(folder) for folder in folders.values()]
    matched = [row for row in match_samples(summaries) if sum(map(bool, row)) > 1]
    if not matched:
        raise UserError(
            "contact sheet: expected a prompt that is in more than one folder, "
            f"got none shared by {' and '.join(map(str, folders.values()))}"
        )
    font = _font(15)
    gutter = max(76, 14 + max(round(font.getlength(_short(name))) for name in folders))
    cells = []
    for row in matched:
        strips = [
            _scored_strip(folders[name], entry, name, gutter)
            for name, entry in zip(folders, row, strict=True)
            if entry
        ]
        cells.append(_cell(next(entry["prompt"] for entry in row if entry), strips))
    columns = 2 if len(cells) > 3 and cells[0].width < 1000 else 1
    width = max(cell.width for cell in cells) + COLUMN_GAP
    height = max(cell.height for cell in cells) + COLUMN_GAP
    lines = math.ceil(len(cells) / columns)
    size = 2 * MARGIN + columns * width - COLUMN_GAP, HEADER + lines * height + MARGIN - COLUMN_GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 24), title, fill=INK, font=_font(22))
    stages = next((summary["stages"] for summary in summaries if summary["stages"]), None)
    if stages:
        names = ", ".join(stages).replace("_", " ")
        draw.text((MARGIN, 54), f"Scores in order: {names}", fill=FAINT, font=_font(14))
    for index, cell in enumerate(cells):
        line, column = divmod(index, columns)
        sheet.paste(cell, (MARGIN + column * width, HEADER + line * height))
    sheet.save(path)


def _font(size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size)


def _scored_strip(folder: Path, entry: Mapping[str, Any], label: str, gutter: int) -> Image.Image:
    """A still with its label and scores in a gutter at the left.

    A still below 72 pixels is enlarged by a whole factor, one above 120 pixels is shrunk to 120.
    """
    still = Image.open(folder / entry["still"]).convert("RGB")
    if still.height < 72:
        scale = math.ceil(72 / still.height)
        still = still.resize((still.width * scale, still.height * scale), Image.Resampling.NEAREST)
    elif still.height > 120:
        width = round(still.width * 120 / still.height)
        still = still.resize((width, 120), Image.Resampling.LANCZOS)
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
    """Both ends of a long label, since names of runs often differ in the last letters."""
    return label if len(label) <= 32 else f"{label[:14]}…{label[-17:]}"


def _cell(prompt: str, strips: Sequence[Image.Image]) -> Image.Image:
    """The strips below each other, under their prompt."""
    heading = textwrap.shorten(prompt, max(24, strips[0].width // 9), placeholder=" …")
    size = max(strip.width for strip in strips), 20 + sum(6 + strip.height for strip in strips)
    cell = Image.new("RGB", size, "white")
    ImageDraw.Draw(cell).text((0, 2), heading, fill=INK, font=_font(15))
    top = 26
    for strip in strips:
        cell.paste(strip, (0, top))
        top += strip.height + 6
    return cell
