"""Checkpoints of strangers, on file systems that lack something, and on full disks."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import blank, load, state_of, tensors_of, write
from torch.distributed.checkpoint.metadata import Metadata

from fastgrpo.errors import one_line
from fastgrpo.training import checkpoint
from fastgrpo.training.checkpoint import (
    parts,
    prune,
    read_state,
    save,
    verify,
)
from fastgrpo.training.checkpoint_names import iteration_of, list_checkpoints


class Payload:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def sealed(path: Path) -> Path:
    """A checkpoint whose manifest fits what is in it, whoever changed it."""
    names = [file.name for file in path.iterdir() if file.name != "manifest.json"]
    checkpoint._write_manifest(path, {name: checkpoint._entry(path / name) for name in names})
    return path


def test_a_strangers_checkpoint_runs_no_code(one_rank: Any, tmp_path: Path) -> None:
    """Neither its metadata, a pickle, nor a value in it that is no tensor."""
    (path,) = write(tmp_path, 1)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for spoiled in (Payload(tmp_path / "made"), metadata):
        if spoiled is metadata:
            metadata.planner_data = Payload(tmp_path / "made")
        (path / ".metadata").write_bytes(pickle.dumps(spoiled))
        for read in (lambda: load(tmp_path, blank()), lambda: parts(path)):
            with pytest.raises(
                ValueError, match=r"\.metadata: expected the metadata.*posix\.mkdir"
            ):
                sealed(path) and read()
    tensors = tensors_of(2)
    tensors["optimizer"]["param_groups"][0]["lr"] = Payload(tmp_path / "made")
    save(tmp_path, 2, tensors, {}, 2)
    with pytest.raises(ValueError, match=r"expected the tensors of this network.*weights_only"):
        load(tmp_path, blank())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "attributes",
    [
        b"cpathlib\nPosixPath\nN}X\x0e\x00\x00\x00is_relative_toctorch\nSize\ns\x86b.",
        b"ctorch.serialization\n_get_layout\n}X\x05\x00\x00\x00cacheNsb.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x01\x00\x00\x00aNs\x86b.",
        b"ctorch.serialization\n_get_layout\n.",
        b"(lp0\n.",
        b"ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\n)\x81}("
        b"X\x0c\x00\x00\x00storage_data}X\x13\x00\x00\x00state_dict_metadata}ub.",
    ],
)
def test_a_strangers_metadata_changes_no_class(
    one_rank: Any, tmp_path: Path, attributes: bytes
) -> None:
    """A pickle can set attributes of a class that it may name: then no path would be outside of
    any folder, for the whole process.
    """
    (path,) = write(tmp_path, 1)
    (path / ".metadata").write_bytes(b"\x80\x02" + attributes)
    before = (Path.is_relative_to, torch.serialization._get_layout.cache)
    with pytest.raises(ValueError, match=r"\.metadata: expected the metadata of a checkpoint"):
        parts(sealed(path))
    assert (Path.is_relative_to, torch.serialization._get_layout.cache) == before
    assert not hasattr(Metadata, "a")


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
@pytest.mark.parametrize("content", ["[" * 10**5, " " * 2**26 + "{}"], ids=["deep", "large"])
def test_json_beyond_all_measure_is_one_line(
    one_rank: Any, tmp_path: Path, name: str, content: str
) -> None:
    (path,) = write(tmp_path, 1)
    (path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: .*(nested too deeply|at most \d+ bytes)"):
        verify(path) if name == "manifest.json" else read_state(sealed(path))


def test_tensors_that_the_manifest_lacks_are_not_believed(one_rank: Any, tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["__0_0.distcp"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: .*without __0_0\.distcp"):
        verify(path)


def test_what_cannot_be_removed_stays_with_a_warning(
    one_rank: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on NFS, where a file that another process reads stays as .nfs0001."""

    def refuse(path: Any, *_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    write(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    write(tmp_path, 2, keep=1)
    left = tmp_path / ".discarded-iteration_000001"
    assert left.is_dir()
    assert load(tmp_path, blank()) == (2, state_of(2))
    write(tmp_path, 2, keep=1)  # that iteration again
    write(tmp_path, 1)
    prune(tmp_path, 1)
    assert iteration_of(list_checkpoints(tmp_path)[-1]) == 1, "its hidden name is taken"
    assert load(tmp_path, blank()) == (2, state_of(2))
    assert f"note: {left} could not be removed: directory not empty: {left}" in caplog.text


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "state.json", ".."])
def test_a_checkpoint_reads_only_its_own_tensors(one_rank: Any, tmp_path: Path, name: str) -> None:
    (path,) = write(tmp_path, 1)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sealed(path)
    with pytest.raises(ValueError, match=r"\.metadata: expected the metadata") as caught:
        load(tmp_path, blank())
    assert name in str(caught.value)


def test_a_link_in_a_checkpoint_is_refused(one_rank: Any, tmp_path: Path) -> None:
    (path,) = write(tmp_path / "run", 1)
    os.replace(path / "__0_0.distcp", tmp_path / "elsewhere")
    (path / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="expected a file, got a link"):
        verify(path)
    (tmp_path / "run" / "iteration_000002").symlink_to(tmp_path)
    assert list_checkpoints(tmp_path / "run") == [path]


def test_leftovers_of_any_kind_go_and_nothing_behind_a_link_does(
    one_rank: Any, tmp_path: Path
) -> None:
    folder, mine = tmp_path / "run", tmp_path / "mine"
    write(folder, 1)
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    (folder / ".partial-iteration_000002").symlink_to(mine)
    (folder / ".partial-x").write_text("a file")
    (folder / ".discarded-iteration_000009").symlink_to(tmp_path / "nowhere")
    assert load(folder, blank()) == (1, state_of(1))
    assert {p.name for p in folder.iterdir()} == {"iteration_000001", "latest"}
    (folder / ".partial-iteration_000002").symlink_to(mine)
    write(folder, 2)
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]


def test_one_too_many_after_a_kill_before_the_pruning(one_rank: Any, tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    prune(tmp_path, 2)
    assert [iteration_of(path) for path in list_checkpoints(tmp_path)] == [3, 2]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSPC])
def test_without_links(
    one_rank: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "symlink", refuse)
    write(tmp_path, 1, 2)
    assert load(tmp_path, blank()) == (2, state_of(2))
    assert {p.name for p in tmp_path.iterdir()} == {"iteration_000001", "iteration_000002"}


def test_latest_that_became_a_folder(one_rank: Any, tmp_path: Path) -> None:
    """As `cp -rL`, zip and a bucket make it."""
    (path,) = write(tmp_path, 1)
    (tmp_path / "latest").unlink()
    shutil.copytree(path, tmp_path / "latest")
    write(tmp_path, 2)
    assert load(tmp_path, blank()) == (2, state_of(2))
    assert not (tmp_path / ".latest").is_symlink()


class FullDisk:
    """In place of a file's stream: no space after `room` bytes."""

    def __init__(self, stream: Any, room: int) -> None:
        self.stream, self.room = stream, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata.tmp", "state.json", "manifest.json"])
def test_a_full_disk_is_said_and_nothing_else_is_lost(
    one_rank: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (old,) = write(tmp_path, 1)
    real = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = real(file, mode, *args, **kwargs)
        is_full = "w" in mode and str(file).endswith(f"/{name}")
        return FullDisk(stream, 700 if name == "__0_0.distcp" else 0) if is_full else stream

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    with pytest.raises(OSError, match="No space") as caught:
        write(tmp_path, 2)
    partial = tmp_path / ".partial-iteration_000002"
    assert one_line(caught.value).startswith(f"no space left on device: {partial}")
    assert {p.name for p in tmp_path.iterdir()} == {"iteration_000001", "latest"}
    verify(old)
