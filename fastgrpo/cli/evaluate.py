"""VBench: sample the videos that it judges, and turn its result files into scores, tables and a
figure.

python -m fastgrpo evaluate sample RUN --prompts VBench_full_info.json   (alone, or under torchrun,
one process per GPU)
python -m fastgrpo evaluate vbench RESULTS [RESULTS ...]

Between the two VBench's own command line runs, in its own environment: `vbench evaluate
--videos_path OUTPUT/videos --dimension NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from fastgrpo.errors import fail
from fastgrpo.evaluation.options import EvaluationOptions
from fastgrpo.evaluation.vbench_scores import SUFFIX
from fastgrpo.evaluation.vbench_tables import compare_vbench
from fastgrpo.training.trust import OPTION
from fastgrpo.training.used_folder import require_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 2 with one line for anything that cannot be used."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo evaluate",
        description=__doc__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="action")
    commands.add_subcommand(
        "sample",
        sample_parser(),
        help="videos of every prompt, named and numbered as VBench wants them",
    )
    commands.add_subcommand(
        "vbench",
        vbench_parser(),
        help="quality, semantic and total score from VBench's result files, several runs side by "
        "side",
    )
    try:
        arguments = parser.parse_args(argv).as_dict()
        if arguments["action"] == "vbench":
            print(compare_vbench(**arguments["vbench"]))
            return 0
        options = EvaluationOptions(**arguments["sample"])
        require_run(Path(options.run))  # before torch is loaded
        from fastgrpo.distributed import collectives
        from fastgrpo.evaluation.evaluation_videos import sample_evaluation

        text = sample_evaluation(options)
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    if collectives.rank() == 0:
        print(text)
    return 0


def sample_parser() -> jsonargparse.ArgumentParser:
    """Of `evaluate sample`."""
    parser = jsonargparse.ArgumentParser(
        exit_on_error=False,
        description="Sample the videos that VBench judges, or those of other prompts, with one "
        "model; videos that are there already are kept.",
    )
    parser.add_argument("run", type=str, metavar="RUN", help="a run folder")
    parser.add_argument("--trust", action="store_true", help=OPTION)
    parser.add_class_arguments(EvaluationOptions, as_group=False, skip={"run", "trust"})
    return parser


def vbench_parser() -> jsonargparse.ArgumentParser:
    """Of `evaluate vbench`."""
    parser = jsonargparse.ArgumentParser(
        exit_on_error=False,
        description="VBench's sixteen dimensions, and its quality, semantic and total score, from "
        "its result files; several runs beside the first.",
    )
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help=f"for each run its *{SUFFIX}, or a folder of them",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON instead of a table: of one run its object, of several {name: object}",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        type=str,
        metavar="NAME",
        help="of the runs, in the same order; those of the files by default",
    )
    parser.add_function_arguments(compare_vbench, as_group=False, skip={"results", "names", "json"})
    return parser
