"""Rows of throughput.py: what one measured thing is, the goals G1 to G4 and G6 that it is held
against, table and CSV file.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measured thing. What was not taken is None."""

    model: str
    size: str
    recipe_size: bool
    """Whether frames and steps are the recipe's (layers may be fewer)."""
    part: str
    by: str
    seconds: float | None
    whole_s: float | None
    """Of all layers, and of the recipe's whole iteration."""
    tflop: float | None
    """What has to be computed in `whole_s`, nothing twice."""
    tflop_per_s: float | None
    mfu_percent: float | None
    peer: str
    """The `by` of the row of the same part that this one is compared with."""
    ratio: float | None
    """The peer's whole_s over this one: above 1 is faster than the peer."""
    peak_gb: float | None
    planned_gb: float | None
    drift: float | None
    """Largest |ratio - 1| of a trained step before any update."""
    mismatch: float | None
    """Largest rms between the training forward's and the rollout's step, in units of its noise s."""
    psnr: float | None
    """dB, to the fp32 un-tiled decode."""
    ms_ssim: float | None
    g0: str
    """green, red or not checked; nothing for what has no ratio of its own (a decode, the
    DanceGRPO-style loop).
    """
    words: str
    goals: str
    matmul_tflop_per_s: float
    diffusers: str
    device: str
    torch: str
    triton: str
    driver: str
    commit: str
    date: str


@dataclass(frozen=True)
class Goal:
    """Of shared/performance.md, for one H100."""

    name: str
    seconds: float
    ratios: dict[str, float] = field(default_factory=dict)
    """The least ratio to another row of the part."""
    peak_gb: float | None = None
    """With the optimizer's states."""
    ms_ssim: float | None = None


GOALS = {
    ("wan2.1_t2v_1.3b", "forward", "fused"): Goal(
        "G1", 0.25, {"eager": 1.25, "compiled": 1.0, "fa2": 1.5}
    ),
    ("wan2.1_t2v_14b", "forward", "fused"): Goal("G3", 0.28),
    ("wan2.1_t2v_1.3b", "decode", "un-tiled bf16"): Goal(
        "G4", 0.70, {"tiled bf16": 2.2}, ms_ssim=0.9999
    ),
    ("wan2.1_t2v_1.3b", "iteration", "ours"): Goal(
        "G6", 265.0, {"peer": 1.6, "peer with fa2": 2.0}
    ),
}
for _kept in ("none", "keep_attention"):  # whichever of them fits
    GOALS["wan2.1_t2v_1.3b", "train", f"fused, {_kept}"] = Goal(
        "G2", 0.87, {"eager, full": 1.5}, peak_gb=75.0
    )
    GOALS["wan2.1_t2v_14b", "train", f"fused, {_kept}"] = Goal("G3", 0.90)
WITH_ADAM, WITHOUT_ADAM = "with Adam's states", "without Adam's states"
"""Words of a train unit: whether the optimizer's memory was taken beside it."""


def compared(figures: Sequence[Figure]) -> list[Figure]:
    """The figures with the ratios to their peers, and with their goals. Where G0 is red there is no
    ratio: it is no gain.
    """
    seconds = {(f.part, f.by): f.whole_s for f in figures}
    found = []
    for figure in figures:
        peers = seconds.get((figure.part, figure.peer))
        ratio = peers / figure.whole_s if peers and figure.whole_s and figure.g0 != "red" else None
        found.append(dataclasses.replace(figure, ratio=ratio, goals=judge(figure, seconds)))
    return found


def judge(figure: Figure, seconds: dict[tuple[str, str], float | None]) -> str:
    """The goals of a figure, each met or not met; they are for an H100 or an H200, the recipe's own
    size, and a green G0.

    seconds: whole_s of all figures of this run, by part and `by`.
    """
    goal = GOALS.get((figure.model, figure.part, figure.by))
    if (
        goal is None
        or not re.search(r"H100|H200", figure.device)
        or figure.whole_s is None
        or not figure.recipe_size
    ):
        return ""
    if figure.g0 not in ("green", ""):
        return f"{goal.name}: G0 is {figure.g0}"
    asked = [(f"{goal.name} {goal.seconds:g} s", figure.whole_s <= goal.seconds)]
    for peer, least in goal.ratios.items():
        theirs = seconds.get((figure.part, peer))
        asked += (
            [(f"{goal.name} {least:g}x {peer}", theirs / figure.whole_s >= least)] if theirs else []
        )
    if goal.peak_gb is not None and figure.peak_gb is not None:
        asked.append(
            (
                f"{goal.name} {goal.peak_gb:g} GB",
                figure.peak_gb < goal.peak_gb and WITH_ADAM in figure.words,
            )
        )
    if goal.ms_ssim is not None and figure.ms_ssim is not None:
        asked.append((f"{goal.name} MS-SSIM {goal.ms_ssim:g}", figure.ms_ssim >= goal.ms_ssim))
    return "; ".join(f"{name}: {'met' if met else 'not met'}" for name, met in asked)


def table(figures: Sequence[Figure], head: bool = True) -> str:
    """Fixed-width lines; the ratio is the peer's time over this one."""
    columns = f"{'seconds':>10}{'whole s':>10}{'TFLOP/s':>9}{'MFU %':>7}{'ratio':>8} {'to':<12}{'GB':>9}{'plan GB':>9}"
    lines = [f"{'part':<20}{'by':<43}{columns}  notes"] if head else []
    for f in figures:
        numbers = (
            f"{number(f.seconds, 4):>10}{number(f.whole_s, 4):>10}{number(f.tflop_per_s, 1):>9}{number(f.mfu_percent, 1):>7}"
            f"{number(f.ratio, 2):>8} {f.peer:<12}{number(f.peak_gb, 1):>9}{number(f.planned_gb, 1):>9}"
        )
        notes = "; ".join(
            filter(
                None, [f.words, f"G0 {f.g0}" if f.g0 == "red" and f.part != "g0" else "", f.goals]
            )
        )
        lines.append(f"{f.part:<20}{f.by:<43}{numbers}  {notes}".rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    """With so many digits after the point, or at least two that count; a dash for what was not
    taken.
    """
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10.0**-digits else f"{value:.1e}"


def write(path: Path, before: str, figures: Sequence[Figure]) -> None:
    """Write a file of what it held before this run, and this run's figures. ValueError: what it
    held has other columns.
    """
    names = [f.name for f in dataclasses.fields(Figure)]
    head = before.partition("\n")[0].strip()
    if head not in ("", ",".join(names)):
        raise ValueError(
            f"{path}: expected the columns {', '.join(names)}, got {head.replace(',', ', ')}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(before)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([] if head else [names])
        for figure in figures:
            writer.writerow(
                [
                    f"{v:.6g}" if isinstance(v, float) else "" if v is None else v
                    for v in dataclasses.astuple(figure)
                ]
            )
