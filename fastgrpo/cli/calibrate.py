"""Measure the thresholds of the self-paced reward: train on each stage alone and see how far it
comes (supplement A).

Takes the options of `train`, and trains K short runs <name>-calibrate-<stage>. Threshold = start
+ 0.7 (end - start) of the smoothed mean reward. Works under torchrun too: `torchrun ... -m
fastgrpo calibrate`.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastgrpo.errors import INPUT_ERRORS, fail
from fastgrpo.evaluation.options import CalibrateOptions
from fastgrpo.training.recipe_parser import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate every stage, on all ranks; the exit code of the run that stopped, or 0."""
    config, config_yaml, options = parse_config(
        argv, CalibrateOptions, prog="python -m fastgrpo calibrate", description=__doc__
    )
    from fastgrpo.distributed import collectives
    from fastgrpo.evaluation.calibration import calibrate

    try:
        # Once for all the runs: a second group from the same store would find the first one's
        # addresses.
        collectives.start(config.runtime)
    except ValueError as error:
        fail(error)
    try:
        return calibrate(config, config_yaml, options)
    except INPUT_ERRORS as error:
        fail(error)
    finally:
        collectives.stop()
