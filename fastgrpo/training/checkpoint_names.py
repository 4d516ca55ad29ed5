"""Which checkpoints there are, and of which iterations, by their names; without torch."""

from __future__ import annotations

from pathlib import Path

from fastgrpo.errors import require

PREFIX = "iteration_"


def iteration_of(checkpoint: Path) -> int:
    """The iteration that a checkpoint was written after.

    Raises:
        UserError: Its folder has another name than `save` gave it.
    """
    number = checkpoint.name.removeprefix(PREFIX)
    require(number.isdecimal(), "checkpoint", f"a folder {PREFIX}NNNNNN", checkpoint.name)
    return int(number)


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first; not yet verified."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and not p.is_symlink()]
    finished = [p for p in found if p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(finished, key=iteration_of, reverse=True)
