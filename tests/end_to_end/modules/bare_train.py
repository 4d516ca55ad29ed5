"""The commands, the trainer without its figures, which take three times as long as a tiny run: an
empty report.html in their place.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import fastgrpo.__main__
import fastgrpo.evaluation.report.page


def main(argv: list[str]) -> int:
    """`python -m fastgrpo ARGV`."""
    fastgrpo.evaluation.report.page.write_report = empty_report
    return fastgrpo.__main__.main(argv)


def train(argv: list[str]) -> NoReturn:
    raise SystemExit(main(["train", *argv]))


def empty_report(run: Path) -> Path:
    (run / "report").mkdir(exist_ok=True)
    (run / "report" / "report.html").write_text("")
    return run / "report" / "report.html"
