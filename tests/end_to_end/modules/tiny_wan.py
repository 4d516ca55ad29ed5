"""A Wan transformer of a few thousand weights, and the trainer on it: what the tests of sharding
run, in one process and in several.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from fastgrpo.config import ParallelConfig, PromptsConfig, RolloutConfig, TrainConfig, UpdateConfig
from fastgrpo.distributed import sharding
from fastgrpo.interfaces import Policy
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training.step import Trainer

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "a dog", "a red cube", "a tree in wind"]
SIZE = (2, 4, 4)


class TinyWan(Policy):
    """diffusers' own network over latents [4, 2, 4, 4]; text [B, 3, 8] from a prompt's hash."""

    fps = 2

    def __init__(self, seed: int = 0, lora: bool = False) -> None:
        torch.manual_seed(seed)
        shape = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2}
        self.transformer: Any = WanTransformer3DModel(
            in_channels=4, out_channels=4, text_dim=8, freq_dim=16, **shape
        ).eval()
        if lora:
            from peft import LoraConfig

            self.transformer.add_adapter(
                LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=True)
            )

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        return (4, num_frames, height, width)

    def load(self, device: torch.device) -> None:
        self.transformer.to(device)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        raise AssertionError("these tests export nothing")

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        words = [
            [b / 128 - 1 for b in hashlib.sha256(p.encode()).digest()[:24]] if p else [0.0] * 24
            for p in prompts
        ]
        return {"encoder_hidden_states": torch.tensor(words).view(-1, 3, 8)}

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        (velocity,) = self.transformer(
            hidden_states=latents, timestep=timesteps, return_dict=False, **conditioning
        )
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents[:, :3]).transpose(1, 2)


def make_trainer(
    reward: Any,
    captions: Sequence[str] = CAPTIONS,
    *,
    seed: int = 0,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    update: dict[str, Any] | None = None,
    guidance_scale: float = 3.0,
    num_prompts: int = 2,
    **parallel: Any,
) -> Trainer:
    """A trainer of two prompts with four videos each, two of them trained in one optimizer step."""
    policy = TinyWan(seed, lora)
    T, H, W = SIZE
    settings = {
        "num_best": 1,
        "num_worst": 1,
        "optimizer_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 1e9,
    } | (update or {})
    config = TrainConfig(
        policy=policy,
        reward=reward,
        prompts=PromptsConfig(train="-", shuffle=False),
        rollout=RolloutConfig(
            num_prompts=num_prompts,
            num_generations=4,
            num_inference_steps=4,
            guidance_scale=guidance_scale,
            height=H,
            width=W,
            num_frames=T,
        ),
        update=UpdateConfig(**settings),
        parallel=ParallelConfig(**parallel),
    )
    sharding.prepare(policy.transformer, config.parallel, CPU, dtype)
    return Trainer(config, policy, ScoringQueue(reward), list(captions), CPU, dtype)


def whole(tensor: Any) -> Any:
    """A tensor that may be sharded, gathered: all ranks call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name, whole."""
    flat: dict[str, Tensor] = {}

    def walk(tree: Any, prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}/")
            elif isinstance(value, Tensor):
                flat[f"{prefix}{key}"] = whole(value).detach().clone()

    walk(trainer.tensors(), "")
    return flat


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in metrics.items()
        if not key.startswith("time/") and key != "step_time"
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """Of names and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
