"""VBench scores of several runs side by side: tables as text, Markdown and LaTeX, a JSON object,
and a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastgrpo.evaluation.vbench_scores import DIMENSIONS, Scores
from fastgrpo.training.figures import COLORS, FAINT, GRID, INK

Values = Literal["normalized", "raw"]
"""Of the dimensions: normalised as they enter the totals, or raw, as papers print them. The three
totals are the same either way.
"""
Format = Literal["text", "markdown", "latex"]
HATCHES = ("", "///", "...", "xx", "\\\\\\", "+++")
_TOTALS = ("quality", "semantic", "total")


@dataclass(frozen=True)
class ScoreRow:
    """One line of a table: a dimension or a total, in points, None where a run does not have it."""

    title: str
    values: list[float | None]
    is_total: bool

    @property
    def differences(self) -> list[float | None]:
        """To the first run."""
        first = self.values[0]
        return [None if first is None or value is None else value - first for value in self.values]


def score_rows(runs: Sequence[Scores], values: Values) -> list[ScoreRow]:
    """The seven dimensions of quality and the quality score, the nine of semantics and theirs, the
    total.
    """
    rows = []
    for total in _TOTALS:
        for dimension in DIMENSIONS:
            if dimension.group == total:
                rows.append(
                    ScoreRow(
                        dimension.title,
                        [getattr(run, values).get(dimension.name) for run in runs],
                        False,
                    )
                )
        rows.append(ScoreRow(f"{total} score", [getattr(run, total) for run in runs], True))
    return rows


def scores_json(scores: Scores, values: Values) -> dict[str, Any]:
    """{"quality", "semantic", "total", "dimensions": {name: points}}; null for what is missing, or
    withheld since it needs what is.
    """
    points = getattr(scores, values)
    return {total: getattr(scores, total) for total in _TOTALS} | {
        "dimensions": {d.name: points.get(d.name) for d in DIMENSIONS}
    }


def score_table(runs: Mapping[str, Scores], values: Values, style: Format) -> str:
    """All runs as one table, in points; behind each but the first the difference to it, in
    brackets. runs: by name.
    """
    head = ["normalized, points" if values == "normalized" else "points", *runs]
    rows = score_rows(list(runs.values()), values)
    return {"text": _text_table, "markdown": _markdown_table, "latex": _latex_table}[style](
        head, rows
    )


def _cells(row: ScoreRow, missing: str, minus: str = "-") -> list[str]:
    cells = []
    for place, (value, difference) in enumerate(zip(row.values, row.differences, strict=True)):
        gap = "" if place == 0 or difference is None else f" ({difference:+.2f})"
        cells.append(missing if value is None else f"{value:.2f}{gap}".replace("-", minus))
    return cells


def _text_table(head: Sequence[str], rows: Sequence[ScoreRow]) -> str:
    lines = [list(head), *([row.title, *_cells(row, "-")] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    ]
    rule = "-" * len(texts[0])
    body = [
        part
        for row, text in zip(rows, texts[1:], strict=True)
        for part in ([text, rule] if row.is_total else [text])
    ]
    return "\n".join([texts[0], rule, *body[:-1]])


def _markdown_table(head: Sequence[str], rows: Sequence[ScoreRow]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    names = [name.replace("|", "\\|") for name in head]
    body = [[row.title, *_cells(row, "–", "−")] for row in rows]
    bold = [
        [f"**{cell}**" for cell in cells] if row.is_total else cells
        for row, cells in zip(rows, body, strict=True)
    ]
    return "\n".join([line(names), "|---|" + "---:|" * (len(head) - 1), *map(line, bold)])


def _latex_table(head: Sequence[str], rows: Sequence[ScoreRow]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(cells) + r" \\"

    lines = [
        r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}  % needs the package booktabs",
        r"  \toprule",
        line([_escaped(h) for h in head]),
    ]
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].is_total:
            lines.append(r"  \midrule")
        lines.append(line([row.title, *_cells(row, "--", "$-$")]))
    return "\n".join([*lines, r"  \bottomrule", r"\end{tabular}"])


def _escaped(text: str) -> str:
    """Text in which no character means anything to LaTeX."""
    names = {
        "\\": "textbackslash",
        "~": "textasciitilde",
        "^": "textasciicircum",
        "|": "textbar",
        "<": "textless",
        ">": "textgreater",
    }
    special = {character: f"\\{name}{{}}" for character, name in names.items()} | {
        character: f"\\{character}" for character in "&%$#_{}"
    }
    return "".join(special.get(character, character) for character in text)


def score_figure(runs: Mapping[str, Scores], values: Values) -> Figure:
    """Bars of every dimension and total, a colour and hatching a run; with several runs beside them
    the differences to the first.
    """
    rows = score_rows(list(runs.values()), values)
    several = len(runs) > 1
    figure = Figure(
        figsize=(10.5 if several else 6.5, 2.0 + len(rows) * max(0.26, 0.13 * len(runs))),
        layout="constrained",
        facecolor="white",
    )
    axes = (
        list(figure.subplots(1, 2, sharey=True, squeeze=False, width_ratios=(3, 2)).flat)
        if several
        else [figure.subplots()]
    )
    _bars(axes[0], rows, list(runs), lambda row: row.values, first=0)
    unit = "normalized score, points" if values == "normalized" else "score, points"
    _dress(axes[0], unit)
    axes[0].set_yticks(range(len(rows)), [row.title for row in rows], fontsize=9, color=INK)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    for label, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.is_total else "normal")
    if several:
        _bars(axes[1], rows, list(runs), lambda row: row.differences, first=1)
        axes[1].axvline(0, color=FAINT, linewidth=1)
        _dress(axes[1], f"difference to {next(iter(runs))}, points")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        ncols=3,
    )
    return figure


def _bars(
    axes: Axes,
    rows: Sequence[ScoreRow],
    names: Sequence[str],
    points: Callable[[ScoreRow], list[float | None]],
    first: int,
) -> None:
    height = 0.8 / len(names)
    for run in range(first, len(names)):
        heights = [
            place + (run - (len(names) - 1) / 2) * height
            for place, row in enumerate(rows)
            if points(row)[run] is not None
        ]
        lengths = [value for row in rows if (value := points(row)[run]) is not None]
        look = {
            "color": COLORS[run % len(COLORS)],
            "hatch": HATCHES[run % len(HATCHES)],
            "edgecolor": "white",
            "linewidth": 0,
        }
        axes.barh(heights, lengths, height=height, label=names[run], gid=f"run_{run}", **look)  # type: ignore[arg-type]


def _dress(axes: Axes, xlabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=9, color=FAINT)
    axes.tick_params(labelsize=9, length=0)
    axes.tick_params(axis="x", colors=FAINT)
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
