"""Stage 2: sample groups of videos with an SDE, keeping every state and its log-probability (Eqs.
1, 2; method.md, section 1).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fastgrpo_kernels import gaussian_noise, guided_velocity, sde_step
from torch import Tensor

from fastgrpo.algorithm.sde import sde_coefficients, sigma_schedule, timesteps, x0_prediction
from fastgrpo.config import RolloutConfig
from fastgrpo.interfaces import Policy
from fastgrpo.training.trajectory import Rollout, branch_velocities, derive_seed

Velocities = tuple[Tensor, Tensor | None]
"""Of the conditional and the unconditional branch, [micro_batch_size, *latent_shape]."""


@dataclass(frozen=True)
class Sample:
    """One micro-batch of finished videos: their numbers in the rollout, their captions, their clean
    latents [n, *latent_shape].
    """

    videos: list[int]
    prompts: list[str]
    latents: Tensor


def stochastic_steps(cfg: RolloutConfig, seed: int, iteration: int, slot: int) -> tuple[int, ...]:
    """The steps of a prompt that are stochastic and may be trained (`sde_window`; method.md,
    section 2). The last step is never among them, except as noise of the `all` window.

    slot: the prompt's number among all the ranks' prompts of the iteration.
    """
    last = cfg.num_inference_steps - 1
    if cfg.sde_window == "all":
        return tuple(range(last))
    if cfg.sde_window == "single":
        return (
            random.Random(derive_seed(seed, "single step", iteration, slot)).randrange(
                max(1, cfg.num_inference_steps // 2)
            ),
        )
    starts = last - cfg.window_size + 1
    move = (iteration - 1) // cfg.window_interval
    progressive = cfg.window_order == "progressive"
    first = (
        move % starts
        if progressive
        else random.Random(derive_seed(seed, "window", move)).randrange(starts)
    )
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
    """An empty rollout for this rank's prompts: schedule, coefficients, seeds, conditioning and
    room for the trajectories.

    first_slot: number of the first of these prompts among all ranks', from which (with seed and
    iteration) all noise follows, so that a trajectory does not depend on the number of ranks.
    """
    P, G, N = len(prompts), cfg.num_generations, cfg.num_inference_steps
    slots = range(first_slot, first_slot + P)
    sigmas = sigma_schedule(N, cfg.shift)
    table, ode = sde_coefficients(sigmas, cfg.sde, cfg.eta), sde_coefficients(sigmas, "ode")
    trainable = [stochastic_steps(cfg, seed, iteration, slot) for slot in slots]
    stochastic = torch.tensor(
        [[cfg.sde_window == "all" or i in steps for i in range(N)] for steps in trainable]
    ).reshape(P, N)
    videos = [(slot, g) for slot in slots for g in range(G)]
    shape = policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
    return Rollout(
        prompts=prompts,
        num_generations=G,
        latent_shape=shape,
        conditioning=policy.encode(prompts),
        unconditional=policy.encode([""]) if cfg.guidance_scale != 1 else None,
        guidance_scale=cfg.guidance_scale,
        sigmas=sigmas,
        timesteps=timesteps(sigmas, cfg.timestep_rounding),
        a=torch.where(stochastic, table.a, ode.a),
        b=torch.where(stochastic, table.b, ode.b),
        std=torch.where(stochastic, table.std, ode.std),
        normalized=table.normalized,
        sde_window=cfg.sde_window,
        trainable_steps=trainable,
        noise_seeds=torch.tensor(
            [derive_seed(seed, "sde", iteration, s, g) for s, g in videos],
            dtype=torch.int64,
            device=device,
        ),
        first_seeds=torch.tensor(
            [
                derive_seed(seed, "first", iteration, s, 0 if cfg.same_noise else g)
                for s, g in videos
            ],
            dtype=torch.int64,
            device=device,
        ),
        latents=torch.empty(P * G, N + 1, *shape, dtype=torch.float32, device=device),
        log_probs=torch.empty(P * G, N, dtype=torch.float32, device=device),
        micro_batch_size=cfg.micro_batch_size,
        decode=cfg.decode,
        compute_dtype=compute_dtype,
    )


@torch.no_grad()
def sample_groups(
    policy: Policy, rollout: Rollout, *, share_first_step: bool = True
) -> Iterator[Sample]:
    """Sample the videos of a rollout, one micro-batch after the other, filling its latents and
    log-probabilities.

    Every micro-batch has the same size, the last one filled up with its own last video, since
    another size would be other bits.

    share_first_step: where groups start from one noise, all rows of a micro-batch of one
    prompt's videos are equal at the first step, and so are all such micro-batches of that
    prompt: the first one's velocities serve them all. Which these are follows from the numbers
    of prompts and videos, so that every rank makes the same number of forwards.
    """
    size, G = rollout.micro_batch_size, rollout.num_generations
    seeds_PG = rollout.first_seeds.view(-1, G)
    share = share_first_step and bool((seeds_PG == seeds_PG[:, :1]).all())
    first: dict[int, Velocities] = {}
    for begin in range(0, rollout.num_videos, size):
        real = list(range(begin, min(begin + size, rollout.num_videos)))
        videos = torch.tensor(real + real[-1:] * (size - len(real)))
        prompt = real[0] // G if share and real[0] // G == real[-1] // G else None
        clean = _sample(policy, rollout, videos, len(real), first, prompt)
        yield Sample(real, [rollout.prompts[i // G] for i in real], clean)


def _sample(
    policy: Policy,
    rollout: Rollout,
    videos: Tensor,
    num_real: int,
    first: dict[int, Velocities],
    prompt: int | None,
) -> Tensor:
    """Sample one micro-batch. first: the first step's velocities by prompt, kept for `prompt`
    alone, the only one of these videos.
    """
    device = rollout.latents.device
    seeds = rollout.noise_seeds[videos.to(device)]
    keep = videos[:num_real].to(device)
    latents = gaussian_noise(
        rollout.first_seeds[videos.to(device)], 0, rollout.latent_shape, device
    )
    rollout.latents[keep, 0] = latents[:num_real]
    for i in range(rollout.num_steps):
        steps = torch.full_like(videos, i)
        if i == 0 and prompt in first:
            velocity, uncond = first[prompt]
        else:
            velocity, uncond = branch_velocities(policy, rollout, latents, videos, steps)
        if i == 0 and prompt is not None:
            first.clear()
            first[prompt] = velocity, uncond
        a, b, std = rollout.coefficients(videos, steps)
        previous = latents
        latents, log_probs = sde_step(
            previous,
            velocity,
            a,
            b,
            std,
            seeds=seeds,
            step=i,
            velocity_uncond=uncond,
            guidance_scale=rollout.guidance_scale,
            normalized=rollout.normalized,
        )
        rollout.latents[keep, i + 1] = latents[:num_real]
        rollout.log_probs[keep, i] = log_probs[:num_real]
    if rollout.decode == "final":
        return latents[:num_real]
    guided = guided_velocity(velocity, uncond, rollout.guidance_scale)
    return x0_prediction(previous, guided, float(rollout.sigmas[-2]))[:num_real]
