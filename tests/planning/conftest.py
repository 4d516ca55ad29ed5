"""The real models' configuration files, and recipes that are counted once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planned import SIZES, recipe

from fastgrpo.config import TrainConfig
from fastgrpo.planning import memory
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.shapes.policy import ShapesPolicy


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration files of the real models, and nothing else of them."""
    root = tmp_path_factory.mktemp("configs")
    for name, transformer in SIZES.items():
        parts = {
            "transformer": ("WanTransformer3DModel", transformer),
            "vae": ("AutoencoderKLWan", {}),
            "text_encoder": ("UMT5EncoderModel", {"d_model": 4096}),
        }
        if name == "hunyuan":
            parts = {
                "transformer": ("HunyuanVideoTransformer3DModel", transformer),
                "vae": ("AutoencoderKLHunyuanVideo", {}),
                "text_encoder": ("LlamaModel", {"hidden_size": 4096}),
                "text_encoder_2": ("CLIPTextModel", {"hidden_size": 768}),
            }
        index: dict[str, Any] = {
            "_class_name": "HunyuanVideoPipeline" if name == "hunyuan" else "WanPipeline"
        }
        for part, (kind, values) in parts.items():
            (root / name / part).mkdir(parents=True)
            (root / name / part / "config.json").write_text(
                json.dumps({"_class_name": kind} | values)
            )
            index[part] = ["", kind]
        (root / name / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="session")
def wan(models: Path) -> tuple[TrainConfig, memory.Counts]:
    """The paper's setting, 1.3B at 53 frames of 480 x 832 on 8 GPUs."""
    config = recipe(WanPolicy(str(models / "wan_1.3b")))
    return config, memory.count(config)


@pytest.fixture(scope="session")
def shapes() -> tuple[TrainConfig, memory.Counts]:
    config = recipe(
        ShapesPolicy(),
        height=16,
        width=16,
        num_frames=8,
        guidance_scale=1.0,
        num_prompts=4,
        micro_batch_size=4,
    )
    return config, memory.count(config)
