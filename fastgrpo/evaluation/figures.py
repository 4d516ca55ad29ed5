"""Figures: panels of lines as plain data, one style for all of them, and the function that draws.

A figure is described before it is drawn, so its alternative text and its tests read the same
numbers that the reader sees. Figures are matplotlib's, made without pyplot, so that nothing global
changes. Colours are Okabe and Ito's, which colour-blind readers tell apart; lines also differ in
their dashes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:  # matplotlib is loaded only to draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

Series = tuple[list[int], list[float]]
"""Iterations and values."""
Dashes = str | tuple[float, tuple[float, ...]]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLES: tuple[Dashes, ...] = (
    "-",
    (0, (6, 2)),
    (0, (1, 1.3)),
    (0, (6, 2, 1.3, 2)),
    (0, (3, 1.5)),
    (0, (9, 2, 1.3, 2, 1.3, 2)),
)
"""Dashes of lines in one panel, so that colour is never the only difference."""
THRESHOLD: Dashes = (0, (5, 3))
INK, FAINT, GRID = "#1f2933", "#6b7785", "#e3e7eb"
MOST_POINTS = 1000
"""Of a curve that are drawn: a figure is about so many pixels wide."""
DOT: dict[str, Any] = {"marker": "o", "markersize": 6.5, "markeredgecolor": "white"}
KINDS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.9, "zorder": 2.5},
    "faint": {"linewidth": 0.9, "alpha": 0.25},
    "dots": DOT | {"linestyle": "none", "zorder": 4},
}
"""What matplotlib draws for each kind of line."""


@dataclass(frozen=True)
class Line:
    """One series.

    Attributes:
        label: In the legend; "" keeps it out.
        points: Iterations and values.
        color: As matplotlib takes it.
        kind: faint: a thin line behind a smoothed one. dots: only markers.
        style: Dashes of a line.
        gid: Its name in the SVG, and for tests.
        band: For each value the half height of a band around it.
    """

    label: str
    points: Series
    color: str
    kind: Literal["line", "faint", "dots"] = "line"
    style: Dashes = "-"
    gid: str = ""
    band: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Above the axes.
        ylabel: With the unit.
        lines: Drawn in order.
        xlabel: Below the axes.
        levels: Dashed horizontal lines (value, colour): thresholds.
        scale: symlog is logarithmic above 1e-7 and linear below it, so that zeros are drawn at 0.
        ylim: Lower and upper limit; None leaves it to the values.
    """

    title: str
    ylabel: str
    lines: tuple[Line, ...]
    xlabel: str = "iteration"
    levels: tuple[tuple[float, str], ...] = ()
    scale: Literal["linear", "log", "symlog"] = "linear"
    ylim: tuple[float | None, float | None] = (None, None)

    @property
    def values(self) -> list[float]:
        """All values that are drawn, without the levels."""
        return [value for line in self.lines for value in line.points[1]]


def indexed_line(index: int, label: str, points: Series = ([], []), gid: str = "") -> Line:
    """The index-th line of a panel in its colour and dashes.

    More lines than colours take other pairs of colour and dashes.
    """
    style = STYLES[(index + index // len(COLORS)) % len(STYLES)]
    return Line(label, points, COLORS[index % len(COLORS)], style=style, gid=gid)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    """One metric's iterations and values, where a row of metrics.jsonl has a finite one."""
    found = [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return [row["iteration"] for row in found], [float(row[key]) for row in found]


def save_figure(figure: Figure, stem: Path) -> None:
    """Write `<stem>.png` (160 dpi) and `<stem>.svg`; the same figure gives the same bytes."""
    import matplotlib

    figure.savefig(f"{stem}.png", dpi=160, metadata={"Software": None})
    # Without a salt, the ids in the file are random.
    with matplotlib.rc_context({"svg.hashsalt": "fastgrpo"}):
        figure.savefig(f"{stem}.svg", metadata={"Date": None})


def describe(panels: Iterable[Panel]) -> str:
    """The alternative text of a figure: each panel's title and the last value of its lines."""
    sentences = []
    for panel in panels:
        last = [
            f"{line.label or panel.ylabel} {line.points[1][-1]:.3g}"
            for line in panel.lines
            if line.points[1] and line.kind == "line"
        ]
        sentences.append(f"{panel.title}: {', '.join(last) or 'nothing yet'}.")
    return " ".join(sentences)


def new_figure(
    rows: int, width: float, height: float, columns: int = 1, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure of `width` x `height` inches and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, sharex=sharex, squeeze=False).flat)


def draw(
    panels: Sequence[Panel], columns: int = 1, width: float = 8.6, height: float = 3.0
) -> Figure:
    """Draw the panels in rows of `columns` under one legend.

    Args:
        panels: In reading order.
        columns: Panels per row.
        width: Of the figure, in inches.
        height: Of a panel, in inches.
    """
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(rows, width, rows * height + 0.3, columns)
    entries: dict[str, Any] = {}
    for place, panel in zip(axes, panels, strict=False):
        _draw_panel(place, panel)
        handles, names = place.get_legend_handles_labels()
        entries = dict(zip(names, handles, strict=True)) | entries
    for place in axes[len(panels) :]:
        place.set_axis_off()
    if entries:
        letters = max(map(len, entries))
        legend = figure.legend(
            entries.values(),
            entries,
            loc="outside upper left",
            # About 0.07 inches for a letter and 0.6 for the line beside it.
            ncols=max(1, int(width / (0.07 * letters + 0.6))),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
        _as_written(legend)
    return figure


def finish(
    axes: Axes, title: str, ylabel: str, xlabel: str = "iteration", legend: bool = True
) -> None:
    """Give axes that have been drawn their title, labels, legend and the style of all figures."""
    from matplotlib.ticker import MaxNLocator

    entries = len(axes.get_legend_handles_labels()[0]) if legend else 0
    pad = 6 + 16 * math.ceil(entries / 3)
    text: dict[str, Any] = {"parse_math": False}  # a name with dollars is no formula
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=pad, **text)
    if entries:
        # Between title and curves, three per line: beside them it would take a fifth of the width.
        names = axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=3,
            borderpad=0,
            borderaxespad=0.3,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
        _as_written(names)
    axes.set_ylabel(ylabel, fontsize=9, color=FAINT, **text)
    axes.set_xlabel(xlabel, fontsize=9, color=FAINT, **text)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(which="both", labelsize=9, colors=FAINT, length=0)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _as_written(legend: Legend) -> None:
    """Show the names in a legend as they are, with dollars that are no formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def thinned(values: Sequence[float]) -> list[int]:
    """The indices of at most MOST_POINTS values that look like all of them: of each of equal parts
    the first, the lowest, the highest and the last.
    """
    if len(values) <= MOST_POINTS:
        return [*range(len(values))]
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(values)), MOST_POINTS // 4):
        seen, first = np.take(values, part), int(part[0])
        ends = 0, len(part) - 1
        kept.update(first + place for place in (*ends, int(seen.argmin()), int(seen.argmax())))
    return sorted(kept)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        shown = thinned(line.points[1])
        iterations, values = ([column[i] for i in shown] for column in line.points)
        look = {"linestyle": line.style} | (DOT if len(values) == 1 else {}) | KINDS[line.kind]
        label = line.label if values else ""
        axes.plot(iterations, values, color=line.color, gid=line.gid, label=label, **look)
        if line.band:
            band = np.take(line.band, shown)
            low, high = np.subtract(values, band), np.add(values, band)
            axes.fill_between(iterations, low, high, color=line.color, alpha=0.15, linewidth=0)
    drawn = {iteration for line in panel.lines for iteration in line.points[0]}
    for level, color in panel.levels:
        look = {"linestyle": THRESHOLD, "linewidth": 1, "label": "threshold"}
        axes.axhline(level, color=color, gid=f"threshold/{level:g}", **look)
    finish(axes, panel.title, panel.ylabel, panel.xlabel, legend=False)
    if not drawn:
        axes.set(xticks=[], yticks=[])
        middle: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no training iteration yet", color=FAINT, **middle)
        return
    if len(drawn) == 1:  # a whole number on each side of it, and so whole numbers as ticks
        axes.set_xlim(min(drawn) - 1, max(drawn) + 1)
    if panel.scale == "symlog":
        axes.set_yscale("symlog", linthresh=1e-7)
    else:
        axes.set_yscale(panel.scale)
    axes.set_ylim(*panel.ylim)
