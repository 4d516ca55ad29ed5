"""Pictures and videos of the report, as data: URLs, so that the page is one file."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.training import figures
from fastgrpo.training.figures import FAINT, GRID, INK

MAX_VIDEO_BYTES = 2_000_000
"""A larger video is shown by its stills: the page has to stay one that a browser opens and a mail
carries.
"""
MAX_PAGE_VIDEO_BYTES = 24_000_000
"""The same for all videos of the page together."""
MAX_SHEET_BYTES = 3_000_000
"""A larger contact sheet is shown as a JPEG; the file beside the page stays lossless."""
MAX_ATTACHED = {"rows of a table": 100, "characters of a text": 20_000}
PAPER = "#ffffff"
DARK = {INK: "#e6edf3", FAINT: "#9aa7b4", GRID: "#30363d", PAPER: "#161b22"}
"""Colours of a figure where the reader's system is dark; the palette of the lines is legible on
both.
"""


def data_url(data: bytes, kind: str) -> str:
    """The bytes as a base64 URL of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def svg_url(svg: bytes) -> str:
    """A figure of ours, with a style inside that turns it dark where the reader's system is;
    another's SVG as it is.
    """
    text = svg.decode("utf-8")
    if INK not in text:
        return data_url(svg, "image/svg+xml")
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    head, tag, rest = text.partition("<svg")
    attributes, close, body = rest.partition(">")
    style = f"<style>@media (prefers-color-scheme: dark){{svg{{fill:{DARK[INK]}}}{rules}}}</style>"
    return data_url((head + tag + attributes + close + style + body).encode(), "image/svg+xml")


def moment(folder: Path) -> str:
    """Of a sample folder: 'untrained' or 'iteration 50'."""
    return "untrained" if _iteration(folder) == 0 else f"iteration {_iteration(folder)}"


def _iteration(folder: Path) -> int:
    return int(folder.name.removeprefix("iteration_"))


def sample_columns(runs: Sequence[RunRecord]) -> dict[str, Path]:
    """What stands side by side, by label: of one run its first and last samples; of several the
    first run's untrained ones and the last of each, as `run · iteration`. Empty where nothing
    has been sampled.
    """
    columns: dict[str, Path] = {}
    sampled = [(run, run.samples) for run in runs if run.samples]
    if not sampled:
        return {}
    if len(runs) == 1:
        return {moment(folder): folder for folder in (sampled[0][1][0], sampled[0][1][-1])}
    first_run, folders = sampled[0]
    if moment(folders[0]) == "untrained":
        columns[f"untrained ({first_run.label})"] = folders[0]
    return columns | {
        f"{run.label} · {_iteration(folders[-1])}": folders[-1] for run, folders in sampled
    }


def videos_section(runs: Sequence[RunRecord], folder: Path) -> dict[str, Any]:
    """Clips of the same captions side by side, with a contact sheet of them written to `folder`, as
    the template takes them.
    """
    columns = sample_columns(runs)
    sheet = folder / "contact_sheet.png"
    result: dict[str, Any] = {"videos_title": "Before and after", "pairs": [], "sheet": None}
    if not columns:
        return result | {
            "videos_note": "No sample videos yet: the first ones show the untrained model."
        }
    summaries = [_read_samples(path) for path in columns.values()]
    stages = ", ".join(stage.replace("_", " ") for stage in summaries[0]["stages"] or ())
    in_order = f" Scores: {stages}." if stages else ""
    matched = figures.match_samples(summaries)
    if len(columns) == 1:
        result["videos_title"] = "Sample videos"
        note = f"So far there are samples of one moment only ({next(iter(columns))}); later ones will stand beside them.{in_order}"
    else:
        matched = [row for row in matched if sum(entry is not None for entry in row) > 1]
        if not matched:
            return result | {
                "videos_note": f"The samples of {' and '.join(columns)} share no caption."
            }
        named = (
            " and ".join(columns)
            if len(runs) == 1
            else "the untrained model, and each run after the iteration beside its name"
        )
        note = f"The same captions and, for the same seed, the same noise: {named}.{in_order}"
        title = (
            "Before and after: same captions, same noise"
            if len(runs) == 1
            else "The same captions in every run"
        )
        result["videos_title"] = "Before and after" if len(runs) == 1 else "Side by side"
        figures.comparison_sheet(columns, sheet, title)
        result["sheet"] = _sheet_url(sheet)
    budget = [MAX_PAGE_VIDEO_BYTES]
    places = list(columns.items())
    result["pairs"] = [
        {
            "prompt": next(entry["prompt"] for entry in row if entry),
            "clips": [
                _clip(path, label, entry, budget)
                for (label, path), entry in zip(places, row, strict=True)
                if entry
            ],
        }
        for row in matched
    ]
    return result | {"videos_note": note}


def attachments(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Figures (SVG, or PNG without one), tables (CSV) and texts (Markdown, YAML) of folders that
    other commands wrote.

    ValueError for one that is no folder or holds none of these.
    """
    shown = []
    for folder in folders:
        files = (
            sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        )
        images = [
            path
            for path in files
            if path.suffix == ".svg"
            or (path.suffix == ".png" and path.with_suffix(".svg") not in files)
        ]
        tables = [path for path in files if path.suffix == ".csv"]
        texts = [path for path in files if path.suffix in (".md", ".yaml", ".txt")]
        if not images + tables + texts:
            raise ValueError(
                f"attach: expected a folder with figures (svg, png), tables (csv) or texts (md, yaml, txt), got {folder}"
            )
        shown.append(
            {
                "name": folder.resolve().name,
                "images": [{"name": path.name, "image": _image_url(path)} for path in images],
                "tables": [{"name": path.name, "rows": _read_table(path)} for path in tables],
                "texts": [{"name": path.name, "text": _read_text(path)} for path in texts],
            }
        )
    return shown


def _image_url(path: Path) -> str:
    return (
        svg_url(path.read_bytes())
        if path.suffix == ".svg"
        else data_url(path.read_bytes(), "image/png")
    )


def _read_table(path: Path) -> list[list[str]]:
    most = MAX_ATTACHED["rows of a table"]
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    return (
        rows
        if len(rows) <= most
        else [*rows[:most], [f"… and {len(rows) - most} rows more in the file"]]
    )


def _read_text(path: Path) -> str:
    text, most = path.read_text(encoding="utf-8"), MAX_ATTACHED["characters of a text"]
    return (
        text
        if len(text) <= most
        else f"{text[:most]}\n… and {len(text) - most} characters more in the file"
    )


def _read_samples(folder: Path) -> dict[str, Any]:
    try:
        return figures.read_samples(folder)
    except ValueError as error:
        raise ValueError(f"{folder / 'samples.json'}: {error}") from error


def _sheet_url(path: Path) -> str:
    data = path.read_bytes()
    return (
        data_url(data, "image/png")
        if len(data) <= MAX_SHEET_BYTES
        else _jpeg_url(Image.open(path), 4000)
    )


def _jpeg_url(image: Image.Image, most_pixels: int) -> str:
    image = image.convert("RGB")
    image.thumbnail((most_pixels, 4 * most_pixels))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_url(buffer.getvalue(), "image/jpeg")


def _clip(
    folder: Path, label: str, entry: Mapping[str, Any], budget: list[int]
) -> dict[str, str | None]:
    """One video for the page; takes its bytes off the budget, or shows a small still where it does
    not fit.
    """
    path = folder / entry["video"]
    size = path.stat().st_size
    video = still = None
    if size <= min(MAX_VIDEO_BYTES, budget[0]):
        budget[0] -= size
        video = data_url(path.read_bytes(), "video/mp4")
    else:
        still = _jpeg_url(Image.open(folder / entry["still"]), 1200)
    file = f"samples/{folder.name}/{path.name}"
    return {
        "label": label,
        "scores": figures.format_scores(entry["scores"]),
        "video": video,
        "still": still,
        "file": file,
    }
