"""Whatever ends a run, the last finished iteration is saved first; then comes the traceback, then
the line that says how to go on; and the run that goes on is the one that was never ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_parts
import torch
import torch.distributed.checkpoint as dcp

import fastgrpo.training.signals
import fastgrpo.training.step
import fastgrpo.training.validation
from fastgrpo.shapes.policy import ShapesPolicy
from fastgrpo.training.step import Trainer
from fastgrpo.training.tracking import MetricsLog

Train = Callable[..., Any]

# Averaged weights, two optimizer steps an iteration, a schedule, a moving window, an evaluation in
# the middle.
ARGUMENTS = [
    "--iterations 4 --checkpoint.interval 50 --evaluation.interval 2 --evaluation.num_videos 1",
    "--update.ema_decay 0.5 --update.optimizer_steps 2 --update.lr_scheduler cosine "
    "--rollout.sde_window sliding --rollout.window_size 2 --rollout.window_interval 1",
]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/some/file")

# What raises, what it raises, in which iteration, when in it, and which checkpoint there is then.
Case = tuple[Any, str, BaseException, int, Callable[..., bool], int]
CASES: dict[str, Case] = {
    "judge": (tiny_parts.SmoothJudge, "score", KeyError("choices"), 3, lambda *_: True, 2),
    "evaluation": (
        fastgrpo.training.validation,
        "sample_validation",
        RuntimeError("gone"),
        2,
        lambda *_: True,
        2,
    ),
    "half an update": (Trainer, "update_ema", MemoryError(), 3, lambda *_: True, 0),
}
SLOW: dict[str, Case] = {
    "sys.exit in a reward": (tiny_parts.SmoothJudge, "score", SystemExit(0), 3, lambda *_: True, 2),
    "Ctrl-C": (ShapesPolicy, "velocity", KeyboardInterrupt(), 3, lambda *_: True, 2),
    "backward": (
        ShapesPolicy,
        "velocity",
        torch.OutOfMemoryError("CUDA"),
        3,
        lambda *_: torch.is_grad_enabled(),
        2,
    ),
    "samples": (fastgrpo.training.validation, "save_samples", FULL, 2, lambda *_: True, 2),
    "metrics": (MetricsLog, "log", FULL, 3, lambda *_: True, 3),
    "rows": (MetricsLog, "sync", FULL, 4, lambda *_: True, 4),
    "export": (ShapesPolicy, "save_pretrained", FULL, 4, lambda *_: True, 4),
    "checkpoint": (dcp, "save", FULL, 4, lambda *_: True, 0),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    return train(tmp_path_factory.mktemp("endings") / "whole", *ARGUMENTS).folder


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_the_last_finished_iteration_is_saved_first(
    tmp_path: Path,
    train: Train,
    each_step: Any,
    uninterrupted: Path,
    assert_same_end: Any,
    name: str,
) -> None:
    owner, attribute, error, number, when, saved = (CASES | SLOW)[name]
    now = {"iteration": 0}
    real = getattr(owner, attribute)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if now["iteration"] == number and when():
            raise error
        return real(*args, **kwargs)

    with (
        each_step(lambda iteration: now.update(iteration=iteration)),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(owner, attribute, failing)
        run = train(tmp_path / "run", *ARGUMENTS)
    assert run.code == 1
    (line,) = [line for line in run.out.splitlines() if line.startswith("stopped after iteration")]
    assert line.endswith("config.yaml --resume auto")
    if error is FULL:
        assert "no space left on device: runs/some/file" in line
        assert "Traceback" not in run.err
    else:
        assert f"{type(error).__name__}: {error}".strip() in line
        assert "Traceback" in run.err
        assert __file__ in run.err
    kept = [path.name for path in sorted((run.folder / "checkpoints").iterdir())]
    assert kept == ([f"iteration_{saved:06d}", "latest"] if saved else [])
    assert ("no checkpoint of it" in line) == (saved == 0)
    assert not [*run.folder.glob(".partial-*")]
    on = train(tmp_path / "run", *ARGUMENTS, "--resume auto")
    assert on.code == 0
    assert_same_end(on.folder, uninterrupted)


def test_a_judge_that_hangs_does_not_keep_a_signal_waiting(
    tmp_path: Path, train: Train, each_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is gone, and the scheduler that kills 30 seconds after its signal."""
    monkeypatch.setattr(fastgrpo.training.signals, "PATIENCE", 0.2)
    monkeypatch.setattr(fastgrpo.training.step, "POLL", 0.1)
    gone, real, now = threading.Event(), tiny_parts.SmoothJudge.score, {"iteration": 0}

    def score(self: Any, *args: Any) -> Any:
        if now["iteration"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            gone.wait(60)
        return real(self, *args)

    monkeypatch.setattr(tiny_parts.SmoothJudge, "score", score)
    begun = time.monotonic()
    with each_step(lambda iteration: now.update(iteration=iteration)):
        run = train(tmp_path / "run", "--iterations 4")
    gone.set()
    assert run.code == 0
    assert "stopped by a signal after iteration 2, with a checkpoint" in run.out
    assert [row["iteration"] for row in run.rows] == [0, 1, 2]
    assert time.monotonic() - begun < 50


@pytest.mark.slow
def test_a_signal_in_an_evaluation_leaves_it_for_the_resume(
    tmp_path: Path,
    train: Train,
    uninterrupted: Path,
    assert_same_end: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In that of iteration 2, and in the last."""
    monkeypatch.setattr(fastgrpo.training.signals, "PATIENCE", 0.0)
    stopped_in, real = [False, True, False, True, False], fastgrpo.training.validation.decode

    def decode(*args: Any) -> Any:
        if stopped_in.pop(0):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(fastgrpo.training.validation, "decode", decode)
    for done, resume in ((2, ""), (4, "--resume auto")):
        run = train(tmp_path / "run", *ARGUMENTS, *resume.split())
        assert run.code == 0
        assert f"stopped by a signal after iteration {done}, with a checkpoint" in run.out
        assert [row["iteration"] for row in run.rows] == [*range(done)]
        assert not (run.folder / "transformer").exists()
    run = train(tmp_path / "run", *ARGUMENTS, "--resume auto")
    assert stopped_in == []
    assert_same_end(run.folder, uninterrupted)


def test_before_the_first_row_nothing_is_lost_and_the_name_stays_free(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a reward that is wrong from the start: the corrected command is the same one."""
    with monkeypatch.context() as patch:
        patch.setattr(tiny_parts.SmoothJudge, "score", lambda *_: None)
        run = train(tmp_path / "run", "--iterations 1")
    assert run.code == 1
    assert "UserError: reward: SmoothJudge.score: expected a tensor of scores" in run.out
    assert "got None" in run.out
    assert train(tmp_path / "run", "--iterations 1").code == 0


@pytest.mark.parametrize("damage", ["lost", "at the end", "in the middle"])
def test_rows_that_are_missing_are_noticed(
    tmp_path: Path, train: Train, interrupt: Any, damage: str
) -> None:
    with interrupt(2):
        folder = train(tmp_path / "run", "--iterations 3").folder
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    left = {"lost": [], "at the end": lines[:2], "in the middle": [lines[0], lines[2]]}[damage]
    (folder / "metrics.jsonl").write_text("".join(left))
    run = train(folder, "--iterations 3 --resume auto")
    assert run.code == 0
    missing = {"lost": "0 to 2", "at the end": "2", "in the middle": "1"}[damage]
    assert f"metrics.jsonl lacks the rows of iterations {missing}:" in run.out


def test_a_damaged_row_is_named(tmp_path: Path, train: Train) -> None:
    folder = train(tmp_path / "run", "--iterations 1").folder
    content = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"\xff" + content)
    run = train(folder, "--iterations 2 --resume auto")
    assert run.code == 2
    (line,) = run.err.splitlines()
    assert "metrics.jsonl, line 1: " in line
    assert (folder / "metrics.jsonl").read_bytes() == b"\xff" + content


def test_a_tracker_that_cannot_start_is_refused_before_weights_are_loaded(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: object, **__: object) -> None:
        raise OSError("no login")

    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "__init__", fail)
        patch.setattr(ShapesPolicy, "load", fail)
        run = train(tmp_path / "run", "--tracking.trackers [tensorboard]")
    assert run.code == 2
    (line,) = run.err.splitlines()
    assert "tracking.trackers: 'tensorboard' could not start: OSError: no login" in line
    assert train(tmp_path / "run", "--iterations 0").code == 0, "the name stays free"


@pytest.mark.parametrize("place", ["below a file", "a long name", "somebody else's"])
def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").touch()
    folder = {"below a file": "file/run", "a long name": "n" * 300}.get(place, "run")
    if place == "somebody else's":  # the tests may be root's

        def refuse(self: Path, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
    run = train(tmp_path / folder)
    assert (run.code, run.out) == (2, "")
    (line,) = run.err.splitlines()
    said = ("not a directory", "file name too long", "permission denied")
    assert any(f"error: {words}: {tmp_path}" in line for words in said)


@pytest.mark.slow
def test_a_file_system_without_links_locks_modes_and_fsync_of_folders(
    tmp_path: Path,
    train: Train,
    interrupt: Any,
    uninterrupted: Path,
    tensors: Any,
    rows_without_times: Any,
) -> None:
    def lack(code: int) -> Callable[..., None]:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        return refuse

    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        lack(errno.EINVAL)() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "symlink", lack(errno.EPERM))
        patch.setattr(os, "fsync", only_files)
        patch.setattr(Path, "chmod", lack(errno.ENOTSUP))
        patch.setattr(fcntl, "flock", lack(errno.ENOLCK))
        with interrupt(2):
            assert train(tmp_path / "run", *ARGUMENTS).code == 0
        run = train(tmp_path / "run", *ARGUMENTS, "--resume auto")
    assert run.code == 0
    assert run.out.count("has no locks") == 1
    assert rows_without_times(run.folder) == rows_without_times(uninterrupted)
    saved = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert saved == ["iteration_000002", "iteration_000004"]


@pytest.mark.slow
def test_a_tracker_that_goes_down_costs_nothing(
    tmp_path: Path, train: Train, uninterrupted: Path, assert_same_end: Any
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", fail)
        run = train(tmp_path / "run", *ARGUMENTS, "--tracking.trackers [tensorboard]")
    assert run.code == 0
    assert run.out.count("tracker 'tensorboard' failed, and the run goes on without it") == 1
    assert_same_end(run.folder, uninterrupted)


def test_scores_out_of_range_do_not_end_a_run(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The video is without a score, counted, and the reason is said where the run stops for it."""

    def score(self: Any, videos: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.full((len(videos), 3), 0.5) + torch.arange(len(videos))[:, None] / 10
        scores[0] = 1.5
        return scores, torch.ones(len(videos), dtype=torch.bool)

    monkeypatch.setattr(tiny_parts.SmoothJudge, "score", score)
    run = train(tmp_path / "run", "--iterations 1 --scoring.max_invalid_share 0.3")
    assert run.code == 0
    assert run.trained_rows[0]["num_invalid_videos"] == 2
    assert run.trained_rows[0]["judge/refused"] == 3, "one of the evaluation, one a group"
    stopped = train(tmp_path / "other", "--iterations 2 --scoring.max_invalid_share 0.2")
    assert stopped.code == 1
    assert "SmoothJudge: expected scores in [0, 1], got [1.5, 1.5, 1.5] for" in stopped.out


@pytest.mark.parametrize("way", ["stopped early", "finished"])
def test_checkpoints_that_are_gone_do_not_cost_the_record(
    tmp_path: Path, train: Train, interrupt: Any, way: str
) -> None:
    """A disk that is not mounted, a scratch that was cleaned: refused in one line, nothing lost."""
    with interrupt(2) if way == "stopped early" else contextlib.nullcontext():
        folder = train(tmp_path / "run", "--iterations 3").folder
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    run = train(folder, "--iterations 3 --resume auto")
    assert run.code == 2
    (line,) = run.err.splitlines()
    assert f"expected the checkpoints of a run in {folder / 'checkpoints'}, found none" in line
    assert (folder / "metrics.jsonl").read_bytes() == before
