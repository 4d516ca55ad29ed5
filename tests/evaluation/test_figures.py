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
    Dashes,
    Line,
    Panel,
    describe,
    draw,
    indexed_line,
)


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_gid()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }  # type: ignore[arg-type]


def texts(figure: Figure) -> str:
    return " | ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_kind_is_drawn_as_it_was_given() -> None:
    given = ([1, 2, 4], [0.5, 0.25, 0.75])
    kinds = ("line", "faint", "dots", "stems")
    panel = Panel(
        "t",
        "y",
        tuple(Line("", given, "#000000", kind, gid=kind) for kind in kinds),
        levels=((0.3, "#ff0000"),),
    )
    figure = draw([panel])
    axes = figure.axes[0]
    assert {kind: lines(axes)[kind] for kind in kinds} == dict.fromkeys(kinds, given)
    assert lines(axes)["threshold/0.3"][1] == [0.3, 0.3]
    assert [line.get_linestyle() for line in axes.lines[:4]] == ["-", "-", "None", "None"]
    assert axes.lines[1].get_alpha() < 0.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["threshold"]
    stalks = axes.collections[0].get_segments()  # type: ignore[attr-defined]
    assert [tuple(stalk[1]) for stalk in stalks] == list(zip(*given, strict=True))


def test_areas_lie_on_each_other() -> None:
    areas = tuple(
        Line(name, ([1, 2], values), "#000000", "area")
        for name, values in (("a", [1.0, 2.0]), ("b", [0.5, 3.0]))
    )
    axes = draw([Panel("t", "seconds", areas, ylim=(0, None))]).axes[0]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]  # type: ignore[union-attr,index]
    assert tops == [2.0, 5.0]
    one = tuple(
        Line(name, ([7], [height]), "#000000", "area") for name, height in (("a", 1.5), ("b", 0.5))
    )
    bars = draw([Panel("t", "seconds", one)]).axes[0].patches  # one iteration has no area
    assert [(bar.get_y(), bar.get_height()) for bar in bars] == [(0, 1.5), (1.5, 0.5)]  # type: ignore[attr-defined]


def test_zeros_are_said_in_words_and_never_hidden_by_a_scale() -> None:
    def panel(*values: float, scale: str = "symlog") -> Panel:
        return Panel(
            "t",
            "y",
            (Line("", (list(range(len(values))), list(values)), "#000000", gid="x"),),
            scale=scale,
        )  # type: ignore[arg-type]

    figure = draw(
        [
            panel(0.0, 0.0),
            panel(2e-7, 0.0, 5e-4),
            panel(1.0, 0.0, scale="log"),
            panel(1.0, 900.0, scale="log"),
        ],
        columns=2,
    )
    assert texts(figure) == "exactly 0 at every iteration"
    zero, mixed, no_log, log = figure.axes
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "symlog", "linear", "log"]
    assert zero.get_ylim() == (-1, 1)
    figure.draw_without_rendering()
    heights = mixed.transData.transform([(1, value) for value in (0.0, 2e-7, 2e-6, 5e-4)])[:, 1]
    assert heights[0] == pytest.approx(mixed.bbox.y0)
    assert np.all(
        np.diff(heights) > 0.05 * mixed.bbox.height
    )  # a linear scale would put the first three on one spot
    assert (lines(no_log)["x"], lines(log)["x"]) == (([0, 1], [1.0, 0.0]), ([0, 1], [1.0, 900.0]))


def test_one_legend_reads_line_by_line_and_shows_the_markers() -> None:
    names = ["first", "second", "a third that is long", "fourth", "fifth", "sixth", "seventh"]
    panels = [Panel("p", "y", tuple(Line(name, ([1], [1.0]), "#000000") for name in names[:4]))]
    panels.append(
        Panel(
            "q",
            "y",
            tuple(Line(name, ([1], [1.0]), "#000000", "dots", marker="s") for name in names[2:]),
        )
    )
    figure = draw(panels, columns=2, width=6)
    assert sorted(legend(figure)) == sorted(names)
    figure.draw_without_rendering()
    places = {text.get_text(): text.get_window_extent() for text in figure.legends[0].get_texts()}
    read = sorted(places, key=lambda name: (-round(places[name].y0 / 5), places[name].x0))
    assert read == names
    handles = dict(zip(legend(figure), figure.legends[0].legend_handles, strict=True))
    assert handles["fourth"].get_marker() == "s"  # type: ignore[union-attr]  # a line in one panel, dots in the other
    assert handles["fourth"].get_linestyle() == "-"  # type: ignore[union-attr]
    assert handles["first"].get_marker() == "None"  # type: ignore[union-attr]


def test_an_empty_panel_says_so_and_a_single_point_is_seen(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    figure = draw(
        [
            Panel("t", "y", (Line("a", ([], []), "#000000"),)),
            Panel("u", "y", (Line("a", ([3], [0.5]), "#000000"),)),
        ]
    )
    figures.save_figure(figure, tmp_path / "x")
    assert texts(figure) == "no training iteration yet"
    assert figure.axes[1].lines[0].get_marker() == "o"
    assert not recwarn.list


def test_words_for_those_who_do_not_see_the_picture() -> None:
    few = Panel(
        "Norm",
        "2-norm",
        (Line("", ([1, 9], [0.5, 12.3456]), "#000000"), Line("", ([1], [7.0]), "#000000", "faint")),
    )
    many = Panel(
        "Runs",
        "y",
        tuple(Line(f"run {i}", ([0, 5], [0.0, float(i)]), "#000000") for i in range(9)),
        xlabel="step",
    )
    assert (
        describe([few, Panel("Empty", "y", ())])
        == "Norm: 2-norm 0.5 to 12.3; iteration 1 to 9. Empty: nothing yet."
    )
    assert describe([many]) == f"Runs: {', '.join(f'run {i} {i}' for i in range(9))}; step 0 to 5."
    dots = Panel("E", "y", (Line("a", ([2], [0.25]), "#000000", "dots"),))
    assert describe([dots]) == "E: a (markers) 0.25; iteration 2 to 2."


def test_runs_differ_in_more_than_colour() -> None:
    looks = [indexed_line(index, "x") for index in range(36)]
    assert len({(line.color, line.style) for line in looks}) == 36
    for six in itertools.batched(looks[:6], 6) if hasattr(itertools, "batched") else [looks[:6]]:
        assert (
            len({line.color for line in six})
            == len({str(line.style) for line in six})
            == len({line.marker for line in six})
            == 6
        )
    styles: list[Dashes] = [*STYLES]
    assert THRESHOLD not in styles


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
