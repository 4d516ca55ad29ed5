"""Thresholds of the self-paced reward, measured by training on each stage alone (supplement A)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from fastgrpo.algorithm.self_paced import calibrated_threshold, smooth
from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives
from fastgrpo.errors import UserError
from fastgrpo.evaluation.figures import save_figure
from fastgrpo.evaluation.options import CalibrateOptions
from fastgrpo.evaluation.report.run_figures import topics
from fastgrpo.evaluation.report.run_record import RunRecord
from fastgrpo.training.loop import run
from fastgrpo.training.run_folder import differences
from fastgrpo.training.tracking import read_metrics
from fastgrpo.training.trust import read_mapping

logger = logging.getLogger("fastgrpo")

DECIDES = ("policy", "reward", "prompts", "rollout", "scoring", "update", "seed")
"""Sections of a configuration that decide the rewards of a stage that is trained alone."""


def calibrate(config: TrainConfig, config_yaml: str, options: CalibrateOptions) -> int:
    """Train on each stage alone and write the thresholds.

    Returns:
        The exit code: 0, that of the run that stopped, or 1.
    """
    curves: dict[str, list[float | None]] = {}
    for number, stage in enumerate(config.reward.stages, start=1):
        alone, text = _only_stage(config, config_yaml, number, options.iterations)
        logger.info(
            f"calibrate: only {stage}, {options.iterations} iterations, in {alone.run_folder}"
        )
        with collectives.failing_together("calibrate"):
            if collectives.rank() == 0 and alone.resume == "auto":
                require_same(alone.run_folder, text)
        code = run(alone, text)
        rows = read_metrics(alone.run_folder / "metrics.jsonl") if collectives.rank() == 0 else []
        done = collectives.gather(rows[-1]["iteration"] if rows else None)[0]
        if code or done < options.iterations:
            logger.info("calibrate: stopped; the same command with --resume auto goes on")
            return code or 1
        trained = [row for row in rows if 0 < row["iteration"] <= options.iterations]
        curves[stage] = [row.get(f"rewards/{stage}/mean") for row in trained]
    if collectives.rank() == 0:
        _write_thresholds(config, options, curves)
    return 0


def require_same(folder: Path, config_yaml: str) -> None:
    """Check that the rows of an earlier call were made with this configuration: a threshold is read
    off one curve, not off the halves of two.

    Raises:
        UserError: What decides the rewards has changed since. Where a judge's servers are does not
            decide them.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    before, now = read_mapping(path), yaml.safe_load(config_yaml)
    one, other = ({key: tree.get(key) for key in DECIDES} for tree in (before, now))
    changed = [line for line in differences(one, other) if ".endpoints: " not in line]
    if changed:
        raise UserError(
            f"{folder} was made with another configuration: {'; '.join(changed)}. Ask for the "
            "same, or take another --name"
        )


def _only_stage(
    config: TrainConfig, config_yaml: str, number: int, iterations: int
) -> tuple[TrainConfig, str]:
    """The configuration, and its YAML, of the run that trains only stage `number` (from 1)."""
    name = f"{config.name}-calibrate-{config.reward.stages[number - 1]}"
    pacing = dataclasses.replace(config.pacing, mode="static", static_stage=number)
    alone = dataclasses.replace(config, name=name, iterations=iterations, pacing=pacing)
    tree = yaml.safe_load(config_yaml) | {"name": name, "iterations": iterations}
    tree["pacing"] |= {"mode": "static", "static_stage": number}
    return alone, yaml.safe_dump(tree, sort_keys=False)


def _write_thresholds(
    config: TrainConfig, options: CalibrateOptions, curves: Mapping[str, Sequence[float | None]]
) -> Path:
    """Write `<output_dir>/<name>-calibrate/thresholds.yaml`, which `--config` takes after the
    recipe, and the curves as a figure.

    Args:
        config: Of the training to come. The difference gate takes K - 1 thresholds, the literal
            one all K.
        options: Of the calibration.
        curves: Stage -> mean reward per iteration, None where no video had a score.
    """
    window = options.smoothing_window
    thresholds, falling = {}, []
    for stage, curve in curves.items():
        numbers = [math.nan if value is None else value for value in curve]
        thresholds[stage] = calibrated_threshold(numbers, window, options.fraction)
        if thresholds[stage] <= smooth(numbers, window)[0]:
            falling.append(stage)
            logger.info(
                f"calibrate: {stage} did not rise when only it was trained, so its threshold "
                f"{thresholds[stage]:.3f} is passed from the start"
            )
    used = [round(threshold, 4) for threshold in thresholds.values()]
    if config.pacing.gate == "difference":
        used.pop()
    folder = Path(config.output_dir) / f"{config.name}-calibrate"
    path = folder / "thresholds.yaml"
    lines = [
        f"# Thresholds for the {config.pacing.gate} gate: start + {options.fraction} (end - start) "
        "of each stage's mean reward when",
        f"# only it is trained for {options.iterations} iterations, smoothed over {window}.",
        f"# Use: --config RECIPE --config {path}",
        *(f"# {stage} DID NOT RISE: its threshold is passed from the start." for stage in falling),
        "pacing:",
        f"  thresholds: {used}",
        *(f"# {stage} (threshold {threshold:.4f})" for stage, threshold in thresholds.items()),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    means = {f"rewards/{stage}/mean": curve for stage, curve in curves.items()}
    rows = [
        {"iteration": index + 1} | {key: curve[index] for key, curve in means.items()}
        for index in range(options.iterations)
    ]
    pacing = {"thresholds": list(thresholds.values())}
    record = RunRecord(folder, config.name, rows, {"pacing": pacing})
    save_figure(topics([record], window)[0].draw(), folder / "curves")
    found = ", ".join(f"{stage} {threshold:.3f}" for stage, threshold in thresholds.items())
    logger.info(f"thresholds {found}: {path}")
    return path
