"""Generate the same prompts from the same noise with the base and the trained weights of a run,
side by side.

Works for any checkpoint in one process, and under torchrun (`torchrun ... -m fastgrpo sample`),
each process its share of the prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from fastgrpo.errors import fail
from fastgrpo.evaluation.options import ComparisonOptions
from fastgrpo.training.trust import OPTION
from fastgrpo.training.used_folder import require_run

logger = logging.getLogger("fastgrpo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 2 with one line for anything that cannot be used."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo sample", description=__doc__, exit_on_error=False
    )
    parser.add_argument("run", type=str, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--no_scores",
        action="store_true",
        help="do not let the run's judge score the videos; a judge that cannot be loaded leaves "
        "them without scores too, with a note",
    )
    parser.add_argument("--trust", action="store_true", help=OPTION)
    skip = {"run", "no_scores", "trust"}
    parser.add_class_arguments(ComparisonOptions, as_group=False, skip=skip)
    try:
        options = ComparisonOptions(**parser.parse_args(argv).as_dict())
        require_run(Path(options.run))  # before torch is loaded
        from fastgrpo.evaluation.comparison import compare_weights

        folder = compare_weights(options)
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    logger.info(f"videos, stills, scores and comparison.png: {folder}")
    return 0
