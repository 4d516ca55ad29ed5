"""Whether a folder holds a run; without torch, so that a start that must be refused is refused at
once.
"""

from __future__ import annotations

from pathlib import Path

SAVED = ".saved"
"""Name of the newest checkpoint, beside the checkpoints: it tells a run that has had some."""


def is_used(folder: Path) -> bool:
    """Whether there is something of a run in a folder that can be lost: a row, a checkpoint, or
    exported weights. The traces of a start that failed earlier are not.
    """
    metrics = folder / "metrics.jsonl"
    has_rows = metrics.exists() and metrics.stat().st_size > 0
    kept = (folder / name for name in (SAVED, "transformer", "export"))
    return has_rows or has_traces(folder) or any(path.exists() for path in kept)


def has_traces(folder: Path) -> bool:
    """Whether there are checkpoints, or what is left of them: a link, damaged ones."""
    found = (folder / "checkpoints").glob("*")  # a disk mounted there has a lost+found
    return any(path.name.startswith(("iteration_", "latest")) for path in found)


def require_run(folder: Path) -> None:
    """Check that a folder is that of a run.

    Raises:
        FileNotFoundError: It has no config.yaml.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"run: expected a run folder with config.yaml, found none at {folder}"
        )


def refuse_used(folder: Path, resume: str) -> None:
    """Check that a start loses nothing of an earlier run.

    Args:
        folder: The run folder.
        resume: `never` or `auto`, as configured.

    Raises:
        FileExistsError: The folder holds an earlier run that is not to be resumed.
    """
    if resume == "never" and is_used(folder):
        raise FileExistsError(
            f"{folder} holds a run already: add `--resume auto` to go on with it, or give "
            "this one another --name"
        )
