"""Train, as `torchrun fastgrpo/train.py` does, in one process."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.config import TrainConfig
from fastgrpo.distributed.console import log_to_console
from fastgrpo.training.prompts import HUB, read_prompts
from fastgrpo.training.recipe_parser import parse_config
from fastgrpo.training.used_folder import refuse_used

logger = logging.getLogger("fastgrpo")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and draw the report. Returns the exit code."""
    log_to_console()
    config, config_yaml, _ = parse_config(
        argv,
        check=refuse_at_once,
        prog="fastgrpo/train.py",
        description=(
            "Align a video diffusion model with Self-Paced GRPO. "
            "Metrics, checkpoints and videos go to <output_dir>/<name>/."
        ),
    )
    # Takes seconds: not before what can be refused without it.
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(_train)(config, config_yaml) or 0


def refuse_at_once(values: Any) -> None:
    """Check the commonest mistakes, a name that is taken and a file that is not there, before torch
    and diffusers are imported. `preflight` and `run_folder` check them again, with all the rest.

    Args:
        values: The configuration without policy and reward.

    Raises:
        ValueError, OSError: One of them was made.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", world_size) == world_size:
        # On several nodes the first rank alone looks: others may not have its folder.
        refuse_used(Path(values.output_dir) / values.name, values.resume)
    for key in ("train", "validation"):
        path = getattr(values.prompts, key)
        if path is not None and not path.startswith(HUB):
            read_prompts(path, f"prompts.{key}")


def _train(config: TrainConfig, config_yaml: str) -> int:
    """Train and draw the report; an error is told to torchrun."""
    from fastgrpo.distributed.collectives import rank
    from fastgrpo.training.loop import run

    code = run(config, config_yaml)
    if rank() == 0:
        # matplotlib and the rest of the report are loaded only when it is drawn.
        from fastgrpo.evaluation.report.page import write_report

        try:
            print(f"report: {write_report(config.run_folder)}")
        except (ValueError, OSError) as error:  # the run itself is done, and its exit code stays
            logger.warning(f"no report: {error}")
    return code
