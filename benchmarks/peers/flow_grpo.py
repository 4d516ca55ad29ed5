"""flow_grpo's sampling and training (scripts/train_sd3.py and flow_grpo/diffusers_patch), over the
embedded network.

Its `pipeline_with_logprob` is called as it is, on a pipeline whose encoder, VAE and image processor
answer at once; `compute_log_prob` and the whole loop `for inner_epoch in ...` of its `main` run
from its source, with accelerate. Restated: the few lines of `main` that stack what the pipeline
returns. Latents have four dimensions there, so those of a video are [96, 8, 1].

In its favour: no progress bar, no tracker, one process.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.checkout import functions, load, loop
from benchmarks.peers.embedded import Network, World

SCRIPT = "scripts/train_sd3.py"
PATCH = "flow_grpo.diffusers_patch"


class FlowGRPO:
    """Its loop, on so many videos at a time.

    Args:
        root: The checkout.
        world: The work.
        videos: In a pass of sampling and of training.
    """

    def __init__(self, root: Path, world: World, videos: int) -> None:
        from accelerate import Accelerator
        from diffusers import FlowMatchEulerDiscreteScheduler

        names = [f"{PATCH}.sd3_pipeline_with_logprob", f"{PATCH}.sd3_sde_with_logprob"]
        pipeline, sde = load(root, names)
        self.world, self.videos, self.sample = world, videos, pipeline.pipeline_with_logprob
        peer, _ = functions(
            root / SCRIPT,
            ["compute_log_prob"],
            {"torch": torch, "sde_step_with_logprob": sde.sde_step_with_logprob},
        )
        self.training = loop(root / SCRIPT, "main", "inner_epoch")
        self.passes = len(world.chosen) // videos
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=self.passes * world.trained_steps
        )
        self.network, optimizer = self.accelerator.prepare(*self._trained())
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=world.config.rollout.shift)
        cfg = world.config.update
        self.scope: dict[str, Any] = {
            "torch": torch,
            "tqdm": lambda items, **_: items,
            "defaultdict": defaultdict,
            "wandb": SimpleNamespace(log=lambda *_, **__: None),
            "autocast": nullcontext,
            "compute_log_prob": peer.compute_log_prob,
            "accelerator": self.accelerator,
            "transformer": self.network,
            "optimizer": optimizer,
            "pipeline": self._pipeline(),
            "num_train_timesteps": world.trained_steps,
            "config": SimpleNamespace(
                sample=SimpleNamespace(
                    num_batches_per_epoch=self.passes, noise_level=0.7, guidance_scale=1.0
                ),
                train=SimpleNamespace(
                    num_inner_epochs=1,
                    cfg=False,
                    beta=0.0,
                    ema=False,
                    adv_clip_max=cfg.adv_clip,
                    clip_range=cfg.clip_range,
                    max_grad_norm=cfg.max_grad_norm,
                ),
            ),
        }
        self.samples: dict[str, Tensor]

    def _trained(self) -> tuple[Network, torch.optim.Optimizer]:
        network = Network()
        return network, self.world.optimizer(network)

    def _pipeline(self) -> Any:
        """What `pipeline_with_logprob` asks of StableDiffusion3Pipeline."""
        shape = self.network.latent_shape[:3]
        return SimpleNamespace(
            transformer=self.network,
            scheduler=self.scheduler,
            check_inputs=lambda *_, **__: None,
            do_classifier_free_guidance=False,
            interrupt=False,
            joint_attention_kwargs=None,
            clip_skip=None,
            _execution_device=torch.device("cpu"),
            encode_prompt=lambda prompt_embeds, **_: (prompt_embeds, None, None, None),
            prepare_latents=lambda batch, *_: torch.randn(batch, *shape),
            progress_bar=lambda **_: nullcontext(SimpleNamespace(update=lambda: None)),
            vae=SimpleNamespace(
                config=SimpleNamespace(scaling_factor=1.0, shift_factor=0.0),
                dtype=torch.float32,
                decode=lambda latents, **_: (latents,),
            ),
            image_processor=SimpleNamespace(postprocess=lambda image, **_: image),
            maybe_free_model_hooks=lambda: None,
        )

    def rollout(self) -> None:
        """pipeline_with_logprob, micro-batch by micro-batch."""
        parts = []
        self.network.eval()
        for batch in self.world.batches(self.videos):
            text = self.world.text[batch]
            with torch.no_grad():
                _, latents, log_probs = self.sample(
                    self.scope["pipeline"],
                    prompt_embeds=text,
                    num_inference_steps=self.world.num_steps,
                    guidance_scale=1.0,
                    output_type="pt",
                    height=16,
                    width=16,
                    noise_level=0.7,
                )
            stacked = torch.stack(latents, dim=1)
            parts.append(
                {
                    "prompt_embeds": text,
                    "timesteps": self.scheduler.timesteps.repeat(len(batch), 1),
                    "latents": stacked[:, :-1],
                    "next_latents": stacked[:, 1:],
                    "log_probs": torch.stack(log_probs, dim=1),
                }
            )
        self.samples = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def update(self) -> None:
        """The loop over `inner_epoch`."""
        chosen = torch.tensor(self.world.chosen)
        advantages = torch.randn(len(chosen), 1).repeat(1, self.world.num_steps)
        samples = {key: tensor[chosen] for key, tensor in self.samples.items()}
        samples |= {"advantages": advantages, "pooled_prompt_embeds": samples["prompt_embeds"]}
        # accelerate keeps this number for the whole process, and other loops have another.
        self.accelerator.gradient_accumulation_steps = self.passes * self.world.trained_steps
        variables = {"samples": samples, "total_batch_size": len(chosen)}
        exec(self.training, {**self.scope, **variables, "epoch": 0, "global_step": 0})
