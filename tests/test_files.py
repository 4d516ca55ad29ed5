"""Where files are looked for, and how one is replaced."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo import files
from fastgrpo.errors import one_line
from fastgrpo.files import (
    atomic_folder,
    atomic_write,
    atomic_write_text,
    find_file,
    keep_copy,
    naming,
    remove,
    sync,
    unless_unsupported,
)

ROOT = Path(__file__).resolve().parents[1]


def test_a_file_is_looked_for_here_and_then_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, installed = tmp_path / "here", tmp_path / "installed"
    (installed / "fastgrpo").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(files, "PACKAGED", installed)
    with pytest.raises(FileNotFoundError) as caught:
        find_file("fastgrpo/a.txt", "prompts.train")
    for part in ("prompts.train", str(here / "fastgrpo/a.txt"), str(installed / "fastgrpo/a.txt")):
        assert part in str(caught.value)
    (installed / "fastgrpo" / "a.txt").write_text("beside")
    assert find_file("fastgrpo/a.txt", "key").read_text() == "beside"
    (here / "fastgrpo").mkdir()
    (here / "fastgrpo" / "a.txt").write_text("here")
    assert find_file("fastgrpo/a.txt", "key").read_text() == "here"
    with pytest.raises(FileNotFoundError, match="prompts"):
        find_file("fastgrpo", "prompts.train")  # a folder is no file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    (tmp_path / ".partial-a.txt").write_text("left by a process that was killed")
    with pytest.raises(UnicodeEncodeError), atomic_write(file) as partial:
        partial.write_text("half \udc80", encoding="utf-8")
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["a.txt"])
    with atomic_write(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
        partial.chmod(0o600)
    assert (file.read_text(), os.listdir(tmp_path)) == ("new", ["a.txt"])
    (tmp_path / "b.txt").touch()
    assert file.stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_the_new_bytes_are_on_the_disk_before_the_name_points_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bytes]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        content = Path(f"/proc/self/fd/{descriptor}").read_bytes() if is_file else b"folder"
        calls.append(("fsync", content))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append(("replace", Path(source).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    atomic_write_text(tmp_path / "a.txt", "new")
    assert calls == [("fsync", b"new"), ("replace", b"new"), ("fsync", b"folder")]


def test_a_kill_at_any_file_operation_leaves_old_or_new(tmp_path: Path) -> None:
    """A process kills itself just before the n-th time that it opens, renames or removes something
    in the folder.
    """
    script = """
import os, signal, sys
from pathlib import Path
from fastgrpo.files import atomic_write_text
path, left = Path(sys.argv[1]), int(sys.argv[2])
def hook(event, arguments):
    global left
    changes = event in ("open", "os.rename", "os.remove", "os.truncate")
    if changes and str(path.parent) in str(arguments[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
atomic_write_text(path, "new")
"""
    path, found = tmp_path / "a.txt", []
    for operations in range(20):
        path.write_text("old")
        command = [sys.executable, "-c", script, str(path), str(operations)]
        code = subprocess.run(command, cwd=ROOT, timeout=120).returncode
        found.append(path.read_text())
        # What a killed process leaves behind does not disturb the next.
        atomic_write_text(path, "newest")
        assert (path.read_text(), os.listdir(tmp_path)) == ("newest", ["a.txt"])
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert set(found) == {"old", "new"}
    assert (found[0], found[-1]) == ("old", "new")
    assert len(found) >= 4  # at least making, writing and renaming were hit


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSYS])
def test_what_a_file_system_cannot_do_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    atomic_write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    with unless_unsupported():
        refuse()


def test_a_disk_that_fails_is_no_matter_of_ability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        sync(tmp_path)
    assert one_line(caught.value) == f"input/output error: {tmp_path}"


def test_a_full_disk_is_said_with_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    """The kernel's error of a write names no file."""
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="No space") as caught, atomic_write(tmp_path / "a.txt"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert one_line(caught.value) == f"no space left on device: {tmp_path / 'a.txt'}"
    assert os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(ConnectionError) as other, naming(tmp_path):
        raise ConnectionError("no answer")
    assert one_line(other.value) == "no answer", "an error of something else stays as it is"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    for content in ("first", "second"):
        with atomic_folder(folder) as partial:
            partial.mkdir()
            (partial / content).touch()
        assert (os.listdir(tmp_path), os.listdir(folder)) == (["weights"], [content])
    with pytest.raises(FileNotFoundError), atomic_folder(folder) as partial:
        (partial / "nowhere" / "a").touch()
    with pytest.raises(OSError, match="No space left") as caught, atomic_folder(folder):
        raise RuntimeError("Error while serializing: I/O error: Os { code: 28, kind: StorageFull }")
    assert caught.value.filename == str(folder)
    assert (os.listdir(tmp_path), os.listdir(folder)) == (["weights"], ["second"])


def test_links_are_neither_followed_nor_emptied(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".partial-a.txt").symlink_to(outside / "thesis.tex")
    atomic_write_text(run / "a.txt", "new")
    (run / "link").symlink_to(outside)
    remove(run / "link")
    remove(run / "nothing")
    assert os.listdir(run) == ["a.txt"]
    assert (outside / "thesis.tex").read_text() == "mine"


def test_a_copy_replaces_no_other(tmp_path: Path) -> None:
    names = []
    for content in ("one", "one", "two", "three", "two"):
        (tmp_path / "a.txt").write_text(content)
        names.append(keep_copy(tmp_path / "a.txt", "a.kept.txt").name)
    expected = ["a.kept.txt", "a.kept.txt", "a.kept.2.txt", "a.kept.3.txt", "a.kept.2.txt"]
    assert names == expected
