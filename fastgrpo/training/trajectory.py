"""What the phases of a step hand on, and the one forward that rollout and update share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.algorithm.self_paced import GroupStatistics
from fastgrpo.interfaces import Conditioning, Policy


class TransitionIndex(NamedTuple):
    """Which n transitions of a rollout, where the host and where the device look them up: neither
    waits for the other.

    Attributes:
        prompts: Indices of the prompts, on the host.
        samples, steps: [n] int64 on the latents' device: sample indices and steps.
    """

    prompts: Sequence[int]
    samples: Tensor
    steps: Tensor


@dataclass
class Rollout:
    """The trajectories of one rank: P prompts with G videos each, B = P G videos, N steps.

    Video i (its `sample_index`) belongs to prompt i // G. What the forward passes look up lies on
    the latents' device from the start, so that the host never waits for a copy in between.

    Attributes:
        prompts: The P prompts.
        num_generations: G.
        latent_shape: Shape of one latent.
        conditioning: Of the P prompts, on the device; what a policy reads on the host is there.
        unconditional: Conditioning of the empty prompt; None without guidance.
        guidance_scale: w in v = v_uncond + w (v_cond - v_uncond).
        sigmas: [N + 1] float64 on the host, from 1 down to 0.
        timesteps: [N] fp32, the timestep that the model sees.
        a, b, std: [P, N] fp32, the affine SDE step of each prompt (docs/method.md, section 1), as
            the kernels compute with it; std 0 is an ODE step.
        normalized: Whether the log-probability has its Gaussian normaliser (all samplers but cps).
        sde_window: Which steps are stochastic (`RolloutConfig`).
        trainable_steps: The steps of each prompt that may be trained.
        noise_seeds, first_seeds: [B] int64, seeds of the SDE's noise and of the first latent.
        same_noise: Whether the videos of a group start from the same noise.
        latents: [B, N + 1, *latent_shape] fp32, every state as it is stored.
        log_probs: [B, N] fp32, NaN at an ODE step.
        micro_batch_size: Videos in one forward pass.
        decode: The latent that becomes the video, "x0" or "final".
        compute_dtype: dtype of the forward pass.
    """

    prompts: list[str]
    num_generations: int
    latent_shape: tuple[int, ...]
    conditioning: Conditioning
    unconditional: Conditioning | None
    guidance_scale: float
    sigmas: Tensor
    timesteps: Tensor
    a: Tensor
    b: Tensor
    std: Tensor
    normalized: bool
    sde_window: str
    trainable_steps: list[tuple[int, ...]]
    noise_seeds: Tensor
    first_seeds: Tensor
    same_noise: bool
    latents: Tensor
    log_probs: Tensor
    micro_batch_size: int
    decode: str
    compute_dtype: torch.dtype

    @property
    def num_videos(self) -> int:
        return len(self.prompts) * self.num_generations

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def index(self, sample_indices: Sequence[int], steps: Sequence[int]) -> TransitionIndex:
        """The index of these n transitions. The host waits for one copy to the device."""
        table = torch.tensor([sample_indices, steps]).to(self.latents.device)
        prompts = [index // self.num_generations for index in sample_indices]
        return TransitionIndex(prompts, *table)

    def coefficients(self, index: TransitionIndex) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, std) of n transitions: each [n] fp32."""
        at = index.samples // self.num_generations, index.steps
        return self.a[at], self.b[at], self.std[at]


@dataclass
class Group:
    """One prompt's G videos after scoring; what follows the scores stays empty if it is skipped.

    Attributes:
        scores_GK: K stage scores of each video.
        valid_G: Which videos have a score.
        statistics: Eqs. 7-8; None with fewer than two valid videos.
        weights_K: Eq. 6.
        rewards_G: Eq. 5; NaN for an invalid video.
        advantages: Eq. 10, by index of the video in its group.
        chosen: The videos to train on, in the order of training.
    """

    scores_GK: list[list[float]]
    valid_G: list[bool]
    statistics: GroupStatistics | None
    weights_K: tuple[float, ...] = ()
    rewards_G: list[float] = field(default_factory=list)
    advantages: dict[int, float] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)


def branch_velocities(
    policy: Policy, rollout: Rollout, latents: Tensor, index: TransitionIndex
) -> tuple[Tensor, Tensor | None]:
    """The conditional and the unconditional velocity of n transitions.

    Rollout and update both call this, or `branch_velocity`, with the same n. The same kernels at
    the same shapes give the same bits, so the ratio before the first update is exactly 1. The two
    branches run one after the other (sequential CFG).

    Args:
        policy: The generator.
        rollout: The trajectories that the transitions belong to.
        latents: [n, *latent_shape] fp32, the state before each transition.
        index: The transitions.

    Returns:
        Two tensors [n, *latent_shape]; the second is None without guidance.
    """
    at = policy, rollout, latents, index
    conditional = branch_velocity(*at, conditional=True)
    if rollout.unconditional is None:
        return conditional, None
    return conditional, branch_velocity(*at, conditional=False)


def branch_velocity(
    policy: Policy, rollout: Rollout, latents: Tensor, index: TransitionIndex, *, conditional: bool
) -> Tensor:
    """One of the two velocities of `branch_velocities`."""
    device, timesteps = latents.device, rollout.timesteps[index.steps]
    if conditional:
        prompts = index.samples // rollout.num_generations
        conditioning = {
            name: rows[prompts if rows.device == device else index.prompts]
            for name, rows in rollout.conditioning.items()
        }
    else:
        conditioning = {
            name: row.expand(len(latents), *row.shape[1:])
            for name, row in (rollout.unconditional or {}).items()
        }
    bf16 = rollout.compute_dtype != torch.float32
    # No cache of cast weights: with it, the forward that backward recomputes would not be this one.
    with torch.autocast(device.type, rollout.compute_dtype, enabled=bf16, cache_enabled=False):
        return policy.velocity(latents, timesteps, conditioning)
