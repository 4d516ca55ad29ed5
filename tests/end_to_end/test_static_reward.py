"""The baseline of one static reward, recipes/dancegrpo.yaml, with a reward network on the embedded
world.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

RECIPE = Path(__file__).resolve().parents[2] / "fastgrpo" / "recipes" / "dancegrpo.yaml"


def test_training_on_an_aesthetic_score(train: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        projection_dim=24,
    )
    CLIPVisionModelWithProjection(tower).save_pretrained(tmp_path / "clip")
    save_file(
        {"weight": torch.randn(1, 24), "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors"
    )
    where = {"head": str(tmp_path / "head.safetensors"), "model": str(tmp_path / "clip")}
    overlay = tmp_path / "reward.yaml"
    overlay.write_text(
        yaml.safe_dump(
            {
                "reward": {
                    "class_path": "fastgrpo.rewards.models.aesthetic.Aesthetic",
                    "init_args": where,
                }
            }
        )
    )
    run = train(
        tmp_path / "run", "--config", str(RECIPE), "--config", str(overlay), "--iterations 2"
    )
    assert run.code == 0, run.err
    for row in run.trained_rows:
        assert row["num_invalid_videos"] == 0
        assert row["weights/aesthetic"] == 1
        assert 0 < row["reward"] == row["rewards/aesthetic/mean"] < 1
        assert row["grad_norm"] > 0
    assert json.loads((run.folder / "judge.json").read_text())["judge"] == "LAION aesthetic"
