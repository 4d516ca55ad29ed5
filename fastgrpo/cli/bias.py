"""Measure how much judges' scores depend on what videos show: the coefficient of variation over
clusters of prompts (Eq. 3).

Each judge's scores are a .jsonl file with an object a line: those of `python -m fastgrpo score`, or
of any other judge (VisionReward, VideoScore) {"video": "0001.mp4", "prompt": "a cat", "score":
3.2}. Videos are matched by file name, or, if rows have no video, by prompt. Prompts are embedded
and clustered by k-means for each k; κ = 100 · std / mean is taken over the cluster means and within
clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from fastgrpo.errors import fail
from fastgrpo.evaluation.options import BiasOptions
from fastgrpo.evaluation.score_rows import MEAN


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 2 with one line for anything that cannot be used."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo bias", description=__doc__, exit_on_error=False
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="a file of scores for each judge",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        type=str,
        metavar="NAME",
        help="of the judges, in the same order; those of the files by default",
    )
    parser.add_argument(
        "--score",
        nargs="+",
        type=str,
        default=[MEAN],
        metavar="STAGE",
        help="a stage, a component (VideoAlign's raw VQ), or mean of all stages; one for all "
        "judges, or one for each",
    )
    parser.add_class_arguments(BiasOptions, as_group=False, skip={"scores", "names", "score"})
    try:
        options = BiasOptions(**parser.parse_args(argv).as_dict())
        from fastgrpo.evaluation.bias import measure_bias

        print(measure_bias(options))
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    return 0
