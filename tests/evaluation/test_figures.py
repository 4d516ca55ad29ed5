"""Panels: what is drawn is what was given, every line can be told from every other, and the words
say what the picture shows.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fastgrpo.evaluation import figures
from fastgrpo.evaluation.figures import (
    STYLES,
    THRESHOLD,
    Line,
    Panel,
    describe,
    draw,
    indexed_line,
    new_figure,
    thinned,
)


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_gid()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }  # type: ignore[arg-type]


def test_each_kind_is_drawn_as_it_was_given() -> None:
    given = ([1, 2, 4], [0.5, 0.25, 0.75])
    kinds = ("line", "faint", "dots")
    curves = tuple(Line(kind, given, "#000000", kind, gid=kind) for kind in kinds)
    figure = draw([Panel("t", "y", curves, levels=((0.3, "#ff0000"),))])
    axes = figure.axes[0]
    assert {kind: lines(axes)[kind] for kind in kinds} == dict.fromkeys(kinds, given)
    assert lines(axes)["threshold/0.3"][1] == [0.3, 0.3]
    assert [line.get_linestyle() for line in axes.lines[:3]] == ["-", "-", "None"]
    assert axes.lines[1].get_alpha() < 0.5
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == sorted([*kinds, "threshold"])


def test_a_long_curve_is_thinned_and_keeps_its_peaks() -> None:
    """Of 10,000 values a tenth, the only two that stand out among them; 1,000 are all drawn."""
    values = [float(i % 7) for i in range(10_000)]
    values[4321], values[8765] = 50.0, -50.0
    line = Line("y", ([*range(10_000)], values), "#000000", gid="y", band=[1.0] * 10_000)
    x, y = lines(draw([Panel("t", "y", (line,))]).axes[0])["y"]
    assert len(x) <= 1000
    assert (x[0], x[-1]) == (0, 9999)
    assert (y[x.index(4321)], y[x.index(8765)]) == (50.0, -50.0)
    assert y == [values[i] for i in x]
    assert max(b - a for a, b in itertools.pairwise(x)) <= 40
    assert thinned(values[:1000]) == [*range(1000)]


def test_a_symmetric_logarithmic_scale_shows_zeros_and_small_values() -> None:
    points = [0, 1, 2], [0.0, 1e-6, 5e-4]
    panel = Panel("t", "y", (Line("", points, "#000000"),), scale="symlog", ylim=(0, None))
    figure = draw([panel])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    heights = axes.transData.transform([(1, value) for value in points[1]])[:, 1]
    assert heights[0] == pytest.approx(axes.bbox.y0)
    assert np.all(np.diff(heights) > 0.05 * axes.bbox.height)


def test_an_empty_panel_says_so_and_a_single_point_is_seen(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    empty, point = (Line("a", points, "#000000") for points in (([], []), ([3], [0.5])))
    figure = draw([Panel("t", "y", (empty,)), Panel("u", "y", (point,))])
    figures.save_figure(figure, tmp_path / "x")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no training iteration yet"]
    assert figure.axes[1].lines[0].get_marker() == "o"
    assert not recwarn.list


def test_words_for_those_who_do_not_see_the_picture() -> None:
    norm = Line("", ([1, 9], [0.5, 12.3456]), "#000000"), Line("", ([1], [7.0]), "#0", "faint")
    runs = tuple(Line(f"run {i}", ([0, 5], [0.0, float(i)]), "#000000") for i in range(2))
    panels = Panel("Norm", "2-norm", norm), Panel("Empty", "y", ()), Panel("Runs", "y", runs)
    assert describe(panels) == "Norm: 2-norm 12.3. Empty: nothing yet. Runs: run 0 0, run 1 1."


def test_runs_differ_in_more_than_colour() -> None:
    looks = [indexed_line(index, "x") for index in range(36)]
    assert len({(line.color, line.style) for line in looks}) == 36
    assert len({line.color for line in looks[:6]}) == len({line.style for line in looks[:6]}) == 6
    assert THRESHOLD not in STYLES


def test_saved_figures_are_png_and_svg_and_the_same_twice(tmp_path: Path) -> None:
    for name in ("a.b", "again"):
        drawn = Figure(figsize=(8, 2))
        drawn.subplots().plot([1, 2], [0.5, 0.25], label="x")
        figures.save_figure(drawn, tmp_path / name)
    assert Image.open(tmp_path / "a.b.png").size[0] == 8 * 160
    assert (tmp_path / "a.b.svg").read_text().startswith("<?xml")
    for kind in ("png", "svg"):
        first, again = (tmp_path / f"{name}.{kind}" for name in ("a.b", "again"))
        assert first.read_bytes() == again.read_bytes()


# Colours as people without one kind of cone see them: Machado, Oliveira and Fernandes (2009),
# severity 1, on linear RGB.
CONES = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


@pytest.mark.parametrize("cones", CONES)
def test_six_colours_are_told_apart(cones: str) -> None:
    """Every pair differs by more than 15 in CIELAB, where 2.3 is just seen."""

    def lab(color: str) -> np.ndarray:
        values = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        seen = np.clip(CONES[cones] @ linear, 0, 1)
        xyz = (
            np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
            @ seen
            / [0.9505, 1, 1.089]
        )
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    assert len(set(figures.COLORS)) == 6
    assert (
        min(np.linalg.norm(lab(a) - lab(b)) for a, b in itertools.combinations(figures.COLORS, 2))
        > 15
    )


@pytest.mark.parametrize("sharex", [False, True])
def test_the_axes_of_a_new_figure_go_row_by_row(sharex: bool) -> None:
    figure, axes = new_figure(2, 6.0, 4.0, columns=3, sharex=sharex)
    assert figure.get_size_inches().tolist() == [6.0, 4.0]
    figure.draw_without_rendering()
    corners = [(-round(a.get_position().y0, 2), a.get_position().x0) for a in axes]
    assert len(axes) == 6
    assert corners == sorted(corners)
    axes[0].set_xlim(3, 5)
    assert (axes[5].get_xlim() == (3, 5)) == sharex
