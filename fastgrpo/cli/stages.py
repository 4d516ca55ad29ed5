"""Mean and spread of the stage scores over a set of videos, with confidence intervals (Fig. 7);
several sets side by side.

Takes the files of `python -m fastgrpo score`, other .jsonl files with {"video": path, "rewards":
{stage: number}} a line, and samples.json beside saved samples. The 95 % intervals are of a
bootstrap over prompts (percentiles), so several videos of one prompt do not count as independent
ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastgrpo.errors import fail
from fastgrpo.evaluation.tables import number, render_table, write_csv, write_json
from fastgrpo.evaluation.score_rows import (
    ScoredRow,
    ScoreFile,
    left_out_lines,
    match_rows,
    name_files,
    read_scores,
)
from fastgrpo.training import figures
from fastgrpo.training.figures import COLORS, FAINT, INK, MARKERS

RESAMPLES = 10_000
CHUNK = 500
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """One stage over one set of videos."""

    mean: float
    low: float
    """Lower end of the mean's 95 % interval; NaN with fewer than two prompts."""
    high: float
    std: float
    """Sample standard deviation; NaN of one video."""
    quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class Difference:
    """A set's mean of one stage minus the first set's, over the videos that both have."""

    videos: int
    mean: float
    low: float
    high: float


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one message for whatever cannot be used."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo stages", description=__doc__, exit_on_error=False
    )
    parser.add_argument(
        "scores",
        nargs="+",
        type=Path,
        metavar="SCORES",
        help="a file of scores for each set of videos",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        type=str,
        metavar="NAME",
        help="of the sets, in the same order; those of the files by default",
    )
    parser.add_function_arguments(stages, as_group=False, skip={"scores", "names"})
    try:
        print(stages(**parser.parse_args(argv).as_dict()))
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    return 0


def stages(
    scores: Sequence[Path],
    names: Sequence[str] | None = None,
    components: bool = False,
    seed: int = 0,
    out: Path | None = None,
) -> str:
    """Each set's stage scores and, of each set but the first, the difference to it, as text; also
    JSON, CSV and a figure in a folder.

    Writes OUT/stages.json, stages.csv, stages.png and stages.svg.

    Args:
        scores: a file of scores for each set of videos, such as those of the base and of the
            trained model. names: of the sets; those of the files if not given. components: a
            published model's raw scores, such as VideoAlign's VQ, MQ and TA, in place of the
            rewards. seed: of the bootstrap. out: folder to write to; `stages` beside the first
            file if not given.

    Raises:
        ValueError, OSError: files that cannot be read, or that have different stages.
    """
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    found = name_files(scores, names)
    read = (raw_scores(read_scores(path)) if components else read_scores(path) for path in scores)
    files = dict(zip(found, read, strict=True))
    stage_names = common_stages(list(files.values()))
    sets = {name: table(file.rows, stage_names) for name, file in files.items()}
    summaries = {
        name: summarize(values, prompts_of(files[name].rows), seed) for name, values in sets.items()
    }
    first = next(iter(files))
    differences, notes = {}, []
    for name, file in files.items():
        notes += left_out_lines([name], [file], len(file.rows))
        try:
            if name != first:
                differences[name] = compare(files[first], file, stage_names, seed)
        except ValueError as error:
            notes.append(f"{name}: no difference to {first}: {str(error).removeprefix('scores: ')}")
    folder = out or scores[0].parent / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "stages": stage_names,
        "seed": seed,
        "resamples": RESAMPLES,
        "first": first,
        "notes": notes,
    }
    write_json(
        folder / "stages.json",
        settings | {"sets": as_json(stage_names, files, summaries, differences)},
    )
    write_csv(folder / "stages.csv", as_rows(stage_names, files, summaries, differences))
    figures.save_figure(stage_figure(sets, summaries, stage_names), folder / "stages")
    lines = [
        stage_table(stage_names, files, summaries, differences),
        "",
        f"95 % intervals: bootstrap over prompts, {RESAMPLES} resamples",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in notes), f"tables and figure: {folder}"])


def raw_scores(file: ScoreFile) -> ScoreFile:
    """The file with each row's components as its scores. ValueError: it has none."""
    rows = [replace(row, scores=row.components) for row in file.rows]
    if not all(row.scores for row in rows):
        raise ValueError(
            f"scores: expected rows with components in {file.path}, which a published model's have, got none in some"
        )
    return replace(file, rows=rows)


def common_stages(files: Sequence[ScoreFile]) -> list[str]:
    """The stages that all rows of all files have, in the first row's order. ValueError: a row with
    others.
    """
    stage_names = list(files[0].rows[0].scores)
    for file in files:
        for row in file.rows:
            if row.scores.keys() != set(stage_names):
                raise ValueError(
                    f"scores: expected the stages {', '.join(stage_names)} in all rows, got {', '.join(row.scores)} in {file.path} for "
                    f"{row.video or row.prompt}"
                )
    return stage_names


def table(rows: Sequence[ScoredRow], stage_names: Sequence[str]) -> Floats:
    """[n, K] scores."""
    return np.array([[row.scores[stage] for stage in stage_names] for row in rows])


def prompts_of(rows: Sequence[ScoredRow]) -> list[str]:
    """What each row is resampled with: its prompt, or the video alone where it has none."""
    return [f"prompt {row.prompt}" if row.prompt else f"video {row.video}" for row in rows]


def summarize(values: Floats, groups: Sequence[str], seed: int) -> list[Summary]:
    """A summary of each stage of values [n, K]."""
    low, high = bootstrap_interval(values, groups, seed)
    std = values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
    quartiles = np.percentile(values, (25, 50, 75), axis=0)
    found = zip(values.mean(0), low, high, std, quartiles.T, strict=True)
    return [
        Summary(float(m), float(lo), float(hi), float(s), tuple(q.tolist()))
        for m, lo, hi, s, q in found
    ]


def compare(
    first: ScoreFile, other: ScoreFile, stage_names: Sequence[str], seed: int
) -> list[Difference]:
    """For each stage the paired difference other - first over the videos of both. ValueError: none,
    or videos that cannot be told apart.
    """
    pairs = match_rows([first, other])
    values = table([b for _, b in pairs], stage_names) - table([a for a, _ in pairs], stage_names)
    low, high = bootstrap_interval(values, prompts_of([a for a, _ in pairs]), seed)
    return [
        Difference(len(pairs), float(m), float(lo), float(hi))
        for m, lo, hi in zip(values.mean(0), low, high, strict=True)
    ]


def bootstrap_interval(values: Floats, groups: Sequence[str], seed: int) -> tuple[Floats, Floats]:
    """95 % interval of the means of values [n, K], two arrays [K]: percentiles over RESAMPLES draws
    of whole groups with replacement.

    NaN with fewer than two groups.
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
    for start in range(0, RESAMPLES, CHUNK):
        draws = rng.multinomial(
            count, np.full(count, 1 / count), size=min(CHUNK, RESAMPLES - start)
        )
        means.append((draws @ sums) / (draws @ sizes)[:, None])
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5), axis=0)
    return low, high


def stage_table(
    stage_names: Sequence[str],
    files: Mapping[str, ScoreFile],
    summaries: Mapping[str, Sequence[Summary]],
    differences: Mapping[str, Sequence[Difference]],
) -> str:
    """A line for each stage and set."""
    first = next(iter(files))
    rows = [
        [
            "stage",
            "set",
            "videos",
            "mean",
            "95 % interval",
            "std",
            *([f"minus {first}", "95 % interval", "in both"] * (len(files) > 1)),
        ]
    ]
    for j, stage in enumerate(stage_names):
        for name, file in files.items():
            s = summaries[name][j]
            row = [
                stage,
                name,
                str(len(file.rows)),
                f"{s.mean:.4f}",
                interval(s.low, s.high),
                digits(s.std),
            ]
            if len(files) > 1 and name in differences:
                d = differences[name][j]
                row += [f"{d.mean:+.4f}", interval(d.low, d.high, "+"), str(d.videos)]
            elif len(files) > 1:
                row += ["", "", ""]
            rows.append(row)
    return render_table(rows, left=(0, 1))


def interval(low: float, high: float, sign: str = "") -> str:
    """`[low, high]`, or a dash."""
    return f"[{low:{sign}.4f}, {high:{sign}.4f}]" if np.isfinite(low) else "–"


def digits(value: float) -> str:
    """With four digits, or a dash."""
    return f"{value:.4f}" if np.isfinite(value) else "–"


def as_json(
    stage_names: Sequence[str],
    files: Mapping[str, ScoreFile],
    summaries: Mapping[str, Sequence[Summary]],
    differences: Mapping[str, Sequence[Difference]],
) -> dict[str, Any]:
    """{set: {"videos", "stages": {stage: summary}, "difference": {stage: ...} or null}}; null for
    what is not finite.
    """
    return {
        name: {
            "videos": len(file.rows),
            "stages": {
                stage: finite(asdict(s))
                for stage, s in zip(stage_names, summaries[name], strict=True)
            },
            "difference": {
                stage: finite(asdict(d))
                for stage, d in zip(stage_names, differences[name], strict=True)
            }
            if name in differences
            else None,
        }
        for name, file in files.items()
    }


def as_rows(
    stage_names: Sequence[str],
    files: Mapping[str, ScoreFile],
    summaries: Mapping[str, Sequence[Summary]],
    differences: Mapping[str, Sequence[Difference]],
) -> list[dict[str, Any]]:
    """A row of the CSV for each set and stage."""
    rows = []
    for name, entry in as_json(stage_names, files, summaries, differences).items():
        for stage, summary in entry["stages"].items():
            q25, median, q75 = summary.pop("quartiles")
            row = {
                "set": name,
                "stage": stage,
                "videos": entry["videos"],
                **summary,
                "q25": q25,
                "median": median,
                "q75": q75,
            }
            against = (entry["difference"] or {}).get(
                stage, dict.fromkeys(("videos", "mean", "low", "high"))
            )
            rows.append(row | {f"difference_{key}": value for key, value in against.items()})
    return rows


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """None in place of numbers that are not finite."""
    return {
        key: number(value) if isinstance(value, float) else value for key, value in values.items()
    }


def stage_figure(
    sets: Mapping[str, Floats],
    summaries: Mapping[str, Sequence[Summary]],
    stage_names: Sequence[str],
) -> Figure:
    """A violin for each stage and set: the scores' density, the mean as a marker, its 95 % interval
    as a bar.
    """
    figure, (axes,) = figures._new_figure(
        1, max(5.0, 1.5 + 0.9 * len(stage_names) * len(sets)), 4.2
    )
    width = 0.8 / len(sets)
    for place, (name, values) in enumerate(sets.items()):
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        positions = np.arange(len(stage_names)) + (place - (len(sets) - 1) / 2) * width
        bodies = axes.violinplot(
            list(values.T), positions=positions, widths=0.9 * width, showextrema=False
        )["bodies"]
        for body in bodies:  # type: ignore[attr-defined]
            body.set(facecolor=color, alpha=0.3, linewidth=0)
        means = np.array([s.mean for s in summaries[name]])
        ends = np.nan_to_num(
            [[s.mean - s.low for s in summaries[name]], [s.high - s.mean for s in summaries[name]]]
        )
        look: dict[str, Any] = {
            "fmt": marker,
            "markersize": 4,
            "capsize": 6,
            "elinewidth": 1.6,
            "zorder": 4,
        }
        drawn = axes.errorbar(
            positions, means, yerr=np.maximum(ends, 0), color=color, label=name, **look
        )
        drawn.lines[0].set_gid(f"means/{name}")
        for x, mean in zip(positions, means, strict=True):
            axes.annotate(
                f"{mean:.3f}", (x, mean), (7, 4), textcoords="offset points", fontsize=8, color=INK
            )
    figures._finish(axes, "Stage scores", "score", "")
    axes.set_xticks(
        range(len(stage_names)), [stage.replace("_", " ") for stage in stage_names], color=FAINT
    )
    axes.set_xlim(-0.6, len(stage_names) - 0.4)
    return figure
