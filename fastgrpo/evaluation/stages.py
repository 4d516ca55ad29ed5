"""Mean and spread of the stage scores over sets of videos, with confidence intervals (Fig. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
Numbers = dict[str, Any]
"""Statistics of one stage by name, as JSON."""


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
    notes = left_out_lines(names, files, matched=max(len(file.rows) for file in files))
    sets, content = {}, {}
    for name, file in zip(names, files, strict=True):
        sets[name] = score_matrix(file.rows, stages)
        summaries = summarize(sets[name], prompts_of(file.rows), seed)
        differences: list[Numbers] = []
        try:
            if file is not files[0]:
                differences = compare(files[0], file, stages, seed)
        except UserError as error:
            why = str(error).removeprefix("scores: ")
            notes.append(f"{name}: no difference to {names[0]}: {why}")
        content[name] = {
            "videos": len(file.rows),
            "stages": dict(zip(stages, summaries, strict=True)),
            "difference": dict(zip(stages, differences, strict=True)) if differences else None,
        }
    folder = output or scores[0].parent / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"stages": stages, "seed": seed, "resamples": RESAMPLES, "first": names[0]}
    write_json(folder / "stages.json", settings | {"notes": notes, "sets": content})
    write_csv(folder / "stages.csv", stage_rows(content))
    figures.save_figure(stage_figure(sets, content), folder / "stages")
    lines = [
        stage_table(content),
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


def summarize(values: Floats, groups: Sequence[str], seed: int) -> list[Numbers]:
    """Summarize each stage.

    Args:
        values: [n, K] scores.
        groups: The group of each row, for `bootstrap_interval`.
        seed: Seed of the bootstrap.

    Returns:
        Of each stage the mean; low and high, the ends of its 95 % interval, None with fewer than
        two prompts; std, the sample standard deviation, None with one video; and the quartiles.
    """
    low, high = bootstrap_interval(values, groups, seed)
    std = values.std(0, ddof=1) if len(values) > 1 else np.full_like(low, np.nan)
    numbers = np.stack([values.mean(0), low, high, std], axis=1)
    quartiles = np.percentile(values, (25, 50, 75), axis=0).T.tolist()
    return [
        dict(zip(("mean", "low", "high", "std"), map(number, row), strict=True)) | {"quartiles": q}
        for row, q in zip(numbers, quartiles, strict=True)
    ]


def compare(first: ScoreFile, other: ScoreFile, stages: Sequence[str], seed: int) -> list[Numbers]:
    """The paired difference other - first of each stage, over the videos of both.

    Returns:
        Of each stage the number of videos, and mean, low and high as `summarize` has them.
    """
    pairs = match_rows([first, other])
    before, after = (score_matrix(rows, stages) for rows in zip(*pairs, strict=True))
    found = summarize(after - before, prompts_of([row for row, _ in pairs]), seed)
    return [
        {"videos": len(pairs)} | {key: one[key] for key in ("mean", "low", "high")} for one in found
    ]


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


def stage_table(content: Mapping[str, Any]) -> str:
    """One line per stage and set of stages.json."""
    first, several = next(iter(content)), len(content) > 1
    head = ["stage", "set", "videos", "mean", "95 % interval", "std"]
    rows = [head + [f"minus {first}", "95 % interval", "in both"] * several]
    for stage in content[first]["stages"]:
        for name, entry in content.items():
            s = entry["stages"][stage]
            std = "–" if s["std"] is None else f"{s['std']:.4f}"
            row = [stage, name, str(entry["videos"]), f"{s['mean']:.4f}", _interval(s), std]
            if entry["difference"]:
                d = entry["difference"][stage]
                row += [f"{d['mean']:+.4f}", _interval(d, "+"), str(d["videos"])]
            elif several:
                row += ["", "", ""]
            rows.append(row)
    return render_table(rows, left=(0, 1))


def _interval(of: Numbers, sign: str = "") -> str:
    return "–" if of["low"] is None else f"[{of['low']:{sign}.4f}, {of['high']:{sign}.4f}]"


def stage_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """stages.json as rows of a CSV file, one per set and stage."""
    absent = dict.fromkeys(("videos", "mean", "low", "high"))
    rows = []
    for name, entry in content.items():
        for stage, summary in entry["stages"].items():
            numbers = {key: value for key, value in summary.items() if key != "quartiles"}
            numbers |= zip(("q25", "median", "q75"), summary["quartiles"], strict=True)
            difference = (entry["difference"] or {}).get(stage, absent)
            row = {"set": name, "stage": stage, "videos": entry["videos"], **numbers}
            rows.append(row | {f"difference_{key}": value for key, value in difference.items()})
    return rows


def stage_figure(sets: Mapping[str, Floats], content: Mapping[str, Any]) -> Figure:
    """A violin for each stage and set: the density of the scores [n, K], the mean as a marker, its
    95 % interval as a bar.
    """
    stages = list(next(iter(content.values()))["stages"])
    width = 0.8 / len(sets)
    figure, (axes,) = figures.new_figure(1, max(5.0, 1.5 + 0.9 * len(stages) * len(sets)), 4.2)
    for index, (name, values) in enumerate(sets.items()):
        color = COLORS[index % len(COLORS)]
        positions = np.arange(len(stages)) + (index - (len(sets) - 1) / 2) * width
        bodies = axes.violinplot(
            list(values.T), positions=positions, widths=0.9 * width, showextrema=False
        )["bodies"]
        for body in bodies:  # type: ignore[attr-defined]
            body.set(facecolor=color, alpha=0.3, linewidth=0)
        summaries = content[name]["stages"].values()
        means, low, high = (
            np.array([s[key] for s in summaries], dtype=np.float64)  # None is NaN
            for key in ("mean", "low", "high")
        )
        ends = np.maximum(np.nan_to_num([means - low, high - means]), 0)
        drawn = axes.errorbar(
            *(positions, means, ends),
            fmt=MARKERS[index % len(MARKERS)],
            color=color,
            label=name,
            markersize=4,
            capsize=6,
            elinewidth=1.6,
            zorder=4,
        )
        drawn.lines[0].set_gid(f"means/{name}")
        look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": INK}
        for x, mean in zip(positions, means, strict=True):
            axes.annotate(f"{mean:.3f}", (x, mean), (7, 4), **look)
    figures.finish(axes, "Stage scores", "score", "")
    labels = [stage.replace("_", " ") for stage in stages]
    axes.set_xticks(range(len(stages)), labels, color=FAINT)
    axes.set_xlim(-0.6, len(stages) - 0.4)
    return figure
