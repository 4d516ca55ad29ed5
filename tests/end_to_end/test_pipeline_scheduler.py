"""Videos by the pipeline's own scheduler are the pipeline's own videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    HunyuanVideoPipeline,
    WanPipeline,
)
from fastgrpo_kernels import gaussian_noise

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import RolloutConfig
from fastgrpo.policies.hunyuan_video import HunyuanVideoPolicy
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import sampling
from fastgrpo.training.rollout import start_rollout
from fastgrpo.training.sampling import Unscored, pipeline_scheduler, sample_with_scheduler

PROMPTS = [
    "a red square moving right",
    "a dog runs",
    "a cat sleeps in the sun",
    "a boat on a lake",
]


@pytest.mark.parametrize("kind", ["wan", "hunyuan_video"])
def test_the_pipelines_scheduler_makes_the_pipelines_video(
    kind: str,
    request: pytest.FixtureRequest,
    one_rank: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the memory of one video's rollout at a time."""
    folder: Path = request.getfixturevalue("wan_folder" if kind == "wan" else "hunyuan_folder")
    policy_class, pipeline_class = (
        (WanPolicy, WanPipeline) if kind == "wan" else (HunyuanVideoPolicy, HunyuanVideoPipeline)
    )
    policy = policy_class(
        str(folder), text_cache=str(tmp_path), text_dtype="fp32", max_sequence_length=64
    )
    policy.embed(PROMPTS[:2], one_rank)
    policy.load(one_rank)
    cfg = RolloutConfig(
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        num_generations=1,
        guidance_scale=5.0 if kind == "wan" else 1.0,
    )
    num_latents: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        rollout = start_rollout(*args, **options)
        num_latents.append(len(rollout.latents))
        return rollout

    monkeypatch.setattr(sampling, "start_rollout", counted)
    judge, pipe = ScoringQueue(Unscored()), pipeline_class.from_pretrained(folder)
    scheduler = pipeline_scheduler(policy, "ode")
    made = sample_with_scheduler(
        policy,
        judge,
        PROMPTS[:2],
        cfg,
        scheduler,
        seed=7,
        device=one_rank,
        compute_dtype=torch.float32,
    )
    judge.close()
    pipe.set_progress_bar_config(disable=True)
    guidance = (
        {"guidance_scale": 5.0, "negative_prompt": policy.negative_prompt}
        if isinstance(policy, WanPolicy)
        else {"guidance_scale": 6.0}
    )
    for slot, prompt in enumerate(PROMPTS[:2]):
        seed = derive_seed(derive_seed(7, "held out"), "first", 0, slot, 0)
        noise = gaussian_noise(torch.tensor([seed]), 0, policy.latent_shape(32, 32, 5), one_rank)
        size = {
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "num_inference_steps": 3,
            "max_sequence_length": 64,
        }
        expected = pipe(prompt, **size, **guidance, latents=noise, output_type="pt").frames[0]
        assert (made.videos[slot].float() / 255 - expected).abs().max() < 1.5 / 255
    assert made.scores_PGK == [[[]], [[]]]
    assert num_latents == [1, 1]


def test_the_pipelines_scheduler_refuses(tiny_policy: Any, wan_folder: Path) -> None:
    with pytest.raises(ValueError, match="which TinyPolicy is not"):
        pipeline_scheduler(tiny_policy(), "ode")
    with pytest.raises(ValueError, match="sde ode"):
        pipeline_scheduler(WanPolicy(str(wan_folder)), "dance")
