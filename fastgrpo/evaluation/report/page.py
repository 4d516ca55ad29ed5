"""The report of one or several runs: figures, and one HTML page that holds everything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fastgrpo.errors import require
from fastgrpo.evaluation import figures
from fastgrpo.evaluation.report import report_media, run_figures, run_record
from fastgrpo.evaluation.report.run_record import RunRecord, Scores
from fastgrpo.files import atomic_write

FIGURES = ("reward", "weights", "hoyer", "ratio_drift", "stability", "time", "memory", "judge")
GLYPHS = dict(zip(figures.MARKERS, "●■▲◆▼✚", strict=True))
TROUBLE = {
    "num_invalid_videos": "videos could not be scored and were left out",
    "num_skipped_groups": (
        "groups gave no signal (all scores equal, or too few) and were not trained"
    ),
    "num_skipped_updates": "updates were skipped because the loss or a gradient was not finite",
}


def write_report(
    *runs: Path, smoothing_window: int = 10, out: Path | None = None, attach: Sequence[Path] = ()
) -> Path:
    """Write figures as PNG and SVG, contact_sheet.png, and report.html, which holds all of it and
    refers to nothing else.

    Args:
        runs: Run folders, finished or still going.
        smoothing_window: Iterations over which curves are averaged.
        out: Folder to write to; by default <run>/report, and for several runs the folder `report`
            beside the first.
        attach: Folders of other commands whose figures and tables are shown as well, besides
            <run>-calibrate if there is one.

    Returns:
        The path of report.html.

    Raises:
        ValueError: Not a run folder, one given twice, a broken file in it, or a window below 1.
        OSError: A file that cannot be read, or a report folder that cannot be written.
    """
    require(smoothing_window >= 1, "smoothing_window", "at least 1", smoothing_window)
    records = run_record.read_runs(runs)
    first = runs[0].resolve()
    beside = [folder.with_name(f"{folder.name}-calibrate") for folder in map(Path.resolve, runs)]
    calibrations = [folder for folder in beside if (folder / "thresholds.yaml").is_file()]
    attached = report_media.attachments(list(dict.fromkeys([*calibrations, *attach])))
    folder = out or (runs[0] if len(runs) == 1 else first.parent) / "report"
    require(folder.is_dir() or not folder.exists(), "out", "a folder", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FIGURES, "contact_sheet"):  # an earlier report may have had more figures
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    context = {
        "name": " · ".join(run.label for run in records),
        "title": first.name if len(runs) == 1 else f"{len(runs)} runs",
        "runs": records,
        "looks": [_look(index, run) for index, run in enumerate(records)],
        "notices": list(_notices(records)),
        "figures": list(_write_figures(folder, records, smoothing_window)),
        "judge_totals": _judge_totals(records),
        "differences": _differences(records),
        "changes": list(_changes(records)),
        "configurations": {run.label: _configuration(run) for run in records},
        "attached": attached,
        **_scores(records, smoothing_window),
        **report_media.videos_section(records, folder),
    }
    html = _environment().get_template("report.html").render(context)
    with atomic_write(folder / "report.html") as path:
        path.write_text(html, encoding="utf-8")
    return folder / "report.html"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "code": lambda text: Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))),
        "title_of": run_figures.title_of,
        "duration": _duration,
        "plain": _plain,
        "number": lambda value, form=".3f": "–" if value is None else format(value, form),
    }
    return environment


def _look(index: int, run: RunRecord) -> dict[str, str]:
    """The run's line in all figures: the table of runs is their legend."""
    line = figures.indexed_line(index, run.label)
    dashes = line.style[1] if isinstance(line.style, tuple) else ()
    return {
        "color": line.color,
        "dashes": " ".join(f"{2 * length:g}" for length in dashes),
        "glyph": GLYPHS[line.marker],
    }


def _notices(runs: Sequence[RunRecord]) -> Iterator[str]:
    for run in runs:
        for notice in _notices_of(run):
            yield f"{run.label}: {notice}" if len(runs) > 1 else notice
    if not run_record.judged_alike(runs):
        yield (
            "These runs were not evaluated alike: their judge, validation prompts or evaluation "
            "sampler differ (see what differs, below), so differences between their scores are not "
            "differences between the models alone."
        )


def _notices_of(run: RunRecord) -> Iterator[str]:
    if not run.rows:
        yield (
            "Nothing has been measured yet: metrics.jsonl has no line. Build the report again when "
            "the first iteration has ended."
        )
    elif not run.trained and run.planned != 0:
        yield (
            "Only the untrained model has been evaluated so far: no training iteration has ended "
            "yet."
        )
    elif run.last_iteration < (run.planned or 0):
        yield (
            "This run is still going, or was stopped: its last iteration is to be "
            f"{run.planned}. The page shows it so far."
        )
    for key, what in TROUBLE.items():
        count = sum(row.get(key) or 0 for row in run.trained)
        if count:
            yield f"{count:.0f} {what}."


def _scores(runs: Sequence[RunRecord], window: int) -> dict[str, Any]:
    """Of one run a card per stage with its first and last score; of several a table of the last
    scores.
    """
    section = {"cards": [], "score_rows": [], "scores_note": "", "stages": []}
    found = [run_record.scores_of(run, window) for run in runs]
    validation = any(scores and scores.validation for scores in found)
    # Scores on the training prompts do not compare with those on the validation prompts.
    found = [scores if scores and scores.validation == validation else None for scores in found]
    usable = [scores for scores in found if scores]
    if not usable:
        return section
    note = f"Mean score, 0 to 1, on the training prompts (mean over {window} iterations)"
    if validation:
        note = "Mean score, 0 to 1, on the validation prompts, from the same noise every time"
    if len(runs) == 1:
        start, end = usable[0].iterations
        note += f": iteration {start} → iteration {end}."
        return section | {"cards": _cards(usable[0]), "scores_note": note}
    note += f", with the difference to {runs[0].label}."
    if len({scores.iterations[1] for scores in usable}) > 1:
        note += " The runs were not evaluated at the same iteration."
    if validation and len({run.config.get("seed") for run in runs}) > 1:
        note += " Their seeds differ, and so does that noise."
    note += " One number per run says nothing of how far seeds scatter: `ablate` measures that."
    stages = run_figures.stages_of(runs)
    rows = []
    for run, scores in zip(runs, found, strict=True):
        cells = []
        for stage in stages:
            value, reference = (s.last.get(stage) if s else None for s in (scores, found[0]))
            change = None
            if run is not runs[0] and value is not None and reference is not None:
                change = value - reference
            cells.append((value, change))
        last = scores.iterations[1] if scores else None
        rows.append({"run": run.label, "iteration": last, "cells": cells})
    return section | {"score_rows": rows, "scores_note": note, "stages": stages}


def _cards(scores: Scores) -> list[dict[str, Any]]:
    cards = []
    for index, (stage, start) in enumerate(scores.first.items()):
        end = scores.last[stage]
        if start is not None and end is not None:
            color = figures.COLORS[index % len(figures.COLORS)]
            cards.append({"stage": stage, "start": start, "end": end, "color": color})
    return cards


def _write_figures(
    folder: Path, runs: Sequence[RunRecord], window: int
) -> Iterator[dict[str, str]]:
    if not any(run.rows for run in runs):
        return
    for topic in run_figures.topics(runs, window):
        figures.save_figure(topic.draw(), folder / topic.id)
        yield {
            "id": topic.id,
            "title": topic.title,
            "image": report_media.svg_url((folder / f"{topic.id}.svg").read_bytes()),
            "narrow": report_media.svg_url(figures.svg_bytes(topic.draw(narrow=True))),
            "alt": figures.describe(topic.panels),
            "words": topic.words,
        }


def _judge_totals(runs: Sequence[RunRecord]) -> dict[str, list[float | None]]:
    """What the judges counted over whole runs: a row for each counter that any run has; none if all
    counts are 0.
    """
    totals = [run_record.judge_totals(run) for run in runs]
    if not any(value for total in totals for value in total.values()):
        return {}
    return {key: [total.get(key) for total in totals] for one in totals for key in one}


def _differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Each key of config.yaml and judge.json that is not the same in all runs -> its values."""
    return run_record.config_differences(
        [run.config | ({"judge.json": run.judge} if run.judge else {}) for run in runs]
    )


def _changes(runs: Sequence[RunRecord]) -> Iterator[list[Any]]:
    """What a resume changed: label, the iteration after which it did, key, before, after."""
    for run in runs:
        versions = [*sorted(run.earlier.items()), (0, run.config)]
        for (iteration, before), (_, after) in pairwise(versions):
            for key, values in run_record.config_differences([before, after]).items():
                yield [run.label, iteration, key, *values]


def _configuration(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Sections of the page: the top level's plain values first, then each nested section with
    dotted keys; judge.json last.
    """
    top = {key: value for key, value in run.config.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in run.config.items() if key not in top}
    sections = {"run": top, **nested, "judge.json": run.judge}
    return {name: run_record.flatten(values) for name, values in sections.items() if values}


def _plain(value: Any) -> str:
    if value is run_record.Missing:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return {"None": "none", "True": "yes", "False": "no", "{}": "none"}.get(str(value), str(value))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.2g} s"
