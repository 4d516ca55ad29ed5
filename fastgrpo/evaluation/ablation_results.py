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

from fastgrpo.evaluation import figures
from fastgrpo.training.tracking import Row

LAST_ITERATIONS = 10
"""Iterations over which the training reward is averaged: one iteration has only a few prompts."""
UNTRAINED = "untrained"
Record = dict[str, Any]
"""Column -> value."""


@dataclass(frozen=True)
class CellResult:
    """The metrics of one run of an ablation; `rows` is empty for a cell that has not begun.

    `judge` stands for what the judge said of itself (judge.json), "" if it said nothing.
    """

    mode: str
    seed: int
    rows: list[Row]
    judge: str = ""

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


def compared_iteration(cells: Sequence[CellResult], iterations: int) -> int | None:
    """The iteration at which cells are compared.

    It is the last iteration of the ablation; while no cell has reached it, the last one at which
    all cells that have begun were evaluated; None if that is only the untrained model.
    """
    if any(iterations in cell.evaluated for cell in cells):
        return iterations
    begun = [cell.evaluated for cell in cells if cell.rows]
    shared = set.intersection(*begun) if begun else set[int]()
    return max((i for i in shared if 0 < i <= iterations), default=None)


def cell_records(
    cells: Sequence[CellResult], stages: Sequence[str], iteration: int | None
) -> list[Record]:
    """A record for each cell: how far it is, and its own numbers at the compared iteration."""
    records = []
    for cell in cells:
        at = iteration if iteration in cell.evaluated else None
        record: Record = {"mode": cell.mode, "seed": cell.seed}
        record |= {"last_iteration": cell.last if cell.rows else None, "iteration": at}
        for stage in stages:
            record[stage] = None if at is None else cell.score(stage, at)
        record["training_reward"] = None if at is None else cell.training_reward(at)
        records.append(record)
    return records


def mode_records(
    cells: Sequence[CellResult], stages: Sequence[str], iteration: int | None
) -> list[Record]:
    """A record for the untrained model and for each mode, over the cells that were evaluated.

    For each column, <column> is the mean over seeds and <column>_std the sample standard
    deviation; None where there is no value, or only one.
    """
    # The untrained model is the same in all modes, and so is the noise of its evaluation: one cell
    # per seed.
    untrained = {cell.seed: cell for cell in reversed(cells) if 0 in cell.evaluated}
    groups: dict[str, tuple[int | None, list[CellResult]]] = {}
    if untrained:
        groups[UNTRAINED] = 0, list(untrained.values())
    for cell in cells:
        groups.setdefault(cell.mode, (iteration, []))[1].append(cell)
    records = []
    for mode, (at, members) in groups.items():
        found = [row for row in cell_records(members, stages, at) if row["iteration"] is not None]
        record: Record = {"mode": mode, "seeds": len(found), "iteration": at}
        for name in (*stages, "training_reward"):
            values = [row[name] for row in found if row[name] is not None]
            record[name] = statistics.fmean(values) if values else None
            record[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        records.append(record)
    return records


def table_cells(records: Sequence[Record], stages: Sequence[str]) -> list[list[str]]:
    """The records of the modes for `render_table`: the head, then "0.884 ± 0.010" for each number,
    without the deviation for one value alone, or a dash for none.
    """
    names = *stages, "training_reward"
    table = [["reward", "seeds", *(name.replace("_", " ") for name in names)]]
    for record in records:
        cells = [record["mode"], str(record["seeds"])]
        for name in names:
            mean, deviation = record[name], record[f"{name}_std"]
            spread = "" if deviation is None else f" ± {deviation:.3f}"
            cells.append("–" if mean is None else f"{mean:.3f}{spread}")
        table.append(cells)
    return table


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


def absences(cells: Sequence[CellResult], iterations: int, iteration: int | None) -> list[str]:
    """A line for each cell that is missing, unfinished, or not in the table, and one for those that
    another judge has scored.
    """
    lines = []
    for cell in cells:
        out = "" if iteration in cell.evaluated else ", not in the table"
        if not cell.rows:
            lines.append(f"{cell.name}: missing")
        elif out or cell.last < iterations:
            lines.append(f"{cell.name}: at iteration {cell.last} of {iterations}{out}")
    begun = [cell for cell in cells if cell.rows]
    if others := [cell.name for cell in begun if cell.judge != begun[0].judge]:
        lines.append(
            f"not scored by the same judge as {begun[0].name} (judge.json), so their scores do not "
            f"compare with its: {', '.join(others)}"
        )
    return lines


def curves(cells: Sequence[CellResult], stages: Sequence[str], iteration: int) -> figures.Figure:
    """Validation mean of each stage over iterations: for each mode the mean over the seeds of the
    table, and a band of one standard deviation.
    """
    modes: dict[str, list[CellResult]] = {}
    for cell in cells:
        if iteration in cell.evaluated:
            modes.setdefault(cell.mode, []).append(cell)
    panels = []
    for stage in stages:
        lines = [
            _mean_curve(index, mode, members, stage, iteration)
            for index, (mode, members) in enumerate(modes.items())
        ]
        title = stage.replace("_", " ")
        panels.append(figures.Panel(title, "validation mean score", tuple(lines)))
    return figures.draw(panels, columns=len(stages), width=3.7 * len(stages), height=3.2)


def _mean_curve(
    index: int, mode: str, cells: Sequence[CellResult], stage: str, iteration: int
) -> figures.Line:
    """Mean over the mode's cells, at the iterations where all of them have a value."""
    points: dict[int, list[float]] = {}
    for i in range(iteration + 1):
        values = [value for cell in cells if (value := cell.score(stage, i)) is not None]
        if len(values) == len(cells):
            points[i] = values
    means = [statistics.fmean(values) for values in points.values()]
    band = [statistics.stdev(values) for values in points.values() if len(values) > 1]
    line = figures.indexed_line(index, mode, (list(points), means), f"{mode}/{stage}")
    return replace(line, band=band)
