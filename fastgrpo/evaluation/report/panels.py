"""Panels of lines as plain data, and the one function that draws them: for a page, a phone and a
paper alike.

A figure is described before it is drawn, so its alternative text and its tests read the same
numbers that the reader sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fastgrpo.training import figures
from fastgrpo.training.figures import FAINT, INK, Series

Dashes = str | tuple[float, tuple[float, ...]]
STYLES: tuple[Dashes, ...] = (
    "-",
    (0, (6, 2)),
    (0, (1, 1.3)),
    (0, (6, 2, 1.3, 2)),
    (0, (3, 1.5)),
    (0, (9, 2, 1.3, 2, 1.3, 2)),
)
"""Dashes of the lines that stand beside each other, so that colour is never the only difference."""
THRESHOLD: Dashes = (0, (5, 3))


@dataclass(frozen=True)
class Line:
    """One series. faint: a thin line behind a smoothed one. dots: markers alone. stems: dots on
    stalks. area: stacked on the others.
    """

    label: str
    """In the legend; empty keeps it out."""
    points: Series
    color: str
    kind: Literal["line", "faint", "dots", "stems", "area"] = "line"
    style: Dashes = "-"
    marker: str = ""
    gid: str = ""
    """Name in the SVG, and for tests."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `levels` are dashed horizontal lines (value, colour): thresholds."""

    title: str
    ylabel: str
    """With the unit."""
    lines: tuple[Line, ...]
    xlabel: str = "iteration"
    levels: tuple[tuple[float, str], ...] = ()
    scale: Literal["linear", "log", "symlog"] = "linear"
    """symlog: logarithmic above the smallest value that is not 0, and linear below it, so that
    zeros are drawn at 0.
    """
    ylim: tuple[float | None, float | None] = (None, None)

    @property
    def values(self) -> list[float]:
        """All that is drawn, but for the levels."""
        return [value for line in self.lines for value in line.points[1]]


def draw(
    panels: Sequence[Panel], columns: int = 1, width: float = 8.6, height: float = 3.0
) -> Figure:
    """The panels in rows of `columns` under one legend; `height` is a panel's, both in inches."""
    rows = math.ceil(len(panels) / columns)
    entries = _legend(panels)
    per_line = _entries_a_line(list(entries), width)
    legend_height = 0.2 * math.ceil(len(entries) / per_line) + 0.1 if entries else 0
    figure, axes = figures._new_figure(rows, width, rows * height + legend_height, columns)
    for place, panel in zip(axes, panels, strict=False):
        _draw_panel(place, panel)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    if entries:
        look = {
            "frameon": False,
            "fontsize": 9,
            "labelcolor": INK,
            "borderpad": 0.2,
            "borderaxespad": 0.2,
            "handlelength": 2.6,
        }
        names = [
            name for column in range(per_line) for name in list(entries)[column::per_line]
        ]  # matplotlib fills columns, we read lines
        figure.legend(
            [entries[name] for name in names],
            names,
            loc="outside upper left",
            ncols=per_line,
            **look,
        )
    return figure


def describe(panels: Iterable[Panel]) -> str:
    """What the panels show, in words and numbers: the alternative text of their figure."""
    return " ".join(f"{panel.title}: {_describe_lines(panel)}." for panel in panels)


def _describe_lines(panel: Panel) -> str:
    lines = [line for line in panel.lines if line.points[0] and line.kind != "faint"]
    if not lines:
        return "nothing yet"
    words = []
    for line in lines:
        name, (_, values) = (
            f"{line.label or panel.ylabel}{' (markers)' if line.kind == 'dots' else ''}",
            line.points,
        )
        # Of many lines the last values alone: an alternative text is read aloud.
        words.append(
            f"{name} {values[0]:.3g} to {values[-1]:.3g}"
            if len(lines) <= 8 and len(values) > 1
            else f"{name} {values[-1]:.3g}"
        )
    first, last = (
        min(line.points[0][0] for line in lines),
        max(line.points[0][-1] for line in lines),
    )
    return f"{', '.join(words)}; {panel.xlabel} {first} to {last}"


def _entries_a_line(labels: Sequence[str], width: float) -> int:
    """How many legend entries fit side by side, by about what a letter and a handle take, in
    inches.
    """
    if sum(0.068 * len(label) + 0.62 for label in labels) <= width:
        return max(1, len(labels))
    return max(1, int(width / (0.068 * max(map(len, labels)) + 0.62)))


def _legend(panels: Sequence[Panel]) -> dict[str, Any]:
    """Label -> what stands beside it, each label once, over all panels; dots with the label of a
    line are shown on it.
    """
    handles: dict[str, Any] = {}
    for line in (line for panel in panels for line in panel.lines if line.label):
        if line.kind == "area":
            handle: Any = Patch(color=line.color, alpha=0.85, linewidth=0)
        else:
            style = "none" if line.kind in ("dots", "stems") else line.style
            handle = Line2D(
                [],
                [],
                color=line.color,
                linestyle=style,
                linewidth=2,
                marker=line.marker or None,
                markeredgecolor="white",
            )
        known = handles.setdefault(line.label, handle)
        if line.kind == "dots" and isinstance(known, Line2D):
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
    for level, color in panel.levels:
        axes.axhline(
            level,
            color=color,
            linestyle=THRESHOLD,
            linewidth=1,
            alpha=0.9,
            gid=f"threshold/{level:g}",
        )
    positive = [value for value in panel.values if value > 0]
    if panel.values and not positive and min(panel.values) == 0 and panel.ylim == (None, None):
        axes.set_ylim(-1, 1)
        axes.set_yticks([0])
        axes.text(
            0.5,
            0.62,
            f"exactly 0 at every {panel.xlabel}",
            transform=axes.transAxes,
            ha="center",
            color=INK,
            fontsize=10,
        )
    elif panel.scale == "symlog" and positive:
        axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(min(positive))))
        axes.set_ylim(bottom=0)
    elif panel.scale == "log" and len(positive) == len(panel.values) > 0:
        axes.set_yscale("log")
    if panel.values:
        axes.set_ylim(*panel.ylim)
        if (
            panel.ylim == (0, None) and not areas
        ):  # room above, whatever the spread of the values is
            axes.set_ylim(top=1.05 * max(panel.values) or None)
    figures._finish(axes, panel.title, panel.ylabel, panel.xlabel)
    axes.set_xlabel(panel.xlabel, fontsize=9, color=FAINT)


def _draw_line(axes: Axes, line: Line, phase: float) -> None:
    """`phase` in [0, 1) shifts the markers along the line, so that those of lines that coincide do
    not.
    """
    iterations, values = line.points
    every = max(1, len(iterations) // 6)
    look: dict[str, Any] = {
        "color": line.color,
        "gid": line.gid,
        "linewidth": 1.9,
        "linestyle": line.style,
        "zorder": 2.5,
    }
    if line.kind == "faint":
        look |= {"alpha": 0.25, "linewidth": 0.9, "zorder": 2}
    elif line.kind in ("dots", "stems"):
        look |= {
            "linestyle": "none",
            "marker": line.marker or "o",
            "markersize": 6.5,
            "markeredgecolor": "white",
            "zorder": 4,
        }
    elif line.marker or len(iterations) == 1:
        look |= {
            "marker": line.marker or "o",
            "markersize": 5,
            "markeredgecolor": "white",
            "markevery": (int(phase * every), every),
        }
    axes.plot(iterations, values, **look)
    if line.kind == "stems":
        axes.vlines(iterations, 0, values, color=line.color, linewidth=1.5, alpha=0.6)


def _draw_areas(axes: Axes, areas: Sequence[Line]) -> None:
    iterations, colors = areas[0].points[0], [line.color for line in areas]
    if len(iterations) > 1:
        axes.stackplot(
            iterations, *(line.points[1] for line in areas), colors=colors, alpha=0.85, linewidth=0
        )
        return
    bottoms = np.cumsum([0.0] + [line.points[1][0] for line in areas])  # one iteration has no area
    for line, bottom in zip(areas, bottoms, strict=False):
        axes.bar(iterations, line.points[1], bottom=bottom, width=0.1, color=line.color, alpha=0.85)
