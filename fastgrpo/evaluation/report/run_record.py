"""What a run folder holds, read for a report. The run may still be going, so anything but the
folder itself may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastgrpo.algorithm.self_paced import smooth
from fastgrpo.config import PacingConfig
from fastgrpo.errors import UserError, require
from fastgrpo.evaluation.figures import series
from fastgrpo.training.checkpoint_names import list_checkpoints
from fastgrpo.training.pacing_note import Distance, distances
from fastgrpo.training.tracking import Row, read_metrics, stage_names
from fastgrpo.training.trust import RECORD, check_links, read_mapping

NAMES_OF_THE_RUN = ("name", "output_dir", "resume")
"""Configuration keys that differ between any two runs and change nothing that they compute."""


@dataclass(frozen=True)
class RunRecord:
    """One run folder; a field is empty if its file is missing.

    Attributes:
        folder: The run folder.
        label: Its name, with as much of the path as tells it from the other runs.
        rows: Of metrics.jsonl.
        config: Of config.yaml.
        earlier: Iteration -> the configuration up to it, from config.until_NNNNNN.yaml, which a
            resume writes.
        judge: Of judge.json.
    """

    folder: Path
    label: str
    rows: list[Row]
    config: dict[str, Any]
    earlier: dict[int, dict[str, Any]] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        """The judge's stages, easiest first."""
        return stage_names(self.rows)

    @property
    def trained(self) -> list[Row]:
        """Rows of training iterations, without that of the untrained model."""
        return [row for row in self.rows if "reward" in row]

    @property
    def thresholds(self) -> list[float]:
        """Those that paced the run; modes without gates have none."""
        pacing = self.config.get("pacing") or {}
        gated = pacing.get("mode", "self_paced") in ("self_paced", "two_stage")
        return list(pacing.get("thresholds") or []) if gated else []

    def distances(self, row: Row) -> list[Distance]:
        """How far each stage is from its threshold after a row's iteration."""
        values, fields = self.config.get("pacing") or {}, ("mode", "gate", "gate_temperature")
        known = {key: values[key] for key in fields if key in values}
        pacing = PacingConfig(thresholds=tuple(self.thresholds), **known)
        return distances(pacing, self.stages, row)

    @property
    def samples(self) -> list[Path]:
        """Complete sample folders, oldest first."""
        found = (path.parent for path in (self.folder / "samples").glob("*/samples.json"))
        return sorted(path for path in found if re.fullmatch(r"iteration_\d+", path.name))

    @property
    def missing(self) -> list[tuple[int, int]]:
        """First and last iteration of each gap: done, as a later row or a checkpoint tells, but
        without a row.
        """
        found = {row["iteration"] for row in self.rows}
        saved = self.folder / "checkpoints"
        done = list_checkpoints(saved)[:1] if saved.is_dir() and not saved.is_symlink() else []
        last = max([*found, *(int(path.name.rpartition("_")[2]) for path in done)], default=-1)
        steps = pairwise([-1, *sorted(found), last + 1])
        return [(one + 1, other - 1) for one, other in steps if other - one > 1]

    @property
    def last_iteration(self) -> int:
        """The last training iteration; 0 before the first."""
        return int(self.trained[-1]["iteration"]) if self.trained else 0

    @property
    def planned(self) -> int | None:
        """The iterations that were asked for."""
        return self.config.get("iterations")

    @property
    def seconds(self) -> float:
        """The time of all training iterations."""
        return sum(row.get("step_time") or 0.0 for row in self.trained)


@dataclass(frozen=True)
class Scores:
    """First and last mean score of each stage of a run; None for a missing one.

    Attributes:
        iterations: Of the first and the last scores.
        validation: On the validation prompts; False: on the training prompts, smoothed.
        first: By stage.
        last: By stage.
    """

    iterations: tuple[int, int]
    validation: bool
    first: dict[str, float | None]
    last: dict[str, float | None]


_MOST = {"iteration": 1e15, "step_time": 1e9}
"""The greatest numbers that a run can have had."""
MISSING = "–"
"""Stands for the value of a key that a configuration does not have."""


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders.

    Raises:
        ValueError: No folder, one given twice, one with neither config.yaml nor metrics.jsonl, or
            a broken file.
    """
    require(folders, "report", "at least one run folder", list(folders))
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        count = resolved.count(folder)
        if count > 1:
            raise UserError(f"report: expected different runs, got {folder} {count} times")
    for folder in folders:
        if not ((folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()):
            raise UserError(
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
    """Keys (dotted) whose values differ -> the value in each configuration, or `MISSING`."""
    flat = [flatten(config) for config in configs]
    rows = {
        key: [config.get(key, MISSING) for config in flat]
        for config in flat
        for key in config
        if key not in NAMES_OF_THE_RUN
    }
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def judged_alike(runs: Sequence[RunRecord]) -> bool:
    """True if one judge scored the same validation prompts with the same sampler in all runs: only
    then do scores compare.
    """

    def conditions(run: RunRecord) -> Any:
        evaluation, prompts = run.config.get("evaluation") or {}, run.config.get("prompts") or {}
        sampler = evaluation.get("sde"), evaluation.get("num_generations")
        return run.config.get("reward"), run.judge, prompts.get("validation"), sampler

    return all(conditions(run) == conditions(runs[0]) for run in runs)


def scores_of(run: RunRecord, window: int) -> Scores | None:
    """First and last validation scores; with fewer than two evaluations, the training scores
    smoothed over `window` iterations; None with fewer than two of these as well.
    """
    for validation in (True, False):
        prefix = "eval/rewards" if validation else "rewards"
        curves = {}
        for stage in run.stages:
            iterations, values = series(run.rows, f"{prefix}/{stage}/mean")
            smoothed = values if validation else smooth(values, window)
            curves[stage] = dict(zip(iterations, smoothed, strict=True))
        found = [iteration for curve in curves.values() for iteration in curve]
        if len(set(found)) >= 2:
            ends = min(found), max(found)
            first, last = ({s: curve.get(end) for s, curve in curves.items()} for end in ends)
            return Scores(ends, validation, first, last)
    return None


def _read_run(folder: Path, label: str) -> RunRecord:
    check_links(folder, *RECORD, "samples")
    metrics, judge = folder / "metrics.jsonl", folder / "judge.json"
    earlier = {}
    for path in sorted(folder.glob("config.until_*.yaml")):
        if match := re.fullmatch(r"config\.until_(\d+)\.yaml", path.name):
            earlier[int(match[1])] = _read_config(path)
    return RunRecord(
        folder=folder,
        label=label,
        rows=_read_rows(metrics) if metrics.is_file() else [],
        config=_read_config(folder / "config.yaml"),
        earlier=earlier,
        judge=read_mapping(judge) if judge.is_file() else {},
    )


def _read_rows(path: Path) -> list[Row]:
    """The rows of metrics.jsonl, with names and numbers that a figure can show."""
    rows = read_metrics(path)
    for row in rows:
        for key, value in row.items():
            most = _MOST.get(key, 1e100)
            where = f"{path}: iteration {row['iteration']:.0f}: {key!r}"
            require(key.isprintable(), where, "a name that can be printed", key)
            ok = value is None or abs(value) <= most
            require(ok, where, f"a number of at most {most:g}", value)
    return rows


def _read_config(path: Path) -> dict[str, Any]:
    """A config.yaml, {} if it is missing; what a report takes of it is as a run writes it."""
    config = read_mapping(path) if path.is_file() else {}
    for section in ("pacing", "evaluation", "prompts"):
        value = config.get(section)
        expected = "keys and their values"
        require(value is None or isinstance(value, dict), f"{path}: {section}", expected, value)
    planned, thresholds = config.get("iterations"), (config.get("pacing") or {}).get("thresholds")
    ok = planned is None or type(planned) is int
    require(ok, f"{path}: iterations", "an integer", planned)
    ok = thresholds is None or (
        isinstance(thresholds, list) and all(type(one) in (int, float) for one in thresholds)
    )
    require(ok, f"{path}: pacing.thresholds", "a list of numbers", thresholds)
    width = (config.get("pacing") or {}).get("gate_temperature", 1.0)
    ok = type(width) in (int, float) and width > 0
    require(ok, f"{path}: pacing.gate_temperature", "a positive number", width)
    return config


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ, with the same number of parts."""
    parts = 1
    while True:
        labels = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(labels)) == len(labels):
            # A name need not be UTF-8, but is drawn.
            return [label.encode(errors="backslashreplace").decode() for label in labels]
        parts += 1
