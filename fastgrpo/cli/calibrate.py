"""Measure the thresholds of the self-paced reward: train on each stage alone and see how far it
comes (supplement A).

Takes the options of `train`, and trains K short runs <name>-calibrate-<stage>. Threshold = start
+ 0.7 (end - start) of the smoothed mean reward. Works under torchrun too: `torchrun ... -m
fastgrpo calibrate`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fastgrpo.algorithm.self_paced import calibrated_threshold, smooth
from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives
from fastgrpo.errors import fail
from fastgrpo.evaluation.report import run_figures
from fastgrpo.training import figures
from fastgrpo.training.config_file import parse_config
from fastgrpo.training.loop import run
from fastgrpo.training.tracking import read_metrics

logger = logging.getLogger("fastgrpo")


@dataclass(frozen=True)
class CalibrateOptions:
    """Calibration of the thresholds."""

    iterations: int = 50
    """Iterations on each stage alone."""
    fraction: float = 0.7
    """Share of a stage's gain at which the next stage opens."""
    smoothing_window: int = 10
    """Iterations of the moving average."""

    def __post_init__(self) -> None:
        for key, ok, expected in (
            ("iterations", self.iterations >= 1, "at least 1"),
            ("fraction", 0 < self.fraction <= 1, "a number in (0, 1]"),
            ("smoothing_window", self.smoothing_window >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(f"options.{key}: expected {expected}, got {getattr(self, key)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate every stage, on all ranks; the exit code of the run that stopped, or 0."""
    config, config_yaml, options = parse_config(
        argv, CalibrateOptions, prog="python -m fastgrpo calibrate", description=__doc__
    )
    try:
        collectives.start(
            config.runtime
            # once for all the runs: a second group from the same store would find the first one's
            # addresses
        )
    except ValueError as error:
        fail(error)
    try:
        return calibrate(config, config_yaml, options)
    finally:
        collectives.stop()


def calibrate(config: TrainConfig, config_yaml: str, options: CalibrateOptions) -> int:
    """Train on each stage alone and write the thresholds; the exit code."""
    curves: dict[str, list[float]] = {}
    for number, stage in enumerate(config.reward.stages, start=1):
        alone, text = stage_alone(config, config_yaml, number, stage, options.iterations)
        logger.info(
            f"calibrate: {stage} alone, {options.iterations} iterations, in {alone.run_folder}"
        )
        code = run(alone, text)
        rows = read_metrics(alone.run_folder / "metrics.jsonl") if collectives.rank() == 0 else []
        done = collectives.gather(rows[-1]["iteration"] if rows else None)[0]
        if code or done < options.iterations:
            logger.info("calibrate: stopped; the same command with --resume auto goes on")
            return code or 1
        curves[stage] = [
            row[f"rewards/{stage}/mean"]
            for row in rows
            if 0 < row["iteration"] <= options.iterations
        ]
    if collectives.rank() == 0:
        write_thresholds(config, options, curves)
    return 0


def stage_alone(
    config: TrainConfig, config_yaml: str, number: int, stage: str, iterations: int
) -> tuple[TrainConfig, str]:
    """The configuration, and its YAML, of the run that trains stage `number` (from 1) alone."""
    name = f"{config.name}-calibrate-{stage}"
    alone = dataclasses.replace(
        config,
        name=name,
        iterations=iterations,
        pacing=dataclasses.replace(config.pacing, mode="static", static_stage=number),
    )
    tree = yaml.safe_load(config_yaml)
    tree["pacing"] |= {"mode": "static", "static_stage": number}
    return alone, yaml.safe_dump(tree | {"name": name, "iterations": iterations}, sort_keys=False)


def write_thresholds(
    config: TrainConfig, options: CalibrateOptions, curves: Mapping[str, Sequence[float]]
) -> Path:
    """`<output_dir>/<name>-calibrate/thresholds.yaml`, which `--config` takes after the recipe,
    with the curves as comments and a figure.

    The difference gate takes K - 1 thresholds, the literal one all K.
    """
    numbers = {
        stage: [float("nan") if v is None else v for v in curve] for stage, curve in curves.items()
    }
    every = {
        stage: calibrated_threshold(curve, options.smoothing_window, options.fraction)
        for stage, curve in numbers.items()
    }
    falling = [
        stage
        for stage, threshold in every.items()
        if threshold <= smooth(numbers[stage], options.smoothing_window)[0]
    ]
    for stage in falling:
        logger.info(
            f"calibrate: {stage} did not rise when trained alone, so its threshold {every[stage]:.3f} is passed from the start"
        )
    used = list(every.values())[: len(every) - (config.pacing.gate == "difference")]
    folder = Path(config.output_dir) / f"{config.name}-calibrate"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# Thresholds for the {config.pacing.gate} gate: start + {options.fraction} (end - start) of each stage's mean reward when",
        f"# trained alone for {options.iterations} iterations, smoothed over {options.smoothing_window}.",
        f"# Use: --config RECIPE --config {folder / 'thresholds.yaml'}",
        *[f"# {stage} DID NOT RISE: its threshold is passed from the start." for stage in falling],
        "pacing:",
        f"  thresholds: {[round(t, 4) for t in used]}",
        "# Where they come from, a mean reward an iteration:",
        *[
            f"#   {stage} (threshold {every[stage]:.4f}): {['-' if v is None else round(v, 4) for v in curve]}"
            for stage, curve in curves.items()
        ],
    ]
    path = folder / "thresholds.yaml"
    path.write_text("\n".join(lines) + "\n")
    rows = [
        {"iteration": i + 1}
        | {f"rewards/{stage}/mean": curve[i] for stage, curve in curves.items()}
        for i in range(options.iterations)
    ]
    figures.save_figure(
        run_figures.reward_curves(
            rows, list(curves), list(every.values()), options.smoothing_window
        ),
        folder / "curves",
    )
    logger.info(f"thresholds {', '.join(f'{stage} {t:.3f}' for stage, t in every.items())}: {path}")
    return path
