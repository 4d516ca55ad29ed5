"""Rows of measurements: their table, the CSV files under benchmarks/data, and the goals G7 and G8
that they are held against.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "data"

SDE_OPS = ("sde_step", "sde_log_prob", "clipped_ratio_loss", "grpo_loss", "branch_gradient")
"""Held against G8; the others, the transformer's pointwise work, against G7."""
PEERS = ("eager", "compile")


@dataclass(frozen=True)
class Row:
    """One backend of one operation at one size, in one direction. A figure that was not
    taken is None.
    """

    op: str
    size: str
    direction: str
    """"forward", "backward" or "forward+backward"."""
    backend: str
    """A backend of fastgrpo_kernels, or a peer: "eager", "compile" (Inductor)."""
    dtype: str
    us: float
    host_us: float
    method: str
    bytes: int
    flops: int
    gb_per_s: float
    copy_gb_per_s: float
    speedup_eager: float | None
    """Time of the peer over this time: above 1 is faster than the peer."""
    speedup_compile: float | None
    log_prob_error: float | None
    """Largest distance from the float64 reference, for operations that return log-probabilities."""
    goals: str
    """Such as "G7 copy 85 %: met; G7 eager 5x: not met"; empty where no goal is set, or on another
    device than theirs.
    """
    device: str
    torch: str
    triton: str
    driver: str
    commit: str
    date: str

    @property
    def copy_percent(self) -> float:
        """Share of the copy bandwidth measured in the same run."""
        return 100.0 * self.gb_per_s / self.copy_gb_per_s

    def judged(self, goals: str) -> Row:
        """The same with its goals."""
        return dataclasses.replace(self, goals=goals)

    @property
    def key(self) -> tuple[str, ...]:
        """What a newer row takes the place of."""
        return self.device, self.op, self.size, self.direction, self.backend, self.dtype


# -------- provenance


def provenance(device: torch.device) -> dict[str, str]:
    """device, torch, triton, driver, commit and date, as the rows have them."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else "none",
        "commit": revision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def revision() -> str:
    """The code's revision as `git describe` has it; FASTGRPO_COMMIT instead where the tree was
    carried without its history.
    """
    return (
        os.environ.get("FASTGRPO_COMMIT")
        or _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty")
        or "unknown"
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def csv_name(device: torch.device) -> str:
    """cpu_ops.csv, or the GPU's name: nvidia_h100_80gb_hbm3_ops.csv."""
    slug = (
        "cpu"
        if device.type == "cpu"
        else re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")
    )
    return f"{slug}_ops.csv"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return ""
    return (
        done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
    )


# -------- goals


def judge(row: Row) -> str:
    """The goals of shared/performance.md that this row is held against, each met or not met; they
    are set for an H100 or an H200.
    """
    if row.backend in (*PEERS, "reference") or not re.search(r"H100|H200", row.device):
        return ""
    asked: list[tuple[str, bool]] = []
    if row.op not in SDE_OPS:
        asked.append(("G7 copy 85 %", row.copy_percent >= 85.0))
        if row.speedup_eager is not None:
            asked.append(("G7 eager 5x", row.speedup_eager >= 5.0))
        least = 0.97 if row.direction == "forward" else 1.1
        if row.speedup_compile is not None:
            asked.append((f"G7 compile {least}x", row.speedup_compile >= least))
    limit = {("sde_step", "forward"): 9.0, ("grpo_loss", "forward+backward"): 20.0}.get(
        (row.op, row.direction)
    )
    if limit is not None and "480p" in row.size:
        asked.append((f"G8 {limit:g} us", row.us <= limit))
        if row.speedup_eager is not None:
            asked.append(("G8 eager 12x", row.speedup_eager >= 12.0))
    if row.log_prob_error is not None:
        asked.append(("G8 error 1e-6", row.log_prob_error < 1e-6))
    return "; ".join(f"{name}: {'met' if met else 'not met'}" for name, met in asked)


# -------- files and table


def read_csv(path: Path) -> list[Row]:
    """Rows that `write_csv` wrote; ValueError for a file with other columns."""
    names = [field.name for field in dataclasses.fields(Row)]
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(
                f"{path}: expected the columns {', '.join(names)}, got {', '.join(reader.fieldnames or [])}"
            )
        return [_parse(entry) for entry in reader]


def write_csv(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Write the rows, and keep those of an earlier file that they do not replace. Returns all of
    them.
    """
    replaced = {row.key for row in rows}
    merged = [
        *(row for row in (read_csv(path) if path.exists() else []) if row.key not in replaced),
        *rows,
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        writer.writerows([_format(value) for value in dataclasses.astuple(row)] for row in merged)
    return merged


def table(rows: Iterable[Row], head: bool = True) -> str:
    """Fixed-width lines; × columns are the peer's time over this one."""
    figures = f"{'us':>9}{'host us':>9}{'GB/s':>8}{'% copy':>8}{'×eager':>8}{'×compile':>9}"
    names = f"{'operation':<26}{'size':<15}{'direction':<18}{'by':<11}{figures}  goals"
    lines = [names] if head else []
    for row in rows:
        ratios = [
            "–" if value is None else f"{value:.2f}"
            for value in (row.speedup_eager, row.speedup_compile)
        ]
        lines.append(
            f"{row.op:<26}{row.size:<15}{row.direction:<18}{row.backend:<11}{row.us:>9.1f}{row.host_us:>9.1f}{row.gb_per_s:>8.1f}"
            f"{row.copy_percent:>8.1f}{ratios[0]:>8}{ratios[1]:>9}  {row.goals}".rstrip()
        )
    return "\n".join(lines)


def _format(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else value


def _parse(entry: dict[str, str]) -> Row:
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Row)}
    values: dict[str, object] = {}
    for name, text in entry.items():
        kind = kinds[name]
        values[name] = (
            None
            if "None" in kind and not text
            else float(text)
            if "float" in kind
            else int(text)
            if kind == "int"
            else text
        )
    return Row(**values)  # type: ignore[arg-type]
