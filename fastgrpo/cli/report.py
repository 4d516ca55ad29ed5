"""`fastgrpo report RUN [RUN ...]`: curves, scores and videos of runs on one self-contained page.

Works on a run that is still going.
"""

from __future__ import annotations

from pathlib import Path

import jsonargparse

from fastgrpo.errors import fail
from fastgrpo.evaluation.report.page import write_report

ATTACH = (
    "folders of other commands (an ablation, a judge's bias) whose figures, tables and texts are "
    "shown on the page as well; <run>-calibrate, where it lies beside a run, is shown without "
    "being named"
)


def main(argv: list[str] | None = None) -> int:
    """Write the report and print its path."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo report",
        description=(
            "Curves, scores and videos of one run, or of several side by side, on one HTML page "
            "that needs no network."
        ),
        exit_on_error=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, finished or going; several are compared to the first",
    )
    parser.add_argument("--attach", nargs="+", type=Path, default=[], metavar="FOLDER", help=ATTACH)
    parser.add_function_arguments(write_report, skip={"runs", "attach"})
    try:
        arguments = parser.parse_args(argv).as_dict()
        print(write_report(*arguments.pop("runs"), **arguments))
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    return 0
