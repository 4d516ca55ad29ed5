"""What an ablation found: a table with mean and spread over seeds, and curves, from the metrics of
its cells (one mode, one seed each).

Compared are the judge's mean scores of the validation captions at one iteration, the same for all
cells. No mean over stages is formed: the last stage of the paper's judge counts the others
already. The training reward stands beside them, but each mode mixes its own, so it does not
compare.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from fastgrpo.evaluation.report import panels
from fastgrpo.training.figures import COLORS, MARKERS, Series
from fastgrpo.training.tracking import Row

LAST_ITERATIONS = 10
"""Iterations over which the training reward is averaged: that of one iteration hangs on its few
captions.
"""
REWARD = "training reward"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class CellResult:
    """The metrics of one run of an ablation."""

    mode: str
    seed: int
    rows: list[Row]
    """Of metrics.jsonl; empty for a cell that has not begun."""

    @property
    def name(self) -> str:
        return f"{self.mode}_seed{self.seed}"

    @property
    def last(self) -> int:
        """The last iteration there is; -1 for a cell that has not begun."""
        return max((row["iteration"] for row in self.rows), default=-1)

    @property
    def evaluated(self) -> set[int]:
        """Iterations with validation scores."""
        return {
            row["iteration"] for row in self.rows if any(key.startswith("eval/") for key in row)
        }

    def score(self, stage: str, iteration: int) -> float | None:
        """Validation mean of a stage; None where it was not evaluated, or no video had a score."""
        found = [
            row.get(f"eval/rewards/{stage}/mean")
            for row in self.rows
            if row["iteration"] == iteration
        ]
        return found[0] if found else None

    def training_reward(self, iteration: int) -> float | None:
        """Mean over the last iterations up to this one; None without any."""
        rewards = [
            row.get("reward")
            for row in self.rows
            if iteration - LAST_ITERATIONS < row["iteration"] <= iteration
        ]
        finite = [reward for reward in rewards if reward is not None]
        return math.fsum(finite) / len(finite) if finite else None


@dataclass(frozen=True)
class ModeRow:
    """A line of the table: for each stage, and last for the training reward, the values of the
    seeds that have one.
    """

    mode: str
    num_seeds: int
    values: list[list[float]]


def compared_iteration(cells: Sequence[CellResult], iterations: int) -> int | None:
    """The iteration at which cells are compared: the last of the ablation; while no cell has got
    there, the last at which all that have begun were evaluated.

    None where that is only the untrained model.
    """
    begun = [cell.evaluated for cell in cells if cell.rows]
    if any(iterations in evaluated for evaluated in begun):
        return iterations
    return (
        max((i for i in set.intersection(*begun) if 0 < i < iterations), default=None)
        if begun
        else None
    )


def table_rows(
    cells: Sequence[CellResult], stages: Sequence[str], iteration: int | None
) -> list[ModeRow]:
    """The untrained model, then each mode over its cells that were evaluated at `iteration`, in the
    order in which modes first come.
    """
    # The untrained model is the same in all modes, and so is the noise of its evaluation: one cell
    # a seed.
    untrained = {cell.seed: cell for cell in reversed(cells) if 0 in cell.evaluated}
    rows = (
        [ModeRow(UNTRAINED, len(untrained), [*_scores(list(untrained.values()), stages, 0), []])]
        if untrained
        else []
    )
    for mode in dict.fromkeys(cell.mode for cell in cells):
        there = (
            []
            if iteration is None
            else [cell for cell in cells if cell.mode == mode and iteration in cell.evaluated]
        )
        rewards = [
            reward for cell in there if (reward := cell.training_reward(iteration or 0)) is not None
        ]
        rows.append(ModeRow(mode, len(there), [*_scores(there, stages, iteration or 0), rewards]))
    return rows


def _scores(
    cells: Sequence[CellResult], stages: Sequence[str], iteration: int
) -> list[list[float]]:
    return [
        [score for cell in cells if (score := cell.score(stage, iteration)) is not None]
        for stage in stages
    ]


def spread(values: Sequence[float]) -> str:
    """'0.884 ± 0.010': mean and sample standard deviation; of one value the value, of none a dash."""
    if not values:
        return "–"
    return f"{statistics.fmean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def caption(iteration: int | None) -> str:
    """What the numbers of the table are, in words."""
    if iteration is None:
        return "Validation captions: nothing to compare yet but the untrained model."
    return (
        f"Validation captions at iteration {iteration}, by the judge of the training; mean ± standard deviation over seeds, which the bands "
        f"of the curves show too. The training reward (mean of the last {LAST_ITERATIONS} iterations) is each mode's own mixture: it does "
        "not compare between modes."
    )


def text_table(rows: Sequence[ModeRow], stages: Sequence[str]) -> str:
    """The table in columns of spaces."""
    lines = _cells(rows, stages)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown_table(rows: Sequence[ModeRow], stages: Sequence[str]) -> str:
    """The table in Markdown."""
    head, *lines = ["| " + " | ".join(line) + " |" for line in _cells(rows, stages)]
    return "\n".join([head, "|---" * (len(stages) + 3) + "|", *lines])


def _cells(rows: Sequence[ModeRow], stages: Sequence[str]) -> list[list[str]]:
    head = ["reward", "seeds", *(stage.replace("_", " ") for stage in stages), REWARD]
    return [head, *([row.mode, str(row.num_seeds), *map(spread, row.values)] for row in rows)]


def csv_table(rows: Sequence[ModeRow], stages: Sequence[str], iteration: int | None) -> str:
    """The table as CSV, six digits: <column> and <column>_std, empty where there is no value, or
    only one.
    """
    columns = [f"{name}{end}" for name in (*stages, "training_reward") for end in ("", "_std")]
    lines: list[list[object]] = [["mode", "seeds", "iteration", *columns]]
    for row in rows:
        numbers = [
            (statistics.fmean(v) if v else None, statistics.stdev(v) if len(v) > 1 else None)
            for v in row.values
        ]
        at = 0 if row.mode == UNTRAINED else iteration
        lines.append(
            [
                row.mode,
                row.num_seeds,
                "" if at is None else at,
                *(_digits(number) for pair in numbers for number in pair),
            ]
        )
    return _csv(lines)


def csv_cells(cells: Sequence[CellResult], stages: Sequence[str], iteration: int | None) -> str:
    """Each cell as a line of CSV: how far it is, and its own numbers at the compared iteration."""
    lines: list[list[object]] = [
        ["mode", "seed", "last_iteration", "iteration", *stages, "training_reward"]
    ]
    for cell in cells:
        at = iteration if iteration in cell.evaluated else None
        numbers = (
            [None] * (len(stages) + 1)
            if at is None
            else [*(cell.score(s, at) for s in stages), cell.training_reward(at)]
        )
        lines.append(
            [
                cell.mode,
                cell.seed,
                "" if cell.last < 0 else cell.last,
                "" if at is None else at,
                *map(_digits, numbers),
            ]
        )
    return _csv(lines)


def _digits(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


def _csv(lines: Sequence[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def absences(cells: Sequence[CellResult], iterations: int, iteration: int | None) -> list[str]:
    """A line for each cell that is missing, unfinished, or not in the table; and how to compare all
    that have begun, where that differs.
    """
    lines = []
    for cell in cells:
        out = "" if iteration in cell.evaluated else ", not in the table"
        if cell.last < 0:
            lines.append(f"{cell.name}: missing")
        elif cell.last < iterations:
            lines.append(f"{cell.name}: at iteration {cell.last} of {iterations}{out}")
        elif out:
            lines.append(f"{cell.name}: not evaluated at iteration {iteration}{out}")
    longer = [cell.last for cell in cells if cell.last > iterations]
    if longer:
        lines.append(
            f"{len(longer)} cells have up to {max(longer)} iterations; what comes after the {iterations} asked for is left out"
        )
    shared = (
        set.intersection(*(cell.evaluated for cell in cells if cell.rows))
        if any(cell.rows for cell in cells)
        else set()
    )
    best = max((i for i in shared if i <= iterations), default=0)
    if iteration is not None and 0 < best < iteration:
        lines.append(
            f"all that have begun were evaluated at iteration {best}: --iterations {best} --collect true compares them there"
        )
    return lines


def curves(cells: Sequence[CellResult], stages: Sequence[str], iteration: int) -> Figure:
    """Validation mean of each stage over iterations: for each mode the mean over the seeds of the
    table, and a band of one deviation.
    """
    drawn = []
    for stage in stages:
        means = {
            mode: _mean_curve(cells, mode, stage, iteration)
            for mode in dict.fromkeys(cell.mode for cell in cells)
        }
        lines = [
            panels.Line(
                mode, points, COLORS[i], "line", panels.STYLES[i], MARKERS[i], gid=f"{mode}/{stage}"
            )
            for i, (mode, (points, _)) in enumerate(means.items())
            if points[0]
        ]
        bands = [
            (COLORS[i], points, deviations)
            for i, (points, deviations) in enumerate(means.values())
            if deviations
        ]
        drawn.append(
            (panels.Panel(stage.replace("_", " "), "validation mean score", tuple(lines)), bands)
        )
    figure = panels.draw(
        [panel for panel, _ in drawn], columns=len(stages), width=3.7 * len(stages), height=3.2
    )
    for axes, (_, bands) in zip(figure.axes, drawn, strict=False):
        for color, (iterations, values), deviations in bands:
            low, high = (
                [v + sign * d for v, d in zip(values, deviations, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(iterations, low, high, color=color, alpha=0.15, linewidth=0)
        axes.autoscale(axis="y")  # the limits were set to the lines
    return figure


def _mean_curve(
    cells: Sequence[CellResult], mode: str, stage: str, iteration: int
) -> tuple[Series, list[float]]:
    """Mean over the cells that the table counts, where all of them have a value, and the
    deviations; none of one cell.
    """
    there = [cell for cell in cells if cell.mode == mode and iteration in cell.evaluated]
    points = (
        {i: [cell.score(stage, i) for cell in there] for i in range(iteration + 1)} if there else {}
    )
    whole = {
        i: [v for v in values if v is not None]
        for i, values in points.items()
        if None not in values
    }
    deviations = [statistics.stdev(values) for values in whole.values()] if len(there) > 1 else []
    return (list(whole), [statistics.fmean(values) for values in whole.values()]), deviations
