"""Thresholds with the options as they are by default: the command is tested end to end in
tests/end_to_end/test_commands.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgrpo.config import PacingConfig, PromptsConfig, TrainConfig
from fastgrpo.evaluation import calibration
from fastgrpo.evaluation.calibration import calibrate, require_same
from fastgrpo.evaluation.options import CalibrateOptions


def test_the_default_window_and_fraction(
    tmp_path: Path,
    tiny_policy: Any,
    tiny_judge: Any,
    one_rank: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """50 iterations of i^2 / 2500: start is the mean of iterations 1 to 5, end that of 45 to 50."""

    def run(config: TrainConfig, config_yaml: str) -> int:
        config.run_folder.mkdir()
        stage = config.reward.stages[config.pacing.static_stage - 1]
        rows = [{"iteration": i, f"rewards/{stage}/mean": i * i / 2500} for i in range(51)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (config.run_folder / "metrics.jsonl").write_text(text)
        return 0

    monkeypatch.setattr(calibration, "run", run)
    judge = tiny_judge()
    pacing = PacingConfig(thresholds=(0.5,) * (len(judge.stages) - 1))
    config = TrainConfig(
        tiny_policy(), judge, PromptsConfig("-"), pacing=pacing, output_dir=str(tmp_path)
    )
    assert calibrate(config, "pacing: {}\n", CalibrateOptions()) == 0
    found = yaml.safe_load((tmp_path / "run-calibrate" / "thresholds.yaml").read_text())
    start = sum(i * i for i in range(1, 6)) / 5 / 2500
    end = sum(i * i for i in range(45, 51)) / 6 / 2500
    expected = start + 0.7 * (end - start)
    assert found["pacing"]["thresholds"] == [pytest.approx(expected, abs=1e-4)] * len(
        pacing.thresholds
    )


def test_other_endpoints_are_the_same_configuration(tmp_path: Path) -> None:
    def text(host: str, seed: int = 0) -> str:
        return yaml.safe_dump({"reward": {"engine": {"endpoints": [host]}}, "seed": seed})

    require_same(tmp_path, text("a"))  # nothing there yet
    (tmp_path / "config.yaml").write_text(text("a"))
    require_same(tmp_path, text("b"))
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        require_same(tmp_path, text("a", seed=1))
