"""What the stages of a step hand on: the trajectories of one rank's groups, and the one forward
that rollout and update share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastgrpo.interfaces import Conditioning, Policy

WITHOUT_ADAPTERS: Mapping[str, Tensor] = MappingProxyType({})
"""For `using_weights`: the base model alone, its LoRA switched off."""


def derive_seed(*words: int | str) -> int:
    """A seed in [0, 2^63) for one purpose, from the run's seed and the purpose's name and counters.

    Counter-based: what a draw gives depends on these words alone, never on what was drawn
    before, on which rank, or after a resume.
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class Rollout:
    """P prompts of this rank with G videos each; video i belongs to prompt i // G. B = P G videos,
    N steps.

    Attributes:
        prompts: P captions. num_generations: G. latent_shape: shape of one latent. conditioning,
            unconditional: of the P prompts, and of the empty one (None without guidance).
            sigmas: [N + 1] float64, 1 down to 0. timesteps: [N] float64, what the model sees. a,
            b, std: [P, N] float64, the affine SDE step of each prompt (method.md, section 1);
            std 0 is an ODE step. normalized: whether the log-probability has its Gaussian
            normaliser (all samplers but cps). sde_window: which steps are stochastic
            (`RolloutConfig`). trainable_steps: for each prompt the steps that may be trained.
            noise_seeds, first_seeds: [B] int64, of the SDE's noise and of the first latent.
            micro_batch_size: videos in one forward pass. decode: which latent becomes the video,
            x0 or final. compute_dtype: of the forward. latents: [B, N + 1, *latent_shape] fp32,
            every state as stored. log_probs: [B, N] fp32, NaN at an ODE step.
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

    def coefficients(self, videos: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, std), each [n] float64 on the latents' device, of n (video, step) pairs."""
        prompts = videos // self.num_generations
        return tuple(
            table[prompts, steps].to(self.latents.device) for table in (self.a, self.b, self.std)
        )  # type: ignore[return-value]


def branch_velocities(
    policy: Policy, rollout: Rollout, latents: Tensor, videos: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Conditional and unconditional velocity [n, *latent_shape] of n (video, step) pairs at
    `latents`.

    Rollout and update both call this, or `branch_velocity`, with the same n: the same kernels at
    the same shapes give the same bits, so that the ratio of the first update is exactly 1. The
    two branches run one after the other (sequential CFG).
    """
    conditional = branch_velocity(policy, rollout, latents, videos, steps, conditional=True)
    if rollout.unconditional is None:
        return conditional, None
    return conditional, branch_velocity(policy, rollout, latents, videos, steps, conditional=False)


def branch_velocity(
    policy: Policy,
    rollout: Rollout,
    latents: Tensor,
    videos: Tensor,
    steps: Tensor,
    *,
    conditional: bool,
) -> Tensor:
    """One of the two velocities of `branch_velocities`."""
    device = latents.device
    timesteps = rollout.timesteps[steps].to(device, torch.float32)
    if conditional:
        prompts = (videos // rollout.num_generations).to(device)
        conditioning = {k: v[prompts] for k, v in rollout.conditioning.items()}
    else:
        conditioning = {
            k: v.expand(len(latents), *v.shape[1:])
            for k, v in (rollout.unconditional or {}).items()
        }
    bf16 = rollout.compute_dtype != torch.float32
    # Without autocast's cache of cast weights: a forward that finds them there is not the one that
    # backward recomputes.
    with torch.autocast(device.type, rollout.compute_dtype, enabled=bf16, cache_enabled=False):
        return policy.velocity(latents, timesteps, conditioning)


@contextmanager
def using_weights(policy: Policy, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let the policy's network have other weights for a while; None changes nothing,
    WITHOUT_ADAPTERS switches its LoRA off.

    weights: by the name of the parameter, placed and sharded like it; those not named stay. They
    are exchanged in place, one after the other, so that in the meantime `weights` holds the
    network's own: no second network has to fit. Autograd must not hold a graph of this network
    that is yet to be back-propagated.
    """
    network: Any = policy.transformer
    if weights is None:
        yield
    elif weights is WITHOUT_ADAPTERS:
        network.disable_adapters()
        try:
            yield
        finally:
            network.enable_adapters()
    else:
        _exchange(network, weights)
        try:
            yield
        finally:
            _exchange(network, weights)


@torch.no_grad()
def _exchange(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what is still gathered is of the weights before
    for name, parameter in network.named_parameters():
        if name in weights:
            own, other = local_part(parameter), local_part(weights[name])
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
