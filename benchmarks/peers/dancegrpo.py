"""DanceGRPO's functions for Wan2.1 (fastvideo/train_grpo_wan_2_1.py), over the embedded network.

As it ships, one video a pass: `sample_reference_model` and `train_one_step` as they are, with a
VAE, a writer of mp4 files and a reward model (HPS) that answer at once. The latents of the
embedded world are given as 16 channels of 8 x 2 x 3, since the script makes them itself. Sampling
gives all videos and the update trains the chosen ones, so the two are called apart, and
`train_one_step` gets the videos that were sampled before instead of new ones.

At a larger micro-batch, which the script does not have (`batch_size = 1` is written in it), its
`run_sample_step`, `grpo_one_step` and `flux_step` are called on so many videos; the loop over
micro-batches, the ratio and the loss are restated. A micro-batch trains the same steps of all its
videos, since `grpo_one_step` takes one.

In its favour: no process group, progress bar, print, learning-rate schedule or file.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.checkout import functions
from benchmarks.peers.embedded import Network, World

SCRIPT = "fastvideo/train_grpo_wan_2_1.py"
NAMES = (
    "sd3_time_shift",
    "flux_step",
    "assert_eq",
    "run_sample_step",
    "grpo_one_step",
    "sample_reference_model",
    "gather_tensor",
    "train_one_step",
)
GEOMETRY = {"t": 29, "h": 16, "w": 24}
"""Pixels whose latents by its VAE's factors are 16 x 8 x 2 x 3: 768 elements."""


class _Silent:
    """`torch.distributed` for one process that is not the one that prints."""

    ReduceOp = SimpleNamespace(AVG=None)

    @staticmethod
    def get_rank() -> int:
        return 1

    @staticmethod
    def is_initialized() -> bool:
        return False

    @staticmethod
    def all_reduce(*_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def barrier() -> None:
        pass


def source(root: Path) -> tuple[SimpleNamespace, dict[str, Any]]:
    """Its functions, and their globals."""
    namespace = {
        "torch": torch,
        "math": math,
        "os": SimpleNamespace(environ={"RANK": "1"}),
        "dist": _Silent,
        "tqdm": lambda steps, **_: steps,
        "print": lambda *_, **__: None,
        "VideoProcessor": lambda **_: SimpleNamespace(postprocess_video=lambda video: video),
        "export_to_video": lambda *_, **__: None,
        "video_first_frame_to_pil": lambda path: None,
    }
    return functions(root / SCRIPT, NAMES, namespace)


class _Tokens:
    def to(self, **_: Any) -> _Tokens:
        return self


def _reward(image: Tensor, text: _Tokens) -> dict[str, Tensor]:
    return {"image_features": torch.rand(1, 1), "text_features": torch.ones(1, 1)}


class DanceGRPO:
    """Its loop as it ships.

    Args:
        root: The checkout.
        world: The work.
    """

    def __init__(self, root: Path, world: World) -> None:
        self.world, self.network = world, Network()
        self.peer, self.scope = source(root)
        cfg = world.config
        self.args = SimpleNamespace(
            **GEOMETRY,
            sampling_steps=world.num_steps,
            shift=cfg.rollout.shift,
            eta=cfg.rollout.eta,
            cfg_infer=1.0,
            init_same_noise=True,
            use_hpsv2=True,
            use_group=True,
            num_generations=len(world.chosen) // len(world.prompts),
            timestep_fraction=cfg.update.timestep_fraction,
            clip_range=cfg.update.clip_range,
            adv_clip_max=cfg.update.adv_clip,
            gradient_accumulation_steps=len(world.chosen),
        )
        self.optimizer = world.optimizer(self.network)
        self.schedule = SimpleNamespace(step=lambda: None)
        self.kept: tuple[Tensor, Tensor, Tensor, Tensor]

    def rollout(self) -> None:
        """sample_reference_model."""
        zeros = [0.0] * 16
        vae = SimpleNamespace(
            config=SimpleNamespace(latents_mean=zeros, latents_std=[1.0] * 16, z_dim=16),
            decode=lambda latents, **_: (latents,),
            enable_tiling=lambda: None,
        )
        self.kept = self.peer.sample_reference_model(
            self.args,
            torch.device("cpu"),
            self.network,
            vae,
            self.world.text,
            self.world.text,
            _reward,
            lambda texts: _Tokens(),
            [""] * self.world.num_videos,
            lambda image: torch.zeros(1),
        )

    def update(self) -> None:
        """train_one_step."""
        rewards, latents, log_probs, sigmas = self.kept
        chosen = torch.tensor(self.world.chosen)
        trained = rewards[chosen], latents[chosen], log_probs[chosen], sigmas
        self.scope["sample_reference_model"] = lambda *_: trained
        text = self.world.text[:: self.world.generations]
        self.peer.train_one_step(
            self.args,
            torch.device("cpu"),
            self.network,
            None,
            None,
            None,
            self.optimizer,
            self.schedule,
            text,
            text,  # it indexes the negative prompt also where it does not use it
            ["x"] * len(text),
            None,
            self.world.config.update.max_grad_norm,
            None,
        )


class DanceGRPOBatched(DanceGRPO):
    """Its functions on so many videos at a time."""

    def __init__(self, root: Path, world: World, videos: int) -> None:
        super().__init__(root, world)
        self.videos = videos

    def rollout(self) -> None:
        """run_sample_step, micro-batch by micro-batch."""
        steps = self.world.num_steps
        sigmas = self.peer.sd3_time_shift(self.args.shift, torch.linspace(1, 0, steps + 1))
        first = torch.randn(1, *self.network.latent_shape)
        parts = []
        for batch in self.world.batches(self.videos):
            noise = first.repeat(len(batch), 1, 1, 1, 1)
            text = self.world.text[batch]
            with torch.no_grad():
                parts.append(
                    self.peer.run_sample_step(
                        self.args, noise, range(steps), sigmas, self.network, text, text, True
                    )[2:]
                )
        latents, log_probs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.kept = torch.rand(self.world.num_videos), latents, log_probs, sigmas

    def update(self) -> None:
        """grpo_one_step, micro-batch by micro-batch."""
        rewards, latents, log_probs, sigmas = self.kept
        args, steps = self.args, self.world.trained_steps
        timesteps = [int(sigma * 1000) for sigma in sigmas]
        chosen = torch.tensor(self.world.chosen)
        passes = math.ceil(len(chosen) / self.videos)
        self.optimizer.zero_grad()
        for batch in chosen.split(self.videos):
            advantages = rewards[batch].clamp(-args.adv_clip_max, args.adv_clip_max)
            text = self.world.text[batch]
            for i in random.sample(range(self.world.num_steps - 1), steps):
                new = self.peer.grpo_one_step(
                    args,
                    latents[batch, i],
                    latents[batch, i + 1],
                    text,
                    text,
                    self.network,
                    torch.full((len(batch),), timesteps[i]),
                    i,
                    sigmas,
                )
                ratio = torch.exp(new - log_probs[batch, i])
                clipped = ratio.clamp(1.0 - args.clip_range, 1.0 + args.clip_range)
                loss = torch.mean(torch.maximum(-advantages * ratio, -advantages * clipped))
                loss = loss / (passes * steps)
                loss.backward()
                loss.detach().item()
        limit = self.world.config.update.max_grad_norm
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), max_norm=limit)
        self.optimizer.step()
