"""Mean and spread of the stage scores over a set of videos, with confidence intervals (Fig. 7);
several sets side by side.

Takes the files of `python -m fastgrpo score`, other .jsonl files with {"video": path, "rewards":
{stage: number}} a line, and samples.json beside saved samples. The 95 % intervals are Student's t
over prompts, so several videos of one prompt do not count as independent ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from fastgrpo.errors import fail
from fastgrpo.evaluation.stages import compare_stages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 2 with one line for anything that cannot be used."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo stages", description=__doc__, exit_on_error=False
    )
    parser.add_argument(
        "scores",
        nargs="+",
        type=Path,
        metavar="SCORES",
        help="a file of scores for each set of videos",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        type=str,
        metavar="NAME",
        help="of the sets, in the same order; those of the files by default",
    )
    parser.add_argument(
        "--components",
        action="store_true",
        help="a published model's raw scores, such as VideoAlign's VQ, MQ and TA, in place of the "
        "rewards",
    )
    parser.add_function_arguments(
        compare_stages, as_group=False, skip={"scores", "names", "components"}
    )
    try:
        print(compare_stages(**parser.parse_args(argv).as_dict()))
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    return 0
