"""The parts of a run's loop that need no run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.config import RuntimeConfig, ScoringConfig, UpdateConfig
from fastgrpo.distributed.collectives import RanksLost
from fastgrpo.training import loop
from fastgrpo.training.loop import (
    Progress,
    compute_dtype,
    conclude,
    end_after,
    reason_to_stop,
    rescue,
)


@pytest.mark.parametrize(
    ("choice", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("fp32", "cuda", torch.float32),
        ("bf16", "cpu", torch.bfloat16),
    ],
)
def test_the_compute_dtype(choice: Any, device: str, dtype: torch.dtype) -> None:
    assert compute_dtype(RuntimeConfig(compute_dtype=choice), torch.device(device)) == dtype


def test_why_a_run_stopped(one_rank: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastgrpo")
    run = {"iterations": 9, "run_folder": Path("runs/this")}
    stopped: Any = SimpleNamespace(
        config=SimpleNamespace(update=UpdateConfig(), scoring=ScoringConfig(), **run),
        skipped_in_a_row=2,
        invalid_share=0.75,
        judge=SimpleNamespace(last_errors=lambda: {"http://here": "gone"}),
    )
    reason = "75% of its videos got no score, and scoring.max_invalid_share is 50%"
    assert reason_to_stop(stopped) == f"{reason}; http://here: gone"
    stopped.skipped_in_a_row = 5
    assert reason_to_stop(stopped).startswith(
        "5 updates in a row (update.max_skipped_updates) could not be made"
    )
    assert conclude(stopped, Progress(3, None, {}), failed=True) == 1
    assert conclude(stopped, Progress(4, None, {}), failed=False) == 0
    # Its update is made, but a signal ended its evaluation.
    assert conclude(stopped, Progress(9, {"iteration": 9}, {}), failed=False) == 0
    failed, signalled, last = caplog.messages
    assert last.startswith("stopped by a signal after iteration 9, with a checkpoint")
    assert failed.startswith(f"stopped after iteration 3: {reason_to_stop(stopped)}. The state is")
    assert signalled.startswith("stopped by a signal after iteration 4, with a checkpoint")
    assert "--config runs/this/config.yaml --resume auto" in failed
    assert "--config runs/this/config.yaml --resume auto" in signalled


def test_a_checkpoints_progress(tmp_path: Path) -> None:
    assert Progress.at(None) == Progress(done=0, row={"iteration": 0}, state={})
    path = tmp_path / "iteration_000003"
    path.mkdir()
    row = {"iteration": 3, "reward": 0.5}
    for content in ({"a": 1}, {"a": 1, "row": row}):
        (path / "state.json").write_text(json.dumps(content))
        assert Progress.at(path) == Progress(3, content.get("row"), {"a": 1}, saved=3)
    (path / "state.json").write_text('{"iteration": 4}')
    with pytest.raises(ValueError, match=r"iteration: expected 3, as its folder is called, got 4"):
        Progress.at(path)
    for row in ({"iteration": 2}, [3], 3):
        (path / "state.json").write_text(json.dumps({"row": row}))
        with pytest.raises(ValueError, match=r"state\.json: row: expected metrics of iteration 3"):
            Progress.at(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"saved": 3}, ""),
        ({"save_failed": True}, "it could not be written"),
        ({"weights_moved": True}, "the update of iteration 4 was half made"),
        ({"is_updating": True}, ""),  # alone, before the optimizer's first step
        ({"done": 0, "saved": None, "row": {}}, "nothing was trained yet"),
        ({"error": RanksLost("no answer")}, "RanksLost: no answer"),
        (
            {"disk": OSError(28, "No space left on device", "x")},
            "OSError: no space left on device: x",
        ),
    ],
)
def test_what_is_whole_is_saved_after_an_error_and_nothing_else(
    one_rank: torch.device, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    saves: list[int] = []

    def save(trainer: Any, log: Any, progress: Progress) -> None:
        if "disk" in changes:
            raise changes["disk"]
        saves.append(progress.done)

    monkeypatch.setattr(loop, "save", save)
    flags = {key: changes.get(key, False) for key in ("is_updating", "weights_moved")}
    progress = Progress(done=3, row=None, state={}, saved=2)
    for key in changes.keys() & vars(progress).keys():
        setattr(progress, key, changes[key])
    error = changes.get("error", KeyError("choices"))
    lost, together = rescue(error, SimpleNamespace(**flags), None, progress)
    assert (lost, together) == (reason, "error" not in changes and "disk" not in changes)
    assert saves == ([3] if reason == "" and progress.saved != 3 else [])


def test_rows_that_cannot_be_written_cost_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error", "metrics.jsonl")

    saves: list[Any] = []
    monkeypatch.setattr(loop.checkpoint, "save", lambda *args: saves.append(args))
    trainer: Any = SimpleNamespace(
        config=SimpleNamespace(run_folder=tmp_path, checkpoint=SimpleNamespace(keep=2)),
        tensors=dict,
    )
    progress = Progress(3, {"iteration": 3}, {"a": 1}, saved=2)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        loop.save(trainer, SimpleNamespace(sync=fail), progress)  # type: ignore[arg-type]
    state = {"iteration": 3, "a": 1, "row": {"iteration": 3}}
    assert saves == [(tmp_path / "checkpoints", 3, {}, state, 2)]
    assert (progress.saved, progress.save_failed) == (3, False)


def test_the_last_line_comes_after_the_traceback(
    one_rank: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In torchrun's summary too, which it prints after all else."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(loop, "rescue", lambda *_: ("", True))
    monkeypatch.setattr(loop.logger, "error", lambda line: print(line, file=sys.stderr))
    trainer: Any = SimpleNamespace(config=SimpleNamespace(run_folder=Path("runs/this")))
    with pytest.raises(SystemExit) as stop:
        end_after(KeyError("choices"), trainer, None, Progress(3, None, {}, saved=3))
    assert stop.value.code == 1
    *shown, line = capfd.readouterr().err.splitlines()
    assert shown == ["KeyError: 'choices'"]
    assert line.startswith(
        "stopped after iteration 3: KeyError: 'choices'; the checkpoint is "
        "runs/this/checkpoints/iteration_000003. Go on with: "
    )
    summary = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]
    first, *_, last = summary["py_callstack"].splitlines()
    assert (first, last) == ("KeyError: 'choices'", f"RuntimeError: {line}")
