"""Stage 7: the clipped policy-gradient update over the chosen videos (Eq. 11; method.md, section
2).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastgrpo_kernels import Transition, branch_gradient, gaussian_kl, grpo_loss, guided_velocity
from torch import Tensor, nn

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import UpdateConfig
from fastgrpo.distributed.collectives import average_gradients, clip_gradients, gather
from fastgrpo.interfaces import Policy
from fastgrpo.training.trajectory import Rollout, branch_velocities, branch_velocity
from fastgrpo.training.weights import using_weights


@dataclass(frozen=True)
class Pair:
    """One transition to train: video and step number, and the video's advantage."""

    video: int
    step: int
    advantage: float


Seen = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of each transition, [micro_batch_size]: ratio, log ratio, whether the clip removed the gradient,
KL (0 without a reference).
"""


@dataclass(frozen=True)
class MicroBatch:
    """The stored transitions of at most B = micro_batch_size pairs, filled up to B with zeros of
    weight (advantage) zero.

    latents, next_latents [B, *latent_shape]; the rest [B]: videos and steps on the CPU, a, b and
    std float64, real bool.
    """

    videos: Tensor
    steps: Tensor
    real: Tensor
    latents: Tensor
    next_latents: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    a: Tensor
    b: Tensor
    std: Tensor


@dataclass
class UpdateStatistics:
    """What the optimizer steps of one iteration on this rank saw. One entry a trained transition,
    unless said otherwise.
    """

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
    """torch's fused AdamW, or NVIDIA apex's FusedAdam where `optimizer: apex_fused_adam` asks for
    it.

    Raises:
        ValueError: there is no NVIDIA apex.
    """
    options = {"lr": cfg.learning_rate, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    optimizer: torch.optim.Optimizer = import_fused_adam()(parameters, adam_w_mode=True, **options)
    return optimizer


def import_fused_adam() -> Any:
    """NVIDIA apex's FusedAdam. ValueError where there is none (PyPI's package of that name is
    something else).
    """
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            "update.optimizer: apex_fused_adam needs NVIDIA apex, built from NVIDIA's source with its CUDA extensions; "
            f"the `apex` on PyPI is another package ({error}). Use adamw, torch's own fused optimizer"
        ) from error
    return FusedAdam


def trained_steps(rollout: Rollout, video: int, fraction: float, seed: int) -> list[int]:
    """The steps of a video that are trained: of the `all` window a random share, of a narrower one
    the whole window.

    With N = 16 and fraction 0.6 these are int(0.6 * 15) = 9 of the first 15 steps, drawn
    independently for each video.
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
    reference: Mapping[str, Tensor] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> UpdateStatistics:
    """Train on the chosen videos: an optimizer step for every `gradient_accumulation` of them.

    Every rank makes the same number of passes of the same size: where it has fewer videos than
    another, and to fill the last micro-batch, it runs passes of weight zero. The loss of one
    transition is divided by (gradient_accumulation x steps trained).

    The weights must be those that sampled the rollout: until the first optimizer step is made,
    every ratio is taken for 1 (`branchwise`).

    Args:
        chosen: numbers of this rank's videos, in the order of training. advantages: by video
            number. reference: the weights that `kl_coef` pulls to, for `using_weights`.
            after_step: called after each optimizer step that was made (the EMA).
    """
    stats = UpdateStatistics()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    most_videos = max(gather(len(chosen)))
    for begin in range(0, most_videos, cfg.gradient_accumulation):
        videos = chosen[begin : begin + cfg.gradient_accumulation]
        pairs = [
            Pair(video, step, advantages[video])
            for video in videos
            for step in trained_steps(
                rollout,
                video,
                cfg.timestep_fraction,
                derive_seed("trained steps", int(rollout.noise_seeds[video])),
            )
        ]
        num_pairs = max(gather(len(pairs)))
        steps_per_video = num_pairs / min(cfg.gradient_accumulation, most_videos - begin)
        loss = accumulate_gradients(
            policy,
            rollout,
            pairs,
            num_pairs,
            cfg.gradient_accumulation * steps_per_video,
            cfg,
            reference,
            stats,
            on_policy=all(stats.skipped),  # no weight has moved yet, on any rank
        )
        if begin == 0:
            stats.num_first = len(pairs)
        average_gradients(parameters)
        grad_norm = clip_gradients(parameters, cfg.max_grad_norm)
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
    reference: Mapping[str, Tensor] | None,
    stats: UpdateStatistics,
    *,
    on_policy: bool = False,
) -> float:
    """Forward and backward over `pairs` in micro-batches of the rollout's size, filled up with
    weight zero to `num_pairs`.

    The gradient is that of (sum of the transitions' losses) / divisor. Adds to `stats`; returns
    the loss.

    on_policy: the weights are those of the rollout, so that every ratio is 1, and `branchwise`
    may rely on it (a ratio that is not, which ratio_drift shows, is neither weighted nor clipped
    then). False is always right. The same on every rank.
    """
    size = rollout.micro_batch_size
    total = torch.zeros((), device=rollout.latents.device)
    passes = []
    for begin in range(0, num_pairs, size):
        batch = list(pairs[begin : begin + size])
        loss, seen = backpropagate(
            policy, rollout, batch, cfg, reference, scale=size / divisor, on_policy=on_policy
        )
        total += loss * (size / divisor)
        passes.append((batch, [values[: len(batch)] for values in seen]))
    # Read back after the last pass, so that the host never waits in between.
    for batch, (ratio, log_ratio, clipped, kl) in passes:
        stats.steps += [pair.step for pair in batch]
        stats.ratios += ratio.tolist()
        stats.log_ratios += log_ratio.tolist()
        stats.clipped += clipped.tolist()
        stats.kl += kl.tolist()
    return float(total)


def backpropagate(
    policy: Policy,
    rollout: Rollout,
    pairs: Sequence[Pair],
    cfg: UpdateConfig,
    reference: Mapping[str, Tensor] | None,
    *,
    scale: float,
    on_policy: bool,
) -> tuple[Tensor, Seen]:
    """Add the gradient of scale x (loss of one micro-batch) to the parameters'; returns what
    `transition_loss` does, without a graph.

    `branchwise` runs one branch of the guidance forward and backward before the other, so that
    one branch's activations live at a time. What it sends back into the second one must be known
    without it: from the noise, where the ratio is 1, and else from a forward more.
    """
    batch = micro_batch(rollout, pairs)
    at = batch.latents, batch.videos, batch.steps
    fixed = None
    if (
        reference is not None
    ):  # before the policy's own forward, whose graph must not see other weights pass through
        with torch.no_grad(), using_weights(policy, reference):
            fixed = branch_velocities(policy, rollout, *at)

    if rollout.unconditional is None or not cfg.branchwise:  # all at once
        loss, seen = transition_loss(
            rollout, batch, *branch_velocities(policy, rollout, *at), fixed, cfg
        )
        (loss * scale).backward()
        return loss.detach(), seen

    both = cfg.cfg_grad == "both"
    if both and on_policy and fixed is None:  # what to send back is known before any forward
        velocity = branch_velocity(policy, rollout, *at, conditional=True)
        gradients = known_gradients(rollout, batch, cfg, scale, velocity.dtype)
        velocity.backward(gradients[0])
        uncond = branch_velocity(policy, rollout, *at, conditional=False)
        uncond.backward(gradients[1])
        with torch.no_grad():
            return transition_loss(rollout, batch, velocity, uncond, None, cfg)

    with torch.no_grad():
        uncond = branch_velocity(policy, rollout, *at, conditional=False)
    velocity = branch_velocity(policy, rollout, *at, conditional=True)
    leaf, uncond_leaf = velocity.detach().requires_grad_(), uncond.detach().requires_grad_(both)
    loss, seen = transition_loss(rollout, batch, leaf, uncond_leaf, fixed, cfg)
    (loss * scale).backward()
    velocity.backward(leaf.grad)
    if both:
        branch_velocity(policy, rollout, *at, conditional=False).backward(uncond_leaf.grad)
    return loss.detach(), seen


def micro_batch(rollout: Rollout, pairs: Sequence[Pair]) -> MicroBatch:
    """What the rollout has stored of at most `micro_batch_size` pairs; what fills it up is never
    NaN.
    """
    device, size = rollout.latents.device, rollout.micro_batch_size
    filled = [*pairs, *[Pair(0, 0, 0.0)] * (size - len(pairs))]
    videos, steps = torch.tensor([p.video for p in filled]), torch.tensor([p.step for p in filled])
    real = torch.arange(size, device=device) < len(pairs)
    rows = real.view(-1, *[1] * len(rollout.latent_shape))
    at = videos.to(device), steps.to(device)
    a, b, std = (torch.where(real, c, 1.0) for c in rollout.coefficients(videos, steps))
    return MicroBatch(
        videos=videos,
        steps=steps,
        real=real,
        latents=torch.where(rows, rollout.latents[at], 0.0),
        next_latents=torch.where(rows, rollout.latents[at[0], at[1] + 1], 0.0),
        old_log_probs=torch.where(real, rollout.log_probs[at], 0.0),
        advantages=torch.tensor([p.advantage for p in filled], device=device),
        a=a,
        b=b,
        std=std,
    )


def known_gradients(
    rollout: Rollout, batch: MicroBatch, cfg: UpdateConfig, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """d(scale x loss) / d velocity of both branches where every ratio is 1: it follows from the
    noise that the seeds give back.

    It is that of `transition_loss` but for the rounding of the stored x', which the noise alone
    does not know.
    """
    seeds = rollout.noise_seeds[batch.videos.to(rollout.noise_seeds.device)]
    return branch_gradient(
        Transition(
            batch.latents,
            torch.empty_like(batch.latents, dtype=dtype),  # its values are not used
            batch.a,
            batch.b,
            batch.std,
            guidance_scale=rollout.guidance_scale,
            normalized=rollout.normalized,
        ),
        batch.advantages,
        seeds=seeds,
        step=batch.steps.to(seeds.device),
        scale=scale / rollout.micro_batch_size,
        adv_clip=cfg.adv_clip,
        cfg_grad=cfg.cfg_grad,
    )


def transition_loss(
    rollout: Rollout,
    batch: MicroBatch,
    velocity: Tensor,
    uncond: Tensor | None,
    fixed: tuple[Tensor, Tensor | None] | None,
    cfg: UpdateConfig,
) -> tuple[Tensor, Seen]:
    """The loss of one micro-batch as a function of both branches' velocities. fixed: those of the
    reference.

    The loss is the sum over the batch divided by micro_batch_size.
    """
    transition = Transition(
        batch.latents,
        velocity,
        batch.a,
        batch.b,
        batch.std,
        uncond,
        rollout.guidance_scale,
        rollout.normalized,
    )
    loss, stats = grpo_loss(
        transition,
        batch.next_latents,
        batch.old_log_probs,
        batch.advantages,
        clip_range=cfg.clip_range,
        adv_clip=cfg.adv_clip,
        cfg_grad=cfg.cfg_grad,
    )
    kl = torch.zeros_like(stats.ratio)
    if fixed is not None:
        kl = (
            gaussian_kl(
                guided_velocity(velocity, uncond, rollout.guidance_scale, cfg_grad=cfg.cfg_grad),
                guided_velocity(*fixed, rollout.guidance_scale),
                batch.b,
                batch.std,
            )
            * batch.real
        )
        loss = loss + cfg.kl_coef * kl.mean()
    return loss, (stats.ratio, stats.log_probs - batch.old_log_probs, stats.clipped, kl.detach())
