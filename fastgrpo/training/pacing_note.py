"""How far the stages are from their thresholds, said early: a gate far from its threshold does not
move, and the self-paced run is then a run of one stage.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastgrpo.algorithm.self_paced import gated_thresholds
from fastgrpo.config import PacingConfig, TrainConfig

logger = logging.getLogger("fastgrpo")

FAR = 4.0
"""Gate temperatures from a threshold beyond which a gate counts as shut or open: sigmoid(4) = .982.
"""
REMINDER = 0.2
"""Share of a run's iterations after which a gate that is still far is a warning."""


@dataclass(frozen=True)
class Distance:
    """A stage's mean score against its threshold.

    Attributes:
        stage: Its name.
        mean: What the gates see of it, or its mean score.
        threshold: `pacing.thresholds`.
        temperatures: (mean - threshold) / gate_temperature.
    """

    stage: str
    mean: float
    threshold: float
    temperatures: float


def distances(
    pacing: PacingConfig, stages: Sequence[str], row: Mapping[str, float | None]
) -> list[Distance]:
    """The distances of the stages that have a gate, after the iteration of a row of metrics.

    Args:
        pacing: The `pacing` section.
        stages: Names of the judge's K stages.
        row: With `competence/<stage>`, or `rewards/<stage>/mean` under `competence: group`. A stage
            without either is left out.
    """
    found = []
    thresholds = gated_thresholds(pacing, len(stages))
    for stage, threshold in zip(stages, thresholds, strict=False):
        mean = row.get(f"competence/{stage}", row.get(f"rewards/{stage}/mean"))
        if mean is not None and math.isfinite(mean):
            far = (mean - threshold) / pacing.gate_temperature
            found.append(Distance(stage, mean, threshold, far))
    return found


def describe_distances(found: Sequence[Distance]) -> str:
    """The distances in one line, such as `visual_quality 0.600, 7.5 T below its threshold 0.75`."""
    return "; ".join(
        f"{d.stage} {d.mean:.3f}, {abs(d.temperatures):.1f} T "
        f"{'below' if d.temperatures < 0 else 'above'} its threshold {d.threshold:g}"
        for d in found
    )


def stuck_stage(
    pacing: PacingConfig, stages: Sequence[str], found: Sequence[Distance]
) -> str | None:
    """What a run with these distances trains until a mean has moved far, in words; None if a gate
    is near its threshold and will move.
    """
    if len(found) < len(gated_thresholds(pacing, len(stages))) or not found:
        return None
    if pacing.gate == "literal":
        all_far = all(abs(d.temperatures) > FAR for d in found)
        return "the stage weights stay as they are" if all_far else None
    # The difference gate opens one stage after the other: the first one that is not far above its
    # threshold decides.
    for d in found:
        if d.temperatures < -FAR:
            return f"only {d.stage} is trained until its mean has risen to about {d.threshold:g}"
        if d.temperatures <= FAR:
            return None
    last = stages[1] if pacing.mode == "two_stage" else stages[-1]
    return f"only {last} is trained, from the start"


def log_pacing(config: TrainConfig, row: Mapping[str, float | None]) -> None:
    """After the first iteration, log how far each stage is from its threshold, and again after
    REMINDER of the run if a gate is still far.

    The first is a warning where a stage is far above its threshold and the gate is `difference`:
    nothing of it is ever trained.

    Args:
        config: The configuration of the run.
        row: Metrics of an iteration.
    """
    stages, iteration = config.reward.stages, row["iteration"]
    found = distances(config.pacing, stages, row)
    stuck = stuck_stage(config.pacing, stages, found)
    reminder = iteration == max(2, round(REMINDER * config.iterations))
    if not found or not (iteration == 1 or (reminder and stuck)):
        return
    over = [d.stage for d in found if d.temperatures > FAR]
    skipped = ", ".join(over) if config.pacing.gate == "difference" else ""
    level = logging.WARNING if reminder or skipped else logging.INFO
    said = stuck or (f"{skipped} is hardly trained" if skipped else "")
    consequence = (
        f": {said}. `python -m fastgrpo calibrate` measures the thresholds of this judge"
        if said
        else ""
    )
    logger.log(level, f"pacing: {describe_distances(found)}{consequence}")
