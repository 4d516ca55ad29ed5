"""Mean and spread of the stage scores over sets of videos, with confidence intervals (Fig. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastgrpo.errors import UserError, require
from fastgrpo.evaluation import figures
from fastgrpo.evaluation.figures import COLORS, FAINT, INK, MARKERS
from fastgrpo.evaluation.score_rows import (
    ScoredRow,
    ScoreFile,
    left_out_lines,
    match_rows,
    name_files,
    read_scores,
)
from fastgrpo.evaluation.tables import number, render_table, write_csv, write_json

RESAMPLES = 10_000
CHUNK = 500
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """One stage over one set of videos.

    Attributes:
        mean: Mean score.
        low: Lower end of the mean's 95 % interval; NaN with fewer than two prompts.
        high: Its upper end.
        std: Sample standard deviation; NaN with one video.
        quartiles: At 25, 50 and 75 %.
    """

    mean: float
    low: float
    high: float
    std: float
    quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class Difference:
    """A set's mean of one stage minus the first set's, over the videos that both have."""

    videos: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class StageSet:
    """One set of videos.

    Attributes:
        scores: [n, K].
        summaries: One per stage.
        differences: To the first set, one per stage; empty for the first set and for a set that
            shares no video with it.
    """

    scores: Floats
    summaries: list[Summary]
    differences: list[Difference]


def compare_stages(
    scores: Sequence[Path],
    names: Sequence[str] | None = None,
    components: bool = False,
    seed: int = 0,
    output: Path | None = None,
) -> str:
    """Summarize the stage scores of each set of videos, and the difference to the first set.

    Writes OUTPUT/stages.json, stages.csv, stages.png and stages.svg.

    Args:
        scores: A file of scores for each set of videos, such as of the base and the trained model.
        names: Names of the sets, in the same order; by default those of the files.
        components: Take a published model's raw scores, such as VideoAlign's VQ, MQ and TA, in
            place of the rewards.
        seed: Seed of the bootstrap.
        output: Folder to write to; by default `stages` beside the first file.

    Returns:
        The table, as text.

    Raises:
        UserError, OSError: Files that cannot be read, or that have different stages.
    """
    require(seed >= 0, "seed", "at least 0", seed)
    names = name_files(scores, names)
    files = [read_scores(path) for path in scores]
    if components:
        files = [with_components(file) for file in files]
    stages = common_stages(files)
    sets: dict[str, StageSet] = {}
    notes = left_out_lines(names, files, matched=max(len(file.rows) for file in files))
    for name, file in zip(names, files, strict=True):
        values, differences = score_matrix(file.rows, stages), []
        try:
            if sets:
                differences = compare(files[0], file, stages, seed)
        except UserError as error:
            why = str(error).removeprefix("scores: ")
            notes.append(f"{name}: no difference to {names[0]}: {why}")
        sets[name] = StageSet(values, summarize(values, prompts_of(file.rows), seed), differences)
    folder = output or scores[0].parent / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    content = stages_json(stages, sets)
    settings = {"stages": stages, "seed": seed, "resamples": RESAMPLES, "first": names[0]}
    write_json(folder / "stages.json", settings | {"notes": notes, "sets": content})
    write_csv(folder / "stages.csv", stage_rows(content))
    figures.save_figure(stage_figure(stages, sets), folder / "stages")
    lines = [
        stage_table(stages, sets),
        "",
        f"95 % intervals: bootstrap over prompts, {RESAMPLES} resamples",
        *(f"note: {note}" for note in notes),
        f"tables and figure: {folder}",
    ]
    return "\n".join(lines)


def with_components(file: ScoreFile) -> ScoreFile:
    """The file with each row's components as its scores."""
    if not all(row.components for row in file.rows):
        raise UserError(
            f"scores: expected rows with components in {file.path}, which a published model's have,"
            " got none in some"
        )
    return replace(file, rows=[replace(row, scores=row.components) for row in file.rows])


def common_stages(files: Sequence[ScoreFile]) -> list[str]:
    """The stages of all rows of all files, in the first row's order."""
    stages = list(files[0].rows[0].scores)
    for file in files:
        for row in file.rows:
            if row.scores.keys() != set(stages):
                raise UserError(
                    f"scores: expected the stages {', '.join(stages)} in all rows, got "
                    f"{', '.join(row.scores)} in {file.path} for {row.video or row.prompt}"
                )
    return stages


def score_matrix(rows: Sequence[ScoredRow], stages: Sequence[str]) -> Floats:
    """[n, K] scores."""
    return np.array([[row.scores[stage] for stage in stages] for row in rows])


def prompts_of(rows: Sequence[ScoredRow]) -> list[str]:
    """The group each row is resampled with: its prompt, or only itself if it has none."""
    return [f"prompt {row.prompt}" if row.prompt else f"video {row.video}" for row in rows]


def summarize(values: Floats, groups: Sequence[str], seed: int) -> list[Summary]:
    """A summary of each stage of values [n, K]."""
    low, high = bootstrap_interval(values, groups, seed)
    std = values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
    quartiles = np.percentile(values, (25, 50, 75), axis=0)
    found = np.stack([values.mean(0), low, high, std], axis=1).tolist()
    return [
        Summary(*ends, tuple(column))
        for ends, column in zip(found, quartiles.T.tolist(), strict=True)
    ]


def compare(
    first: ScoreFile, other: ScoreFile, stages: Sequence[str], seed: int
) -> list[Difference]:
    """The paired difference other - first of each stage, over the videos of both."""
    pairs = match_rows([first, other])
    values = score_matrix([b for _, b in pairs], stages) - score_matrix(
        [a for a, _ in pairs], stages
    )
    low, high = bootstrap_interval(values, prompts_of([a for a, _ in pairs]), seed)
    found = np.stack([values.mean(0), low, high], axis=1).tolist()
    return [Difference(len(pairs), *ends) for ends in found]


def bootstrap_interval(values: Floats, groups: Sequence[str], seed: int) -> tuple[Floats, Floats]:
    """95 % interval of the means, by a bootstrap over groups (percentiles of RESAMPLES draws).

    Videos of one prompt do not count as independent, so prompts are drawn, not videos.

    Args:
        values: [n, K].
        groups: The group of each row.
        seed: Seed of the draws.

    Returns:
        Lower and upper ends [K]; NaN with fewer than two groups.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    count = len(names)
    if count < 2:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    sizes = np.bincount(member, minlength=count)
    sums = np.stack(
        [np.bincount(member, weights=column, minlength=count) for column in values.T], axis=1
    )
    rng = np.random.default_rng(seed)
    means = []
    # In chunks, since all draws at once take RESAMPLES x count numbers.
    for _ in range(RESAMPLES // CHUNK):
        draws = rng.multinomial(count, np.full(count, 1 / count), size=CHUNK)
        means.append((draws @ sums) / (draws @ sizes)[:, None])
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5), axis=0)
    return low, high


def stage_table(stages: Sequence[str], sets: Mapping[str, StageSet]) -> str:
    """One line per stage and set."""
    several = len(sets) > 1
    head = ["stage", "set", "videos", "mean", "95 % interval", "std"]
    rows = [head + [f"minus {next(iter(sets))}", "95 % interval", "in both"] * several]
    for j, stage in enumerate(stages):
        for name, one in sets.items():
            s = one.summaries[j]
            std = f"{s.std:.4f}" if np.isfinite(s.std) else "–"
            row = [stage, name, str(len(one.scores)), f"{s.mean:.4f}", _interval(s), std]
            if one.differences:
                d = one.differences[j]
                row += [f"{d.mean:+.4f}", _interval(d, "+"), str(d.videos)]
            elif several:
                row += ["", "", ""]
            rows.append(row)
    return render_table(rows, left=(0, 1))


def _interval(of: Summary | Difference, sign: str = "") -> str:
    return f"[{of.low:{sign}.4f}, {of.high:{sign}.4f}]" if np.isfinite(of.low) else "–"


def stages_json(stages: Sequence[str], sets: Mapping[str, StageSet]) -> dict[str, Any]:
    """{set: {"videos", "stages": {stage: summary}, "difference": {stage: ...} or null}}; null for
    a number that is not finite.
    """
    return {
        name: {
            "videos": len(one.scores),
            "stages": {stage: _finite(s) for stage, s in zip(stages, one.summaries, strict=True)},
            "difference": {
                stage: _finite(d) for stage, d in zip(stages, one.differences, strict=False)
            }
            or None,
        }
        for name, one in sets.items()
    }


def stage_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`stages_json` as rows of a CSV file, one per set and stage."""
    absent = dict.fromkeys(("videos", "mean", "low", "high"))
    rows = []
    for name, entry in content.items():
        for stage, summary in entry["stages"].items():
            quartiles = dict(zip(("q25", "median", "q75"), summary["quartiles"], strict=True))
            row = {"set": name, "stage": stage, "videos": entry["videos"], **summary} | quartiles
            del row["quartiles"]
            difference = (entry["difference"] or {}).get(stage, absent)
            rows.append(row | {f"difference_{key}": value for key, value in difference.items()})
    return rows


def _finite(of: Summary | Difference) -> dict[str, Any]:
    return {
        key: number(value) if isinstance(value, float) else value
        for key, value in asdict(of).items()
    }


def stage_figure(stages: Sequence[str], sets: Mapping[str, StageSet]) -> Figure:
    """A violin for each stage and set: the density of the scores, the mean as a marker, its 95 %
    interval as a bar.
    """
    width = 0.8 / len(sets)
    figure, (axes,) = figures.new_figure(1, max(5.0, 1.5 + 0.9 * len(stages) * len(sets)), 4.2)
    for index, (name, one) in enumerate(sets.items()):
        color = COLORS[index % len(COLORS)]
        positions = np.arange(len(stages)) + (index - (len(sets) - 1) / 2) * width
        bodies = axes.violinplot(
            list(one.scores.T), positions=positions, widths=0.9 * width, showextrema=False
        )["bodies"]
        for body in bodies:  # type: ignore[attr-defined]
            body.set(facecolor=color, alpha=0.3, linewidth=0)
        means = np.array([s.mean for s in one.summaries])
        ends = np.nan_to_num([(s.mean - s.low, s.high - s.mean) for s in one.summaries]).T
        drawn = axes.errorbar(
            *(positions, means, np.maximum(ends, 0)),
            fmt=MARKERS[index % len(MARKERS)],
            color=color,
            label=name,
            markersize=4,
            capsize=6,
            elinewidth=1.6,
            zorder=4,
        )
        drawn.lines[0].set_gid(f"means/{name}")
        for x, mean in zip(positions, means, strict=True):
            axes.annotate(
                *(f"{mean:.3f}", (x, mean), (7, 4)),
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
    figures.finish(axes, "Stage scores", "score", "")
    axes.set_xticks(range(len(stages)), [stage.replace("_", " ") for stage in stages], color=FAINT)
    axes.set_xlim(-0.6, len(stages) - 0.4)
    return figure
