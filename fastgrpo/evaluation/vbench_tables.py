"""VBench's scores of several runs side by side: a table, a JSON object and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastgrpo.evaluation import figures
from fastgrpo.evaluation.score_rows import name_files
from fastgrpo.evaluation.tables import Format, render_table
from fastgrpo.evaluation.vbench_scores import (
    DIMENSIONS,
    TOTALS,
    Scores,
    read_results,
    vbench_scores,
)

Values = Literal["normalized", "raw"]


def compare_vbench(
    results: Sequence[Path],
    names: Sequence[str] | None = None,
    json: bool = False,
    values: Values = "normalized",
    format: Format = "text",
    figure: Path | None = None,
) -> str:
    """VBench's sixteen dimensions, and its quality, semantic and total score, from its result
    files; several runs beside the first.

    Args:
        results: For each run its *_eval_results.json, or a folder of them.
        names: Names of the runs, in the same order; by default those of the files and folders.
        json: Give JSON instead of a table: of one run its object, of several {name: object}.
        values: Of the dimensions: normalized, as they enter the totals, or raw, as papers print
            them. The three totals are the same either way.
        format: Of the table; latex needs the package booktabs.
        figure: Also draw bars, to this path with .png and .svg.

    Returns:
        The table, with a line for each run that lacks dimensions; or the JSON text.

    Raises:
        UserError, OSError: Files cannot be read, or there are not as many names.
    """
    found = zip(name_files(results, names, "results"), results, strict=True)
    runs = {name: vbench_scores(read_results(path)) for name, path in found}
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        stem = figure.with_suffix("") if figure.suffix in (".png", ".svg") else figure
        figures.save_figure(score_figure(runs, values), stem)
    if json:
        return json_text(runs, values)
    lines = [score_table(runs, values, format)]
    for name, run in runs.items():
        if run.missing:
            withheld = " or ".join(total for total in TOTALS if getattr(run, total) is None)
            comment = "% " if format == "latex" else ""
            lines.append(f"{comment}{name} lacks {', '.join(run.missing)}: no {withheld} score")
    return "\n".join(lines)


def score_rows(runs: Mapping[str, Scores], values: Values) -> dict[str, list[float | None]]:
    """The runs' points by title, None for a run without: the seven dimensions of quality and the
    quality score, the nine of semantics and theirs, the total.
    """
    rows: dict[str, list[float | None]] = {}
    for total in TOTALS:
        for d in DIMENSIONS:
            if d.group == total:
                rows[d.title] = [getattr(run, values).get(d.name) for run in runs.values()]
        rows[f"{total} score"] = [getattr(run, total) for run in runs.values()]
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
    lines = [["normalized, points" if values == "normalized" else "points", *runs]]
    totals = []
    for title, (first, *others) in score_rows(runs, values).items():
        cells = ["–" if first is None else f"{first:.2f}"]
        for value in others:
            gap = "" if first is None or value is None else f" ({value - first:+.2f})"
            cells.append("–" if value is None else f"{value:.2f}{gap}")
        if title.endswith(" score"):
            totals.append(len(lines))
        lines.append([title, *cells])
    return render_table(lines, format, totals=totals)


def score_figure(runs: Mapping[str, Scores], values: Values) -> figures.Figure:
    """Bars of every dimension and total, one colour per run."""
    rows = score_rows(runs, values)
    places, height = np.arange(len(rows)), 0.8 / len(runs)
    figure, (axes,) = figures.new_figure(1, 8.0, 2.0 + 0.3 * len(rows))
    lengths = np.array(list(rows.values()), dtype=np.float64)  # None is NaN, which draws no bar
    for index, name in enumerate(runs):
        color = figures.COLORS[index % len(figures.COLORS)]
        axes.barh(places + index * height, lengths[:, index], height, label=name, color=color)
    unit = "normalized score, points" if values == "normalized" else "score, points"
    figures.finish(axes, "VBench", "", unit)
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()  # the first on top
    return figure
