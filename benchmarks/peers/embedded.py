"""The work that every loop is given: the embedded world's network, prompts, and videos to train.

One iteration samples P prompts x G videos in N steps, and trains the best and worst of each group
on a share of their steps in one optimizer step: without guidance, judge or decoding, in fp32. All
sizes are those of the recipe fastgrpo/recipes/shapes.yaml. The peers' network is diffusers' own
WanTransformer3DModel, as it is loaded; ours is prepared as `train` prepares it.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives, sharding
from fastgrpo.shapes.policy import SHIPPED_CHECKPOINT, frame_positions
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.optimizer import make_optimizer
from fastgrpo.training.prompts import read_prompts
from fastgrpo.training.recipe_parser import parse_config
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.trajectory import Rollout
from fastgrpo.training.update import update

RECIPE = "fastgrpo/recipes/shapes.yaml"


class Loop(Protocol):
    """One trainer's rollout and update over the same work."""

    def rollout(self) -> None:
        """Sample all videos, keeping what the update needs."""

    def update(self) -> None:
        """Train on the chosen ones of the videos sampled last, with one optimizer step."""


@dataclass(frozen=True)
class World:
    """What all loops share.

    Attributes:
        config: The recipe.
        prompts: P prompts.
        text: [P * G, 3, 32] fp32, the text of each video's prompt.
        chosen: The videos that are trained.
    """

    config: TrainConfig
    prompts: list[str]
    text: Tensor
    chosen: list[int]

    @property
    def generations(self) -> int:
        """G, videos of one prompt."""
        return self.config.rollout.num_generations

    @property
    def num_videos(self) -> int:
        """P * G."""
        return len(self.text)

    @property
    def num_steps(self) -> int:
        """N."""
        return self.config.rollout.num_inference_steps

    @property
    def trained_steps(self) -> int:
        """Of a video: int(0.6 * 15) = 9 of 16."""
        return int(self.config.update.timestep_fraction * (self.num_steps - 1))

    def batches(self, videos: int) -> list[Tensor]:
        """Indices of all videos, so many at a time."""
        return [*torch.arange(self.num_videos).split(videos)]

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """AdamW as all four peers make it, with the recipe's learning rate."""
        return torch.optim.AdamW(network.parameters(), lr=self.config.update.learning_rate)


def load_world(overrides: Sequence[str] = ()) -> World:
    """The recipe, with options of `train` over it; starts this process as one rank of one."""
    words = ["--config", RECIPE, "--runtime.device", "cpu", *overrides]
    config, _, _ = parse_config(words, prog="benchmarks/loops.py")
    device = collectives.start(config.runtime)
    config.policy.load(device)
    roll, cfg = config.rollout, config.update
    prompts = read_prompts(config.prompts.train, "prompts.train")[: roll.num_prompts]
    text = config.policy.encode(prompts)["encoder_hidden_states"]
    draw = random.Random(0)
    chosen = [
        prompt * roll.num_generations + video
        for prompt in range(len(prompts))
        for video in sorted(draw.sample(range(roll.num_generations), cfg.num_best + cfg.num_worst))
    ]
    return World(config, prompts, text.repeat_interleave(roll.num_generations, 0), chosen)


class Network(nn.Module):
    """diffusers' WanTransformer3DModel with the embedded world's two position channels, called as
    the peers call theirs: latents of any shape of 768 elements, further arguments ignored.

    Attributes:
        videos: Those that have gone through it.
    """

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        folder = SHIPPED_CHECKPOINT / "transformer"
        self.transformer = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
        self.positions = frame_positions()[None]
        inner = self.transformer.config
        self.latent_shape: tuple[int, ...] = (inner.out_channels, self.positions.shape[2], 1, 1)
        self.config = SimpleNamespace(in_channels=inner.out_channels, patch_size=inner.patch_size)
        self.videos = 0

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        """The velocity, in the shape of the latents."""
        batch = len(hidden_states)
        self.videos += batch
        latents = hidden_states.float().reshape(batch, *self.latent_shape)
        latents = torch.cat([latents, self.positions.expand(batch, -1, -1, -1, -1)], dim=1)
        (velocity,) = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            return_dict=False,
        )
        return (velocity.reshape(hidden_states.shape),)

    def cache_context(self, name: str) -> Any:
        """Flow-Factory names the branch that it computes."""
        return nullcontext(name)


class Ours:
    """The trainer's own rollout and update, so many videos and transitions a pass.

    Attributes:
        drift: Largest |ratio - 1| of the last update's transitions before it.
    """

    def __init__(self, world: World, videos: int) -> None:
        device = torch.device("cpu")
        self.world, self.iteration, self.drift = world, 0, 0.0
        cfg = dataclasses.replace(world.config.rollout, micro_batch_size=videos)
        self.config = dataclasses.replace(world.config, rollout=cfg)
        self.policy = copy.copy(world.config.policy)
        self.dtype = compute_dtype(self.config.runtime, device)
        sharding.load(self.policy, self.config.parallel, device, self.dtype)
        parameters = [p for p in self.policy.transformer.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(parameters, self.config.update)
        self.sampled: Rollout

    def rollout(self) -> None:
        """As Trainer.step samples."""
        self.iteration += 1
        roll = self.config.rollout
        self.sampled = start_rollout(
            self.policy,
            self.world.prompts,
            roll,
            seed=self.config.seed,
            iteration=self.iteration,
            first_slot=0,
            device=torch.device("cpu"),
            compute_dtype=self.dtype,
        )
        for _ in sample_videos(self.policy, self.sampled, share_first_step=roll.share_first_step):
            pass

    def update(self) -> None:
        """As Trainer.step trains."""
        chosen = self.world.chosen
        advantages = {video: 1.0 if i % 2 else -1.0 for i, video in enumerate(chosen)}
        cfg = dataclasses.replace(self.config.update, optimizer_steps=1)
        stats = update(self.policy, self.optimizer, self.sampled, chosen, advantages, cfg)
        if any(stats.skipped):
            raise ValueError(f"update: expected a finite gradient, got {stats.grad_norms}")
        self.drift = max(abs(ratio - 1.0) for ratio in stats.ratios)
