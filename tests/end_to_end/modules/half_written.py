"""A command that is killed with its seventh video half written."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import fastgrpo.__main__
from fastgrpo.evaluation import evaluation_videos


def main(argv: list[str]) -> int:
    """`python -m fastgrpo ARGV`."""
    own, made = evaluation_videos.write_video, list[Path]()

    def write_video(path: Path, *given: Any) -> None:
        own(path, *given)
        made.append(path)
        if len(made) == 7:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    evaluation_videos.write_video = write_video
    return fastgrpo.__main__.main(argv)
