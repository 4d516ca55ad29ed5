"""Flow-Factory's GRPO trainer and Wan2 adapter, over the embedded network.

Its modules are imported. `GRPOTrainer.sample` and `optimize` and `Wan2_T2V_Adapter.inference` and
`forward` run as they are, on instances that are made without their constructors (which load
weights, a data set and reward models), with the scheduler that it chooses for Wan
(UniPCMultistepSDEScheduler) and accelerate. Restated: nothing; the decoder, the pipeline's
`prepare_latents` and the reward buffer answer at once.

In its favour: only the trained steps are stochastic there (`num_sde_steps`), so the others need
no log-probability and are not stored; no progress bar, no logger.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.peers.checkout import load, mapping
from benchmarks.peers.embedded import Network, World

ABSENT = ("imageio", "imageio.v3", "datasets", "datasets.utils", "datasets.utils.logging")
"""Imported by its modules for data sets and trackers."""


def _nothing(*_: Any, **__: Any) -> None:
    pass


class FlowFactory:
    """Its loop, on so many videos at a time.

    Args:
        root: The checkout.
        world: The work.
        videos: In a pass of sampling and of training.
    """

    def __init__(self, root: Path, world: World, videos: int) -> None:
        from accelerate import Accelerator

        names = ["trainers.grpo", "models.wan.wan2_t2v", "scheduler"]
        grpo, wan, scheduler = load(
            root / "src", [f"flow_factory.{name}" for name in names], ABSENT
        )
        self.world, self.passes = world, len(world.chosen) // videos
        cfg, steps = world.config.update, world.trained_steps
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.passes * steps)
        network = Network()
        self.network, optimizer = self.accelerator.prepare(network, world.optimizer(network))
        settings = mapping(
            num_inference_steps=world.num_steps,
            guidance_scale=1.0,
            height=16,
            width=16,
            num_frames=29,
            per_device_batch_size=videos,
            num_batches_per_epoch=len(world.batches(videos)),
            num_inner_epochs=1,
            seed=0,
            kl_beta=0.0,
            offload_samples_to_cpu=False,
            clip_range=(-cfg.clip_range, cfg.clip_range),
            adv_clip_range=(-cfg.adv_clip, cfg.adv_clip),
            max_grad_norm=cfg.max_grad_norm,
        )
        self.adapter = object.__new__(wan.Wan2_T2V_Adapter)
        self.adapter.__dict__.update(
            accelerator=self.accelerator,
            training_args=settings,
            model_args=SimpleNamespace(target_components=["transformer"]),
            target_module_map={"transformer": ["all"]},
            pipeline=self._pipeline(scheduler.UniPCMultistepSDEScheduler),
            decode_latents=lambda latents, **_: torch.zeros(len(latents), 1, 3, 1, 1),
            _components={"transformer": self.network},
        )
        self.trainer = object.__new__(grpo.GRPOTrainer)
        self.trainer.__dict__.update(
            accelerator=self.accelerator,
            adapter=self.adapter,
            optimizer=optimizer,
            training_args=settings,
            log_args=SimpleNamespace(verbose=False),
            autocast=nullcontext,
            reward_buffer=SimpleNamespace(clear=_nothing, add_samples=_nothing),
            dataloader=self._data(videos),
            log_data=_nothing,
            epoch=0,
            step=0,
        )
        self.samples: list[Any]

    def _pipeline(self, scheduler: Any) -> Any:
        """What the adapter asks of WanPipeline."""
        shape = self.network.latent_shape
        noisy = scheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=self.world.config.rollout.shift,
            num_sde_steps=self.world.trained_steps,
        )
        # Which steps are stored is asked before its first rollout.
        noisy.set_timesteps(self.world.num_steps, device=torch.device("cpu"))
        return SimpleNamespace(
            transformer=self.network,
            scheduler=noisy,
            config=SimpleNamespace(boundary_ratio=None, expand_timesteps=False),
            vae_scale_factor_temporal=4,
            vae_scale_factor_spatial=8,
            prepare_latents=lambda batch_size, **_: torch.randn(batch_size, *shape),
            maybe_free_model_hooks=_nothing,
        )

    def _data(self, videos: int) -> list[dict[str, Any]]:
        """What its data loader gives: the videos' prompts, embedded."""
        G = self.world.generations
        return [
            {
                "prompt": [self.world.prompts[i // G] for i in batch.tolist()],
                "prompt_ids": torch.zeros(len(batch), 1, dtype=torch.long),
                "prompt_embeds": self.world.text[batch],
            }
            for batch in self.world.batches(videos)
        ]

    def rollout(self) -> None:
        """GRPOTrainer.sample."""
        self.samples = self.trainer.sample()

    def update(self) -> None:
        """GRPOTrainer.optimize."""
        chosen = [self.samples[video] for video in self.world.chosen]
        for sample, advantage in zip(chosen, torch.randn(len(chosen)), strict=True):
            sample.extra_kwargs["advantage"] = advantage
        # accelerate keeps this number for the whole process, and other loops have another.
        self.accelerator.gradient_accumulation_steps = self.passes * self.world.trained_steps
        self.trainer.optimize(chosen)
