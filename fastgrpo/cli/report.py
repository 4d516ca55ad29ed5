"""`python -m fastgrpo report RUN [RUN ...]`: curves, scores and videos of runs on one
self-contained page. Works on a run still going.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jsonargparse
from markupsafe import Markup, escape

from fastgrpo.errors import fail
from fastgrpo.evaluation.report import panels, report_media, run_figures, run_record
from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.training import figures

WRITTEN = (
    "reward",
    "weights",
    "hoyer",
    "ratio_drift",
    "stability",
    "time",
    "memory",
    "judge",
    "contact_sheet",
)
"""Names of the images that a report may write, and so removes where an earlier one wrote them and
this one does not.
"""
ATTACH = """folders of other commands (an ablation, a judge's bias) whose figures, tables and texts are shown on the page as well;
<run>-calibrate, where it lies beside a run, is shown without being named"""
GLYPHS = dict(zip(figures.MARKERS, "●■▲◆▼✚", strict=True))


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 2 with one message for a wrong argument or a run that cannot be
    read.
    """
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo report",
        description="Curves, scores and videos of one run, or of several side by side, on one HTML page that needs no network.",
        exit_on_error=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, finished or going; several are compared to the first",
    )
    parser.add_argument("--attach", nargs="+", type=Path, default=[], metavar="FOLDER", help=ATTACH)
    parser.add_function_arguments(write_report, skip={"runs", "attach"})
    try:
        arguments = parser.parse_args(argv)
        print(
            write_report(
                *arguments.runs,
                smoothing_window=arguments.smoothing_window,
                out=arguments.out,
                attach=arguments.attach,
            )
        )
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    return 0


def write_report(
    *runs: Path, smoothing_window: int = 10, out: Path | None = None, attach: Sequence[Path] = ()
) -> Path:
    """Write figures as PNG and SVG, contact_sheet.png, and report.html, which holds all of it and
    refers to nothing else.

    Args:
        runs: run folders; finished or still going. smoothing_window: iterations over which
            curves are averaged. out: folder to write to; by default <run>/report, and for
            several runs the folder `report` beside the first. attach: folders of other commands
            whose figures and tables are shown as well, besides <run>-calibrate where there is
            one.

    Returns:
        The path of report.html.

    Raises:
        ValueError: not a run folder (neither config.yaml nor metrics.jsonl), or one given twice;
            a broken file in it; a window below 1. OSError: a file that cannot be read, or a
            report folder that cannot be written.
    """
    if smoothing_window < 1:
        raise ValueError(f"smoothing_window: expected at least 1, got {smoothing_window}")
    read = run_record.read_runs(runs)
    beside = [
        folder.with_name(f"{folder.name}-calibrate")
        for folder in (run.folder.resolve() for run in read)
    ]
    calibrations = [folder for folder in beside if (folder / "thresholds.yaml").is_file()]
    attached = report_media.attachments(list(dict.fromkeys([*calibrations, *attach])))
    folder = out or (runs[0] / "report" if len(runs) == 1 else runs[0].resolve().parent / "report")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    context = {
        "name": " · ".join(run.label for run in read),
        "title": runs[0].resolve().name if len(runs) == 1 else f"{len(runs)} runs",
        "several": len(runs) > 1,
        "facts": _facts(read[0])
        if len(read) == 1
        else [f"{len(read)} runs, compared to {read[0].label}"],
        "notices": _notices(read),
        "overview": [_overview(index, run) for index, run in enumerate(read)],
        "figures": _write_figures(folder, read, smoothing_window),
        "judge_totals": _judge_totals(read),
        "differences": _differences(read),
        "changes": list(_changes(read)),
        "configurations": {run.label: _configuration(run) for run in read},
        "attached": attached,
        **(
            _cards(read[0], smoothing_window)
            if len(read) == 1
            else _final_scores(read, smoothing_window)
        ),
        **report_media.videos_section(read, folder),
    }
    page = folder / "report.html"
    partial = folder / ".report.html.tmp"
    partial.write_text(_environment().get_template("report.html").render(context), encoding="utf-8")
    os.replace(partial, page)
    return page


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(run_figures.__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["code"] = lambda text: Markup(
        re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    )
    return environment


def _facts(run: RunRecord) -> list[str]:
    planned, trained = run.config.get("iterations"), run.trained
    facts = [
        f"{_done(run)} of {planned} iterations"
        if planned is not None
        else f"{_done(run)} iterations"
    ]
    seconds = _seconds(run)
    if seconds:
        facts.append(
            f"{_duration(seconds)} of training, {seconds / len(trained):.2g} s an iteration"
        )
    return [
        *facts,
        *(_class_of(run, part) for part in ("policy", "reward") if _class_of(run, part)),
    ]


def _done(run: RunRecord) -> int:
    return int(run.trained[-1]["iteration"]) if run.trained else 0


def _seconds(run: RunRecord) -> float:
    return sum(row.get("step_time") or 0.0 for row in run.trained)


def _class_of(run: RunRecord, part: str) -> str:
    described = run.config.get(part)
    return (
        str(described["class_path"]).rpartition(".")[2]
        if isinstance(described, Mapping) and described.get("class_path")
        else ""
    )


def _overview(index: int, run: RunRecord) -> dict[str, str]:
    """One line of the table of runs: it is the legend of all figures as well."""
    line = run_figures.run_line(index, run.label)
    dashes = line.style[1] if isinstance(line.style, tuple) else ()
    planned, trained = run.config.get("iterations"), run.trained
    return {
        "label": run.label,
        "color": line.color,
        "dashes": " ".join(f"{2 * length:g}" for length in dashes),
        "glyph": GLYPHS[line.marker],
        "iterations": f"{_done(run)} of {planned}" if planned is not None else str(_done(run)),
        "mode": str((run.config.get("pacing") or {}).get("mode", "–")),
        "time": _duration(_seconds(run)) if trained else "–",
        "each": f"{_seconds(run) / len(trained):.2g} s" if trained else "–",
        "policy": _class_of(run, "policy") or "–",
        "reward": _class_of(run, "reward") or "–",
    }


def _notices(runs: Sequence[RunRecord]) -> list[str]:
    notices = [
        f"{run.label}: {notice}" if len(runs) > 1 else notice
        for run in runs
        for notice in _notices_of(run)
    ]
    if len(runs) > 1 and not run_record.judged_alike(runs):
        notices.append(
            "These runs were not evaluated alike: their judge, validation captions or evaluation sampler differ (see what differs, below), "
            "so differences between their scores are not differences between the models alone."
        )
    return notices


def _notices_of(run: RunRecord) -> list[str]:
    if not run.rows:
        return [
            "Nothing has been measured yet: metrics.jsonl has no line. Build the report again when the first iteration has ended."
        ]
    notices = []
    planned, trained = run.config.get("iterations"), run.trained
    if not trained and planned != 0:
        notices.append(
            "Only the untrained model has been evaluated so far: no training iteration has ended yet."
        )
    elif trained and planned is not None and trained[-1]["iteration"] < planned:
        notices.append(
            f"This run is still going, or was stopped: its last iteration is to be {planned}. The page shows it so far."
        )
    for key, what in (
        ("num_invalid_videos", "videos could not be scored and were left out"),
        (
            "num_skipped_groups",
            "groups gave no signal (all scores equal, or too few) and were not trained",
        ),
        (
            "num_skipped_updates",
            "updates were skipped because the loss or a gradient was not finite",
        ),
    ):
        count = sum(row.get(key) or 0 for row in trained)
        if count:
            notices.append(f"{count:.0f} {what}.")
    return notices


def _where(validation: bool, window: int) -> str:
    if validation:
        return "the captions of the evaluation, from the same noise every time"
    return f"the training captions (mean over {window} iterations)"


def _cards(run: RunRecord, window: int) -> dict[str, Any]:
    """First and last score of each stage of the only run."""
    scores = run_record.scores_of(run, window)
    if scores is None:
        return {"scores": [], "score_rows": [], "scores_note": "", "stages": []}
    cards = []
    for index, stage in enumerate(run.stages):
        start, end = scores.first[stage], scores.last[stage]
        if start is None or end is None:
            continue
        cards.append(
            {
                "stage": stage.replace("_", " "),
                "start": f"{start:.3f}",
                "end": f"{end:.3f}",
                "change": f"{end - start:+.3f}",
                "low_percent": f"{100 * min(max(min(start, end), 0), 1):.1f}",
                "end_percent": f"{100 * min(max(end, 0), 1):.1f}",
                "color": figures.COLORS[index % len(figures.COLORS)],
            }
        )
    begin, last = scores.iterations
    note = f"Mean score, 0 to 1, on {_where(scores.validation, window)}: iteration {begin} → iteration {last}."
    return {"scores": cards, "score_rows": [], "scores_note": note, "stages": []}


def _final_scores(runs: Sequence[RunRecord], window: int) -> dict[str, Any]:
    """The last score of each run and stage, with the difference to the first run's."""
    stages = run_figures.stages_of(runs)
    found = [run_record.scores_of(run, window) for run in runs]
    validation = any(scores is not None and scores.validation for scores in found)
    usable = [
        scores if scores is not None and scores.validation == validation else None
        for scores in found
    ]
    rows = []
    for run, scores in zip(runs, usable, strict=True):
        cells = []
        for stage in stages:
            value = scores.last.get(stage) if scores else None
            reference = usable[0].last.get(stage) if usable[0] else None
            difference = (
                None if run is runs[0] or value is None or reference is None else value - reference
            )
            cells.append(
                {
                    "value": "–" if value is None else f"{value:.3f}",
                    "change": "" if difference is None else f"{difference:+.3f}",
                }
            )
        rows.append(
            {
                "run": run.label,
                "iteration": str(scores.iterations[1]) if scores else "–",
                "cells": cells,
            }
        )
    ends = {scores.iterations[1] for scores in usable if scores}
    note = f"Mean score, 0 to 1, on {_where(validation, window)}, with the difference to {runs[0].label}."
    note += " The runs were not evaluated at the same iteration." if len(ends) > 1 else ""
    note += (
        " Their seeds differ, and so does that noise."
        if validation and len({run.config.get("seed") for run in runs}) > 1
        else ""
    )
    note += " One number a run says nothing of how far seeds scatter: `ablate` measures that."
    has_rows = any(usable)
    names = [stage.replace("_", " ") for stage in stages]
    return {
        "scores": [],
        "score_rows": rows if has_rows else [],
        "scores_note": note if has_rows else "",
        "stages": names,
    }


def _write_figures(folder: Path, runs: Sequence[RunRecord], window: int) -> list[dict[str, str]]:
    if not any(run.rows for run in runs):
        return []
    entries = []
    for topic in run_figures.topics(runs, window):
        _, svg = figures.save_figure(topic.draw(), folder / topic.id)
        narrow = figures.svg_bytes(topic.draw(narrow=True))
        entries.append(
            {
                "id": topic.id,
                "title": topic.title,
                "image": report_media.svg_url(svg.read_bytes()),
                "narrow": report_media.svg_url(narrow),
                "alt": panels.describe(topic.panels),
                "words": topic.words,
            }
        )
    return entries


def _judge_totals(runs: Sequence[RunRecord]) -> list[list[str]]:
    """What the judges counted over whole runs: a row for each counter that any run has; none where
    all they could say is 0.
    """
    totals = [run_record.judge_totals(run) for run in runs]
    keys = list(dict.fromkeys(key for total in totals for key in total))
    if not any(value for total in totals for value in total.values()):
        return []
    return [[key, *(_number(total.get(key)) for total in totals)] for key in keys]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _differences(runs: Sequence[RunRecord]) -> list[list[str]]:
    """One row for each key of config.yaml and judge.json that is not the same in all runs."""
    if len(runs) == 1:
        return []
    merged = [run.config | ({"judge.json": run.judge} if run.judge else {}) for run in runs]
    return [
        [key, *map(_plain, values)] for key, values in run_record.config_differences(merged).items()
    ]


def _changes(runs: Sequence[RunRecord]) -> Iterator[list[str]]:
    """What a resume changed in a run: label, the iteration after which it did, key, before, after."""
    for run in runs:
        versions = sorted(run.earlier.items())
        since = [config for _, config in versions[1:]] + [run.config]
        for (iteration, before), later in zip(
            versions, since, strict=False
        ):  # without a resume, no version was before this one
            for key, (old, new) in run_record.config_differences([before, later]).items():
                yield [run.label, str(iteration), key, _plain(old), _plain(new)]


def _configuration(run: RunRecord) -> dict[str, dict[str, str]]:
    """Sections of the page: the top level's plain values first, then each nested section with
    dotted keys; judge.json last.
    """
    sections: dict[str, dict[str, str]] = {"run": {}}
    for key, value in run.config.items():
        if isinstance(value, Mapping):
            sections[key] = {
                name: _plain(entry) for name, entry in run_record.flatten(value).items()
            }
        else:
            sections["run"][key] = _plain(value)
    sections["judge.json"] = {
        name: _plain(entry) for name, entry in run_record.flatten(run.judge).items()
    }
    return {name: entries for name, entries in sections.items() if entries}


def _plain(value: Any) -> str:
    if value is run_record.Missing:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return {"None": "none", "True": "yes", "False": "no", "{}": "none"}.get(str(value), str(value))


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.2g} s"
