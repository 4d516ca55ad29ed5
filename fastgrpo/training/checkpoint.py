"""Checkpoints: torch.distributed.checkpoint for tensors, one JSON file for the rest, and a manifest
that makes them verifiable.

    checkpoints/iteration_000050/     *.distcp, .metadata     model, optimizer, EMA
                                      state.json              counters, pacer, schedule
                                      manifest.json           size and SHA-256 of every other file, written last
    checkpoints/latest                link to the newest

A checkpoint is written under a hidden name and renamed when it is whole, so that no name ever
points to half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from fastgrpo.distributed.collectives import gather, rank

_PREFIX = "iteration_"
_REFUSED = ".refused"


def save(
    folder: Path, iteration: int, tensors: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """Write checkpoint `folder`/iteration_NNNNNN on all ranks together, point `latest` to it, drop
    all but the newest `keep`.

    tensors: a (nested) state dict for torch.distributed.checkpoint. state: JSON-serialisable.
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
        if final.exists():  # saved before under this number
            _discard(final)
        os.replace(partial, final)
        _sync(folder)
        _point_latest(folder, final.name)
        for old in list_checkpoints(folder)[keep:]:
            _discard(old)
    dist.barrier()
    return final


def load(folder: Path, tensors: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """Load the newest checkpoint that verifies into `tensors`, in place, on all ranks; None where
    there is no checkpoint at all.

    A damaged one is reported with the file that is wrong, renamed to `<name>.refused`, and the
    one before it is taken. A part of `tensors` (a top-level key) that the checkpoint does not
    have is removed from it.

    Returns:
        iteration and `state`.

    Raises:
        ValueError: there are checkpoints, but none of them is whole; or they are of another
            network.
    """
    chosen: str | None = None
    if rank() == 0:
        chosen = _newest_whole(folder)
    chosen = gather(chosen)[0]
    if chosen is None:
        return None
    if chosen == "":
        raise ValueError(
            f"resume: every checkpoint in {folder} is damaged; they are kept as *{_REFUSED}. Start a run of another name"
        )
    path = folder / chosen
    for part in tensors.keys() - parts(path):
        del tensors[part]
    _read(path, tensors)
    return int(chosen.removeprefix(_PREFIX)), json.loads((path / "state.json").read_text())


def load_weights(checkpoint: Path, transformer: nn.Module, ema: bool) -> None:
    """Load a checkpoint's trained parameters, or their EMA, into `transformer`, in place; without a
    process group too. Frozen ones stay.

    ValueError: a checkpoint of another network, or one without an EMA (`parts`).
    """
    frozen = {name for name, p in transformer.named_parameters() if not p.requires_grad}
    weights = {
        name: tensor for name, tensor in transformer.state_dict().items() if name not in frozen
    }
    averaged = {name for name, _ in transformer.named_parameters()} if ema else set()
    wanted = {
        "model": {name: tensor for name, tensor in weights.items() if name not in averaged},
        "ema": {name: tensor for name, tensor in weights.items() if name in averaged},
    }
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # one process alone is what is meant
        _read(checkpoint, wanted)


def _read(checkpoint: Path, tensors: dict[str, Any]) -> None:
    try:
        dcp.load(tensors, checkpoint_id=checkpoint)
    except (
        CheckpointException
    ) as error:  # no Exception: a command that refuses what it cannot use would not catch it
        cause, _ = next(iter(error.failures.values()))
        raise ValueError(f"{checkpoint}: expected the tensors of this network: {cause}") from error


def parts(checkpoint: Path) -> set[str]:
    """The top-level keys of the state dict that a checkpoint holds: model, optimizer, and ema where
    there is one.
    """
    return {
        key.split(".")[0]
        for key in dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    }


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first, damaged ones among them if they were not yet found
    out.
    """
    numbers = {p: p.name.removeprefix(_PREFIX) for p in folder.glob(f"{_PREFIX}*")}
    return sorted(
        (p for p in numbers if numbers[p].isdecimal()), key=lambda p: int(numbers[p]), reverse=True
    )


def verify(checkpoint: Path) -> None:
    """ValueError that names the first file of a checkpoint that is missing, truncated or altered."""
    manifest = checkpoint / "manifest.json"
    try:
        files = {
            name: (entry["bytes"], entry["sha256"])
            for name, entry in json.loads(manifest.read_text())["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: unreadable ({error!r})") from error
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: expected {size} bytes, found {file.stat().st_size}")
        if _sha256(file) != digest:
            raise ValueError(f"{file}: its SHA-256 is not the one it was written with")


def _newest_whole(folder: Path) -> str | None:
    """Name of the newest checkpoint that verifies; "" where all are damaged, None where there is
    none.
    """
    for leftover in [*folder.glob(".partial-*"), *folder.glob(".discarded-*")]:
        shutil.rmtree(leftover)
    found: str | None = "" if any(folder.glob(f"{_PREFIX}*{_REFUSED}*")) else None
    for checkpoint in list_checkpoints(folder):
        try:
            verify(checkpoint)
        except ValueError as error:
            found = ""
            print(
                f"checkpoint {checkpoint.name} refused: {error}; trying the one before it",
                flush=True,
            )
            os.replace(checkpoint, _free_name(checkpoint))
            continue
        _point_latest(folder, checkpoint.name)
        return checkpoint.name
    return found


def _free_name(checkpoint: Path) -> Path:
    names = (checkpoint.with_name(f"{checkpoint.name}{_REFUSED}{i or ''}") for i in range(10**6))
    return next(name for name in names if not name.exists())


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in _files(folder):
        _sync(file)
        files[str(file.relative_to(folder))] = {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n")
    _sync(manifest)
    _sync(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
