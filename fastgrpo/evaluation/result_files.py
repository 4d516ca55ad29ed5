"""Tables of an analysis as text, CSV and JSON. A number that is not finite is None, so null or an
empty cell.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def number(value: float) -> float | None:
    """None for what is not finite."""
    return float(value) if math.isfinite(value) else None


def text_table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows of as many cells each, in columns two spaces apart, aligned to the right but for the
    columns `left`.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [
        [
            cell.ljust(w) if c in left else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As JSON, without NaN."""
    path.write_text(
        json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """With the first row's keys as the header; an empty cell for None."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
