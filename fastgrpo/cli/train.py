"""Train, as `torchrun fastgrpo/train.py` does, in one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from fastgrpo.distributed.collectives import rank
from fastgrpo.distributed.console import log_to_console
from fastgrpo.training.loop import run
from fastgrpo.training.recipe_parser import parse_config

logger = logging.getLogger("fastgrpo")


@record
def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and draw the report. Returns the exit code."""
    log_to_console()
    config, config_yaml, _ = parse_config(
        argv,
        prog="fastgrpo/train.py",
        description=(
            "Align a video diffusion model with Self-Paced GRPO. "
            "Metrics, checkpoints and videos go to <output_dir>/<name>/."
        ),
    )
    code = run(config, config_yaml)
    if rank() == 0:
        # matplotlib and the rest of the report are loaded only when it is drawn.
        from fastgrpo.evaluation.report.page import write_report

        try:
            print(f"report: {write_report(config.run_folder)}")
        except (ValueError, OSError) as error:  # the run itself is done, and its exit code stays
            logger.warning(f"no report: {error}")
    return code
