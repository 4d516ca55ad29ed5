"""The curves of a report: of one run with its stages beside each other, of several with a line for
each run.

Rows are those of metrics.jsonl; a value that is missing or was not finite is left out of its
curve. README's glossary says what each is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from fastgrpo.algorithm.self_paced import smooth
from fastgrpo.evaluation.report.panels import STYLES, Line, Panel, draw
from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.training.figures import COLORS, INK, MARKERS, Series, series
from fastgrpo.training.tracking import Row

PHASES = ("rollout", "reward", "update")


@dataclass(frozen=True)
class Topic:
    """One figure of the report. In `words`, what stands between backticks is a metric or a key."""

    id: str
    title: str
    panels: tuple[Panel, ...]
    words: str

    def draw(self, narrow: bool = False) -> Figure:
        """For a page or a paper, or, `narrow`, one panel above the other for a phone."""
        count = len(self.panels)
        if narrow:
            return draw(self.panels, 1, 4.3, 2.6)
        columns = count if count <= 3 else 2 if count == 4 else 3
        return draw(self.panels, columns, 8.6, {1: 3.4, 2: 2.9, 3: 2.6}[columns])


def topics(runs: Sequence[RunRecord], window: int) -> list[Topic]:
    """The report's figures in reading order; those of memory and of the judge only where a run has
    measured something of it.
    """
    make: list[Callable[[Sequence[RunRecord], int], Topic | None]] = [
        _reward,
        _weights,
        _hoyer,
        _ratio_drift,
        _stability,
        _time,
        _memory,
        _judge,
    ]
    return [
        topic for topic in (one(runs, window) for one in make) if topic is not None and topic.panels
    ]


def reward_curves(
    rows: Sequence[Row], stages: Sequence[str], thresholds: Sequence[float] = (), window: int = 10
) -> Figure:
    """Mean score of each stage over iterations: as measured (faint), smoothed over `window`
    iterations, and validation (markers).

    The j-th threshold is a dashed line in the j-th stage's colour. The weighted reward, what the
    group advantages see, is dotted.
    """
    return draw([_stage_rewards(rows, stages, thresholds, window)], height=3.4)


def stages_of(runs: Sequence[RunRecord]) -> list[str]:
    """The stages of all runs, in the first's order, then those that only later ones have."""
    return list(dict.fromkeys(stage for run in runs for stage in run.stages))


def _title(stage: str) -> str:
    return stage.replace("_", " ")


def _smoothed(points: Series, window: int) -> Series:
    return points[0], smooth(points[1], window)


def _over_stages(
    title: str,
    ylabel: str,
    rows: Sequence[Row],
    stages: Sequence[str],
    metric: str,
    window: int = 0,
) -> Panel:
    """A line for each stage, whose name stands for the {} of `metric`; with a window, smoothed,
    over a faint line as measured.
    """
    lines = []
    for index, stage in enumerate(stages):
        key, color = metric.format(stage), COLORS[index % len(COLORS)]
        if window:
            lines.append(Line("", series(rows, key), color, "faint", gid=f"raw/{key}"))
        points = _smoothed(series(rows, key), window) if window else series(rows, key)
        lines.append(
            Line(_title(stage), points, color, marker=MARKERS[index % len(MARKERS)], gid=key)
        )
    return Panel(title, ylabel, tuple(lines))


def _over_runs(
    title: str, ylabel: str, runs: Sequence[RunRecord], key: str, window: int = 1
) -> Panel:
    """A line for each run, smoothed over `window` iterations."""
    lines = []
    for index, run in enumerate(runs):
        points = _smoothed(series(run.rows, key), window)
        lines.append(run_line(index, run.label, points, gid=f"{key}/{index}"))
    return Panel(title, ylabel, tuple(lines))


def run_line(index: int, label: str, points: Series = ([], []), gid: str = "") -> Line:
    """The look of the run with that number, from 0; more runs than colours come in other pairs of
    colour and dashes.
    """
    style = STYLES[(index + index // len(COLORS)) % len(STYLES)]
    return Line(
        label,
        points,
        COLORS[index % len(COLORS)],
        "line",
        style,
        MARKERS[index % len(MARKERS)],
        gid,
    )


def _of_one(title: str, ylabel: str, run: RunRecord, key: str, window: int) -> Panel:
    points = series(run.rows, key)
    raw, bold = (
        Line("", points, COLORS[0], "faint", gid=f"raw/{key}"),
        Line("", _smoothed(points, window), COLORS[0], gid=key),
    )
    return Panel(title, ylabel, (raw, bold))


def _of_each(title: str, ylabel: str, runs: Sequence[RunRecord], key: str, window: int) -> Panel:
    """One metric that has no stages: of a run alone as measured and smoothed, of several smoothed."""
    return (
        _of_one(title, ylabel, runs[0], key, window)
        if len(runs) == 1
        else _over_runs(title, ylabel, runs, key, window)
    )


def _stage_rewards(
    rows: Sequence[Row], stages: Sequence[str], thresholds: Sequence[float], window: int
) -> Panel:
    panel = _over_stages(
        "Stage rewards", "mean score (0 to 1)", rows, stages, "rewards/{}/mean", window
    )
    lines = [replace(line, marker="") for line in panel.lines]
    for index, stage in enumerate(stages):
        color, marker, key = (
            COLORS[index % len(COLORS)],
            MARKERS[index % len(MARKERS)],
            f"eval/rewards/{stage}/mean",
        )
        lines.append(
            _validation(Line(_title(stage), ([], []), color, marker=marker), rows, key, gid=key)
        )
    lines.append(
        Line(
            "weighted reward",
            _smoothed(series(rows, "reward"), window),
            INK,
            style=(0, (1, 1.3)),
            gid="reward",
        )
    )
    return replace(panel, lines=tuple(lines), levels=_levels(stages, thresholds))


def _validation(line: Line, rows: Sequence[Row], key: str, gid: str) -> Line:
    """Dots in the look of a line."""
    return replace(line, points=series(rows, key), kind="dots", gid=gid)


def _levels(stages: Sequence[str], thresholds: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """In the colours of their stages; a threshold more than there are stages is not drawn."""
    return tuple(
        (float(threshold), COLORS[index % len(COLORS)])
        for index, threshold in enumerate(thresholds[: len(stages)])
    )


def _reward(runs: Sequence[RunRecord], window: int) -> Topic:
    if len(runs) == 1:
        run = runs[0]
        panels = [_stage_rewards(run.rows, run.stages, run.thresholds, window)]
        words = (
            f"Mean score of the judge at each stage, `rewards/<stage>/mean`: thin lines are single iterations, bold ones the mean over "
            f"{window}. Markers: captions of the evaluation, `eval/rewards/<stage>/mean`. Dashed: thresholds, `pacing.thresholds`. "
            "Dotted: the weighted `reward` that training climbs; it dips where weight moves to a harder stage, which is no setback."
        )
        return Topic("reward", "Does it get better?", tuple(panels), words)
    panels = []
    for stage in stages_of(runs):
        panel = _over_runs(
            _title(stage), "mean score (0 to 1)", runs, f"rewards/{stage}/mean", window
        )
        lines, key = (
            [replace(line, marker="") for line in panel.lines],
            f"eval/rewards/{stage}/mean",
        )
        lines += [
            _validation(line, run.rows, key, f"{key}/{index}")
            for index, (run, line) in enumerate(zip(runs, panel.lines, strict=True))
        ]
        levels = tuple(
            (float(run.thresholds[run.stages.index(stage)]), COLORS[index % len(COLORS)])
            for index, run in enumerate(runs)
            if stage in run.stages[: len(run.thresholds)]
        )
        if len({value for value, _ in levels}) == 1:
            levels = ((levels[0][0], INK),)
        panels.append(replace(panel, lines=tuple(lines), levels=levels))
    panels.append(_over_runs("weighted reward", "mean (0 to 1)", runs, "reward", window))
    words = (
        f"Mean score of the judge at each stage, `rewards/<stage>/mean`, over {window} iterations. Markers: captions of the evaluation, "
        "`eval/rewards/<stage>/mean`. Dashed: thresholds, `pacing.thresholds`, in a run's colour where the runs differ. The weighted "
        "`reward` is what each run climbs: its weights differ from run to run, so compare runs by the stages."
    )
    return Topic("reward", "Which run gets better, and at what?", tuple(panels), words)


def _weights(runs: Sequence[RunRecord], window: int) -> Topic:
    if len(runs) == 1:
        run = runs[0]
        share = _over_stages(
            "Stage weights", "weight (they sum to 1)", run.rows, run.stages, "weights/{}"
        )
        panels = [replace(share, ylim=(-0.03, 1.03))]
        seen = _over_stages(
            "Competence and thresholds", "running mean score", run.rows, run.stages, "competence/{}"
        )
        if any(line.points[0] for line in seen.lines):
            panels.append(replace(seen, levels=_levels(run.stages, run.thresholds)))
    else:
        shares = [
            _over_runs(_title(stage), "weight", runs, f"weights/{stage}")
            for stage in stages_of(runs)
        ]
        panels = [replace(share, ylim=(-0.03, 1.03)) for share in shares]
    words = "Share of each stage in the reward, `weights/<stage>` (Eq. 6)"
    words += (
        ", and the competence that moves it, `competence/<stage>`: when a stage's competence passes its dashed threshold, weight moves on "
        "to the next stage."
        if len(panels) > 1 and len(runs) == 1
        else ", one panel a stage."
    )
    return Topic("weights", "What is being taught?", tuple(panels), words)


def _hoyer(runs: Sequence[RunRecord], window: int) -> Topic:
    if len(runs) == 1:
        run = runs[0]
        panels = [
            _over_stages(
                "Hoyer index of a group's scores",
                "index (0 to 1)",
                run.rows,
                run.stages,
                "hoyer/{}",
                window,
            )
        ]
        seen = _over_stages(
            "Saturation that the gates see",
            "saturation (0 to 1)",
            run.rows,
            run.stages,
            "saturation/{}",
        )
        panels += [seen] if any(line.points[0] for line in seen.lines) else []
    else:
        panels = [
            _over_runs(_title(stage), "Hoyer index (0 to 1)", runs, f"hoyer/{stage}", window)
            for stage in stages_of(runs)
        ]
    words = (
        f"`hoyer/<stage>` (Eq. 8), mean over groups and over {window} iterations: 0 where all videos of a group score alike, so that "
        "there is nothing left to choose between at that stage."
    )
    if len(runs) == 1 and len(panels) > 1:
        words += " Beside it `saturation/<stage>`, the running mean of what `pacing.saturation` makes of it, an input of the gates (Eq. 9)."
    return Topic("hoyer", "Can the judge still tell the videos apart?", tuple(panels), words)


def _drift_by_step(rows: Sequence[Row]) -> Series:
    """Denoising step -> the largest drift there of any iteration."""
    prefix = "ratio_drift/step_"
    keys = {int(key[len(prefix) :]): key for row in rows for key in row if key.startswith(prefix)}
    found = {step: values for step, key in sorted(keys.items()) if (values := series(rows, key)[1])}
    return list(found), [max(values) for values in found.values()]


def _ratio_drift(runs: Sequence[RunRecord], window: int) -> Topic:
    ylabel, lines = "max |ratio − 1|", []
    for index, run in enumerate(runs):
        line = run_line(index, run.label, _drift_by_step(run.rows), f"ratio_drift/by_step/{index}")
        lines.append(
            line
            if len(runs) > 1
            else Line("", line.points, COLORS[1], "stems", gid="ratio_drift/by_step")
        )
    over_time = [
        run_line(index, run.label, series(run.rows, "ratio_drift"), f"ratio_drift/{index}")
        if len(runs) > 1
        else Line("", series(run.rows, "ratio_drift"), COLORS[0], gid="ratio_drift")
        for index, run in enumerate(runs)
    ]
    panels = (
        Panel("Ratio drift by iteration", ylabel, tuple(over_time), scale="symlog"),
        Panel(
            "Ratio drift by denoising step",
            ylabel,
            tuple(lines),
            xlabel="denoising step",
            scale="symlog",
        ),
    )
    words = (
        "`ratio_drift` and `ratio_drift/step_<i>`, the largest of any iteration. Before the first update of an iteration, training "
        "recomputes the rollout's probabilities with the very same weights, so each ratio should be 1: far from 0 means lost precision or "
        "a bug."
    )
    return Topic("ratio_drift", "Is the arithmetic right?", panels, words)


def _stability(runs: Sequence[RunRecord], window: int) -> Topic:
    norm = _of_each("Gradient norm before clipping", "2-norm", runs, "grad_norm", window)
    wide = bool(norm.values) and min(norm.values) > 0 and max(norm.values) > 30 * min(norm.values)
    norm = replace(
        norm, scale="log" if wide else "linear", ylim=(None, None) if wide else (0, None)
    )
    clip = _of_each("Clip fraction", "fraction of loss terms", runs, "clip_ratio", window)
    if any(clip.values):
        clip = replace(clip, ylim=(0, None))
    words = (
        f"`grad_norm` and `clip_ratio`{', thin as measured and bold' if len(runs) == 1 else ','} as mean over {window} iterations. Healthy "
        "training keeps the norm bounded and the share of trained transitions whose gradient the clip removed well below one."
    )
    return Topic("stability", "Is training stable?", (norm, clip), words)


def _time(runs: Sequence[RunRecord], window: int) -> Topic:
    if len(runs) == 1:
        timed = [
            row
            for row in runs[0].rows
            if all(row.get(f"time/{phase}") is not None for phase in PHASES)
        ]
        areas = [
            Line(phase, series(timed, f"time/{phase}"), color, "area", gid=f"time/{phase}")
            for phase, color in zip(PHASES, COLORS, strict=False)
        ]
        panels = [Panel("Time of an iteration", "seconds", tuple(areas), ylim=(0, None))]
        words = (
            "`time/rollout`, `time/reward` and `time/update`, on top of each other: sampling videos, waiting for the judge, updating the "
            "weights."
        )
    else:
        made = [_over_runs(phase, "seconds", runs, f"time/{phase}", window) for phase in PHASES]
        made.append(_over_runs("whole iteration", "seconds", runs, "step_time", window))
        panels = [
            replace(panel, ylim=(0, None) if any(panel.values) else (None, None)) for panel in made
        ]
        words = (
            f"`time/<phase>` and `step_time`, mean over {window} iterations: sampling videos, waiting for the judge, updating the weights. "
            "Runs on different machines, or beside other work, do not compare."
        )
    return Topic("time", "Where does time go?", tuple(panels), words)


def _memory(runs: Sequence[RunRecord], window: int) -> Topic | None:
    panel = _of_each("Largest GPU memory of a rank", "GB", runs, "memory/peak_gb", 1)
    if not panel.values:
        return None
    words = "`memory/peak_gb`: the most memory that PyTorch held on the GPU at any moment of the iteration, on the rank that held most."
    return Topic(
        "memory", "How much memory does it take?", (replace(panel, ylim=(0, None)),), words
    )


USUAL = ("judge/answers", "judge/requests", "judge/vision_passes", "judge/prefix_passes")
"""What a judge counts of its work, and not of trouble with it."""


def _judge(runs: Sequence[RunRecord], window: int) -> Topic | None:
    """Counts that are 0 throughout are left to the table of totals."""
    keys = list(
        dict.fromkeys(
            key for run in runs for row in run.trained for key in row if key.startswith("judge/")
        )
    )
    keys = [
        key
        for key in [*keys, "num_invalid_videos"]
        if any(any(series(run.rows, key)[1]) for run in runs)
    ]
    counts = [key for key in keys if key not in USUAL]
    panels = []
    if len(runs) == 1 and counts:
        lines = []
        for index, key in enumerate(counts):
            color, marker, points = (
                COLORS[index % len(COLORS)],
                MARKERS[index % len(MARKERS)],
                series(runs[0].rows, key),
            )
            lines.append(Line("", points, color, "faint", gid=f"raw/{key}"))
            lines.append(
                Line(_count_name(key), _smoothed(points, window), color, marker=marker, gid=key)
            )
        panels.append(
            Panel("Trouble with the judge", "count an iteration", tuple(lines), ylim=(0, None))
        )
    elif counts:
        made = [
            _over_runs(_count_name(key), "count an iteration", runs, key, window) for key in counts
        ]
        panels += [replace(panel, ylim=(0, None)) for panel in made]
    panel = _of_each(
        "Sampling stood still for the judge", "seconds", runs, "time/backpressure", window
    )
    if any(any(series(run.rows, "time/backpressure")[1]) for run in runs):
        panels.append(replace(panel, ylim=(0, None)))
    if not panels:
        return None
    words = (
        f"`judge/<counter>` and `num_invalid_videos`, summed over ranks, mean over {window} iterations: questions asked again, answers "
        "without a number, requests that failed, videos left without a score; `time/backpressure`: how long a rank's sampling "
        "waited for room in the queue. Counts that are 0 throughout are not drawn."
    )
    return Topic("judge", "Does the judge keep up?", tuple(panels), words)


def _count_name(key: str) -> str:
    return key.removeprefix("judge/").removeprefix("num_").replace("_", " ")
