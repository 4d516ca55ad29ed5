"""Pictures and videos of the report as data: URLs, so that the page is one file."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.errors import require
from fastgrpo.evaluation.report.contact_sheet import MAX_PROMPTS, contact_sheet, open_still
from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.training.sample_files import format_scores, match_samples, read_samples
from fastgrpo.training.trust import check_links

MAX_PAGE_VIDEO_BYTES = 24_000_000
"""Videos beyond this are shown by their stills, so that a browser can open the page and a mail can
carry it.
"""
MAX_TEXT_LENGTH = 20_000
"""Of an attached file."""


def data_url(path: Path) -> str:
    """A file as a base64 URL."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"data:{mimetypes.guess_type(path)[0]};base64,{data}"


def sample_columns(runs: Sequence[RunRecord]) -> dict[str, Path]:
    """Which sample folders stand side by side.

    Returns:
        Label -> folder: the first samples of the first run that has any, and the last samples of
        every run. Empty if nothing has been sampled.
    """
    sampled = [(run, run.samples) for run in runs if run.samples]
    chosen = [(run, folders[0]) for run, folders in sampled[:1]]
    chosen += [(run, folders[-1]) for run, folders in sampled]
    columns = {}
    for run, folder in chosen:
        iteration = int(folder.name.removeprefix("iteration_"))
        moment = f"iteration {iteration}" if iteration else "untrained"
        columns[moment if len(runs) == 1 else f"{run.label} · {moment}"] = folder
    return columns


def videos_section(runs: Sequence[RunRecord], folder: Path) -> dict[str, Any]:
    """Videos of the same prompts side by side, as the template takes them; writes a contact sheet
    of them to `folder`.
    """
    columns = sample_columns(runs)
    section: dict[str, Any] = {"pairs": [], "sheet": None}
    if not columns:
        return section | {"videos_note": "No sample videos yet."}
    summaries = [read_samples(path) for path in columns.values()]
    matched, named = match_samples(summaries), " and ".join(columns)
    if len(columns) == 1:
        note = f"So far there are samples of one moment only ({named})."
    else:
        matched = [row for row in matched if sum(map(bool, row)) > 1]
        if not matched:
            return section | {"videos_note": f"The samples of {named} share no prompt."}
        note = f"The same prompts and, for the same seed, the same noise: {named}."
        sheet = folder / "contact_sheet.png"
        contact_sheet(columns, sheet, "Samples of the same prompts")
        section["sheet"] = _jpeg_url(sheet, 4000)
    if stages := summaries[0]["stages"]:
        note += f" Scores: {', '.join(stages).replace('_', ' ')}."
    if len(matched) > MAX_PROMPTS:
        note += f" The first {MAX_PROMPTS} of {len(matched)} prompts."
    room = MAX_PAGE_VIDEO_BYTES
    for row in matched[:MAX_PROMPTS]:
        clips = []
        for (label, path), entry in zip(columns.items(), row, strict=True):
            if entry:
                clips.append(_clip(path, label, entry, room))
                room -= clips[-1]["size"]
        prompt = next(entry["prompt"] for entry in row if entry)
        section["pairs"].append({"prompt": prompt, "clips": clips})
    return section | {"videos_note": note}


def attachments(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Figures (SVG, or PNG without one) and texts (CSV, Markdown, YAML) of folders that other
    commands wrote.

    Raises:
        ValueError: A folder that is missing or holds none of these.
    """
    shown = []
    for folder in folders:
        check_links(folder, "*")
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        images = [
            {"name": path.name, "image": data_url(path)}
            for path in files
            if path.suffix == ".svg"
            or (path.suffix == ".png" and path.with_suffix(".svg") not in files)
        ]
        texts = [
            {"name": path.name, "text": _read_text(path)}
            for path in files
            if path.suffix in (".csv", ".md", ".yaml", ".txt")
        ]
        expected = "a folder with figures (svg, png) or texts (csv, md, yaml, txt)"
        require(images or texts, "attach", expected, str(folder))
        shown.append({"name": folder.resolve().name, "images": images, "texts": texts})
    return shown


def _read_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    left_out = len(text) - MAX_TEXT_LENGTH
    note = f"\n… and {left_out} characters more in the file" if left_out > 0 else ""
    return text[:MAX_TEXT_LENGTH] + note


def _jpeg_url(path: Path, max_width: int) -> str:
    image = open_still(path)
    image.thumbnail((max_width, 4 * max_width))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _clip(folder: Path, label: str, entry: Mapping[str, Any], room: int) -> dict[str, Any]:
    """One video for the page, or a small still if its bytes do not fit into the `room` left."""
    path = folder / entry["video"]
    size = path.stat().st_size
    embedded = size <= room
    return {
        "label": label,
        "scores": format_scores(entry["scores"]),
        "video": data_url(path) if embedded else None,
        "still": None if embedded else _jpeg_url(folder / entry["still"], 1200),
        "file": f"samples/{folder.name}/{path.name}",
        "size": size if embedded else 0,
    }
