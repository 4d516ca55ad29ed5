"""The parts of a run's loop that need no run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.config import RuntimeConfig, ScoringConfig, UpdateConfig
from fastgrpo.training.loop import compute_dtype, reason_to_stop


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


def test_why_a_run_stopped(one_rank: torch.device) -> None:
    stopped: Any = SimpleNamespace(
        config=SimpleNamespace(update=UpdateConfig(), scoring=ScoringConfig()),
        skipped_in_a_row=2,
        invalid_share=0.75,
        judge=SimpleNamespace(reward=SimpleNamespace(last_errors=lambda: {"http://here": "gone"})),
    )
    reason = "75% of its videos got no score, and scoring.max_invalid_share is 50%"
    assert reason_to_stop(stopped) == f"{reason}; http://here: gone"
    stopped.skipped_in_a_row = 5
    assert reason_to_stop(stopped).startswith(
        "5 updates in a row (update.max_skipped_updates) could not be made"
    )
