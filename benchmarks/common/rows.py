"""Rows of measurements: provenance, table, goals, and the CSV files under benchmarks/data.

Each script has a Measurement of its own; this is all that they share.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "benchmarks" / "data"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured thing. A figure that was not taken is None."""

    KEY: ClassVar[tuple[str, ...]]
    """Fields that name what was measured: a newer row replaces an older one that has the same."""

    device: str
    torch: str
    triton: str
    driver: str
    commit: str
    date: str
    goals: str = ""
    """Such as "G7 copy 85 %: met"; empty where no goal is set, or on another device than theirs."""


Column = tuple[str, str, Callable[[Any], str]]
"""Header, width as a format specification, and the text of a row."""


def provenance(device: torch.device) -> dict[str, str]:
    """device, torch, triton, driver, commit and date, as the rows have them."""
    driver = "none"
    if device.type == "cuda":
        driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = importlib.util.find_spec("triton")
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if found else "none",
        "driver": driver,
        "commit": revision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def revision() -> str:
    """The code's revision as `git describe` has it; FASTGRPO_COMMIT instead where the tree was
    carried without its history.
    """
    carried = os.environ.get("FASTGRPO_COMMIT")
    described = carried or _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return described or "unknown"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def csv_path(folder: Path | None, device: torch.device, script: str) -> Path:
    """cpu_ops.csv, or with the GPU's name: nvidia_h100_80gb_hbm3_ops.csv; by default in DATA."""
    name = "cpu" if device.type == "cpu" else device_name(device).lower()
    return (folder or DATA) / f"{re.sub(r'[^a-z0-9]+', '_', name).strip('_')}_{script}.csv"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return ""
    return next(iter(done.stdout.strip().splitlines()), "") if done.returncode == 0 else ""


def has_goals(device: str) -> bool:
    """True on an H100 or an H200, for which the goals of docs/performance.md are set."""
    return re.search(r"H100|H200", device) is not None


def met(asked: Sequence[tuple[str, bool]]) -> str:
    """Goals, each met or not met."""
    return "; ".join(f"{name}: {'met' if is_met else 'not met'}" for name, is_met in asked)


def write_csv(path: Path, rows: Sequence[Measurement]) -> None:
    """Write the rows, and keep those of an earlier file that they do not replace.

    Raises:
        ValueError: the earlier file has other columns.
    """
    kind = type(rows[0])
    names = [field.name for field in dataclasses.fields(kind)]
    replaced = {tuple(str(getattr(row, name)) for name in kind.KEY) for row in rows}
    kept = [
        entry
        for entry in (read_csv(path, names) if path.exists() else [])
        if tuple(entry[name] for name in kind.KEY) not in replaced
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(kept)
        for row in rows:
            values = dataclasses.asdict(row)
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file as text; ValueError for a file with other columns."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or [])
        if found != list(columns):
            raise ValueError(
                f"{path}: expected the columns {', '.join(columns)}, got {', '.join(found)}"
            )
        return list(reader)


def table(rows: Sequence[Any], columns: Sequence[Column], head: bool = True) -> str:
    """Fixed-width lines; the last column is as long as its text."""
    lines = [[f"{name:{width}}" for name, width, _ in columns]] if head else []
    lines += [[f"{text(row):{width}}" for _, width, text in columns] for row in rows]
    return "\n".join(" ".join(line).rstrip() for line in lines)


def number(value: float | None, digits: int) -> str:
    """With so many digits after the point, or at least two that count; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10.0**-digits else f"{value:.1e}"
