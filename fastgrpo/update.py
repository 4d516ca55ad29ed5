"""Stage 7: the clipped policy-gradient update over the chosen videos (Eq. 11; method.md, section 2)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastgrpo_kernels import gaussian_kl, grpo_loss, guided_velocity
from torch import Tensor, nn

from fastgrpo.config import UpdateConfig
from fastgrpo.interfaces import Policy
from fastgrpo.parallel import average_gradients, gather
from fastgrpo.trajectory import Rollout, branch_velocities, derive_seed, using_weights


@dataclass(frozen=True)
class Pair:
    """One transition to train: video and step number, and the video's advantage."""

    video: int
    step: int
    advantage: float


@dataclass
class UpdateStatistics:
    """What the optimizer steps of one iteration on this rank saw. One entry a trained transition, unless said otherwise."""

    steps: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    clipped: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    num_first: int = 0
    """Transitions of the first optimizer step: the leading entries of the lists, still on-policy."""
    losses: list[float] = field(default_factory=list)
    """One an optimizer step: this rank's loss."""
    grad_norms: list[float] = field(default_factory=list)
    """One an optimizer step: 2-norm over all ranks, before clipping."""
    skipped: list[bool] = field(default_factory=list)
    """One an optimizer step: whether it was left out for a loss or gradient that was not finite."""


def make_optimizer(parameters: list[nn.Parameter], cfg: UpdateConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW, or NVIDIA apex's FusedAdam where `optimizer: apex_fused_adam` asks for it.

    Raises:
        ValueError: there is no NVIDIA apex.
    """
    options = {"lr": cfg.learning_rate, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    optimizer: torch.optim.Optimizer = import_fused_adam()(parameters, adam_w_mode=True, **options)
    return optimizer


def import_fused_adam() -> Any:
    """NVIDIA apex's FusedAdam. ValueError where there is none (PyPI's package of that name is something else)."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            "update.optimizer: apex_fused_adam needs NVIDIA apex, built from NVIDIA's source with its CUDA extensions; "
            f"the `apex` on PyPI is another package ({error}). Use adamw, torch's own fused optimizer"
        ) from error
    return FusedAdam


def trained_steps(rollout: Rollout, video: int, fraction: float, seed: int) -> list[int]:
    """The steps of a video that are trained: of the `all` window a random share, of a narrower one the whole window.

    With N = 16 and fraction 0.6 these are int(0.6 * 15) = 9 of the first 15 steps, drawn independently for each video.
    """
    candidates = rollout.trainable_steps[video // rollout.num_generations]
    if rollout.sde_window != "all":
        return list(candidates)
    return sorted(random.Random(seed).sample(candidates, max(1, int(fraction * len(candidates)))))


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    chosen: Sequence[int],
    advantages: Mapping[int, float],
    cfg: UpdateConfig,
    *,
    reference: nn.Module | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> UpdateStatistics:
    """Train on the chosen videos: an optimizer step for every `gradient_accumulation` of them.

    Every rank makes the same number of passes of the same size: where it has fewer videos than another, and to fill the last
    micro-batch, it runs passes of weight zero. The loss of one transition is divided by (gradient_accumulation x steps trained).

    Args:
        chosen: numbers of this rank's videos, in the order of training. advantages: by video number.
        reference: the network that `kl_coef` pulls to. after_step: called after each optimizer step that was made (the EMA).
    """
    stats = UpdateStatistics()
    parameters = [p for p in policy.transformer.parameters() if p.requires_grad]
    most_videos = max(gather(len(chosen)))
    for begin in range(0, most_videos, cfg.gradient_accumulation):
        videos = chosen[begin : begin + cfg.gradient_accumulation]
        pairs = [
            Pair(video, step, advantages[video])
            for video in videos
            for step in trained_steps(rollout, video, cfg.timestep_fraction, derive_seed("trained steps", int(rollout.noise_seeds[video])))
        ]
        num_pairs = max(gather(len(pairs)))
        steps_per_video = num_pairs / min(cfg.gradient_accumulation, most_videos - begin)
        loss = accumulate_gradients(policy, rollout, pairs, num_pairs, cfg.gradient_accumulation * steps_per_video, cfg, reference, stats)
        if begin == 0:
            stats.num_first = len(pairs)
        average_gradients(parameters)
        grad_norm = float(nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm))
        # The averaged gradient is the same on every rank, so every rank decides the same.
        finite = math.isfinite(grad_norm) and all(map(math.isfinite, gather(loss)))
        if finite:
            optimizer.step()
            after_step()
        optimizer.zero_grad(set_to_none=True)
        stats.losses.append(loss)
        stats.grad_norms.append(grad_norm)
        stats.skipped.append(not finite)
    return stats


def accumulate_gradients(
    policy: Policy,
    rollout: Rollout,
    pairs: Sequence[Pair],
    num_pairs: int,
    divisor: float,
    cfg: UpdateConfig,
    reference: nn.Module | None,
    stats: UpdateStatistics,
) -> float:
    """Forward and backward over `pairs` in micro-batches of the rollout's size, filled up with weight zero to `num_pairs`.

    The gradient is that of (sum of the transitions' losses) / divisor. Adds to `stats`; returns the loss.
    """
    size = rollout.micro_batch_size
    total = torch.zeros((), device=rollout.latents.device)
    passes = []
    for begin in range(0, num_pairs, size):
        batch = list(pairs[begin : begin + size])
        loss, *seen = transition_loss(policy, rollout, batch, cfg, reference)
        (loss * (size / divisor)).backward()
        total += loss.detach() * (size / divisor)
        passes.append((batch, [values[: len(batch)] for values in seen]))
    # Read back after the last pass, so that the host never waits in between.
    for batch, (ratio, log_ratio, clipped, kl) in passes:
        stats.steps += [pair.step for pair in batch]
        stats.ratios += ratio.tolist()
        stats.log_ratios += log_ratio.tolist()
        stats.clipped += clipped.tolist()
        stats.kl += kl.tolist()
    return float(total)


def transition_loss(
    policy: Policy, rollout: Rollout, batch: Sequence[Pair], cfg: UpdateConfig, reference: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One micro-batch of at most `micro_batch_size` transitions, filled up with zeros of weight zero.

    Returns:
        loss, the sum over the batch divided by micro_batch_size; and [micro_batch_size] ratio, log ratio, whether the clip removed the
        gradient, and KL (0 without a reference).
    """
    device, size = rollout.latents.device, rollout.micro_batch_size
    filled = [*batch, *[Pair(0, 0, 0.0)] * (size - len(batch))]
    videos, steps = torch.tensor([p.video for p in filled]), torch.tensor([p.step for p in filled])
    advantages = torch.tensor([p.advantage for p in filled], device=device)
    real = torch.arange(size, device=device) < len(batch)
    rows = real.view(-1, *[1] * len(rollout.latent_shape))
    at = videos.to(device), steps.to(device)
    latents = torch.where(rows, rollout.latents[at], 0.0)
    next_latents = torch.where(rows, rollout.latents[at[0], at[1] + 1], 0.0)
    old_log_probs = torch.where(real, rollout.log_probs[at], 0.0)
    a, b, std = (torch.where(real, c, 1.0) for c in rollout.coefficients(videos, steps))

    velocity, uncond = branch_velocities(policy, rollout, latents, videos, steps)
    loss, stats = grpo_loss(
        latents, next_latents, velocity, old_log_probs, advantages, a, b, std,
        clip_range=cfg.clip_range, adv_clip=cfg.adv_clip, velocity_uncond=uncond,
        guidance_scale=rollout.guidance_scale, cfg_grad=cfg.cfg_grad, normalized=rollout.normalized,
    )  # fmt: skip
    kl = torch.zeros(size, device=device)
    if reference is not None:
        with torch.no_grad(), using_weights(policy, reference):
            fixed = branch_velocities(policy, rollout, latents, videos, steps)
        kl = gaussian_kl(
            guided_velocity(velocity, uncond, rollout.guidance_scale, cfg_grad=cfg.cfg_grad),
            guided_velocity(*fixed, rollout.guidance_scale), b, std,
        ) * real  # fmt: skip
        loss = loss + cfg.kl_coef * kl.mean()
    return loss, stats.ratio, stats.log_probs - old_log_probs, stats.clipped, kl.detach()
