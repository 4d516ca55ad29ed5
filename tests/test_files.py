"""Where files are looked for, and how one is replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastgrpo import files
from fastgrpo.files import atomic_write, find_file


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
    with pytest.raises(KeyError), atomic_write(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["a.txt"])
    with atomic_write(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
        partial.chmod(0o600)
    assert (file.read_text(), os.listdir(tmp_path)) == ("new", ["a.txt"])
    (tmp_path / "b.txt").touch()
    assert file.stat().st_mode == (tmp_path / "b.txt").stat().st_mode
