"""UniRL's Wan2.1 stage, FlowGRPO algorithm and train stack, over the embedded network.

Its modules are imported. `WAN21DiffusionStage.diffuse`, `FlowGRPO.compute_loss_and_backward` (which
replays all trained steps of a micro-batch before one backward) and `TrainStack.train` run as they
are, with its Dance kernel. Restated: `TrainsideRolloutEngine.generate`'s loop over micro-batches,
`TrainStack.prepare_segment`'s with `replay` (it cannot replay fewer steps than were recorded), and
the FSDP backend, of which one process needs zero_grad, clipping and the optimizer's step.

In its favour: log-probabilities are those of the rollout (its recipes for Wan compute them again
first, `old_logp_source: replay`; `replay` does that); trajectories stay in fp32.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.peers.checkout import load
from benchmarks.peers.embedded import Network, World

ABSENT = (
    "ray",
    "ray.actor",
    "ray.util",
    "ray.util.placement_group",
    "ray.util.scheduling_strategies",
    "omegaconf",
)
"""Imported by its modules for what runs on several machines."""
MODULES = (
    "algorithms.flowgrpo",
    "models.wan21.conditions",
    "models.wan21.diffusion",
    "sde.kernels",
    "sde.runtime",
    "train.stack",
    "types.conditions",
    "types.rollout_resp",
    "types.sampling",
)


class _Backend:
    """FSDPBackend for one process."""

    grad_sync_deferred = False
    scheduler = None

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def set_grad_sync(self, enabled: bool) -> None:
        pass

    def optimizer_step(self, max_grad_norm: float) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self.optimizer.step()
        return float(norm)


class UniRL:
    """Its loop.

    Args:
        root: The checkout.
        world: The work.
        videos: In a pass of sampling.
        trained: Videos in a pass of training; default: the same.
        replay: Whether the update computes the old log-probabilities again.
    """

    def __init__(
        self, root: Path, world: World, videos: int, trained: int = 0, replay: bool = False
    ) -> None:
        grpo, conditions, diffusion, kernels, runtime, stack, kinds, resp, sampling = load(
            root, [f"unirl.{name}" for name in MODULES], ABSENT
        )
        self.world, self.videos, self.network = world, videos, Network()
        self.track, self.conditions = resp.RolloutTrack, conditions.WAN21Conditions
        self.text = kinds.TextEmbedCondition
        self.stage = diffusion.WAN21DiffusionStage(
            model=SimpleNamespace(transformer=self.network, vae=None),
            step=diffusion.WAN21DiffusionStep(),
            strategy=kernels.DanceSDEStrategy(),
            autocast_precision="fp32",
            trajectory_precision="fp32",
        )
        self.stage.latent_channels = self.network.latent_shape[0]
        self.params = sampling.DiffusionSamplingParams(
            num_inference_steps=world.num_steps,
            guidance_scale=1.0,
            height=8,
            width=8,
            num_frames=29,
            eta=world.config.rollout.eta,
            init_same_noise=True,
            sde_indices=[*range(world.num_steps)],
        )
        self.schedule = runtime.get_sigma_schedule(
            world.num_steps, world.config.rollout.shift, torch.device("cpu")
        )
        steps = self.steps = random.Random(0).sample(
            range(world.num_steps - 1), world.trained_steps
        )

        class Chosen(grpo.FlowGRPO):  # type: ignore[name-defined]
            """As its own docstring allows: a subset of the recorded steps."""

            def _resolve_target_steps(self, segment: Any) -> list[int]:
                return sorted(steps)

        algorithm = Chosen(
            stage=self.stage,
            params=self.params,
            clip_range=world.config.update.clip_range,
            conditions_cls=self.conditions,
        )
        self.replay = replay
        self.stack = stack.TrainStack(
            fsdp_backend=_Backend(world.optimizer(self.network)),
            algorithm=algorithm,
            micro_batch_size=trained or videos,
            max_grad_norm=world.config.update.max_grad_norm,
        )
        self.sampled: Any

    def rollout(self) -> None:
        """WAN21DiffusionStage.diffuse, micro-batch by micro-batch."""
        self.network.eval()
        first = torch.randn(1, *self.network.latent_shape)
        tracks = []
        for batch in self.world.batches(self.videos):
            text = self.text(embeds=self.world.text[batch])
            segment = self.stage.diffuse(
                self.conditions(text=text),
                schedule=self.schedule,
                params=self.params,
                initial_latents=first.expand(len(batch), -1, -1, -1, -1),
            )
            names = [str(video) for video in batch.tolist()]
            tracks.append(self.track(sample_ids=names, conditions={"text": text}, segment=segment))
        self.sampled = self.track.concat(tracks)

    def update(self) -> None:
        """TrainStack.train."""
        self.network.train()
        chosen = self.sampled.select(torch.tensor(self.world.chosen))
        chosen.advantages = torch.randn(len(self.world.chosen))
        (slices,) = self.stack._optimizer_step_slices(len(self.world.chosen))
        if self.replay:
            for begin, end in slices:
                part = chosen.slice(begin, end)
                with torch.no_grad():
                    self.stage.replay(
                        self.conditions.from_dict(part.conditions),
                        segment=part.segment,
                        params=self.params,
                        step_indices=sorted(self.steps),
                    )
        self.stack.train(chosen, micro_slices=slices, training_progress=0.0)
