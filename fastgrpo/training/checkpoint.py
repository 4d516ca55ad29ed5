"""Checkpoints: torch.distributed.checkpoint for tensors, one JSON file for the rest, and a manifest
that makes them verifiable.

    checkpoints/iteration_000050/   *.distcp, .metadata   model, optimizer, EMA
                                    state.json            counters, pacer
                                    manifest.json         size and SHA-256 of every other file
    checkpoints/latest              link to the newest

The manifest is written last. A checkpoint is written under a hidden name and renamed when it is
whole, so no name ever points to half of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from fastgrpo.distributed.collectives import gather, rank
from fastgrpo.files import sync

logger = logging.getLogger("fastgrpo")

_PREFIX = "iteration_"
_REFUSED = ".refused"


def save(
    folder: Path, iteration: int, tensors: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint on all ranks together, and point `latest` to it.

    Args:
        folder: Holds the run's checkpoints.
        iteration: The last finished one.
        tensors: A (nested) state dict for torch.distributed.checkpoint.
        state: The rest, JSON-serialisable; rank 0's is written.
        keep: How many of the newest checkpoints stay.

    Returns:
        `folder`/iteration_NNNNNN.
    """
    final = folder / f"{_PREFIX}{iteration:06d}"
    partial = folder / f".partial-{final.name}"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        dcp.save(tensors, checkpoint_id=partial)
    dist.barrier()
    if rank() == 0:
        (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        _write_manifest(partial)
        if final.exists():  # this iteration was done before, and again after a resume
            _discard(final)
        os.replace(partial, final)
        sync(folder)
        _point_latest(folder, final.name)
        for old in list_checkpoints(folder)[keep:]:
            _discard(old)
    dist.barrier()
    return final


def load(folder: Path, tensors: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """Load the newest checkpoint that verifies, on all ranks together.

    A damaged one is logged with the file that is wrong and renamed to `<name>.refused`, and the
    one before it is taken.

    Args:
        folder: Holds the run's checkpoints.
        tensors: A state dict, loaded in place. A part of it (a top-level key) that the checkpoint
            does not have is removed from it.

    Returns:
        The iteration and the `state` of `save`; None if there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints, but none of them is whole, or they are of another
            network.
    """
    name = gather(_newest_whole(folder) if rank() == 0 else None)[0]
    if name is None:
        return None
    if name == "":
        raise ValueError(
            f"resume: every checkpoint in {folder} is damaged; they are kept as *{_REFUSED}. "
            "Start a run of another name"
        )
    path = folder / name
    for part in tensors.keys() - parts(path):
        del tensors[part]
    _read(path, tensors)
    return int(name.removeprefix(_PREFIX)), json.loads((path / "state.json").read_text())


def load_weights(checkpoint: Path, transformer: nn.Module, ema: bool) -> None:
    """Load a checkpoint's trained weights in place. Needs no process group.

    Args:
        checkpoint: Its folder.
        transformer: Frozen parameters stay as they are.
        ema: Take the parameters' average instead; the buffers are the network's own.

    Raises:
        ValueError: The checkpoint is of another network, or has no EMA (`parts`).
    """
    parameters = dict(transformer.named_parameters())
    wanted: dict[str, dict[str, Any]] = {"model": {}, "ema": {}}
    for name, tensor in transformer.state_dict().items():
        if name not in parameters:  # a buffer
            wanted["model"][name] = tensor
        elif parameters[name].requires_grad:
            wanted["ema" if ema else "model"][name] = tensor
    with warnings.catch_warnings():
        # One process alone is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        _read(checkpoint, wanted)


def _read(checkpoint: Path, tensors: dict[str, Any]) -> None:
    try:
        dcp.load(tensors, checkpoint_id=checkpoint)
    except CheckpointException as error:  # a BaseException, which no command would catch
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{checkpoint}: expected the tensors of this network: {cause}") from error


def parts(checkpoint: Path) -> set[str]:
    """The top-level keys of a checkpoint's state dict: model, optimizer, and ema if it has one."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {key.split(".")[0] for key in metadata}


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first; not yet verified."""
    numbers = {p: p.name.removeprefix(_PREFIX) for p in folder.glob(f"{_PREFIX}*")}
    finished = [p for p, number in numbers.items() if number.isdecimal()]
    return sorted(finished, key=lambda p: int(numbers[p]), reverse=True)


def verify(checkpoint: Path) -> None:
    """ValueError for the first file of a checkpoint that is missing, truncated or altered."""
    manifest = checkpoint / "manifest.json"
    try:
        files = json.loads(manifest.read_text())["files"]
        expected = [(checkpoint / name, e["bytes"], e["sha256"]) for name, e in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: unreadable ({error!r})") from error
    for file, size, digest in expected:
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: expected {size} bytes, got {file.stat().st_size}")
        if _sha256(file) != digest:
            raise ValueError(f"{file}: its SHA-256 is not the one it was written with")


def _newest_whole(folder: Path) -> str | None:
    """Name of the newest checkpoint that verifies; "" if all are damaged, None if there is none."""
    for leftover in [*folder.glob(".partial-*"), *folder.glob(".discarded-*")]:
        shutil.rmtree(leftover)
    for checkpoint in list_checkpoints(folder):
        try:
            verify(checkpoint)
        except ValueError as error:
            logger.warning(
                f"checkpoint {checkpoint.name} refused: {error}; trying the one before it"
            )
            os.replace(checkpoint, _free_name(checkpoint))
            continue
        _point_latest(folder, checkpoint.name)
        return checkpoint.name
    return "" if any(folder.glob(f"{_PREFIX}*{_REFUSED}*")) else None


def _free_name(checkpoint: Path) -> Path:
    names = (checkpoint.with_name(f"{checkpoint.name}{_REFUSED}{i or ''}") for i in count())
    return next(name for name in names if not name.exists())


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(file)
        entry = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        files[str(file.relative_to(folder))] = entry
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n")
    sync(manifest)
    sync(folder)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _point_latest(folder: Path, name: str) -> None:
    new = folder / ".latest"
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    os.replace(new, folder / "latest")


def _discard(checkpoint: Path) -> None:
    # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a
    # whole one's name.
    hidden = checkpoint.with_name(f".discarded-{checkpoint.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)
