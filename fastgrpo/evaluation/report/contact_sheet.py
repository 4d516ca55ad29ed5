"""Contact sheets: stills of the same prompts from several sample folders, in one png."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastgrpo.errors import UserError
from fastgrpo.evaluation.figures import INK
from fastgrpo.training.sample_files import format_scores, match_samples, read_samples

MARGIN = 32
"""Pixels around the sheet."""
MAX_PROMPTS = 64
"""Prompts on a sheet or page, so that it can be opened whatever was sampled."""
_MAX_LETTERS, _MAX_WIDTH = 200, 2400  # of a line of text, and the pixels of a row of frames


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
    blocks = [_text(title, 22)]
    stages = next((summary["stages"] for summary in summaries if summary["stages"]), None)
    if stages:
        blocks.append(_text(f"Scores in order: {', '.join(stages).replace('_', ' ')}", 14))
    for row in matched[:MAX_PROMPTS]:
        prompt = next(entry["prompt"] for entry in row if entry)
        blocks.append(_text(f"\n{textwrap.shorten(prompt, 100, placeholder=' …')}", 17))
        for (label, folder), entry in zip(folders.items(), row, strict=True):
            if entry:
                blocks.append(_text(f"{label}   {format_scores(entry['scores'])}", 13))
                blocks.append(_strip(folder, entry))
    if len(matched) > MAX_PROMPTS:
        blocks.append(_text(f"\n… and {len(matched) - MAX_PROMPTS} prompts more", 17))
    width, height = max(block.width for block in blocks), sum(block.height for block in blocks)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), "white")
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height
    sheet.save(path)


def _text(text: str, size: int) -> Image.Image:
    """Lines of text on white."""
    import matplotlib  # it has the font

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(path, size)
    text = "\n".join(line[:_MAX_LETTERS] for line in text.split("\n"))
    blank = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, width, height = blank.multiline_textbbox((0, 0), text, font)
    image = Image.new("RGB", (math.ceil(width), math.ceil(height) + 8), "white")
    ImageDraw.Draw(image).multiline_text((0, 2), text, fill=INK, font=font)
    return image


def open_still(path: Path) -> Image.Image:
    """A picture of a run.

    Raises:
        UserError: It cannot be read, or is too large to be one.
    """
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything for a damaged file
        raise UserError(f"{path}: cannot be read as a picture: {error}") from error


def _strip(folder: Path, entry: Mapping[str, Any]) -> Image.Image:
    """A still with a line between its frames.

    A still below 72 pixels is enlarged by a whole factor, one above 120 pixels is shrunk to 120.
    """
    still = open_still(folder / entry["still"])
    if still.height < 72:
        still = ImageOps.scale(still, math.ceil(72 / still.height), Image.Resampling.NEAREST)
    elif still.height > 120:
        still = ImageOps.contain(still, (still.width, 120))
    still.thumbnail((_MAX_WIDTH, still.height))
    draw = ImageDraw.Draw(still)
    for frame in range(1, entry["still_frames"]):
        x = round(frame * still.width / entry["still_frames"])
        draw.line((x, 0, x, still.height), fill="white", width=2)
    return still
