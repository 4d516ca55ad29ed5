"""Rollout phase: sample groups of videos with an SDE, keeping every state and its log-probability.

Eqs. 1 and 2; docs/method.md, section 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fastgrpo_kernels import Transition, gaussian_noise, guided_velocity, sde_step
from torch import Tensor

from fastgrpo.algorithm.sde import sde_coefficients, sigma_schedule, timesteps, x0_prediction
from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import RolloutConfig
from fastgrpo.interfaces import Policy
from fastgrpo.training.trajectory import Rollout, TransitionIndex, branch_velocities

Velocities = tuple[Tensor, Tensor | None]
"""Of the conditional and the unconditional branch, [micro_batch_size, *latent_shape]."""


@dataclass(frozen=True)
class FinishedBatch:
    """One micro-batch of n finished videos.

    Attributes:
        sample_indices: Of the videos in the rollout.
        prompts: One per video.
        latents: [n, *latent_shape] fp32, the clean latents to decode.
    """

    sample_indices: list[int]
    prompts: list[str]
    latents: Tensor


def trainable_steps(cfg: RolloutConfig, seed: int, iteration: int, slot: int) -> tuple[int, ...]:
    """The steps of a prompt that are stochastic and may be trained (docs/method.md, section 2).

    The last step is never among them; the `all` window adds noise there, but does not train it.

    Args:
        cfg: `sde_window` and its settings.
        seed: The run's seed.
        iteration: Counted from 1.
        slot: The prompt's number among the iteration's prompts on all ranks.
    """
    last = cfg.num_inference_steps - 1
    if cfg.sde_window == "all":
        return tuple(range(last))
    if cfg.sde_window == "single":  # one step from the first half, shared by the group
        draw = random.Random(derive_seed(seed, "single step", iteration, slot))
        return (draw.randrange(max(1, cfg.num_inference_steps // 2)),)
    num_starts = last - cfg.window_size + 1
    move = (iteration - 1) // cfg.window_interval
    if cfg.window_order == "progressive":
        first = move % num_starts
    else:
        first = random.Random(derive_seed(seed, "window", move)).randrange(num_starts)
    return tuple(range(first, first + cfg.window_size))


@torch.no_grad()
def start_rollout(
    policy: Policy,
    prompts: list[str],
    cfg: RolloutConfig,
    *,
    seed: int,
    iteration: int,
    first_slot: int,
    device: torch.device,
    compute_dtype: torch.dtype = torch.float32,
) -> Rollout:
    """Make an empty rollout for this rank's prompts: seeds, schedule, conditioning and memory.

    Args:
        policy: Encodes the prompts.
        prompts: P prompts.
        cfg: How to sample.
        seed: The run's seed.
        iteration: Counted from 1.
        first_slot: Number of the first of these prompts among all ranks' prompts. All noise
            follows from it, `seed` and `iteration`, so a trajectory does not depend on the number
            of ranks.
        device: Where the trajectories lie.
        compute_dtype: Of the forward pass.
    """
    P, G, N = len(prompts), cfg.num_generations, cfg.num_inference_steps
    slots = range(first_slot, first_slot + P)
    sigmas = sigma_schedule(N, cfg.shift)
    table, ode = sde_coefficients(sigmas, cfg.sde, cfg.eta), sde_coefficients(sigmas, "ode")
    trainable = [trainable_steps(cfg, seed, iteration, slot) for slot in slots]
    # [P, N]: outside its window a prompt takes ODE steps.
    stochastic = torch.tensor(
        [[cfg.sde_window == "all" or i in steps for i in range(N)] for steps in trainable]
    ).reshape(P, N)

    def on_device(table: Tensor) -> Tensor:
        return table.to(device, torch.float32)

    def seeds(purpose: str, shared: bool) -> Tensor:
        values = [
            derive_seed(seed, purpose, iteration, slot, 0 if shared else g)
            for slot in slots
            for g in range(G)
        ]
        return torch.tensor(values, dtype=torch.int64, device=device)

    shape = policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
    return Rollout(
        prompts=prompts,
        num_generations=G,
        latent_shape=shape,
        conditioning=policy.encode(prompts),
        unconditional=policy.encode([""]) if cfg.guidance_scale != 1 else None,
        guidance_scale=cfg.guidance_scale,
        sigmas=sigmas,
        timesteps=on_device(timesteps(sigmas, cfg.timestep_rounding)),
        a=on_device(torch.where(stochastic, table.a, ode.a)),
        b=on_device(torch.where(stochastic, table.b, ode.b)),
        std=on_device(torch.where(stochastic, table.std, ode.std)),
        normalized=table.normalized,
        sde_window=cfg.sde_window,
        trainable_steps=trainable,
        noise_seeds=seeds("sde", shared=False),
        first_seeds=seeds("first", shared=cfg.same_noise),
        same_noise=cfg.same_noise,
        latents=torch.empty(P * G, N + 1, *shape, dtype=torch.float32, device=device),
        log_probs=torch.empty(P * G, N, dtype=torch.float32, device=device),
        micro_batch_size=cfg.micro_batch_size,
        decode=cfg.decode,
        compute_dtype=compute_dtype,
    )


@torch.no_grad()
def sample_videos(
    policy: Policy, rollout: Rollout, *, share_first_step: bool = True
) -> Iterator[FinishedBatch]:
    """Sample the rollout's videos micro-batch by micro-batch, filling latents and log_probs. The
    host waits for nothing here: it queues the steps of the next videos while the GPU computes.

    Every micro-batch has the same size, because another size would give other bits. The last one
    is filled up with its own last video.

    Args:
        policy: The generator.
        rollout: From `start_rollout`; filled in place.
        share_first_step: Compute the first step's velocities once per prompt and reuse them for
            every micro-batch of that prompt only, when its group starts from one noise. Which
            micro-batches these are depends only on the numbers of prompts and videos, so every rank
            makes the same number of forwards.
    """
    size, G = rollout.micro_batch_size, rollout.num_generations
    share = share_first_step and (rollout.same_noise or G == 1)
    first: dict[int, Velocities] = {}
    for begin in range(0, rollout.num_videos, size):
        indices = list(range(begin, min(begin + size, rollout.num_videos)))
        one_prompt = indices[0] // G == indices[-1] // G
        shared_prompt = indices[0] // G if share and one_prompt else None
        clean = _sample(policy, rollout, indices, first, shared_prompt)
        yield FinishedBatch(indices, [rollout.prompts[i // G] for i in indices], clean)


def _sample(
    policy: Policy,
    rollout: Rollout,
    sample_indices: list[int],
    first: dict[int, Velocities],
    shared_prompt: int | None,
) -> Tensor:
    """Sample one micro-batch.

    Args:
        sample_indices: Of the n videos that are kept, one after the other.
        first: The first step's velocities by prompt: those of the last `shared_prompt`.
        shared_prompt: The one prompt of these videos, if its first step is shared.

    Returns:
        Clean latents [n, *latent_shape].
    """
    device, size, n = rollout.latents.device, rollout.micro_batch_size, len(sample_indices)
    begin, last = sample_indices[0], sample_indices[-1]
    # Made on the device, not copied to it.
    samples = torch.arange(begin, begin + size, device=device).clamp_(max=last)
    prompts = [min(begin + i, last) // rollout.num_generations for i in range(size)]
    seeds, kept = rollout.noise_seeds[samples], slice(begin, last + 1)
    latents = gaussian_noise(rollout.first_seeds[samples], 0, rollout.latent_shape, device)
    rollout.latents[kept, 0] = latents[:n]
    for i in range(rollout.num_steps):
        index = TransitionIndex(prompts, samples, torch.full_like(samples, i))
        if i == 0 and shared_prompt in first:
            velocity, uncond = first[shared_prompt]
        else:
            velocity, uncond = branch_velocities(policy, rollout, latents, index)
        if i == 0 and shared_prompt is not None:
            first.clear()  # groups come one after the other: no earlier prompt comes back
            first[shared_prompt] = velocity, uncond
        a, b, std = rollout.coefficients(index)
        previous = latents
        transition = Transition(
            previous, velocity, a, b, std, uncond, rollout.guidance_scale, rollout.normalized
        )
        # Guidance is applied inside sde_step (fastgrpo_kernels/sde/transition.py).
        latents, log_probs = sde_step(transition, seeds=seeds, step=i)
        rollout.latents[kept, i + 1] = latents[:n]
        rollout.log_probs[kept, i] = log_probs[:n]
    if rollout.decode == "final":
        return latents[:n]
    guided = guided_velocity(velocity, uncond, rollout.guidance_scale)
    return x0_prediction(previous, guided, float(rollout.sigmas[-2]))[:n]
