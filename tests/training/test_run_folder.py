"""The folder of a run: who may claim it, what is kept beside the metrics, how to go on."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgrpo.config import TrackingConfig
from fastgrpo.training.run_folder import (
    claim,
    differences,
    is_used,
    log_changes,
    open_log,
    resume_command,
    write_judge,
)


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
    claim(folder, "never").close()  # an empty one is nobody's
    (folder / "checkpoints").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").touch()
    for used in (folder, tmp_path / "other"):
        assert is_used(used)
        with pytest.raises(FileExistsError, match=r"--resume auto.*--name") as caught:
            claim(used, "never")
        assert str(used) in str(caught.value)
        claim(used, "auto").close()


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


def test_changes_since_the_last_start_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastgrpo"):
        log_changes(tmp_path, "a: 2\n")  # config.yaml was lost
        (tmp_path / "config.yaml").write_text("a: 1\nb: 1\n")
        log_changes(tmp_path, "a: 2\nb: 1\n")
    assert caplog.messages == ["resume: changed since the last start: a: 1 -> 2"]


def test_the_log_holds_rows_and_the_configuration(config: Any) -> None:
    with open_log(config, "name: run\n", None) as log:
        log.log({"iteration": 1, "reward": 0.25})
    written = {path.name: path.read_text() for path in config.run_folder.iterdir()}
    row = written.pop("metrics.jsonl")
    assert json.loads(row) == {"iteration": 1, "reward": 0.25}
    assert written == {"config.yaml": "name: run\n"}


def test_a_changed_configuration_leaves_the_old_one_behind(config: Any) -> None:
    folder = config.run_folder
    for text, last_row in (("a: 1\n", None), ("a: 1\n", 3), ("a: 2\n", 3)):
        assert not list(folder.glob("config.until_*"))
        with open_log(config, text, last_row):
            pass
    assert (folder / "config.until_000003.yaml").read_text() == "a: 1\n"
    assert (folder / "config.yaml").read_text() == "a: 2\n"


def test_only_rank_0_has_a_log(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with open_log(config, "name: run\n", None) as log:
        assert log is None
    assert not config.run_folder.exists()


def test_a_judge_that_changes_with_a_resume_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "judge.json"
    with caplog.at_level(logging.INFO, "fastgrpo"):
        write_judge(path, {"engine": {"model": "a"}, "seed": 0}, resumed=False)
        assert json.loads(path.read_text()) == {"engine": {"model": "a"}, "seed": 0}
        write_judge(path, {"engine": {"model": "b"}, "seed": 0}, resumed=True)
        # A new run has nothing to compare with.
        write_judge(path, {"engine": {"model": "c"}, "seed": 0}, resumed=False)
    assert caplog.messages == [
        "resume: the judge has changed since the last start: engine.model: 'a' -> 'b'"
    ]


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
