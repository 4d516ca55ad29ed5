"""The folder of a run: claim it, keep beside the metrics what made them, say how to go on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives
from fastgrpo.files import atomic_write_text
from fastgrpo.training.tracking import MetricsLog, flatten

logger = logging.getLogger("fastgrpo")


def claim(folder: Path, resume: str) -> TextIO | None:
    """Make the run folder and lock it. All ranks call this.

    Args:
        folder: The run folder.
        resume: `never` or `auto`, as configured.

    Returns:
        On rank 0 the open lock file; a process that dies lets go of it.

    Raises:
        FileExistsError: The folder holds an earlier run that is not to be resumed, or a run that
            is still going.
    """
    if resume == "never" and is_used(folder):
        raise FileExistsError(
            f"{folder} holds a run already: add `--resume auto` to go on with it, or give this one "
            "another --name"
        )
    lock, busy = None, False
    if collectives.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  (held open for the life of the run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = True
    if collectives.any_rank(busy):
        raise FileExistsError(f"{folder} is in use by another process that is still running")
    return lock


def is_used(folder: Path) -> bool:
    """Whether a run has written to its folder, as rank 0 sees it."""
    traces = (folder / "metrics.jsonl", folder / "checkpoints")
    return bool(collectives.gather(any(trace.exists() for trace in traces))[0])


@contextmanager
def open_log(
    config: TrainConfig, config_yaml: str, last_row: int | None
) -> Iterator[MetricsLog | None]:
    """Open the metrics on rank 0, and write what makes them: config.yaml and judge.json.

    Args:
        config: The configuration of this start.
        config_yaml: The same as YAML.
        last_row: Last iteration whose row is kept; -1 for none, None for a new run.
    """
    if collectives.rank() != 0:
        yield None
        return
    folder, tracking, values = config.run_folder, config.tracking, yaml.safe_load(config_yaml)
    with MetricsLog(
        folder,
        tracking.trackers,
        config=values,
        last_iteration=last_row,
        project=tracking.project,
    ) as log:
        path = folder / "config.yaml"
        if (
            last_row is not None
            and path.exists()
            and path.read_text(encoding="utf-8") != config_yaml
        ):
            # This resume changes the configuration: keep the one that made the rows so far.
            shutil.copyfile(path, folder / f"config.until_{max(last_row, 0):06d}.yaml")
        atomic_write_text(path, config_yaml)
        if judge := config.reward.describe():
            write_judge(folder / "judge.json", judge, resumed=last_row is not None)
        yield log


def write_judge(path: Path, judge: dict[str, Any], resumed: bool) -> None:
    """Keep with the scores what decided them; log what a resume finds changed.

    Args:
        path: judge.json of the run.
        judge: `RewardModel.describe`: the questions' hashes, the model, how it is asked.
        resumed: Whether the file is an earlier start's.
    """
    if resumed and path.exists():
        for line in differences(json.loads(path.read_text(encoding="utf-8")), judge):
            logger.info(f"resume: the judge has changed since the last start: {line}")
    atomic_write_text(path, json.dumps(judge, indent=1) + "\n")


def log_changes(folder: Path, config_yaml: str) -> None:
    """Log each key whose value differs from that of the run's last start."""
    path = folder / "config.yaml"
    if path.exists():
        for line in differences(
            yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(config_yaml)
        ):
            logger.info(f"resume: changed since the last start: {line}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each dotted key whose value differs between two nested mappings."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def resume_command(folder: Path) -> str:
    """The shell command that goes on with a run from the same working directory, started the way
    this process was.

    For a job on several nodes only its last part: no process knows how its launcher is called.
    """
    script = Path(sys.argv[0])
    train = shlex.quote(sys.argv[0]) if script.name == "train.py" else "-m fastgrpo train"
    ranks = str(collectives.world_size())
    launcher = shlex.quote(sys.executable)
    if os.environ.get("LOCAL_WORLD_SIZE", ranks) != ranks:
        launcher = "(your launcher)"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        own = str(Path(sys.executable).with_name("torchrun"))
        torchrun = "torchrun" if shutil.which("torchrun") == own else shlex.quote(own)
        launcher = f"{torchrun} --standalone --nproc-per-node {ranks}"
    return f"{launcher} {train} --config {shlex.quote(str(folder / 'config.yaml'))} --resume auto"
