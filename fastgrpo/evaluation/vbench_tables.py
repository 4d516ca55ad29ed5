"""VBench's scores of several runs side by side: a table, a JSON object and a figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastgrpo.evaluation.figures import COLORS, FAINT, GRID, INK, save_figure
from fastgrpo.evaluation.score_rows import name_files
from fastgrpo.evaluation.tables import Format, render_table
from fastgrpo.evaluation.vbench_scores import (
    DIMENSIONS,
    TOTALS,
    Scale,
    Scores,
    read_results,
    vbench_scores,
)

Values = Literal["normalized", "raw"]
HATCHES = ("", "///", "...", "xx", "\\\\\\", "+++")


def compare_vbench(
    results: Sequence[Path],
    names: Sequence[str] | None = None,
    json: bool = False,
    values: Values = "normalized",
    format: Format = "text",
    scale: Scale = "auto",
    figure: Path | None = None,
) -> str:
    """VBench's sixteen dimensions, and its quality, semantic and total score, from its result
    files; several runs beside the first.

    Args:
        results: For each run its *_eval_results.json, a folder of them, or plain JSON.
        names: Names of the runs, in the same order; by default those of the files and folders.
        json: Give JSON instead of a table: of one run its object, of several {name: object}.
        values: Of the dimensions: normalized, as they enter the totals, or raw, as papers print
            them. The three totals are the same either way.
        format: Of the table; latex needs the package booktabs.
        scale: Of plain files {dimension: score}; auto tells it by the scores, and refuses if it
            cannot be told.
        figure: Also draw bars, to this path with .png and .svg.

    Returns:
        The table, with a line for each run that lacks dimensions; or the JSON text.

    Raises:
        UserError, OSError: Files cannot be read, or there are not as many names.
    """
    found = zip(name_files(results, names, "results"), results, strict=True)
    runs = {name: vbench_scores(read_results(path, scale)) for name, path in found}
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        stem = figure.with_suffix("") if figure.suffix in (".png", ".svg") else figure
        save_figure(score_figure(runs, values), stem)
    if json:
        return json_text(runs, values)
    lines = [score_table(runs, values, format)]
    for name, run in runs.items():
        withheld = [total for total in TOTALS if getattr(run, total) is None]
        if run.missing:
            comment = "% " if format == "latex" else ""
            lacks = f"{name} lacks {', '.join(run.missing)}"
            lines.append(f"{comment}{lacks}: no {' or '.join(withheld)} score")
    return "\n".join(lines)


@dataclass(frozen=True)
class ScoreRow:
    """One line of a table: a dimension or a total, in points, None for a run without it."""

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
    for total in TOTALS:
        for d in DIMENSIONS:
            if d.group == total:
                points = [getattr(run, values).get(d.name) for run in runs]
                rows.append(ScoreRow(d.title, points, is_total=False))
        points = [getattr(run, total) for run in runs]
        rows.append(ScoreRow(f"{total} score", points, is_total=True))
    return rows


def json_text(runs: Mapping[str, Scores], values: Values) -> str:
    """Of one run its object {"quality", "semantic", "total", "dimensions": {name: points}}, of
    several an object by name; null for what is missing, or withheld since it needs what is.
    """
    objects: dict[str, Any] = {
        name: {total: getattr(run, total) for total in TOTALS}
        | {"dimensions": {d.name: getattr(run, values).get(d.name) for d in DIMENSIONS}}
        for name, run in runs.items()
    }
    content = objects if len(objects) > 1 else next(iter(objects.values()))
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def score_table(runs: Mapping[str, Scores], values: Values, format: Format) -> str:
    """All runs in one table, in points, with the difference to the first run in brackets."""
    missing = {"text": "-", "markdown": "–", "latex": "--"}[format]
    lines = [["normalized, points" if values == "normalized" else "points", *runs]]
    rows = score_rows(list(runs.values()), values)
    for row in rows:
        cells = []
        for index, (value, gap) in enumerate(zip(row.values, row.differences, strict=True)):
            difference = f" ({gap:+.2f})" if index and gap is not None else ""
            cells.append(missing if value is None else f"{value:.2f}{difference}")
        lines.append([row.title, *cells])
    totals = [index for index, row in enumerate(rows, start=1) if row.is_total]
    return render_table(lines, format, totals=totals)


def score_figure(runs: Mapping[str, Scores], values: Values) -> Figure:
    """Bars of every dimension and total, one colour and hatching per run; with several runs beside
    them the differences to the first.
    """
    rows, names = score_rows(list(runs.values()), values), list(runs)
    several = len(runs) > 1
    figure = Figure(
        figsize=(10.5 if several else 6.5, 2.0 + len(rows) * max(0.26, 0.13 * len(runs))),
        layout="constrained",
        facecolor="white",
    )
    ratios = (3, 2) if several else (1,)
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    _draw_bars(axes[0], rows, lambda row: row.values, names, first=0)
    unit = "normalized score, points" if values == "normalized" else "score, points"
    axes[0].set_xlabel(unit, fontsize=9, color=FAINT)
    axes[0].set_yticks(range(len(rows)), [row.title for row in rows], fontsize=9, color=INK)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    for label, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.is_total else "normal")
    if several:
        _draw_bars(axes[1], rows, lambda row: row.differences, names, first=1)
        axes[1].axvline(0, color=FAINT, linewidth=1)
        axes[1].set_xlabel(f"difference to {names[0]}, points", fontsize=9, color=FAINT)
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK, "ncols": 3}
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", **look)
    return figure


def _draw_bars(
    axes: Axes,
    rows: Sequence[ScoreRow],
    points: Callable[[ScoreRow], list[float | None]],
    names: Sequence[str],
    first: int,
) -> None:
    height = 0.8 / len(names)
    for run in range(first, len(names)):
        offset = (run - (len(names) - 1) / 2) * height
        lengths = {
            index + offset: value
            for index, row in enumerate(rows)
            if (value := points(row)[run]) is not None
        }
        axes.barh(
            *(list(lengths), list(lengths.values()), height),
            label=names[run],
            gid=f"run_{run}",
            color=COLORS[run % len(COLORS)],
            hatch=HATCHES[run % len(HATCHES)],
            edgecolor="white",
            linewidth=0,
        )
    axes.tick_params(labelsize=9, length=0)
    axes.tick_params(axis="x", colors=FAINT)
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
