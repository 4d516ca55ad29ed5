"""Draw the rows that ops.py wrote: share of the copy bandwidth, and how many times faster than the
eager peer.

    python benchmarks/plot.py                                   # every benchmarks/data/*_ops.csv
    python benchmarks/plot.py benchmarks/data/cpu_ops.csv

Writes a png beside each CSV file. A row of panels is one size; a group of bars is one operation
in one direction.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python benchmarks/plot.py`

from benchmarks.rows import DATA, Row, read_csv
from fastgrpo.evaluation.figures import COLORS, FAINT, GRID, INK

ORDER = ("triton", "cuda", "cpp", "reference", "compile", "eager")
"""Of the bars in a group, and their colours."""
GOALS = {"copy": 85.0, "eager": 5.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/data/*_ops.csv")
    files = parser.parse_args(arguments).files or sorted(DATA.glob("*_ops.csv"))
    if not files:
        print(f"no *_ops.csv in {DATA}; benchmarks/ops.py writes them")
        return 1
    for path in files:
        picture = path.with_suffix(".png")
        draw(read_csv(path)).savefig(picture, dpi=160, metadata={"Software": None})
        print(picture)
    return 0


def draw(rows: Sequence[Row]) -> Figure:
    """One figure of one device's rows; ValueError if there are none."""
    if not rows:
        raise ValueError("expected at least one row, got none")
    sizes = list(dict.fromkeys(row.size for row in rows))
    groups = {
        size: list(dict.fromkeys((row.op, row.direction) for row in rows if row.size == size))
        for size in sizes
    }
    heights = [0.9 + 0.42 * len(groups[size]) for size in sizes]
    figure = Figure(figsize=(11, 1.0 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(sizes), 2, squeeze=False, height_ratios=heights)
    for (left, right), size in zip(panels, sizes, strict=True):
        of_size = [row for row in rows if row.size == size]
        gpu = of_size[0].method != "wall"
        _bars(
            left,
            groups[size],
            {row.key[1:5]: row.copy_percent for row in of_size},
            size,
            f"{size}: % of the copy bandwidth",
        )
        speedups = {
            row.key[1:5]: row.speedup_eager for row in of_size if row.speedup_eager is not None
        }
        _bars(right, groups[size], speedups, size, "times faster than eager")
        right.set_yticklabels([])
        right.axvline(1.0, color=INK, linewidth=0.8)
        if gpu:
            left.axvline(GOALS["copy"], color=FAINT, linestyle=(0, (5, 3)), linewidth=1)
            right.axvline(GOALS["eager"], color=FAINT, linestyle=(0, (5, 3)), linewidth=1)
    used = [name for name in ORDER if any(row.backend == name for row in rows)]
    handles = [left.barh(0, 0, color=_colour(name)) for name in used]
    figure.legend(
        handles,
        used,
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    last = rows[-1]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    figure.suptitle(
        f"{last.device}, torch {last.torch}, triton {last.triton}, {commits}",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    return figure


def _bars(
    axes: Axes,
    groups: Sequence[tuple[str, str]],
    values: dict[tuple[str, ...], float],
    size: str,
    title: str,
) -> None:
    names = [name for name in ORDER if any(key[3] == name for key in values)]
    thickness = 0.8 / max(1, len(names))
    for place, (op, direction) in enumerate(groups):
        for index, name in enumerate(names):
            value = values.get((op, size, direction, name))
            if value is None:
                continue
            y = place + (index - (len(names) - 1) / 2) * thickness
            axes.barh(y, value, height=thickness, color=_colour(name))
            axes.text(value, y, f" {value:.3g}", va="center", fontsize=6, color=FAINT)
    axes.set_yticks(
        range(len(groups)),
        [op if direction == "forward" else f"{op}, {direction}" for op, direction in groups],
        fontsize=8,
    )
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=8, colors=FAINT, length=0)
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _colour(backend: str) -> str:
    return "#B0B7BF" if backend == "eager" else COLORS[ORDER.index(backend)]


if __name__ == "__main__":
    sys.exit(main())
