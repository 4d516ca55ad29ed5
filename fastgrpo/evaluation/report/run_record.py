"""What a run folder holds, read for a report: while the run is going as well, so anything but the
folder itself may still be missing.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastgrpo.algorithm.self_paced import smooth
from fastgrpo.training.tracking import Row, read_metrics, stage_names

NAMES_OF_THE_RUN = ("name", "output_dir", "resume")
"""Keys of the configuration that differ between any two runs and change nothing of what they
compute.
"""


@dataclass(frozen=True)
class RunRecord:
    """One run folder: metrics.jsonl, config.yaml, those that a resume replaced, and judge.json,
    each empty where the file is not there.
    """

    folder: Path
    label: str
    """Its name, with as much of the path as tells it from the other runs."""
    rows: list[Row]
    config: dict[str, Any]
    earlier: dict[int, dict[str, Any]]
    """Iteration -> the configuration up to it, from config.until_NNNNNN.yaml."""
    judge: dict[str, Any]

    @property
    def stages(self) -> tuple[str, ...]:
        """The judge's stages, easiest first."""
        return stage_names(self.rows)

    @property
    def trained(self) -> list[Row]:
        """Rows of training iterations: without that of the untrained model."""
        return [row for row in self.rows if "reward" in row]

    @property
    def thresholds(self) -> list[float]:
        """Those that paced the run: the modes without gates have none."""
        pacing = self.config.get("pacing") or {}
        return (
            list(pacing.get("thresholds") or [])
            if pacing.get("mode", "self_paced") in ("self_paced", "two_stage")
            else []
        )

    @property
    def samples(self) -> list[Path]:
        """Finished sample folders, oldest first."""
        return sorted(
            path.parent for path in (self.folder / "samples").glob("iteration_*/samples.json")
        )


@dataclass(frozen=True)
class Scores:
    """First and last mean score of each stage of a run; None where there is none."""

    iterations: tuple[int, int]
    validation: bool
    """Over validation captions; False: smoothed, over those of the training."""
    first: dict[str, float | None]
    last: dict[str, float | None]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders, each once.

    Raises:
        ValueError: none given, one given twice, no run folder (neither config.yaml nor
            metrics.jsonl), or a file in it that is broken.
    """
    if not folders:
        raise ValueError("report: expected at least one run folder, got none")
    resolved = [folder.resolve() for folder in folders]
    for folder, count in Counter(resolved).items():
        if count > 1:
            raise ValueError(f"report: expected different runs, got {folder} {count} times")
    for folder in folders:
        if not ((folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()):
            raise ValueError(
                f"report: expected a run folder with config.yaml or metrics.jsonl, got {folder}"
            )
    return [
        _read_run(folder, label) for folder, label in zip(folders, _labels(resolved), strict=True)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each configuration, for the keys that are not the same in all;
    `Missing` where one has no such key.
    """
    flat = [flatten(config) for config in configs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = {
        key: [config.get(key, Missing) for config in flat]
        for key in keys
        if key not in NAMES_OF_THE_RUN
    }
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


class Missing:
    """Stands for the value of a key that a configuration does not have."""


def judged_alike(runs: Sequence[RunRecord]) -> bool:
    """Whether one judge scored the same validation captions with the same sampler in all runs: only
    then do scores compare.
    """

    def what(run: RunRecord) -> Any:
        sampler = (
            (run.config.get("evaluation") or {}).get("sde"),
            (run.config.get("evaluation") or {}).get("num_generations"),
        )
        prompts = run.config.get("prompts") or {}
        return run.config.get("reward"), run.judge, prompts.get("validation"), sampler

    return all(what(run) == what(runs[0]) for run in runs)


def scores_of(run: RunRecord, window: int) -> Scores | None:
    """First and last validation scores, or where fewer than two evaluations were made the training
    scores smoothed over `window` iterations.

    None where there are not two points of either.
    """
    for validation in (True, False):
        series = {
            stage: _series(run.rows, f"{'eval/' if validation else ''}rewards/{stage}/mean")
            for stage in run.stages
        }
        iterations = sorted({iteration for points in series.values() for iteration in points})
        if len(iterations) < 2:
            continue
        if not validation:
            series = {
                stage: dict(zip(points, smooth(list(points.values()), window), strict=True))
                for stage, points in series.items()
            }
        ends = iterations[0], iterations[-1]
        first, last = ({stage: points.get(end) for stage, points in series.items()} for end in ends)
        return Scores(ends, validation, first, last)
    return None


def judge_totals(run: RunRecord) -> dict[str, float]:
    """Sum over the run of what the judge counts (`judge/...`) and of the videos without a score, in
    the order of the rows.
    """
    totals: dict[str, float] = {}
    for row in run.trained:
        for key, value in row.items():
            if key.startswith("judge/") or key == "num_invalid_videos":
                totals[key] = totals.get(key, 0) + (value or 0)
    return totals


def _series(rows: Sequence[Row], key: str) -> dict[int, float]:
    return {
        row["iteration"]: float(row[key])
        for row in rows
        if row.get(key) is not None and math.isfinite(row[key])
    }


def _read_run(folder: Path, label: str) -> RunRecord:
    metrics = folder / "metrics.jsonl"
    numbered = {
        path: re.fullmatch(r"config\.until_(\d+)\.yaml", path.name)
        for path in sorted(folder.glob("config.until_*.yaml"))
    }
    return RunRecord(
        folder=folder,
        label=label,
        rows=read_metrics(metrics) if metrics.is_file() else [],
        config=_read_mapping(folder / "config.yaml"),
        earlier={int(match[1]): _read_mapping(path) for path, match in numbered.items() if match},
        judge=_read_mapping(folder / "judge.json"),
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        mapping = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(mapping).__name__}")
    return mapping


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ, as many parts for all."""
    parts = 1
    while True:
        labels = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
        parts += 1
