"""Pictures and videos of the report as data: URLs, so that the page is one file."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastgrpo.errors import require
from fastgrpo.evaluation.figures import FAINT, GRID, INK
from fastgrpo.evaluation.report.contact_sheet import contact_sheet
from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.training.sample_files import format_scores, match_samples, read_samples

MAX_VIDEO_BYTES = 2_000_000
"""A larger video is shown by its stills, so that a browser can open the page and a mail can carry
it.
"""
MAX_PAGE_VIDEO_BYTES = 24_000_000
"""The same for all videos of the page together."""
MAX_SHEET_BYTES = 3_000_000
"""A larger contact sheet is shown as a JPEG; the file beside the page stays lossless."""
MAX_TABLE_ROWS, MAX_TEXT_LENGTH = 100, 20_000
"""Of an attached file."""
PAPER = "#ffffff"
DARK = {INK: "#e6edf3", FAINT: "#9aa7b4", GRID: "#30363d", PAPER: "#161b22"}
"""Colours of a figure where the reader's system is dark; the colours of lines are legible on both.
"""


def data_url(data: bytes, kind: str) -> str:
    """The bytes as a base64 URL of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def svg_url(svg: bytes) -> str:
    """An SVG as a URL. A figure of this package also gets a style that turns it dark where the
    reader's system is.
    """
    text = svg.decode("utf-8")
    if INK in text:
        rules = "".join(
            f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
            for light, dark in DARK.items()
            for what in ("fill", "stroke")
        )
        rules = f"@media (prefers-color-scheme: dark){{svg{{fill:{DARK[INK]}}}{rules}}}"
        end = text.index(">", text.index("<svg")) + 1
        text = f"{text[:end]}<style>{rules}</style>{text[end:]}"
    return data_url(text.encode(), "image/svg+xml")


def sample_columns(runs: Sequence[RunRecord]) -> dict[str, Path]:
    """Which sample folders stand side by side.

    Returns:
        Label -> folder. Of one run: its first and last samples. Of several: the first run's
        untrained samples and the last samples of each, as `run · iteration`. Empty if nothing has
        been sampled.
    """
    sampled = [(run, run.samples) for run in runs if run.samples]
    if not sampled:
        return {}
    first_run, folders = sampled[0]
    untrained = _iteration(folders[0]) == 0
    if len(runs) == 1:
        first = "untrained" if untrained else f"iteration {_iteration(folders[0])}"
        columns = {first: folders[0]}
        if len(folders) > 1:
            columns[f"iteration {_iteration(folders[-1])}"] = folders[-1]
        return columns
    columns = {f"untrained ({first_run.label})": folders[0]} if untrained else {}
    return columns | {
        f"{run.label} · {_iteration(folders[-1])}": folders[-1] for run, folders in sampled
    }


def _iteration(folder: Path) -> int:
    return int(folder.name.removeprefix("iteration_"))


def videos_section(runs: Sequence[RunRecord], folder: Path) -> dict[str, Any]:
    """Videos of the same prompts side by side, as the template takes them; writes a contact sheet
    of them to `folder`.
    """
    columns = sample_columns(runs)
    section: dict[str, Any] = {"videos_title": "Before and after", "pairs": [], "sheet": None}
    if not columns:
        note = "No sample videos yet: the first ones show the untrained model."
        return section | {"videos_note": note}
    summaries = [read_samples(path) for path in columns.values()]
    matched = match_samples(summaries)
    if len(columns) == 1:
        section["videos_title"] = "Sample videos"
        (moment,) = columns
        note = f"So far there are samples of one moment only ({moment}); later ones will stand "
        note += "beside them."
    else:
        matched = [row for row in matched if sum(map(bool, row)) > 1]
        if not matched:
            note = f"The samples of {' and '.join(columns)} share no prompt."
            return section | {"videos_note": note}
        title, named = "Before and after: same prompts, same noise", " and ".join(columns)
        if len(runs) > 1:
            section["videos_title"] = "Side by side"
            title = "The same prompts in every run"
            named = "the untrained model, and each run after the iteration beside its name"
        note = f"The same prompts and, for the same seed, the same noise: {named}."
        contact_sheet(columns, folder / "contact_sheet.png", title)
        section["sheet"] = _sheet_url(folder / "contact_sheet.png")
    if stages := summaries[0]["stages"]:
        note += f" Scores: {', '.join(stages).replace('_', ' ')}."
    room = MAX_PAGE_VIDEO_BYTES
    for row in matched:
        clips = []
        for (label, path), entry in zip(columns.items(), row, strict=True):
            if entry:
                clips.append(_clip(path, label, entry, room))
                room -= clips[-1]["size"]
        prompt = next(entry["prompt"] for entry in row if entry)
        section["pairs"].append({"prompt": prompt, "clips": clips})
    return section | {"videos_note": note}


def attachments(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Figures (SVG, or PNG without one), tables (CSV) and texts (Markdown, YAML) of folders that
    other commands wrote.

    Raises:
        ValueError: A folder that is missing or holds none of these.
    """
    shown = []
    for folder in folders:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        entries: dict[str, list[dict[str, Any]]] = {"images": [], "tables": [], "texts": []}
        for path in files:
            if path.suffix == ".svg":
                entries["images"].append({"name": path.name, "image": svg_url(path.read_bytes())})
            elif path.suffix == ".png" and path.with_suffix(".svg") not in files:
                url = data_url(path.read_bytes(), "image/png")
                entries["images"].append({"name": path.name, "image": url})
            elif path.suffix == ".csv":
                entries["tables"].append({"name": path.name, "rows": _read_table(path)})
            elif path.suffix in (".md", ".yaml", ".txt"):
                entries["texts"].append({"name": path.name, "text": _read_text(path)})
        expected = "a folder with figures (svg, png), tables (csv) or texts (md, yaml, txt)"
        require(any(entries.values()), "attach", expected, str(folder))
        shown.append({"name": folder.resolve().name, **entries})
    return shown


def _read_table(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    left_out = len(rows) - MAX_TABLE_ROWS
    note = [[f"… and {left_out} rows more in the file"]] if left_out > 0 else []
    return rows[:MAX_TABLE_ROWS] + note


def _read_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    left_out = len(text) - MAX_TEXT_LENGTH
    note = f"\n… and {left_out} characters more in the file" if left_out > 0 else ""
    return text[:MAX_TEXT_LENGTH] + note


def _sheet_url(path: Path) -> str:
    data = path.read_bytes()
    if len(data) <= MAX_SHEET_BYTES:
        return data_url(data, "image/png")
    return _jpeg_url(path, 4000)


def _jpeg_url(path: Path, max_width: int) -> str:
    image = Image.open(path).convert("RGB")
    image.thumbnail((max_width, 4 * max_width))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_url(buffer.getvalue(), "image/jpeg")


def _clip(folder: Path, label: str, entry: Mapping[str, Any], room: int) -> dict[str, Any]:
    """One video for the page, or a small still if its bytes do not fit into the `room` left."""
    path = folder / entry["video"]
    size = path.stat().st_size
    embedded = size <= min(MAX_VIDEO_BYTES, room)
    return {
        "label": label,
        "scores": format_scores(entry["scores"]),
        "video": data_url(path.read_bytes(), "video/mp4") if embedded else None,
        "still": None if embedded else _jpeg_url(folder / entry["still"], 1200),
        "file": f"samples/{folder.name}/{path.name}",
        "size": size if embedded else 0,
    }
