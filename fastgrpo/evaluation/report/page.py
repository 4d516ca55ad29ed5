"""The report of one or several runs: figures, and one HTML page that holds everything."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fastgrpo.errors import require
from fastgrpo.evaluation import figures
from fastgrpo.evaluation.report import report_media, run_figures, run_record
from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.files import atomic_write
from fastgrpo.training.trust import check_links

FIGURES = ("reward", "weights", "hoyer", "ratio_drift", "stability", "time", "memory", "judge")
TROUBLE = {
    "num_invalid_videos": "videos could not be scored and were left out",
    "num_skipped_groups": (
        "groups gave no signal (all scores equal, or too few) and were not trained"
    ),
    "num_skipped_updates": "updates were skipped because the loss or a gradient was not finite",
}


def write_report(
    *runs: Path,
    smoothing_window: int = 10,
    output: Path | None = None,
    attach: Sequence[Path] = (),
) -> Path:
    """Write figures as PNG and SVG, contact_sheet.png, and report.html, which holds all of it and
    refers to nothing else.

    Args:
        runs: Run folders, finished or still going.
        smoothing_window: Iterations over which curves are averaged.
        output: Folder to write to; by default <run>/report, and for several runs the folder
            `report` beside the first.
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
    folder = output or (runs[0] if len(runs) == 1 else first.parent) / "report"
    if output is None:
        check_links(folder.parent, folder.name)
    require(folder.is_dir() or not folder.exists(), "output", "a folder", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "contact_sheet.png").unlink(missing_ok=True)
    videos = report_media.videos_section(records, folder)  # first, as these files may be damaged
    for name in FIGURES:  # an earlier report may have had more figures
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    judged = [run.config | ({"judge.json": run.judge} if run.judge else {}) for run in records]
    context = {
        "name": " · ".join(run.label for run in records),
        "title": first.name if len(runs) == 1 else f"{len(runs)} runs",
        "runs": records,
        "lines": [figures.indexed_line(index, run.label) for index, run in enumerate(records)],
        "notices": list(_notices(records)),
        "figures": list(_write_figures(folder, records, smoothing_window)),
        "differences": run_record.config_differences(judged),
        "changes": list(_changes(records)),
        "configurations": [run_record.flatten(config) for config in judged],
        "attached": attached,
        **_scores(records, smoothing_window),
        **videos,
    }
    html = _environment().get_template("report.html").render(context)
    with atomic_write(folder / "report.html") as path:
        # A folder's name may be no UTF-8, and a text of a run no valid one.
        path.write_text(html, encoding="utf-8", errors="backslashreplace")
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
        "duration": lambda seconds: datetime.timedelta(seconds=round(seconds)),
    }
    return environment


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
    if run.missing:
        gaps = [str(one) if one == last else f"{one} to {last}" for one, last in run.missing]
        yield (
            f"metrics.jsonl lacks the rows of iterations {', '.join(gaps[:10])}"
            f"{', …' * (len(gaps) > 10)}, which were done: the file was changed or lost, so curves "
            "have gaps and counts are too low."
        )
    for key, what in TROUBLE.items():
        count = sum(row.get(key) or 0 for row in run.trained)
        if count:
            yield f"{count:.0f} {what}."


def _scores(runs: Sequence[RunRecord], window: int) -> dict[str, Any]:
    """A table of mean scores: of one run its first and last, of several the last of each."""
    found = [run_record.scores_of(run, window) for run in runs]
    validation = any(scores and scores.validation for scores in found)
    # Scores on the training prompts do not compare with those on the validation prompts.
    found = [scores if scores and scores.validation == validation else None for scores in found]
    stages = run_figures.stages_of(runs)
    if not any(found):
        return {"score_rows": [], "scores_note": "", "stages": stages}
    note = f"Mean score, 0 to 1, on the training prompts (mean over {window} iterations)"
    if validation:
        note = "Mean score, 0 to 1, on the validation prompts, from the same noise every time"
    note += ", with the difference to the first row."
    entries: list[tuple[str, int | None, dict[str, float | None]]]
    if len(runs) == 1 and found[0]:
        start, end = found[0].iterations
        entries = [("start", start, found[0].first), ("end", end, found[0].last)]
    else:
        entries = [
            (run.label, scores.iterations[1], scores.last) if scores else (run.label, None, {})
            for run, scores in zip(runs, found, strict=True)
        ]
        seeds = [run.config.get("seed") for run in runs]
        if validation and any(seed != seeds[0] for seed in seeds):
            note += " The seeds of the runs differ, and so does that noise."
        note += " One number per run says nothing of how far seeds scatter: `ablate` measures that."
    rows = [dict(zip(("label", "iteration", "scores"), entry, strict=True)) for entry in entries]
    return {"score_rows": rows, "scores_note": note, "stages": stages}


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
            "image": report_media.data_url(folder / f"{topic.id}.svg"),
            "alt": figures.describe(topic.panels),
            "words": topic.words,
        }


def _changes(runs: Sequence[RunRecord]) -> Iterator[list[Any]]:
    """What a resume changed: label, the iteration after which it did, key, before, after."""
    for run in runs:
        versions = [*sorted(run.earlier.items()), (0, run.config)]
        for (iteration, before), (_, after) in pairwise(versions):
            for key, values in run_record.config_differences([before, after]).items():
                yield [run.label, iteration, key, *values]
