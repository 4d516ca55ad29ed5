"""The folder of a run: claim it, keep beside the metrics what made them, say how to go on."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives
from fastgrpo.errors import UserError
from fastgrpo.files import UNSUPPORTED, atomic_write_text, keep_copy
from fastgrpo.training import checkpoint, trust
from fastgrpo.training.tracking import MetricsLog, flatten, read_metrics
from fastgrpo.training.used_folder import SAVED, has_traces, is_used, refuse_used

logger = logging.getLogger("fastgrpo")

WRITTEN = (
    *trust.RECORD,
    SAVED,
    ".lock",
    "tracker_id",
    "checkpoints",
    "samples",
    "transformer",
    "report",
)
"""What a run writes to its folder, besides what trackers write."""
_LARGE = ("checkpoints", "samples")


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
        UserError: Links lead out of the folder, and it was not made here.
        OSError: It cannot be written.
    """
    lock = None
    with collectives.failing_together("the run folder"):
        if collectives.rank() == 0:
            if not trust.is_made_here(folder):
                # Before the first start there is nothing of anybody in it, and a person may have
                # put the large folders elsewhere.
                is_new = not (is_used(folder) or (folder / "config.yaml").exists())
                trust.check_links(folder, *{*WRITTEN} - {*(_LARGE if is_new else ())})
            refuse_used(folder, resume)
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
    return lock


def lock_folder(folder: Path) -> TextIO:
    """Open and lock `folder`/.lock; where the file system has no locks, with a warning.

    Raises:
        FileExistsError: Another process has locked it.
        OSError: It cannot be written, or it is a link.
    """

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    lock = open(folder / ".lock", "w", opener=opener)  # noqa: SIM115  (held open by the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise FileExistsError(
                f"{folder} is in use by another process that is still running"
            ) from error
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning(
            f"note: the file system of {folder} has no locks ({error.strerror}): start one run "
            "at a time in it"
        )
    return lock


def find_checkpoint(config: TrainConfig) -> tuple[Path | None, bool]:
    """What a start goes on from. All ranks call this.

    Returns:
        The newest whole checkpoint, if there is one and it is wanted, and whether the folder holds
        a run.

    Raises:
        UserError: Every checkpoint is damaged; or all are gone, though there were some; or
            metrics.jsonl is damaged.
    """
    folder = config.run_folder
    if config.resume == "never":
        return None, False
    found = checkpoint.newest(folder / "checkpoints")
    used = found is not None
    with collectives.failing_together("resume"):
        if collectives.rank() == 0:
            if found is None:
                used = is_used(folder)
                _require_none_lost(folder, config.checkpoint.interval)
            else:
                checkpoint.prune(folder / "checkpoints", config.checkpoint.keep)
    if collectives.any_rank(used and found is None):
        logger.warning(f"resume: no checkpoint in {folder} yet; starting over")
        return None, True
    return found, used


def _require_none_lost(folder: Path, interval: int) -> None:
    """Check that a run without checkpoints never had one.

    Args:
        folder: The run folder.
        interval: Iterations between checkpoints, if its config.yaml does not tell.

    Raises:
        UserError: It had.
    """
    metrics, saved = folder / "metrics.jsonl", folder / SAVED
    rows = read_metrics(metrics) if metrics.is_file() else []
    last = max((row["iteration"] for row in rows), default=-1)
    with suppress(UserError, KeyError, TypeError, ValueError):
        interval = int(trust.read_mapping(folder / "config.yaml")["checkpoint"]["interval"])
    name = ""
    with suppress(OSError, ValueError):
        name = saved.read_text().strip()[:100]
    # The row of an iteration is written before its checkpoint.
    traces = [(folder / n).exists() for n in ("transformer", "export")]
    if name or last > interval or any(traces) or has_traces(folder):
        raise UserError(
            f"resume: expected the checkpoints of a run in {folder / 'checkpoints'}, found none, "
            f"though {folder} has the record of one that had some"
            + (f", the newest {name}" if name else f", up to iteration {last}" * (last >= 0))
            + ". Put them back (is a disk not mounted?), or start over under another --name"
        )


def note_saved(folder: Path, iteration: int) -> None:
    """Leave a trace of a checkpoint that a loss of the checkpoints does not take along."""
    with suppress(OSError):  # the checkpoint itself is whole
        atomic_write_text(folder / SAVED, f"iteration_{iteration:06d}\n")


def open_log(config: TrainConfig, config_yaml: str, last_row: int | None) -> MetricsLog | None:
    """Start the trackers and open the metrics. All ranks call this.

    Args:
        config: The configuration of this start.
        config_yaml: The same as YAML.
        last_row: Last iteration whose row is kept; -1 for none, None for a new run.

    Returns:
        The log, on rank 0.

    Raises:
        UserError: A tracker does not start, or metrics.jsonl is damaged.
    """
    log = None
    with collectives.failing_together("the metrics"):
        if collectives.rank() == 0:
            log = MetricsLog(
                config.run_folder,
                config.tracking.trackers,
                config=yaml.safe_load(config_yaml),
                last_iteration=last_row,
                project=config.tracking.project,
            )
    return log


def write_record(config: TrainConfig, config_yaml: str, last_row: int | None) -> None:
    """Write what makes the rows, config.yaml and judge.json, and log what a resume changes. All
    ranks call this.

    Args:
        config, config_yaml, last_row: As for `open_log`.
    """
    with collectives.failing_together("the record of the run"):
        if collectives.rank() == 0:
            folder, resumed = config.run_folder, last_row is not None
            path, values = folder / "config.yaml", yaml.safe_load(config_yaml)
            changes = _changes(path, values, resumed)
            for line in changes:
                logger.info(f"resume: changed since the last start: {line}")
            if changes:
                # Keep the configuration that made the rows so far.
                keep_copy(path, f"config.until_{max(last_row or 0, 0):06d}.yaml")
            atomic_write_text(path, config_yaml)
            trust.sign(folder)
            if judge := config.reward.describe():
                path = folder / "judge.json"
                for line in _changes(path, judge, resumed):
                    logger.info(f"resume: the judge has changed since the last start: {line}")
                atomic_write_text(path, json.dumps(judge, indent=1) + "\n")


def _changes(path: Path, now: Mapping[str, Any], resumed: bool) -> list[str]:
    """How a file of an earlier start differs from its new content; of a damaged one keep a copy."""
    if not resumed or not path.exists():
        return []
    try:
        return differences(trust.read_mapping(path), now)
    except UserError as error:
        copy = keep_copy(path, f"{path.stem}.damaged{path.suffix}")
        logger.warning(f"resume: {error}; it is kept as {copy.name} and written anew")
        return []


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
