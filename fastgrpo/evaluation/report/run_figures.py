"""The curves of a report: of one run with its stages beside each other, of several runs with a
line per run.

Rows are those of metrics.jsonl; a value that is missing or was not finite is left out of its
curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastgrpo.algorithm.self_paced import smooth
from fastgrpo.evaluation.figures import COLORS, INK, Line, Panel, Series, draw, indexed_line, series
from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.training.pacing_note import describe_distances
from fastgrpo.training.tracking import Row

if TYPE_CHECKING:  # matplotlib is loaded only to draw
    from matplotlib.figure import Figure

Runs = Sequence[RunRecord]
PHASES = ("rollout", "reward", "update")
NO_TROUBLE = ("judge/answers", "judge/requests", "judge/vision_passes", "judge/prefix_passes")
"""Counters of a judge's work; its other counters are of trouble."""


@dataclass(frozen=True)
class Topic:
    """One figure of the report. In `words`, text between backticks is a metric or a key."""

    id: str
    title: str
    panels: tuple[Panel, ...]
    words: str

    def draw(self) -> Figure:
        """For a page or a paper."""
        count = len(self.panels)
        columns = count if count <= 3 else 2 if count == 4 else 3
        return draw(self.panels, columns, 8.6, {1: 3.4, 2: 2.9, 3: 2.6}[columns])


def topics(runs: Runs, window: int) -> list[Topic]:
    """The report's figures in reading order, with curves smoothed over `window` iterations.

    Memory and the judge have a figure only if a run has measured something of them.
    """
    make = (_reward, _weights, _hoyer, _ratio_drift, _stability, _time, _memory, _judge)
    return [topic for topic in (one(runs, window) for one in make) if topic.panels]


def stages_of(runs: Runs) -> list[str]:
    """The stages of all runs: the first run's in order, then those that only later runs have."""
    return list(dict.fromkeys(stage for run in runs for stage in run.stages))


def _title_of(stage: str) -> str:
    """A stage's name for readers."""
    return stage.replace("_", " ")


def _panels(
    runs: Runs, title: str, ylabel: str, keys: Mapping[str, str], window: int = 1, **options: Any
) -> list[Panel]:
    """Several metrics (key -> label): of one run a panel with a line per metric, of several runs a
    panel per metric with a line per run.
    """
    if len(runs) > 1:
        return [_panel(runs, label, ylabel, key, window, **options) for key, label in keys.items()]
    curves = [(label, runs[0].rows, key) for key, label in keys.items()]
    lines = [line for index, curve in enumerate(curves) for line in _lines(index, *curve, window)]
    return [Panel(title, ylabel, tuple(lines), **options)]


def _panel(runs: Runs, title: str, ylabel: str, key: str, window: int = 1, **options: Any) -> Panel:
    """One metric with a line per run."""
    if len(runs) == 1:
        lines = _lines(0, "", runs[0].rows, key, window)
    else:
        lines = [
            replace(line, gid=f"{line.gid}/{index}")
            for index, run in enumerate(runs)
            for line in _lines(index, run.label, run.rows, key, window)
            if line.kind != "faint"
        ]
    return Panel(title, ylabel, tuple(lines), **options)


def _lines(index: int, label: str, rows: Sequence[Row], key: str, window: int) -> list[Line]:
    """A metric as measured (faint), its moving average, and its validation values as dots."""
    iterations, values = points = series(rows, key)
    line = indexed_line(index, label, (iterations, smooth(values, window)), key)
    faint = replace(line, label="", points=points, kind="faint", gid=f"raw/{key}")
    validation = series(rows, f"eval/{key}")
    dots = replace(line, label="", points=validation, kind="dots", gid=f"eval/{key}")
    return [faint, line, *([dots] if validation[0] else [])]


def _per_stage(runs: Runs, pattern: str) -> dict[str, str]:
    """Keys and labels for `_panels`: the pattern with each stage's name for its {}."""
    return {pattern.format(stage): _title_of(stage) for stage in stages_of(runs)}


def _levels(runs: Runs, stage: str = "") -> tuple[tuple[float, str], ...]:
    """Thresholds: of one run each in its stage's colour, of several runs those of one stage, each
    in its run's colour.
    """
    if len(runs) == 1:
        return tuple(zip(runs[0].thresholds[: len(runs[0].stages)], COLORS, strict=False))
    found = [dict(zip(run.stages, run.thresholds, strict=False)).get(stage) for run in runs]
    colors = itertools.cycle(COLORS)
    pairs = zip(found, colors, strict=False)
    return tuple((value, color) for value, color in pairs if value is not None)


def _reward(runs: Runs, window: int) -> Topic:
    keys = _per_stage(runs, "rewards/{}/mean")
    panels = _panels(runs, "Stage rewards", "mean score (0 to 1)", keys, window)
    weighted = _panel(runs, "weighted reward", "mean (0 to 1)", "reward", window)
    if len(runs) == 1:
        black = replace(weighted.lines[1], label="weighted reward", color=INK)
        lines = (*panels[0].lines, black)
        panels = [replace(panels[0], lines=lines, levels=_levels(runs))]
    else:
        stages = zip(panels, stages_of(runs), strict=True)
        panels = [replace(panel, levels=_levels(runs, stage)) for panel, stage in stages]
        panels.append(weighted)
    words = (
        "Mean score of the judge at each stage, `rewards/<stage>/mean`: thin lines are single "
        f"iterations, bold ones the mean over {window}. Markers: validation prompts, "
        "`eval/rewards/<stage>/mean`. Dashed: thresholds, `pacing.thresholds`. The weighted "
        "`reward` is what training climbs: it dips where weight moves to a harder stage, which is "
        "no setback, and its weights differ from run to run, so compare runs by the stages."
    )
    return Topic("reward", "Does it get better?", tuple(panels), words)


def _weights(runs: Runs, window: int) -> Topic:
    weights, competence = (_per_stage(runs, key) for key in ("weights/{}", "competence/{}"))
    panels = _panels(runs, "Stage weights", "weight (they sum to 1)", weights, ylim=(-0.03, 1.03))
    if len(runs) == 1:
        title, ylabel = "Competence and thresholds", "running mean score"
        panels += _panels(runs, title, ylabel, competence, levels=_levels(runs))
    words = (
        "Share of each stage in the reward, `weights/<stage>` (Eq. 6). What moves it is the "
        "competence, `competence/<stage>`: when that of a stage passes its threshold, weight moves "
        "on to the next stage."
    )
    if len(runs) == 1 and runs[0].trained:
        for trained in (runs[0].trained[0], runs[0].trained[-1]):
            if found := runs[0].distances(trained):
                said = describe_distances(found)
                words += f" After iteration {trained['iteration']}: {said} (T: the gate's width)."
    return Topic("weights", "What is being taught?", _not_empty(panels), words)


def _hoyer(runs: Runs, window: int) -> Topic:
    hoyer, saturation = (_per_stage(runs, key) for key in ("hoyer/{}", "saturation/{}"))
    panels = _panels(runs, "Hoyer index of a group's scores", "index (0 to 1)", hoyer, window)
    if len(runs) == 1:
        panels += _panels(runs, "Saturation that the gates see", "saturation (0 to 1)", saturation)
    words = (
        f"`hoyer/<stage>` (Eq. 8), mean over groups and over {window} iterations: 0 where all "
        "videos of a group score alike, so that there is nothing left to choose between at that "
        "stage. `saturation/<stage>` is the running mean of what `pacing.saturation` makes of it, "
        "an input of the gates (Eq. 9)."
    )
    title = "Can the judge still tell the videos apart?"
    return Topic("hoyer", title, _not_empty(panels), words)


def _not_empty(panels: Sequence[Panel]) -> tuple[Panel, ...]:
    """The first panel, and the others that have values: not every mode measures all."""
    return *panels[:1], *(panel for panel in panels[1:] if panel.values)


def _drift_by_step(rows: Sequence[Row]) -> Series:
    """Denoising step -> the largest drift there of any iteration."""
    prefix = "ratio_drift/step_"
    found = (key for row in rows for key in row if key.startswith(prefix))
    keys = {key for key in found if key.removeprefix(prefix).isdecimal()}
    drifts = {int(key.removeprefix(prefix)): series(rows, key)[1] for key in keys}
    largest = {step: max(values) for step, values in sorted(drifts.items()) if values}
    return list(largest), list(largest.values())


def _ratio_drift(runs: Runs, window: int) -> Topic:
    ylabel = "max |ratio − 1|"
    options: dict[str, Any] = {"scale": "symlog", "ylim": (0, None)}
    over_time = _panel(runs, "Ratio drift by iteration", ylabel, "ratio_drift", **options)
    by_step = [
        indexed_line(index, run.label, _drift_by_step(run.rows), f"ratio_drift/by_step/{index}")
        for index, run in enumerate(runs)
    ]
    if len(runs) == 1:
        by_step = [replace(by_step[0], label="")]
    steps = Panel(
        "Ratio drift by denoising step", ylabel, tuple(by_step), "denoising step", **options
    )
    words = (
        "`ratio_drift` and `ratio_drift/step_<i>`, the largest of any iteration. Before the first "
        "update of an iteration, training recomputes the rollout's probabilities with the very "
        "same weights, so each ratio should be 1: far from 0 means lost precision or a bug."
    )
    return Topic("ratio_drift", "Is the arithmetic right?", (over_time, steps), words)


def _stability(runs: Runs, window: int) -> Topic:
    norm = _panel(runs, "Gradient norm before clipping", "2-norm", "grad_norm", window)
    if norm.values and min(norm.values) > 0:  # a logarithmic scale would hide a zero
        norm = replace(norm, scale="log")
    clip = _panel(
        runs, "Clip fraction", "fraction of loss terms", "clip_ratio", window, ylim=(0, None)
    )
    words = (
        f"`grad_norm` and `clip_ratio`, mean over {window} iterations. Healthy training keeps the "
        "norm bounded and the share of trained transitions whose gradient the clip removed well "
        "below one."
    )
    return Topic("stability", "Is training stable?", (norm, clip), words)


def _time(runs: Runs, window: int) -> Topic:
    keys = {f"time/{phase}": phase for phase in PHASES} | {"step_time": "whole iteration"}
    panels = _panels(runs, "Time of an iteration", "seconds", keys, window, ylim=(0, None))
    words = (
        f"`time/<phase>` and `step_time`, mean over {window} iterations: sampling videos, waiting "
        "for the judge, updating the weights. Runs on different machines, or beside other work, do "
        "not compare."
    )
    return Topic("time", "Where does time go?", tuple(panels), words)


def _memory(runs: Runs, window: int) -> Topic:
    panel = _panel(runs, "Largest GPU memory of a rank", "GB", "memory/peak_gb", ylim=(0, None))
    words = (
        "`memory/peak_gb`: the most memory that PyTorch held on the GPU at any moment of the "
        "iteration, on the rank that held most."
    )
    panels = (panel,) if panel.values else ()
    return Topic("memory", "How much memory does it take?", panels, words)


def _judge(runs: Runs, window: int) -> Topic:
    found = dict.fromkeys(key for run in runs for row in run.trained for key in row)
    counts = {
        key: key.removeprefix("judge/").removeprefix("num_").replace("_", " ")
        for key in found
        if key.startswith(("judge/", "num_invalid")) and key not in NO_TROUBLE
    }
    options: dict[str, Any] = {"ylim": (0, None)}
    panels = []
    if troubles := {key: label for key, label in counts.items() if _is_seen(runs, key)}:
        title = "Trouble with the judge"
        panels += _panels(runs, title, "count per iteration", troubles, window, **options)
    if _is_seen(runs, "time/backpressure"):
        title, key = "Sampling stood still for the judge", "time/backpressure"
        panels.append(_panel(runs, title, "seconds", key, window, **options))
    words = (
        f"`judge/<counter>` and `num_invalid_videos`, summed over ranks, mean over {window} "
        "iterations: questions asked again, answers without a number, requests that failed, videos "
        "left without a score; `time/backpressure`: how long a rank's sampling waited for room in "
        "the queue. Counts that are 0 throughout are not drawn."
    )
    return Topic("judge", "Does the judge keep up?", tuple(panels), words)


def _is_seen(runs: Runs, key: str) -> bool:
    return any(any(series(run.rows, key)[1]) for run in runs)
