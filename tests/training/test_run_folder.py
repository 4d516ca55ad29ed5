"""The folder of a run: who may claim it, what is kept beside the metrics, how to go on."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgrpo.config import CheckpointConfig, TrackingConfig
from fastgrpo.training import run_folder
from fastgrpo.training.run_folder import (
    claim,
    differences,
    find_checkpoint,
    lock_folder,
    note_saved,
    open_log,
    resume_command,
    write_record,
)
from fastgrpo.training.used_folder import has_traces, is_used, refuse_used


@pytest.fixture
def config(tmp_path: Path, tiny_judge: Any) -> Any:
    """What `open_log` reads of a configuration."""
    reward, tracking = tiny_judge(), TrackingConfig(trackers=())
    return SimpleNamespace(run_folder=tmp_path / "run", reward=reward, tracking=tracking)


def test_a_used_folder_is_claimed_only_to_go_on(tmp_path: Path, one_rank: Any) -> None:
    folder = tmp_path / "run"
    assert not is_used(folder)
    first = claim(folder, "never")
    assert folder.is_dir()
    with pytest.raises(FileExistsError, match="another process that is still running"):
        claim(folder, "auto")
    first.close()  # as a process that ends or dies does
    for name in ("metrics.jsonl", "config.yaml", "judge.json"):
        (folder / name).touch()  # of a start that failed
    claim(folder, "never").close()
    for trace in ("metrics.jsonl", ".saved", "checkpoints/iteration_000001", "transformer/a.json"):
        used = tmp_path / trace.replace("/", "_")
        (used / trace).parent.mkdir(parents=True)
        (used / trace).write_text("1")
        assert is_used(used)
        assert has_traces(used) == trace.startswith("checkpoints/")
        with pytest.raises(FileExistsError, match=r"--resume auto.*--name") as caught:
            claim(used, "never")
        with pytest.raises(FileExistsError, match=re.escape(str(caught.value))):
            refuse_used(used, "never")
        assert str(used) in str(caught.value)
        claim(used, "auto").close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_a_note(
    tmp_path: Path,
    one_rank: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_folder(tmp_path).close()
    (said,) = caplog.messages
    assert f"{tmp_path} has no locks ({os.strerror(code)})" in said


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints", "samples"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, one_rank: Any, name: str) -> None:
    mine, run = tmp_path / "mine", tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()  # of a run, which was not made here
    mine.write_text("thesis")
    (run / name).symlink_to(mine)
    with pytest.raises(ValueError, match="got one outside of it"):
        claim(run, "auto")
    assert mine.read_text() == "thesis"
    (run / name).unlink()
    (run / ".lock").symlink_to(run / "config.yaml")
    with pytest.raises(OSError, match=r"symbolic links.*\.lock"):
        claim(run, "auto")


def test_a_persons_own_links_before_the_first_start(tmp_path: Path, one_rank: Any) -> None:
    """To a large disk, where nothing is yet; once something is there, they are a stranger's."""
    run = tmp_path / "run"
    for name in ("checkpoints", "samples"):
        (tmp_path / "scratch" / name).mkdir(parents=True)
        run.mkdir(exist_ok=True)
        (run / name).symlink_to(tmp_path / "scratch" / name)
    (tmp_path / "scratch" / "checkpoints" / "lost+found").mkdir()  # a disk of its own
    claim(run, "never").close()
    (tmp_path / "scratch" / "checkpoints" / "iteration_000001").mkdir()
    with pytest.raises(ValueError, match="got one outside of it"):
        claim(run, "auto")


def test_differences_between_two_configurations() -> None:
    before = {
        "a": 1,
        "same": [1, 2],
        "section": {"x": 0.5, "y": {"z": "t"}, "gone": None},
        "turned": {"k": 1},
    }
    now = {"a": 2, "same": [1, 2], "section": {"x": 0.5, "y": {"z": "u"}, "new": 3}, "turned": 4}
    assert differences(before, now) == [
        "a: 1 -> 2",
        "section.new: None -> 3",
        "section.y.z: 't' -> 'u'",
        "turned: None -> 4",
        "turned.k: 1 -> None",
    ]
    assert differences(before, before) == []


def test_the_log_holds_rows_and_the_configuration(config: Any, one_rank: Any) -> None:
    with open_log(config, "name: run\n", None) as log:
        log.log({"iteration": 1, "reward": 0.25})
    write_record(config, "name: run\n", None)
    written = {path.name: path.read_text() for path in config.run_folder.glob("[!.]*")}
    row = written.pop("metrics.jsonl")
    assert json.loads(row) == {"iteration": 1, "reward": 0.25}
    assert written == {"config.yaml": "name: run\n"}


def test_a_changed_configuration_is_told_and_leaves_the_old_one_behind(
    config: Any, one_rank: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = config.run_folder
    folder.mkdir()
    caplog.set_level(logging.INFO, "fastgrpo")
    for text, last_row in (("a: 1\n", None), ("a: 1\n", 3), ("a: 2\nb: 1\n", 3)):
        assert not list(folder.glob("config.until_*"))
        write_record(config, text, last_row)
    assert (folder / "config.until_000003.yaml").read_text() == "a: 1\n"
    assert (folder / "config.yaml").read_text() == "a: 2\nb: 1\n"
    changed = "resume: changed since the last start"
    assert caplog.messages == [f"{changed}: a: 1 -> 2", f"{changed}: b: None -> 1"]


def test_a_judge_that_changes_with_a_resume_is_told(
    config: Any, one_rank: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config.run_folder.mkdir()
    path = config.run_folder / "judge.json"
    with caplog.at_level(logging.INFO, "fastgrpo"):
        # A new run has nothing to compare with.
        for model, last_row in (("a", None), ("b", 1), ("c", None)):
            config.reward.describe = lambda model=model: {"engine": {"model": model}, "seed": 0}
            write_record(config, "a: 1\n", last_row)
            assert json.loads(path.read_text()) == {"engine": {"model": model}, "seed": 0}
    assert caplog.messages == [
        "resume: the judge has changed since the last start: engine.model: 'a' -> 'b'"
    ]


@pytest.mark.parametrize("content", [b"", b"a: [", b"\xff\x00", b"- 1\n"])
@pytest.mark.parametrize("name", ["config.yaml", "judge.json"])
def test_a_damaged_record_is_named_and_kept(
    config: Any, one_rank: Any, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    config.run_folder.mkdir()
    config.reward.describe = lambda: {"seed": 0}
    write_record(config, "a: 1\n", None)
    path = config.run_folder / name
    path.write_bytes(content)
    write_record(config, "a: 1\n", 3)
    (said,) = caplog.messages
    damaged = path.with_name(f"{path.stem}.damaged{path.suffix}")
    assert str(path) in said
    assert damaged.name in said
    assert damaged.read_bytes() == content
    assert path.stat().st_size > 3


def test_only_rank_0_has_a_log(config: Any, monkeypatch: pytest.MonkeyPatch, one_rank: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    assert open_log(config, "name: run\n", None) is None
    write_record(config, "name: run\n", None)
    assert not config.run_folder.exists()


@pytest.mark.parametrize(
    ("rows", "trace", "is_lost"),
    [
        (5, None, False),  # killed before the first, or while it was written
        (6, None, True),
        (-1, None, False),
        (1, ".saved", True),
        (-1, ".saved", True),
        (1, "transformer", True),
        (1, "checkpoints/latest", True),
    ],
)
def test_checkpoints_that_are_gone_are_missed(
    config: Any, one_rank: Any, rows: int, trace: str | None, is_lost: bool
) -> None:
    config.resume, config.checkpoint = "auto", CheckpointConfig(interval=50)
    folder = config.run_folder
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("checkpoint: {interval: 5}\n")
    text = "".join(f'{{"iteration": {i}}}\n' for i in range(rows + 1))
    (folder / "metrics.jsonl").write_text(text)
    if trace == ".saved":
        note_saved(folder, 2)
    elif trace == "transformer":
        (folder / trace).mkdir()
    elif trace:
        (folder / trace).symlink_to("iteration_000001")
    if not is_lost:
        assert find_checkpoint(config) == (None, rows >= 0)
        return
    with pytest.raises(ValueError, match=r"expected the checkpoints of a run.*another --name"):
        find_checkpoint(config)
    assert (folder / "metrics.jsonl").read_text() == text


def test_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As this process was started: by torchrun or python, with train.py or `-m fastgrpo train`; a
    folder with a blank in it too.
    """
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", ["some/where/train.py", "--config", "x"])
    end = ["--config", "my runs/a/config.yaml", "--resume", "auto"]
    command = resume_command(Path("my runs/a"))
    assert shlex.split(command) == [sys.executable, "some/where/train.py", *end]
    monkeypatch.setattr(sys, "argv", ["some/where/__main__.py", "train"])
    assert shlex.split(resume_command(Path("my runs/a")))[1:] == ["-m", "fastgrpo", "train", *end]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    own = Path(sys.executable).with_name("torchrun")
    expected = "--standalone --nproc-per-node 4 -m fastgrpo train --config a/config.yaml"
    for path, torchrun in ((str(own.parent), "torchrun"), ("/nowhere", str(own))):
        monkeypatch.setenv("PATH", path)
        assert re.fullmatch(f"{torchrun} {expected} --resume auto", resume_command(Path("a")))
    # Of several nodes no process knows how their launcher was called.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command(Path("a")).startswith("(your launcher) -m fastgrpo train --config a/")


def test_one_checkpoint_too_many_goes_at_a_resume(
    config: Any, one_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the renaming of a checkpoint and the pruning leaves it."""
    saved = [config.run_folder / "checkpoints" / f"iteration_00000{i}" for i in (1, 2, 3)]
    for path in saved:
        path.mkdir(parents=True)
    monkeypatch.setattr(run_folder.checkpoint, "newest", lambda folder: saved[-1])
    config.resume, config.checkpoint = "auto", CheckpointConfig(keep=2)
    assert find_checkpoint(config) == (saved[-1], True)
    assert [path.exists() for path in saved] == [False, True, True]
