"""The judge's benchmark: it runs, its model has the published size, and a wrong token leaves no
number.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402

from benchmarks import judge  # noqa: E402

TINY = ["--scale", "tiny", "--device", "cpu", "--rounds", "1"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def entries(folder: Path) -> list[dict[str, str]]:
    with open(folder / "cpu_judge.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_runs_at_a_tiny_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge.main([*TINY, "--csv", str(tmp_path)]) == 0
    assert "same tokens" in capsys.readouterr().out
    rows = {row["by"]: row for row in entries(tmp_path)}
    assert set(rows) == {
        "shared prefix",
        "shared prefix, expected",
        "generate, batched",
        "generate, single",
    }
    assert all(
        row["work"] == "3 videos x 3 questions, 60x80x9" and row["goals"] == ""
        for row in rows.values()
    )
    for by, row in rows.items():
        for peer, ratio in (
            ("generate, single", "against_single"),
            ("generate, batched", "against_batched"),
        ):
            assert float(row[ratio]) == pytest.approx(
                float(rows[peer]["seconds"]) / float(row["seconds"]), rel=1e-3
            ), by


def test_no_number_where_a_token_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a shared prefix whose positions are off by one step of time the answers are others,
    which is noticed.
    """
    from fastgrpo.rewards.vlm import qwen_prefix

    right = qwen_prefix.prefix_positions
    monkeypatch.setattr(
        qwen_prefix,
        "prefix_positions",
        lambda before, grid, step, after: right(before, grid, step + 9, after),
    )
    assert judge.main([*TINY, "--csv", str(tmp_path)]) == 1
    assert "no number" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_ties_are_told_from_errors() -> None:
    """The peers' logits are 0.01 apart: a token 0.015 below the largest is a tie, one 0.5 below it
    is not.
    """
    logits = torch.zeros(2, judge.TOKENS, 10)
    logits[..., 3], logits[..., 4], logits[..., 5] = 1.0, 0.985, 0.5
    three = [[3] * judge.TOKENS] * 2
    peer: tuple[list[list[int]], Tensor] = (three, logits)
    other = (three, logits + 0.01)
    assert judge.differences(three, peer, other) == ""
    assert (
        judge.differences([[3, 3, 3, 4, 9], three[1]], peer, other) == ""
    )  # after a tie it is another answer
    assert "answer 1, token 2: 5, not 3" in judge.differences(
        [three[0], [3, 3, 5, 3, 3]], peer, other
    )
    assert "answer 0, token 0: 4, not 3" in judge.differences(
        [[4] * 5, three[1]], peer, (three, logits + 0.005)
    )
    assert "only 4 of 10" in judge.differences([[3, 3, 4, 3, 3]] * 2, peer, other)
    parted = logits + 0.01
    parted[0, 3:] += (
        # after another token at place 2 the other peer's logits are of another answer, and no noise
        50
    )
    assert "token 2: 5" in judge.differences(
        [three[0], [3, 3, 5, 3, 3]], peer, ([[3, 3, 4, 7, 7], three[1]], parted)
    )


def test_the_7b_model_has_its_published_size() -> None:
    """8.29 billion parameters (the hub's figure for Qwen/Qwen2.5-VL-7B-Instruct)."""
    with torch.device("meta"):
        module = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(**judge.CONFIGS["qwen2.5-vl-7b"], **judge._IDS)
        )
    assert sum(p.numel() for p in module.parameters()) == 8_292_166_656


def test_goals_are_judged_on_their_device_only() -> None:
    full = judge.SCALES["full"]
    met = judge.goals(1.9, 6.5, 1.8, "NVIDIA H100 80GB HBM3", "qwen2.5-vl-7b", full)
    assert met == "G5 2.0 s: met; G5 batched 1.9x: not met; G5 single 6x: met"
    assert judge.goals(1.9, 6.5, 1.8, "AMD EPYC", "qwen2.5-vl-7b", full) == ""
    assert judge.goals(1.9, 6.5, 1.8, "NVIDIA H100 80GB HBM3", "tiny", full) == ""
    assert (
        judge.goals(1.9, 6.5, 1.8, "NVIDIA H100 80GB HBM3", "qwen2.5-vl-7b", judge.SCALES["tiny"])
        == ""
    )


def test_a_newer_row_takes_the_place_of_an_older(tmp_path: Path) -> None:
    about: dict[str, Any] = {
        name: name for name in ("device", "torch", "transformers", "driver", "commit", "date")
    }
    row = judge.Row("m", "w", "shared prefix", "bf16", 2.0, None, 3.0, 2.0, "", **about)
    path = tmp_path / "cpu_judge.csv"
    judge.write_rows(path, [row, dataclasses.replace(row, by="generate, single")])
    judge.write_rows(path, [dataclasses.replace(row, seconds=1.25, peak_gb=60.5)])
    assert [(entry["by"], entry["seconds"], entry["peak_gb"]) for entry in entries(tmp_path)] == [
        ("generate, single", "2", ""),
        ("shared prefix", "1.25", "60.5"),
    ]
