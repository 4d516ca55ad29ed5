"""Checkpoints: torch.distributed.checkpoint for tensors, one JSON file for the rest, and a manifest
that makes them verifiable.

    checkpoints/iteration_000050/   *.distcp, .metadata   model, optimizer, EMA
                                    state.json            counters, pacer
                                    manifest.json         size and SHA-256 of every other file
    checkpoints/latest              link to the newest, for people; nothing reads it

The manifest is written last. A checkpoint is written under a hidden name and renamed when it is
whole, so no name ever points to half of one. Each file is hashed by the rank that wrote it.

A checkpoint may come from somebody else: reading one runs no code of its author, and reads no file
outside its folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from fastgrpo.distributed.collectives import (
    failing_together,
    gather,
    rank,
    waiting_for_ranks,
    world_size,
)
from fastgrpo.errors import UserError, one_line, require
from fastgrpo.files import naming, remove, sync
from fastgrpo.training.checkpoint_names import PREFIX, list_checkpoints

logger = logging.getLogger("fastgrpo")

_MOST_BYTES = 2**26
"""Of a state or a manifest."""
_REFUSED = ".refused"
_STATE = "state.json"
_METADATA = ".metadata"
_TENSORS = re.compile(r"__\d+_\d+\.distcp")
"""Names of the files that hold the tensors: the writer's rank, and a number."""
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (_METADATA_MODULE, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""All that the pickle of a checkpoint's metadata is made of, but for dtypes."""


def save(
    folder: Path, iteration: int, tensors: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint on all ranks together. If that fails, on all ranks, what was written of it
    is removed and the earlier ones are as they were.

    Args:
        folder: Holds the run's checkpoints.
        iteration: The last finished one.
        tensors: A (nested) state dict for torch.distributed.checkpoint.
        state: The rest, JSON-serialisable; rank 0's is written.
        keep: How many of the newest checkpoints stay.

    Returns:
        `folder`/iteration_NNNNNN.

    Raises:
        OSError: Names the file or folder that could not be written.
    """
    final = folder / f"{PREFIX}{iteration:06d}"
    partial = folder / f".partial-{final.name}"
    task = f"checkpoint {final.name}"
    try:
        with failing_together(task):
            if rank() == 0:
                remove(partial)
                partial.mkdir(parents=True)
        _write(partial, tensors)
        with failing_together(task), naming(partial):
            own = [*partial.glob(f"__{rank()}_*")]
            if rank() == 0:
                (partial / _STATE).write_text(json.dumps(state, indent=1) + "\n")
                own += [partial / _STATE, partial / _METADATA]
            entries = {file.name: _entry(file) for file in own}
        files = {name: entry for of_rank in gather(entries) for name, entry in of_rank.items()}
        with failing_together(task), naming(partial):
            if rank() == 0:
                _write_manifest(partial, files)
                if final.exists():  # this iteration was done before, and again after a resume
                    _discard(final)
                os.replace(partial, final)
                sync(folder)
                _point_latest(folder, final.name)
                prune(folder, keep)
    except Exception:
        if rank() == 0:
            with suppress(OSError):
                remove(partial)
        raise
    return final


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, found on all ranks together, each of which hashes its
    share of the files.

    A damaged one is logged with the file that is wrong and renamed to `<name>.refused`, and the
    one before it is taken.

    Args:
        folder: Holds the run's checkpoints.

    Returns:
        Its folder; None if there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints, but none of them is whole.
        OSError: A file cannot be read.
    """
    names: list[str] = []
    with failing_together("resume"):
        if rank() == 0:
            for leftover in [*folder.glob(".partial-*"), *folder.glob(".discarded-*")]:
                with _unless_stuck(leftover):
                    remove(leftover)
            names = [checkpoint.name for checkpoint in list_checkpoints(folder)]
    for name in gather(names)[0]:
        problem = None
        with failing_together("resume"):
            try:
                verify(folder / name, rank(), world_size())
            except ValueError as error:
                problem = str(error)
        problems = [text for text in gather(problem) if text is not None]
        with failing_together("resume"):
            if rank() == 0 and problems:
                logger.warning(
                    f"checkpoint {name} refused: {problems[0]}; trying the one before it"
                )
                os.replace(folder / name, _free_name(folder / name))
            elif rank() == 0:
                _point_latest(folder, name)
        if not problems:
            return folder / name
    refused = gather(any(folder.glob(f"{PREFIX}*{_REFUSED}*")))[0]
    if refused:
        raise UserError(
            f"resume: every checkpoint in {folder} is damaged; they are kept as *{_REFUSED}. "
            "Start a run of another name"
        )
    return None


def load(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Load the tensors of a checkpoint that verifies, on all ranks together.

    Args:
        checkpoint: Its folder.
        tensors: A state dict, loaded in place. A part of it (a top-level key) that the checkpoint
            does not have is removed from it.

    Raises:
        ValueError: It is of another network.
    """
    for part in tensors.keys() - parts(checkpoint):
        del tensors[part]
    _read(checkpoint, tensors)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` that `save` was given.

    Raises:
        ValueError, OSError: It cannot be read.
    """
    path = checkpoint / _STATE
    state = _read_json(path)
    require(isinstance(state, dict), str(path), "keys and their values", state)
    return dict(state)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and those not that cannot be removed. On one
    rank.
    """
    for old in list_checkpoints(folder)[keep:]:
        with _unless_stuck(old):
            _discard(old)


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
        with waiting_for_ranks(f"checkpoint {checkpoint.name} on all ranks"):
            dcp.load(tensors, storage_reader=_Reader(checkpoint), planner=_Planner())
    except CheckpointException as error:  # a BaseException, which no command would catch
        cause, _ = next(iter(error.failures.values()))
        raise UserError(f"{checkpoint}: expected the tensors of this network: {cause}") from error


def _write(folder: Path, tensors: dict[str, Any]) -> None:
    """Write the tensors' files and .metadata; what one rank raises is raised on all."""
    writer = dcp.FileSystemWriter(folder, sync_files=False)  # `_entry` does that
    writer.fs = _Disk()
    try:
        with warnings.catch_warnings(), waiting_for_ranks(f"{folder} on all ranks"):
            warnings.filterwarnings("ignore", category=FutureWarning)
            dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, OSError) or not isinstance(cause, Exception):
            raise cause from None
        raise RuntimeError(f"{folder}: {cause}") from error


class _Disk(FileSystem):
    """Says what the disk said: torch ends a failed write with an error of its own, of positions in
    the file.
    """

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, cause.filename or str(path)) from error


class _Unpickler(pickle._Unpickler):  # Python's own, since that in C lets nobody change BUILD
    """Knows what a checkpoint's metadata is made of, and nothing that runs code."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        # It sets attributes of anything: of a class too, such as `PosixPath.is_relative_to`.
        made = type(self.stack[-2])  # type: ignore[attr-defined]
        if not is_dataclass(made):
            raise pickle.UnpicklingError(f"attributes of a {made.__name__} are no part of it")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of it")


class _Reader(dcp.FileSystemReader):
    """Reads only files of the checkpoint's own folder, and no pickle that runs code."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / _METADATA
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"a {type(metadata).__name__}")
            for info in metadata.storage_data.values():
                if not _TENSORS.fullmatch(info.relative_path) or info.transform_descriptors:
                    raise ValueError(f"a tensor in {info.relative_path!r}")
            if not all(isinstance(key, str) for key in metadata.state_dict_metadata):
                raise ValueError("names that are no text")
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
        except OSError:
            raise
        except Exception as error:  # the file says what happens here
            raise UserError(f"{path}: expected the metadata of a checkpoint: {error}") from error
        return metadata


class _Planner(DefaultLoadPlanner):
    """Loads values that are no tensors as plain values; torch's own would run what they name."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def parts(checkpoint: Path) -> set[str]:
    """The top-level keys of a checkpoint's state dict: model, optimizer, and ema if it has one."""
    return {key.split(".")[0] for key in _Reader(checkpoint).read_metadata().state_dict_metadata}


def verify(checkpoint: Path, part: int = 0, num_parts: int = 1) -> None:
    """Check that a checkpoint is as it was written.

    Args:
        checkpoint: Its folder.
        part: Which share of the files is hashed.
        num_parts: Of so many.

    Raises:
        ValueError: Names the first file that is missing, truncated or altered.
        OSError: A file cannot be read.
    """
    manifest = checkpoint / "manifest.json"
    try:
        files = _read_json(manifest)["files"]
        expected = [(name, e["bytes"], e["sha256"]) for name, e in files.items()]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: unreadable ({error!r})") from error
    tensors = {path.name for path in checkpoint.glob("*.distcp")}
    for name in sorted({_STATE, _METADATA, *tensors} - files.keys()):
        raise UserError(f"{manifest}: unreadable (without {name})")
    for name, size, digest in sorted(expected)[part::num_parts]:
        file = checkpoint / name
        if name not in (_STATE, _METADATA) and not _TENSORS.fullmatch(name):
            raise UserError(f"{manifest}: unreadable (with {name!r})")
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if file.is_symlink():
            raise UserError(f"{file}: expected a file, got a link")
        if file.stat().st_size != size:
            raise UserError(f"{file}: expected {size} bytes, got {file.stat().st_size}")
        if _sha256(file) != digest:
            raise UserError(f"{file}: its SHA-256 is not the one it was written with")


def _read_json(path: Path) -> Any:
    """ValueError also if it is too large or too deep to be one of ours."""
    size = path.stat().st_size
    require(size <= _MOST_BYTES, str(path), f"at most {_MOST_BYTES} bytes", size)
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply") from error


def _free_name(checkpoint: Path) -> Path:
    names = (checkpoint.with_name(f"{checkpoint.name}{_REFUSED}{i or ''}") for i in count())
    return next(name for name in names if not name.exists())


def _entry(file: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is on the disk then."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
    sync(manifest)
    sync(folder)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _point_latest(folder: Path, name: str) -> None:
    """Make the link, where the file system has links and `latest` is not a folder by now."""
    new = folder / ".latest"
    with suppress(OSError):
        remove(new)
        new.symlink_to(name)
        os.replace(new, folder / "latest")
    with suppress(OSError):
        new.unlink(missing_ok=True)


def _discard(checkpoint: Path) -> None:
    # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a
    # whole one's name.
    hidden = checkpoint.with_name(f".discarded-{checkpoint.name}")
    remove(hidden)
    os.replace(checkpoint, hidden)
    with _unless_stuck(hidden):
        remove(hidden)


@contextmanager
def _unless_stuck(path: Path) -> Iterator[None]:
    """Warn of what cannot be removed, and go on: NFS keeps a file while somebody reads it."""
    try:
        yield
    except OSError as error:
        logger.warning(f"note: {path} could not be removed: {one_line(error)}")
