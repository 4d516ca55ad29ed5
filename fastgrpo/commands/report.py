"""`python -m fastgrpo report RUN`: the curves and videos of a run on one self-contained page. Works on a run that is still going."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jsonargparse
import yaml
from matplotlib.figure import Figure
from PIL import Image

from fastgrpo import figures
from fastgrpo.config import refuse
from fastgrpo.self_paced import smooth
from fastgrpo.tracking import Row, read_metrics, stage_names

MAX_VIDEO_BYTES = 2_000_000
"""A larger video is shown by its stills: the page has to stay one that a browser opens and a mail carries."""
MAX_PAGE_VIDEO_BYTES = 24_000_000
"""The same for all videos of the page together."""


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 2 with one message for a wrong argument or a run that cannot be read."""
    parser = jsonargparse.ArgumentParser(prog="python -m fastgrpo report", description="Curves and videos of a run on one HTML page.")
    parser.add_function_arguments(write_report, as_positional=True)
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.run, arguments.smoothing_window))
    except ValueError as error:
        refuse(error)
    return 0


def write_report(run: Path, smoothing_window: int = 10) -> Path:
    """Write `<run>/report/`: curves as PNG and SVG, contact_sheet.png, and report.html, which holds all of it and refers to nothing else.

    Args:
        run: the run folder; finished or still going.
        smoothing_window: iterations over which the reward curves are averaged.

    Returns:
        The path of report.html.

    Raises:
        ValueError: not a run folder (neither config.yaml nor metrics.jsonl); a broken metrics.jsonl or config.yaml; a window below 1.
    """
    if smoothing_window < 1:
        raise ValueError(f"smoothing_window: expected at least 1, got {smoothing_window}")
    metrics = run / "metrics.jsonl"
    if not (metrics.is_file() or (run / "config.yaml").is_file()):
        raise ValueError(f"report: expected a run folder with config.yaml or metrics.jsonl, got {run}")
    rows = read_metrics(metrics) if metrics.is_file() else []
    config = _read_config(run / "config.yaml")
    stages = stage_names(rows)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    context = {
        "name": run.resolve().name,
        "facts": _facts(rows, config),
        "notices": _notices(rows, config),
        "configuration": _configuration(config),
        "figures": _write_figures(folder, rows, stages, _thresholds(config), smoothing_window),
        **_scores(rows, stages, smoothing_window),
        **_videos(run, folder),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = folder / "report.html"
    page.write_text(environment.get_template("report.html").render(context), encoding="utf-8")
    return page


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(config).__name__}")
    return config


def _thresholds(config: Mapping[str, Any]) -> list[float]:
    """Those that paced the run: the modes without gates have none to show."""
    pacing = config.get("pacing") or {}
    return list(pacing.get("thresholds") or []) if pacing.get("mode", "self_paced") in ("self_paced", "two_stage") else []


def _trained(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "reward" in row]


def _facts(rows: Sequence[Row], config: Mapping[str, Any]) -> list[str]:
    trained = _trained(rows)
    planned = config.get("iterations")
    done = trained[-1]["iteration"] if trained else 0
    facts = [f"{done} of {planned} iterations" if planned is not None else f"{done} iterations"]
    seconds = sum(row.get("step_time") or 0.0 for row in trained)
    if seconds:
        facts.append(f"{_duration(seconds)} of training, {seconds / len(trained):.2g} s an iteration")
    for part in ("policy", "reward"):
        described = config.get(part)
        if isinstance(described, Mapping) and described.get("class_path"):
            facts.append(str(described["class_path"]).rpartition(".")[2])
    return facts


def _notices(rows: Sequence[Row], config: Mapping[str, Any]) -> list[str]:
    trained = _trained(rows)
    if not rows:
        return ["Nothing has been measured yet: metrics.jsonl has no line. Build the report again when the first iteration has ended."]
    notices = []
    planned = config.get("iterations")
    if not trained and planned != 0:
        notices.append("Only the untrained model has been evaluated so far: no training iteration has ended yet.")
    elif trained and planned is not None and trained[-1]["iteration"] < planned:
        notices.append(f"This run is still going, or was stopped: its last iteration is to be {planned}. The page shows it so far.")
    for key, what in (
        ("num_invalid_videos", "videos could not be scored and were left out"),
        ("num_skipped_groups", "groups gave no signal (all scores equal, or too few) and were not trained"),
        ("num_skipped_updates", "updates were skipped because the loss or a gradient was not finite"),
    ):
        count = sum(row.get(key) or 0 for row in trained)
        if count:
            notices.append(f"{count:.0f} {what}.")
    return notices


def _scores(rows: Sequence[Row], stages: Sequence[str], window: int) -> dict[str, Any]:
    """First and last score of each stage: on held-out captions, or smoothed on the training ones where nothing was held out."""
    held_out = any(len(figures.series(rows, f"eval/rewards/{stage}/mean")[0]) > 1 for stage in stages)
    cards = []
    ends: tuple[int, int] = (0, 0)
    for index, stage in enumerate(stages):
        iterations, values = figures.series(rows, f"eval/rewards/{stage}/mean" if held_out else f"rewards/{stage}/mean")
        if not held_out:
            values = smooth(values, window)
        if len(values) < 2:
            continue
        start, end, ends = values[0], values[-1], (iterations[0], iterations[-1])
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
    where = (
        "the captions of the evaluation, from the same noise every time"
        if held_out
        else f"the training captions (mean over {window} iterations)"
    )
    return {"scores": cards, "scores_note": f"Mean score, 0 to 1, on {where}: iteration {ends[0]} → iteration {ends[1]}."}


def _write_figures(
    folder: Path, rows: Sequence[Row], stages: Sequence[str], thresholds: Sequence[float], window: int
) -> list[dict[str, str]]:
    if not rows:
        return []
    drawn: list[tuple[str, str, Figure, str]] = [
        (
            "reward",
            "Does it get better?",
            figures.reward_curves(rows, stages, thresholds, window),
            f"The judge's mean score at each stage: faint lines are single iterations, bold lines the mean over {window}, markers the "
            "captions of the evaluation. The dotted weighted reward is what training climbs; it dips where weight moves to a "
            "harder stage, which is no setback.",
        ),
        (
            "weights",
            "What is it being taught?",
            figures.weight_curves(rows, stages, thresholds),
            "The share of each stage in the reward: when the running mean of a stage passes its dashed threshold, weight moves on to the "
            "next.",
        ),
        (
            "ratio_drift",
            "Is the arithmetic right?",
            figures.ratio_drift(rows),
            "Before the first update of an iteration, training recomputes the rollout's probabilities with the very same weights, so each "
            "ratio should be 1: what is shown is the largest distance from 1, and far from 0 means lost precision or a bug.",
        ),
        (
            "health",
            "Is training stable, and where does time go?",
            figures.training_health(rows),
            "Healthy training keeps the gradient norm bounded and the clip fraction well below one; the last panel shows what an iteration "
            "spends on sampling videos, judging them and updating the weights.",
        ),
    ]
    entries = []
    for identity, title, figure, words in drawn:
        _, svg = figures.save_figure(figure, folder / identity)
        entries.append({"id": identity, "title": title, "image": _data_url(svg.read_bytes(), "image/svg+xml"), "words": words})
    return entries


def _videos(run: Path, folder: Path) -> dict[str, Any]:
    """Clips of the first and the last finished sample folder, side by side, and their contact sheet."""
    finished = sorted(path.parent for path in (run / "samples").glob("iteration_*/samples.json"))
    sheet = folder / "contact_sheet.png"
    sheet.unlink(missing_ok=True)
    result: dict[str, Any] = {"videos_title": "Before and after", "pairs": [], "sheet": None}
    if not finished:
        return result | {"videos_note": "No sample videos yet: the first ones show the untrained model."}
    first, last = finished[0], finished[-1]
    before = figures.read_samples(first)
    stages = ", ".join(stage.replace("_", " ") for stage in before["stages"] or ())
    in_order = f" Scores: {stages}." if stages else ""
    budget = [MAX_PAGE_VIDEO_BYTES]
    if first == last:
        pairs = [{"prompt": entry["prompt"], "clips": [_clip(first, entry, budget)]} for entry in before["samples"]]
        note = f"So far there are samples of one moment only ({_moment(first)}); later ones will stand beside them.{in_order}"
        return result | {"videos_title": "Sample videos", "videos_note": note, "pairs": pairs}
    matched = figures.pair_samples(before, figures.read_samples(last))
    pairs = [{"prompt": old["prompt"], "clips": [_clip(first, old, budget), _clip(last, new, budget)]} for old, new in matched]
    if not matched:
        return result | {"videos_note": f"The samples of {_moment(first)} and {_moment(last)} share no caption."}
    figures.contact_sheet(first, last, sheet)
    note = f"The same captions and the same noise: {_moment(first)} at the left, {_moment(last)} at the right.{in_order}"
    return result | {"videos_note": note, "pairs": pairs, "sheet": _data_url(sheet.read_bytes(), "image/png")}


def _clip(folder: Path, entry: Mapping[str, Any], budget: list[int]) -> dict[str, str | None]:
    """One video for the page; takes its bytes off the budget, or shows a small still where it does not fit."""
    path = folder / entry["video"]
    size = path.stat().st_size
    video = still = None
    if size <= min(MAX_VIDEO_BYTES, budget[0]):
        budget[0] -= size
        video = _data_url(path.read_bytes(), "video/mp4")
    else:
        image = Image.open(folder / entry["still"]).convert("RGB")
        image.thumbnail((1200, 1200))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        still = _data_url(buffer.getvalue(), "image/jpeg")
    file = f"samples/{folder.name}/{path.name}"
    return {"label": _moment(folder), "scores": figures.format_scores(entry["scores"]), "video": video, "still": still, "file": file}


def _moment(folder: Path) -> str:
    iteration = int(folder.name.removeprefix("iteration_"))
    return "untrained" if iteration == 0 else f"iteration {iteration}"


def _configuration(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Sections of the page: the top level's plain values first, then each nested section with dotted keys."""
    sections: dict[str, dict[str, str]] = {"run": {}}
    for key, value in config.items():
        if isinstance(value, Mapping):
            sections[key] = dict(_flatten(value))
        else:
            sections["run"][key] = _plain(value)
    return {name: entries for name, entries in sections.items() if entries}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", _plain(value)))
    return flat


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return {"None": "none", "True": "yes", "False": "no", "{}": "none"}.get(str(value), str(value))


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.2g} s"


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
