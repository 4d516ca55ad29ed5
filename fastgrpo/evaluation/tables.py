"""Tables of results: as text, Markdown or LaTeX for a reader, as CSV or JSON for a program.

A number that is not finite is None here: null in JSON, an empty cell in CSV.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tabulate import SEPARATING_LINE, tabulate

Format = Literal["text", "markdown", "latex"]
_STYLES = {"text": "simple", "markdown": "pipe", "latex": "latex_booktabs"}


def number(value: float) -> float | None:
    """The value, or None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def render_table(
    rows: Sequence[Sequence[str]],
    format: Format = "text",
    left: Collection[int] = (0,),
    totals: Collection[int] = (),
) -> str:
    """Lay out rows of cells in columns.

    Args:
        rows: The head, then the body; the same number of cells in each.
        format: Plain text, Markdown, or LaTeX for the package booktabs.
        left: Columns aligned to the left; the others are aligned to the right.
        totals: Rows (by index, the head is 0) that end a group: a rule follows, or in Markdown,
            which has no rules, the row is bold.
    """
    head, *body = ([cell.strip() for cell in row] for row in rows)
    if format == "markdown":
        head, *body = ([cell.replace("|", "\\|") for cell in row] for row in [head, *body])
    lines: list[Any] = []
    for index, row in enumerate(body, start=1):
        bold = index in totals and format == "markdown"
        lines.append([f"**{cell}**" for cell in row] if bold else row)
        if index in totals and format != "markdown" and index < len(body):
            lines.append(SEPARATING_LINE)
    align = ["left" if column in left else "right" for column in range(len(head))]
    text = tabulate(lines, head, tablefmt=_STYLES[format], colalign=align, disable_numparse=True)
    if format == "latex":
        text = text.replace("|", r"\textbar{}")
    # A hyphen before a digit is a minus sign, except in a word such as run-2.
    minus = {"text": "-", "markdown": "−", "latex": "$-$"}[format]
    return re.sub(r"(?<!\w)-(?=\d)", minus, text)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in UTF-8, without NaN."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file whose header is the first row's keys."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
