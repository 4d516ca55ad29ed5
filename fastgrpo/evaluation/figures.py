"""Figures: panels of lines as plain data, one style for all of them, and the function that draws.

A figure is described before it is drawn, so its alternative text and its tests read the same
numbers that the reader sees. Figures are matplotlib's, made without pyplot, so that nothing global
changes. Colours are Okabe and Ito's, which colour-blind readers tell apart; lines also differ in
marker or dashes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

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


@dataclass(frozen=True)
class Line:
    """One series.

    Attributes:
        label: In the legend; "" keeps it out.
        points: Iterations and values.
        color: As matplotlib takes it.
        kind: faint: a thin line behind a smoothed one. dots: only markers. stems: dots on stalks.
            area: stacked on the other areas.
        style: Dashes of a line.
        marker: "" for none.
        gid: Its name in the SVG, and for tests.
        band: For each value the half height of a band around it.
    """

    label: str
    points: Series
    color: str
    kind: Literal["line", "faint", "dots", "stems", "area"] = "line"
    style: Dashes = "-"
    marker: str = ""
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
        scale: symlog is logarithmic above the smallest positive value and linear below it, so that
            zeros are drawn at 0.
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


def indexed_line(
    index: int, label: str, points: Series = ([], []), gid: str = "", solid: bool = False
) -> Line:
    """The index-th line of a panel in its colour, marker and dashes; `solid`: without dashes.

    More lines than colours take other pairs of colour and dashes.
    """
    style = STYLES[(index + index // len(COLORS)) % len(STYLES)]
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    return Line(label, points, color, "line", "-" if solid else style, marker, gid)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    """One metric's iterations and values, where a row of metrics.jsonl has a finite one."""
    found = [row for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return [row["iteration"] for row in found], [float(row[key]) for row in found]


def save_figure(figure: Figure, stem: Path) -> None:
    """Write `<stem>.png` (160 dpi) and `<stem>.svg`; the same figure gives the same bytes."""
    figure.savefig(f"{stem}.png", dpi=160, metadata={"Software": None})
    Path(f"{stem}.svg").write_bytes(svg_bytes(figure))


def svg_bytes(figure: Figure) -> bytes:
    """The figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    # Without a salt, the ids in the file are random.
    with matplotlib.rc_context({"svg.hashsalt": "fastgrpo"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def describe(panels: Iterable[Panel]) -> str:
    """What the panels show, in words and numbers: the alternative text of their figure."""
    return " ".join(f"{panel.title}: {_describe_lines(panel)}." for panel in panels)


def _describe_lines(panel: Panel) -> str:
    lines = [line for line in panel.lines if line.points[0] and line.kind != "faint"]
    if not lines:
        return "nothing yet"
    words = []
    for line in lines:
        values = line.points[1]
        name = f"{line.label or panel.ylabel}{' (markers)' if line.kind == 'dots' else ''}"
        # Of many lines only the last values: an alternative text is read aloud.
        first = f"{values[0]:.3g} to " if len(lines) <= 8 and len(values) > 1 else ""
        words.append(f"{name} {first}{values[-1]:.3g}")
    xs = [x for line in lines for x in line.points[0]]
    return f"{', '.join(words)}; {panel.xlabel} {min(xs)} to {max(xs)}"


def new_figure(
    rows: int, width: float, height: float, columns: int = 1, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure of `width` x `height` inches and its axes, row by row."""
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
    legend = _legend(panels)
    per_line = _entries_per_line(list(legend), width)
    legend_height = 0.2 * math.ceil(len(legend) / per_line) + 0.1 if legend else 0
    figure, axes = new_figure(rows, width, rows * height + legend_height, columns)
    for place, panel in zip(axes, panels, strict=False):
        _draw_panel(place, panel)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    if legend:
        # matplotlib fills columns, readers read lines.
        names = [name for column in range(per_line) for name in list(legend)[column::per_line]]
        figure.legend(
            [legend[name] for name in names],
            names,
            loc="outside upper left",
            ncols=per_line,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            borderpad=0.2,
            borderaxespad=0.2,
            handlelength=2.6,
        )
    return figure


def finish(axes: Axes, title: str, ylabel: str, xlabel: str = "iteration") -> None:
    """Give axes that have been drawn their title, labels, legend and the style of all figures."""
    entries = len(axes.get_legend_handles_labels()[0])
    lines = math.ceil(entries / 3)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=6 + 16 * lines)
    if entries:
        # Between title and curves, three per line: beside them it would take a fifth of the width.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=3,
            borderpad=0,
            borderaxespad=0.3,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
    axes.set_ylabel(ylabel, fontsize=9, color=FAINT)
    if axes.get_subplotspec() is None or axes.get_subplotspec().is_last_row():  # type: ignore[union-attr]
        axes.set_xlabel(xlabel, fontsize=9, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=9, colors=FAINT, length=0)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    curves = [line for line in axes.lines if not str(line.get_gid()).startswith("threshold")]
    drawn = {float(x) for line in curves for x in np.asarray(line.get_xdata())}
    if len(drawn) == 1:
        # One iteration: a whole number on each side of it, and so whole numbers as ticks.
        axes.set_xlim(min(drawn) - 1, min(drawn) + 1)
    if not (drawn or axes.collections or axes.patches):
        axes.set(xticks=[], yticks=[])
        _write(axes, 0.5, "no training iteration yet", va="center", color=FAINT)


def _write(axes: Axes, height: float, text: str, **look: Any) -> None:
    axes.text(0.5, height, text, transform=axes.transAxes, ha="center", **look)


def _entries_per_line(labels: Sequence[str], width: float) -> int:
    """How many legend entries fit side by side, by the approximate inches of a letter and a
    handle.
    """
    if sum(0.068 * len(label) + 0.62 for label in labels) <= width:
        return max(1, len(labels))
    return max(1, int(width / (0.068 * max(map(len, labels)) + 0.62)))


def _legend(panels: Sequence[Panel]) -> dict[str, Any]:
    """Label -> handle, each label once over all panels; dots with the label of a line are shown on
    that line.
    """
    handles: dict[str, Any] = {}
    for line in (line for panel in panels for line in panel.lines if line.label):
        if line.kind == "area":
            handles.setdefault(line.label, Patch(color=line.color, alpha=0.85, linewidth=0))
            continue
        handle = Line2D(
            [],
            [],
            color=line.color,
            linestyle="none" if line.kind in ("dots", "stems") else line.style,
            linewidth=2,
            marker=line.marker or None,
            markeredgecolor="white",
        )
        known = handles.setdefault(line.label, handle)
        if line.kind == "dots":
            known.set_marker(line.marker or "o")
    if any(panel.levels for panel in panels):
        handles["threshold"] = Line2D([], [], color=FAINT, linestyle=THRESHOLD, linewidth=1)
    return handles


def _draw_panel(axes: Axes, panel: Panel) -> None:
    areas = [line for line in panel.lines if line.kind == "area" and line.points[0]]
    if areas:
        _draw_areas(axes, areas)
    for index, line in enumerate(panel.lines):
        if line.kind != "area":
            _draw_line(axes, line, index / len(panel.lines))
    look: dict[str, Any] = {"linestyle": THRESHOLD, "linewidth": 1, "alpha": 0.9}
    for level, color in panel.levels:
        axes.axhline(level, color=color, gid=f"threshold/{level:g}", **look)
    values = panel.values
    positive = [value for value in values if value > 0]
    if values and not any(values) and panel.ylim[1] is None:
        axes.set(ylim=(-1, 1), yticks=[0])
        _write(axes, 0.62, f"exactly 0 at every {panel.xlabel}", color=INK, fontsize=10)
    elif values:
        if panel.scale == "symlog" and positive:
            axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(min(positive))))
            axes.set_ylim(bottom=0)
        elif panel.scale == "log" and len(positive) == len(values):
            axes.set_yscale("log")
        axes.set_ylim(*panel.ylim)
        if panel.ylim == (0, None) and not areas:  # room above, whatever the spread of the values
            axes.set_ylim(top=1.05 * max(values))
    finish(axes, panel.title, panel.ylabel)
    axes.set_xlabel(panel.xlabel, fontsize=9, color=FAINT)


def _draw_line(axes: Axes, line: Line, phase: float) -> None:
    """Draw a line. `phase` in [0, 1) shifts its markers, so that those of lines that coincide do
    not.
    """
    iterations, values = line.points
    every = max(1, len(iterations) // 6)
    look: dict[str, Any] = {"linewidth": 1.9, "linestyle": line.style, "zorder": 2.5}
    marked = {"marker": line.marker or "o", "markeredgecolor": "white"}
    if line.kind == "faint":
        look |= {"alpha": 0.25, "linewidth": 0.9, "zorder": 2}
    elif line.kind in ("dots", "stems"):
        look |= marked | {"linestyle": "none", "markersize": 6.5, "zorder": 4}
    elif line.marker or len(iterations) == 1:
        look |= marked | {"markersize": 5, "markevery": (int(phase * every), every)}
    axes.plot(iterations, values, color=line.color, gid=line.gid, **look)
    if line.band:
        low, high = np.subtract(values, line.band), np.add(values, line.band)
        axes.fill_between(iterations, low, high, color=line.color, alpha=0.15, linewidth=0)
    if line.kind == "stems":
        axes.vlines(iterations, 0, values, color=line.color, linewidth=1.5, alpha=0.6)


def _draw_areas(axes: Axes, areas: Sequence[Line]) -> None:
    iterations, values = areas[0].points[0], [line.points[1] for line in areas]
    colors = [line.color for line in areas]
    if len(iterations) > 1:
        axes.stackplot(iterations, *values, colors=colors, alpha=0.85, linewidth=0)
        return
    bottom = 0.0
    for line in areas:  # one iteration has no area
        axes.bar(iterations, line.points[1], bottom=bottom, width=0.1, color=line.color, alpha=0.85)
        bottom += line.points[1][0]
