"""judge.py: it runs, its model has the published size, and a wrong token leaves no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import judge

TINY = ["--scale", "tiny", "--device", "cpu", "--rounds", "1", "--csv"]


def test_it_runs_at_a_tiny_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], read: Any
) -> None:
    assert judge.main([*TINY, str(tmp_path)]) == 0
    assert "same tokens" in capsys.readouterr().out
    rows = {row["implementation"]: row for row in read("cpu_judge.csv")}
    assert len(rows) == 4
    for row in rows.values():
        for peer in ("single", "batched"):
            ratio = float(rows[f"generate, {peer}"]["seconds"]) / float(row["seconds"])
            assert float(row[f"against_{peer}"]) == pytest.approx(ratio, rel=1e-3)


def test_no_number_where_a_token_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared prefix whose positions are off by one step of time gives other answers."""
    from fastgrpo.rewards.vlm import qwen_prefix

    right = qwen_prefix.prefix_positions
    monkeypatch.setattr(
        qwen_prefix,
        "prefix_positions",
        lambda before, grid, step, after: right(before, grid, step + 9, after),
    )
    assert judge.main([*TINY, str(tmp_path)]) == 1
    assert "no number" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_ties_are_told_from_errors() -> None:
    """The peers' logits are 0.01 apart: a token 0.015 below the largest is a tie, one 0.5 below it
    is not.
    """
    logits = torch.zeros(2, judge.TOKENS, 10)
    logits[..., 3], logits[..., 4], logits[..., 5] = 1.0, 0.985, 0.5
    three = [[3] * judge.TOKENS] * 2
    peer, other = (three, logits), (three, logits + 0.01)
    assert judge.differences(three, peer, other) == ""
    after_a_tie = [[3, 3, 3, 4, 9], three[1]]
    assert judge.differences(after_a_tie, peer, other) == ""
    wrong = judge.differences([three[0], [3, 3, 5, 3, 3]], peer, other)
    assert "answer 1, token 2: 5, not 3" in wrong
    assert "only 4 of 10" in judge.differences([[3, 3, 4, 3, 3]] * 2, peer, other)


def test_the_7b_model_has_its_published_size() -> None:
    """8.29 billion parameters (the hub's figure for Qwen/Qwen2.5-VL-7B-Instruct)."""
    config = Qwen2_5_VLConfig(**judge.CONFIGS["qwen2.5-vl-7b"])
    with torch.device("meta"):
        module = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(p.numel() for p in module.parameters()) == 8_292_166_656
