"""The parts of a run's loop that need no run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.config import RuntimeConfig, ScoringConfig, UpdateConfig
from fastgrpo.training.loop import compute_dtype, conclude, reason_to_stop


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
    assert conclude(stopped, 3, failed=True) == 1
    assert conclude(stopped, 4, failed=False) == 0
    failed, signalled = caplog.messages
    assert failed.startswith(f"stopped after iteration 3: {reason_to_stop(stopped)}. The state is")
    assert signalled.startswith("stopped by a signal after iteration 4, with a checkpoint")
    assert "--config runs/this/config.yaml --resume auto" in failed
    assert "--config runs/this/config.yaml --resume auto" in signalled
