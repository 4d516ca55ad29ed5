"""Recipes to plan, and the sizes of the real models."""

from __future__ import annotations

from typing import Any

from fastgrpo.config import PromptsConfig, RolloutConfig, TrainConfig
from fastgrpo.shapes.judge import ShapesJudge

WAN = {
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
}
SIZES: dict[str, dict[str, Any]] = {
    "wan_1.3b": WAN | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan_14b": WAN | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "hunyuan": {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "guidance_embeds": True,
    },
}


def recipe(policy: Any, **rollout: Any) -> TrainConfig:
    return TrainConfig(
        policy=policy,
        reward=ShapesJudge(),
        prompts=PromptsConfig(train="none"),
        rollout=RolloutConfig(**rollout),
    )
