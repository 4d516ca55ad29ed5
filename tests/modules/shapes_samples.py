"""Clips of the embedded world's policy by the sampler that RL starts from, and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.config import RolloutConfig
from fastgrpo.shapes.captions import all_captions
from fastgrpo.shapes.judge import ShapesJudge
from fastgrpo.shapes.policy import ShapesPolicy
from fastgrpo.training.rollout import sample_videos, start_rollout


def sample(policy: ShapesPolicy, prompts: Sequence[str], seed: int) -> Tensor:
    """One clip [B, 8, 3, 16, 16] of each prompt."""
    cfg = RolloutConfig(
        num_generations=1,
        height=16,
        width=16,
        num_frames=8,
        guidance_scale=1.0,
        micro_batch_size=len(prompts),
    )
    device = torch.device("cpu")
    rollout = start_rollout(
        policy, [*prompts], cfg, seed=seed, iteration=1, first_slot=0, device=device
    )
    (videos,) = sample_videos(policy, rollout)
    return policy.decode(videos.latents)


def start_scores(policy: ShapesPolicy, seed: int, repeats: int = 8) -> Tensor:
    """Mean VQ, MQ and TA [3] of `repeats` samples of each of the 48 prompts."""
    prompts = [str(caption) for caption in all_captions()]
    samples = (sample(policy, prompts, seed + i) for i in range(repeats))
    return torch.cat([ShapesJudge().qualities(clips, prompts) for clips in samples]).mean(0)
