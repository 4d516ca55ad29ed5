"""The curves of a report: of one run with its stages beside each other, of several runs with a line
per run.

Rows are those of metrics.jsonl; a value that is missing or was not finite is left out of its
curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from fastgrpo.algorithm.self_paced import smooth
from fastgrpo.evaluation.figures import COLORS, INK, Line, Panel, Series, draw, indexed_line, series
from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.training.tracking import Row

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

    def draw(self, narrow: bool = False) -> Figure:
        """For a page or a paper, or, `narrow`, one panel above the other for a phone."""
        if narrow:
            return draw(self.panels, 1, 4.3, 2.6)
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


def title_of(stage: str) -> str:
    """A stage's name for readers."""
    return stage.replace("_", " ")


def _smoothed(points: Series, window: int) -> Series:
    return points[0], smooth(points[1], window)


def _over_stages(
    title: str, ylabel: str, run: RunRecord, metric: str, window: int = 0, **options: Any
) -> Panel:
    """A line for each stage, whose name replaces the {} of `metric`; with a window, smoothed over a
    faint line as measured.
    """
    names = {metric.format(stage): title_of(stage) for stage in run.stages}
    return Panel(title, ylabel, _solid_lines(run.rows, names, window), **options)


def _solid_lines(rows: Sequence[Row], names: Mapping[str, str], window: int) -> tuple[Line, ...]:
    """A line for each metric (key -> its label); with a window, smoothed over a faint one."""
    lines = []
    for index, (key, name) in enumerate(names.items()):
        line = indexed_line(index, name, series(rows, key), key, solid=True)
        if window:
            lines.append(Line("", line.points, line.color, "faint", gid=f"raw/{key}"))
            line = replace(line, points=_smoothed(line.points, window))
        lines.append(line)
    return tuple(lines)


def _over_runs(
    title: str, ylabel: str, runs: Runs, key: str, window: int = 1, **options: Any
) -> Panel:
    """One metric: of one run as measured and smoothed, of several runs smoothed."""
    if len(runs) == 1:
        line = Line("", series(runs[0].rows, key), COLORS[0], gid=key)
        faint = replace(line, kind="faint", gid=f"raw/{key}")
        lines = [faint, replace(line, points=_smoothed(line.points, window))]
    else:
        lines = [
            indexed_line(
                index, run.label, _smoothed(series(run.rows, key), window), f"{key}/{index}"
            )
            for index, run in enumerate(runs)
        ]
    return Panel(title, ylabel, tuple(lines), **options)


def _with_validation(
    panel: Panel, rows: Sequence[Sequence[Row]], keys: Sequence[str]
) -> tuple[Line, ...]:
    """The panel's lines without markers, and the validation scores of each as dots in its look."""
    bold = [line for line in panel.lines if line.kind == "line"]
    dots = [
        replace(line, points=series(found, f"eval/{key}"), kind="dots", gid=f"eval/{line.gid}")
        for line, found, key in zip(bold, rows, keys, strict=True)
    ]
    return *(replace(line, marker="") for line in panel.lines), *dots


def _stage_rewards(run: RunRecord, window: int) -> Panel:
    """Mean score of each stage: as measured (faint), smoothed over `window` iterations, and on the
    validation prompts (markers).

    The j-th threshold is a dashed line in the j-th stage's colour. The weighted reward, from which
    the group advantages are computed, is dotted.
    """
    panel = _over_stages(
        "Stage rewards", "mean score (0 to 1)", run, "rewards/{}/mean", window, levels=_levels(run)
    )
    keys = [f"rewards/{stage}/mean" for stage in run.stages]
    weighted = _smoothed(series(run.rows, "reward"), window)
    dotted = Line("weighted reward", weighted, INK, style=(0, (1, 1.3)), gid="reward")
    return replace(panel, lines=(*_with_validation(panel, [run.rows] * len(keys), keys), dotted))


def _levels(run: RunRecord) -> tuple[tuple[float, str], ...]:
    """Thresholds in the colours of their stages; one more than there are stages is not drawn."""
    return tuple(
        (float(threshold), COLORS[index % len(COLORS)])
        for index, threshold in enumerate(run.thresholds[: len(run.stages)])
    )


def _reward(runs: Runs, window: int) -> Topic:
    if len(runs) == 1:
        words = (
            "Mean score of the judge at each stage, `rewards/<stage>/mean`: thin lines are single "
            f"iterations, bold ones the mean over {window}. Markers: validation prompts, "
            "`eval/rewards/<stage>/mean`. Dashed: thresholds, `pacing.thresholds`. Dotted: the "
            "weighted `reward` that training climbs; it dips where weight moves to a harder stage, "
            "which is no setback."
        )
        panels = [_stage_rewards(runs[0], window)]
        return Topic("reward", "Does it get better?", tuple(panels), words)
    panels = []
    for stage in stages_of(runs):
        key = f"rewards/{stage}/mean"
        panel = _over_runs(title_of(stage), "mean score (0 to 1)", runs, key, window)
        levels = [
            (float(run.thresholds[run.stages.index(stage)]), COLORS[index % len(COLORS)])
            for index, run in enumerate(runs)
            if stage in run.stages[: len(run.thresholds)]
        ]
        if len({value for value, _ in levels}) == 1:
            levels = [(levels[0][0], INK)]
        lines = _with_validation(panel, [run.rows for run in runs], [key] * len(runs))
        panels.append(replace(panel, lines=lines, levels=tuple(levels)))
    panels.append(_over_runs("weighted reward", "mean (0 to 1)", runs, "reward", window))
    words = (
        f"Mean score of the judge at each stage, `rewards/<stage>/mean`, over {window} iterations. "
        "Markers: validation prompts, `eval/rewards/<stage>/mean`. Dashed: thresholds, "
        "`pacing.thresholds`, in a run's colour where the runs differ. The weighted `reward` is "
        "what each run climbs: its weights differ from run to run, so compare runs by the stages."
    )
    return Topic("reward", "Which run gets better, and at what?", tuple(panels), words)


def _weights(runs: Runs, window: int) -> Topic:
    words = "Share of each stage in the reward, `weights/<stage>` (Eq. 6), one panel per stage."
    ylim = (-0.03, 1.03)
    if len(runs) > 1:
        panels = [
            _over_runs(title_of(stage), "weight", runs, f"weights/{stage}", ylim=ylim)
            for stage in stages_of(runs)
        ]
        return Topic("weights", "What is being taught?", tuple(panels), words)
    (run,) = runs
    panels = [_over_stages("Stage weights", "weight (they sum to 1)", run, "weights/{}", ylim=ylim)]
    competence = _over_stages(
        "Competence and thresholds",
        "running mean score",
        run,
        "competence/{}",
        levels=_levels(run),
    )
    if competence.values:
        panels.append(competence)
        words = (
            "Share of each stage in the reward, `weights/<stage>` (Eq. 6), and the competence that "
            "moves it, `competence/<stage>`: when a stage's competence passes its dashed "
            "threshold, weight moves on to the next stage."
        )
    return Topic("weights", "What is being taught?", tuple(panels), words)


def _hoyer(runs: Runs, window: int) -> Topic:
    words = (
        f"`hoyer/<stage>` (Eq. 8), mean over groups and over {window} iterations: 0 where all "
        "videos of a group score alike, so that there is nothing left to choose between at that "
        "stage."
    )
    if len(runs) == 1:
        title, ylabel = "Hoyer index of a group's scores", "index (0 to 1)"
        panels = [_over_stages(title, ylabel, runs[0], "hoyer/{}", window)]
        title, ylabel = "Saturation that the gates see", "saturation (0 to 1)"
        saturation = _over_stages(title, ylabel, runs[0], "saturation/{}")
        if saturation.values:
            panels.append(saturation)
            words += (
                " Beside it `saturation/<stage>`, the running mean of what `pacing.saturation` "
                "makes of it, an input of the gates (Eq. 9)."
            )
    else:
        panels = [
            _over_runs(title_of(stage), "Hoyer index (0 to 1)", runs, f"hoyer/{stage}", window)
            for stage in stages_of(runs)
        ]
    return Topic("hoyer", "Can the judge still tell the videos apart?", tuple(panels), words)


def _drift_by_step(rows: Sequence[Row]) -> Series:
    """Denoising step -> the largest drift there of any iteration."""
    prefix = "ratio_drift/step_"
    keys = {key for row in rows for key in row if key.startswith(prefix)}
    drifts = {int(key.removeprefix(prefix)): series(rows, key)[1] for key in keys}
    largest = {step: max(values) for step, values in sorted(drifts.items()) if values}
    return list(largest), list(largest.values())


def _ratio_drift(runs: Runs, window: int) -> Topic:
    by_step = [
        indexed_line(index, run.label, _drift_by_step(run.rows), f"ratio_drift/by_step/{index}")
        for index, run in enumerate(runs)
    ]
    over_time = _over_runs(
        "Ratio drift by iteration", "max |ratio − 1|", runs, "ratio_drift", scale="symlog"
    )
    if len(runs) == 1:
        points = by_step[0].points
        by_step = [Line("", points, COLORS[1], "stems", gid="ratio_drift/by_step")]
        over_time = replace(over_time, lines=over_time.lines[1:])  # as measured is all there is
    panels = (
        over_time,
        replace(
            over_time,
            title="Ratio drift by denoising step",
            lines=tuple(by_step),
            xlabel="denoising step",
        ),
    )
    words = (
        "`ratio_drift` and `ratio_drift/step_<i>`, the largest of any iteration. Before the first "
        "update of an iteration, training recomputes the rollout's probabilities with the very "
        "same weights, so each ratio should be 1: far from 0 means lost precision or a bug."
    )
    return Topic("ratio_drift", "Is the arithmetic right?", panels, words)


def _stability(runs: Runs, window: int) -> Topic:
    norm = _over_runs("Gradient norm before clipping", "2-norm", runs, "grad_norm", window)
    # A logarithmic scale for a wide range, unless it would hide a zero.
    wide = bool(norm.values) and min(norm.values) > 0 and max(norm.values) > 30 * min(norm.values)
    norm = replace(norm, scale="log") if wide else replace(norm, ylim=(0, None))
    clip = _over_runs(
        "Clip fraction", "fraction of loss terms", runs, "clip_ratio", window, ylim=(0, None)
    )
    words = (
        f"`grad_norm` and `clip_ratio`{', thin as measured and bold' if len(runs) == 1 else ','} "
        f"as mean over {window} iterations. Healthy training keeps the norm bounded and the share "
        "of trained transitions whose gradient the clip removed well below one."
    )
    return Topic("stability", "Is training stable?", (norm, clip), words)


def _time(runs: Runs, window: int) -> Topic:
    keys = {phase: f"time/{phase}" for phase in PHASES}
    what = "sampling videos, waiting for the judge, updating the weights."
    if len(runs) == 1:
        rows = [
            row for row in runs[0].rows if all(row.get(key) is not None for key in keys.values())
        ]
        areas = [
            Line(phase, series(rows, key), color, "area", gid=key)
            for (phase, key), color in zip(keys.items(), COLORS, strict=False)
        ]
        panels = [Panel("Time of an iteration", "seconds", tuple(areas), ylim=(0, None))]
        words = f"`time/rollout`, `time/reward` and `time/update`, on top of each other: {what}"
    else:
        panels = [
            _over_runs(title, "seconds", runs, key, window, ylim=(0, None))
            for title, key in (keys | {"whole iteration": "step_time"}).items()
        ]
        words = (
            f"`time/<phase>` and `step_time`, mean over {window} iterations: {what} Runs on "
            "different machines, or beside other work, do not compare."
        )
    return Topic("time", "Where does time go?", tuple(panels), words)


def _memory(runs: Runs, window: int) -> Topic:
    panel = _over_runs("Largest GPU memory of a rank", "GB", runs, "memory/peak_gb", ylim=(0, None))
    words = (
        "`memory/peak_gb`: the most memory that PyTorch held on the GPU at any moment of the "
        "iteration, on the rank that held most."
    )
    panels = (panel,) if panel.values else ()
    return Topic("memory", "How much memory does it take?", panels, words)


def _judge(runs: Runs, window: int) -> Topic:
    """Counts that are 0 throughout are left to the table of totals."""
    rows = [row for run in runs for row in run.rows]
    found = {key: None for run in runs for row in run.trained for key in row}
    counts = {
        key: key.removeprefix("judge/").removeprefix("num_").replace("_", " ")
        for key in [*found, "num_invalid_videos"]
        if key.startswith(("judge/", "num_invalid")) and key not in NO_TROUBLE
        if any(series(rows, key)[1])
    }
    ylabel = "count per iteration"
    options: dict[str, Any] = {"ylim": (0, None)}
    panels = []
    if len(runs) == 1 and counts:
        lines = _solid_lines(rows, counts, window)
        panels.append(Panel("Trouble with the judge", ylabel, lines, **options))
    else:
        panels += [
            _over_runs(name, ylabel, runs, key, window, **options) for key, name in counts.items()
        ]
    if any(series(rows, "time/backpressure")[1]):
        title, key = "Sampling stood still for the judge", "time/backpressure"
        panels.append(_over_runs(title, "seconds", runs, key, window, **options))
    words = (
        f"`judge/<counter>` and `num_invalid_videos`, summed over ranks, mean over {window} "
        "iterations: questions asked again, answers without a number, requests that failed, videos "
        "left without a score; `time/backpressure`: how long a rank's sampling waited for room in "
        "the queue. Counts that are 0 throughout are not drawn."
    )
    return Topic("judge", "Does the judge keep up?", tuple(panels), words)
