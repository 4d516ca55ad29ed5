"""What an ablation found: a table with mean and spread over seeds, and curves, from the metrics of
its cells (one mode, one seed each).

The judge's mean scores of the validation prompts are compared at one iteration, the same for all
cells. No mean over stages is formed, since the last stage of the paper's judge counts the others
already. The training reward stands beside them, but each mode mixes its own, so it does not
compare.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from fastgrpo.evaluation import figures
from fastgrpo.training.tracking import Row

LAST_ITERATIONS = 10
"""Iterations over which the training reward is averaged: one iteration has only a few prompts."""
UNTRAINED = "untrained"


@dataclass(frozen=True)
class CellResult:
    """The metrics of one run of an ablation; `rows` is empty for a cell that has not begun."""

    mode: str
    seed: int
    rows: list[Row]

    @property
    def name(self) -> str:
        return f"{self.mode}_seed{self.seed}"

    @property
    def last(self) -> int:
        """The last iteration; -1 for a cell that has not begun."""
        return max((row["iteration"] for row in self.rows), default=-1)

    @property
    def evaluated(self) -> set[int]:
        """Iterations with validation scores."""
        return {
            row["iteration"] for row in self.rows if any(key.startswith("eval/") for key in row)
        }

    def score(self, stage: str, iteration: int) -> float | None:
        """Validation mean of a stage; None if it was not evaluated or no video had a score."""
        row = next((row for row in self.rows if row["iteration"] == iteration), {})
        return row.get(f"eval/rewards/{stage}/mean")

    def training_reward(self, iteration: int) -> float | None:
        """Mean over the last iterations up to this one; None without any."""
        last = range(iteration - LAST_ITERATIONS + 1, iteration + 1)
        rewards = [row.get("reward") for row in self.rows if row["iteration"] in last]
        finite = [reward for reward in rewards if reward is not None]
        return statistics.fmean(finite) if finite else None


@dataclass(frozen=True)
class ModeRow:
    """A line of the table: for each stage, and last for the training reward, the values of the
    seeds that have one.
    """

    mode: str
    num_seeds: int
    values: list[list[float]]


def compared_iteration(cells: Sequence[CellResult], iterations: int) -> int | None:
    """The iteration at which cells are compared.

    It is the last iteration of the ablation; while no cell has reached it, the last one at which
    all cells that have begun were evaluated; None if that is only the untrained model.
    """
    if any(iterations in cell.evaluated for cell in cells):
        return iterations
    return max(_shared(cells, iterations), default=None)


def _shared(cells: Sequence[CellResult], iterations: int) -> set[int]:
    """Iterations, after the start, at which all cells that have begun were evaluated."""
    begun = [cell.evaluated for cell in cells if cell.rows]
    return {i for i in set.intersection(*begun) if 0 < i <= iterations} if begun else set()


def table_rows(
    cells: Sequence[CellResult], stages: Sequence[str], iteration: int | None
) -> list[ModeRow]:
    """The untrained model, then each mode over its cells that were evaluated at `iteration`, in the
    order in which modes first come.
    """
    # The untrained model is the same in all modes, and so is the noise of its evaluation: one cell
    # per seed.
    untrained = {cell.seed: cell for cell in reversed(cells) if 0 in cell.evaluated}
    rows = [_mode_row(UNTRAINED, list(untrained.values()), stages, 0)] if untrained else []
    for mode in dict.fromkeys(cell.mode for cell in cells):
        there = [cell for cell in cells if cell.mode == mode and iteration in cell.evaluated]
        rows.append(_mode_row(mode, there, stages, iteration or 0))
    return rows


def _mode_row(
    mode: str, cells: Sequence[CellResult], stages: Sequence[str], iteration: int
) -> ModeRow:
    columns = [[cell.score(stage, iteration) for cell in cells] for stage in stages]
    columns.append([cell.training_reward(iteration) for cell in cells])
    values = [[value for value in column if value is not None] for column in columns]
    return ModeRow(mode, len(cells), values)


def spread(values: Sequence[float]) -> str:
    """'0.884 ± 0.010': mean and sample standard deviation; one value alone, or a dash for none."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def caption(iteration: int | None) -> str:
    """What the numbers of the table are, in words."""
    if iteration is None:
        return "Validation prompts: nothing to compare yet but the untrained model."
    return (
        f"Validation prompts at iteration {iteration}, by the judge of the training; mean ± "
        "standard deviation over seeds, which the bands of the curves show too. The training "
        f"reward (mean of the last {LAST_ITERATIONS} iterations) is each mode's own mixture: it "
        "does not compare between modes."
    )


def table_cells(rows: Sequence[ModeRow], stages: Sequence[str]) -> list[list[str]]:
    """The table for `render_table`: the head, then a row per mode."""
    head = ["reward", "seeds", *(stage.replace("_", " ") for stage in stages), "training reward"]
    return [head, *([row.mode, str(row.num_seeds), *map(spread, row.values)] for row in rows)]


def mode_records(
    rows: Sequence[ModeRow], stages: Sequence[str], iteration: int | None
) -> list[dict[str, Any]]:
    """The table for `write_csv`, six digits: <column> and <column>_std, None where there is no
    value, or only one.
    """
    records = []
    for row in rows:
        at = 0 if row.mode == UNTRAINED else iteration
        record: dict[str, Any] = {"mode": row.mode, "seeds": row.num_seeds, "iteration": at}
        for name, values in zip((*stages, "training_reward"), row.values, strict=True):
            record[name] = _digits(statistics.fmean(values) if values else None)
            record[f"{name}_std"] = _digits(statistics.stdev(values) if len(values) > 1 else None)
        records.append(record)
    return records


def cell_records(
    cells: Sequence[CellResult], stages: Sequence[str], iteration: int | None
) -> list[dict[str, Any]]:
    """Each cell for `write_csv`: how far it is, and its own numbers at the compared iteration."""
    records = []
    for cell in cells:
        at = iteration if iteration in cell.evaluated else None
        last = None if cell.last < 0 else cell.last
        record = {"mode": cell.mode, "seed": cell.seed, "last_iteration": last, "iteration": at}
        for stage in stages:
            record[stage] = None if at is None else _digits(cell.score(stage, at))
        record["training_reward"] = None if at is None else _digits(cell.training_reward(at))
        records.append(record)
    return records


def _digits(number: float | None) -> str | None:
    return None if number is None else f"{number:.6g}"


def absences(cells: Sequence[CellResult], iterations: int, iteration: int | None) -> list[str]:
    """A line for each cell that is missing, unfinished, or not in the table; and how to compare all
    cells that have begun, if that differs.
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
            f"{len(longer)} cells have up to {max(longer)} iterations; what comes after the "
            f"{iterations} asked for is left out"
        )
    best = max(_shared(cells, iterations), default=0)
    if iteration is not None and 0 < best < iteration:
        lines.append(
            f"all that have begun were evaluated at iteration {best}: --iterations {best} "
            "--collect compares them there"
        )
    return lines


def curves(cells: Sequence[CellResult], stages: Sequence[str], iteration: int) -> Figure:
    """Validation mean of each stage over iterations: for each mode the mean over the seeds of the
    table, and a band of one standard deviation.
    """
    panels = []
    for stage in stages:
        lines = [
            _mean_curve(index, mode, cells, stage, iteration)
            for index, mode in enumerate(dict.fromkeys(cell.mode for cell in cells))
        ]
        drawn = tuple(line for line in lines if line.points[0])
        title = stage.replace("_", " ")
        panels.append(figures.Panel(title, "validation mean score", drawn))
    return figures.draw(panels, columns=len(stages), width=3.7 * len(stages), height=3.2)


def _mean_curve(
    index: int, mode: str, cells: Sequence[CellResult], stage: str, iteration: int
) -> figures.Line:
    """Mean over the mode's cells in the table, at the iterations where all of them have a value."""
    there = [cell for cell in cells if cell.mode == mode and iteration in cell.evaluated]
    points: dict[int, list[float]] = {}
    for i in range(iteration + 1):
        values = [value for cell in there if (value := cell.score(stage, i)) is not None]
        if there and len(values) == len(there):
            points[i] = values
    means = [statistics.fmean(values) for values in points.values()]
    line = figures.indexed_line(index, mode, (list(points), means), f"{mode}/{stage}")
    if len(there) < 2:
        return line
    return replace(line, band=[statistics.stdev(values) for values in points.values()])
