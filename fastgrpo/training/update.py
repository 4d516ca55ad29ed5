"""Update phase: clipped policy gradients over chosen videos (Eq. 11; docs/method.md, section 2)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from fastgrpo_kernels import Transition, branch_gradient, gaussian_kl, grpo_loss, guided_velocity
from torch import Tensor

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import UpdateConfig
from fastgrpo.distributed.collectives import (
    average_gradients,
    clip_gradients,
    gather,
    rank,
    world_size,
)
from fastgrpo.distributed.sharding import reduce_gradients_if
from fastgrpo.interfaces import Policy
from fastgrpo.training.trajectory import (
    Rollout,
    TransitionIndex,
    branch_velocities,
    branch_velocity,
)
from fastgrpo.training.weights import using_weights


@dataclass(frozen=True)
class TrainedTransition:
    """One transition to train: where it lies in the rollout, and the advantage of its video."""

    sample_index: int
    step: int
    advantage: float


@dataclass(frozen=True)
class TrainedRows:
    """At most B = micro_batch_size transitions to train, filled up to B, for the device to look up.

    Attributes:
        index: Where they lie in the rollout.
        valid_mask: [B] bool, False for what fills them up.
        advantages: [B] fp32.
    """

    index: TransitionIndex
    valid_mask: Tensor
    advantages: Tensor


class _TransitionStats(NamedTuple):
    """What the forward pass of a micro-batch gave, each [micro_batch_size].

    Attributes:
        ratio: exp(new - old log-probability).
        log_ratio: Its logarithm.
        clipped: Whether the clip removed the gradient.
        kl: KL to the reference; 0 without one.
    """

    ratio: Tensor
    log_ratio: Tensor
    clipped: Tensor
    kl: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """The stored values of at most B = micro_batch_size transitions, filled up to B.

    What fills it up is zeros with advantage zero, never NaN.

    Attributes:
        index: Where they lie in the rollout.
        valid_mask: [B] bool, False for what fills the batch up.
        latents, next_latents: [B, *latent_shape] fp32, x and x'.
        old_log_probs, advantages: [B] fp32.
        a, b, std: [B] fp32.
    """

    index: TransitionIndex
    valid_mask: Tensor
    latents: Tensor
    next_latents: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    a: Tensor
    b: Tensor
    std: Tensor


@dataclass
class UpdateStatistics:
    """What one iteration's optimizer steps on this rank gave.

    Attributes:
        steps, ratios, log_ratios, clipped, kl: One entry per trained transition.
        num_first: Transitions of the first optimizer step: the leading entries of those lists,
            which are still on-policy.
        losses: This rank's loss, per optimizer step.
        grad_norms: 2-norm over all ranks before clipping, per optimizer step.
        skipped: Whether the step was left out because of a loss or gradient that is not finite.
    """

    steps: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    clipped: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    num_first: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)

    @property
    def on_policy(self) -> bool:
        """Whether no optimizer step was made yet, so that the weights are those of the rollout."""
        return all(self.skipped)


def trained_steps(rollout: Rollout, sample_index: int, fraction: float, seed: int) -> list[int]:
    """The steps of a video that are trained.

    Of the `all` window a random share: with N = 16 and fraction 0.6, int(0.6 * 15) = 9 of the
    first 15 steps, drawn independently for each video. Of a narrower window all steps.
    """
    candidates = rollout.trainable_steps[sample_index // rollout.num_generations]
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
    """Train on the chosen videos, shared among `optimizer_steps` optimizer steps.

    Every rank makes the same number of passes of the same size, or sharded ranks would wait
    forever. A rank with fewer videos runs passes of weight zero; unused rows of a micro-batch also
    have weight zero. The loss of one transition is divided by (videos that a rank keeps /
    optimizer_steps x steps trained), whatever the other groups gave: averaged over ranks, it is
    the loss of one rank that has all groups. A step for which no rank has a video is not made.

    Args:
        policy: Its weights must be those that sampled the rollout: until the first optimizer step
            `branchwise` assumes that every ratio is 1.
        optimizer: Holds the trained parameters.
        rollout: From `sample_videos`.
        chosen: Sample indices of this rank's videos, in the order of training; at most num_best +
            num_worst of each group.
        advantages: By sample index.
        cfg: The `update` section.
        reference: For `using_weights`, the weights that `kl_coef` pulls to.
        after_step: Called after each optimizer step that was made (the EMA).
    """
    stats = UpdateStatistics()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    noise_seeds = rollout.noise_seeds.tolist()
    shares = share_among_steps(rollout, chosen, cfg)
    most_videos = map(max, zip(*gather([len(videos) for videos in shares]), strict=True))
    steps_per_video = len(trained_steps(rollout, 0, cfg.timestep_fraction, seed=0))
    divisor = kept_per_step(rollout, cfg) * steps_per_video
    for videos, most in zip(shares, most_videos, strict=True):
        if not most:
            continue
        transitions = []
        for index in videos:
            seed = derive_seed("trained steps", noise_seeds[index])
            for step in trained_steps(rollout, index, cfg.timestep_fraction, seed):
                transitions.append(TrainedTransition(index, step, advantages[index]))
        num_transitions = most * steps_per_video
        loss = accumulate_gradients(
            policy, rollout, transitions, num_transitions, divisor, cfg, reference, stats
        )
        if not stats.losses:
            stats.num_first = len(transitions)
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


def share_among_steps(
    rollout: Rollout, chosen: Sequence[int], cfg: UpdateConfig
) -> list[list[int]]:
    """The videos of this rank that each of the `optimizer_steps` trains, in the order of `chosen`.

    An iteration has a place for each video that it may keep on all ranks: first the first of every
    group, then the second of every group, and so on. The steps take equal parts of the places. So
    a video's step depends neither on the number of ranks nor on groups that were skipped.
    """
    ours = len(rollout.prompts)
    groups = ours * world_size()  # each rank has a block of the iteration's prompts
    places = groups * (cfg.num_best + cfg.num_worst)
    shares: list[list[int]] = [[] for _ in range(cfg.optimizer_steps)]
    seen: Counter[int] = Counter()
    for index in chosen:
        group = index // rollout.num_generations
        place = seen[group] * groups + rank() * ours + group
        seen[group] += 1
        shares[place * cfg.optimizer_steps // places].append(index)
    return shares


def kept_per_step(rollout: Rollout, cfg: UpdateConfig) -> float:
    """The videos that a rank may train in one optimizer step, in the mean over steps and ranks."""
    return len(rollout.prompts) * (cfg.num_best + cfg.num_worst) / cfg.optimizer_steps


def accumulate_gradients(
    policy: Policy,
    rollout: Rollout,
    transitions: Sequence[TrainedTransition],
    num_transitions: int,
    divisor: float,
    cfg: UpdateConfig,
    reference: Mapping[str, Tensor] | None,
    stats: UpdateStatistics,
) -> float:
    """Forward and backward over transitions, in micro-batches of the rollout's size.

    The gradient is that of (sum of the transitions' losses) / divisor.

    Args:
        policy: The generator.
        rollout: Holds the transitions.
        transitions: To train on this rank.
        num_transitions: The most that any rank has; weight zero fills up to it.
        divisor: Of the sum of losses.
        cfg: The `update` section.
        reference: Weights of the KL.
        stats: Gets the new entries. While it is on-policy, which all ranks agree on, `branchwise`
            assumes that every ratio is 1; if one is not, its gradient is computed as if it were,
            and `ratio_drift` shows it.

    Returns:
        The loss.
    """
    size = rollout.micro_batch_size
    total = torch.zeros((), device=rollout.latents.device)
    passes = []
    every = trained_rows(rollout, transitions, num_transitions)
    for i, rows in enumerate(every, 1):
        reduce_gradients_if(policy.transformer, is_last=i == len(every))
        loss, seen = backpropagate(
            policy, rollout, rows, cfg, reference, scale=size / divisor, on_policy=stats.on_policy
        )
        total += loss * (size / divisor)
        passes.append(torch.stack([values.float() for values in seen]))
    # Read back after the last pass, so that the host never waits in between.
    if passes:
        table = torch.cat(passes, dim=1)[:, : len(transitions)]
        ratio, log_ratio, clipped, kl = table.tolist()
        stats.steps += [transition.step for transition in transitions]
        stats.ratios += ratio
        stats.log_ratios += log_ratio
        stats.clipped += map(bool, clipped)
        stats.kl += kl
    return float(total)


def trained_rows(
    rollout: Rollout, transitions: Sequence[TrainedTransition], num_transitions: int = 0
) -> list[TrainedRows]:
    """Bring the transitions of one optimizer step to the device, for all its passes at once: the
    host waits here, and in none of them.

    Args:
        rollout: Holds the transitions.
        transitions: To train on this rank.
        num_transitions: The least number to fill up to; it is filled up to whole micro-batches.

    Returns:
        One entry per pass.
    """
    device, size = rollout.latents.device, rollout.micro_batch_size
    begins = range(0, max(num_transitions, len(transitions)), size)
    missing = len(begins) * size - len(transitions)
    filled = [*transitions, *[TrainedTransition(0, 0, 0.0)] * missing]
    prompts, samples, steps = rollout.index(
        [transition.sample_index for transition in filled],
        [transition.step for transition in filled],
    )
    advantages = torch.tensor([transition.advantage for transition in filled], device=device)
    valid_mask = torch.arange(len(filled), device=device) < len(transitions)
    return [
        TrainedRows(
            TransitionIndex(prompts[part], samples[part], steps[part]),
            valid_mask[part],
            advantages[part],
        )
        for part in (slice(begin, begin + size) for begin in begins)
    ]


def backpropagate(
    policy: Policy,
    rollout: Rollout,
    rows: TrainedRows,
    cfg: UpdateConfig,
    reference: Mapping[str, Tensor] | None,
    *,
    scale: float,
    on_policy: bool,
) -> tuple[Tensor, _TransitionStats]:
    """Add the gradient of scale x (loss of one micro-batch) to the parameters' gradients.

    `branchwise` runs one branch of the guidance forward and backward before the other, so only one
    branch's activations live at a time. The gradient with respect to a branch's velocity must then
    be known without the other branch's graph: from the noise while the ratio is 1, else from one
    more forward.

    Returns:
        As `transition_loss`, without a graph.
    """
    batch = micro_batch(rollout, rows)
    at = batch.latents, batch.index
    reference_velocities = None
    if reference is not None:
        # Before the policy's own forward, whose graph must not see other weights pass through.
        with torch.no_grad(), using_weights(policy, reference):
            reference_velocities = branch_velocities(policy, rollout, *at)

    if rollout.unconditional is None or not cfg.branchwise:
        # Both branches in one graph.
        velocities = branch_velocities(policy, rollout, *at)
        loss, stats = transition_loss(rollout, batch, *velocities, reference_velocities, cfg)
        (loss * scale).backward()
        return loss.detach(), stats

    both = cfg.cfg_grad == "both"
    if both and on_policy and reference_velocities is None:
        # The gradients with respect to both velocities are known before any forward.
        velocity = branch_velocity(policy, rollout, *at, conditional=True)
        gradients = known_gradients(rollout, batch, cfg, scale, velocity.dtype)
        velocity.backward(gradients[0])
        uncond = branch_velocity(policy, rollout, *at, conditional=False)
        uncond.backward(gradients[1])
        with torch.no_grad():
            return transition_loss(rollout, batch, velocity, uncond, None, cfg)

    # One forward of the unconditional branch for its value; if both branches are trained
    # (cfg_grad), a second one for its graph.
    with torch.no_grad():
        uncond = branch_velocity(policy, rollout, *at, conditional=False)
    velocity = branch_velocity(policy, rollout, *at, conditional=True)
    leaf, uncond_leaf = velocity.detach().requires_grad_(), uncond.detach().requires_grad_(both)
    loss, stats = transition_loss(rollout, batch, leaf, uncond_leaf, reference_velocities, cfg)
    (loss * scale).backward()
    velocity.backward(leaf.grad)
    if both:
        branch_velocity(policy, rollout, *at, conditional=False).backward(uncond_leaf.grad)
    return loss.detach(), stats


def micro_batch(rollout: Rollout, rows: TrainedRows) -> MicroBatch:
    """Look up the transitions of one pass in the rollout."""
    (_, samples, steps), valid_mask = rows.index, rows.valid_mask
    valid_rows = valid_mask.view(-1, *[1] * len(rollout.latent_shape))
    # A std of 1 keeps the loss of a row without a transition finite.
    a, b, std = (torch.where(valid_mask, c, 1.0) for c in rollout.coefficients(rows.index))
    return MicroBatch(
        index=rows.index,
        valid_mask=valid_mask,
        latents=torch.where(valid_rows, rollout.latents[samples, steps], 0.0),
        next_latents=torch.where(valid_rows, rollout.latents[samples, steps + 1], 0.0),
        old_log_probs=torch.where(valid_mask, rollout.log_probs[samples, steps], 0.0),
        advantages=rows.advantages,
        a=a,
        b=b,
        std=std,
    )


def known_gradients(
    rollout: Rollout, batch: MicroBatch, cfg: UpdateConfig, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """d(scale x loss) / d velocity of both branches while every ratio is 1.

    It follows from the noise that the seeds give back. It differs from the gradient of
    `transition_loss` only by the rounding of the stored x', which the noise does not know.
    """
    seeds = rollout.noise_seeds[batch.index.samples]
    # Only shape and dtype of the velocity are used, not its values.
    velocity = torch.empty_like(batch.latents, dtype=dtype)
    return branch_gradient(
        _kernel_transition(rollout, batch, velocity, None),
        batch.advantages,
        seeds=seeds,
        step=batch.index.steps,
        scale=scale / rollout.micro_batch_size,
        adv_clip=cfg.adv_clip,
        cfg_grad=cfg.cfg_grad,
    )


def transition_loss(
    rollout: Rollout,
    batch: MicroBatch,
    velocity: Tensor,
    uncond: Tensor | None,
    reference_velocities: tuple[Tensor, Tensor | None] | None,
    cfg: UpdateConfig,
) -> tuple[Tensor, _TransitionStats]:
    """The loss of one micro-batch as a function of both branches' velocities (Eq. 11).

    The sum over transitions of -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + kl_coef KL,
    divided by micro_batch_size.

    Args:
        rollout: Guidance and normalisation of the log-probability.
        batch: The stored transitions.
        velocity, uncond: [B, *latent_shape]; `uncond` is None without guidance.
        reference_velocities: Of both branches with the weights of the KL's reference, if there is
            one.
        cfg: The `update` section.
    """
    loss, stats = grpo_loss(
        _kernel_transition(rollout, batch, velocity, uncond),
        batch.next_latents,
        batch.old_log_probs,
        batch.advantages,
        clip_range=cfg.clip_range,
        adv_clip=cfg.adv_clip,
        cfg_grad=cfg.cfg_grad,
    )
    kl = torch.zeros_like(stats.ratio)
    if reference_velocities is not None:
        w = rollout.guidance_scale
        guided = guided_velocity(velocity, uncond, w, cfg_grad=cfg.cfg_grad)
        guided_reference = guided_velocity(*reference_velocities, w)
        kl = gaussian_kl(guided, guided_reference, batch.b, batch.std) * batch.valid_mask
        loss = loss + cfg.kl_coef * kl.mean()
    log_ratio = stats.log_probs - batch.old_log_probs
    return loss, _TransitionStats(stats.ratio, log_ratio, stats.clipped, kl.detach())


def _kernel_transition(
    rollout: Rollout, batch: MicroBatch, velocity: Tensor, uncond: Tensor | None
) -> Transition:
    """The micro-batch as the kernels take it."""
    return Transition(
        batch.latents,
        velocity,
        batch.a,
        batch.b,
        batch.std,
        velocity_uncond=uncond,
        guidance_scale=rollout.guidance_scale,
        normalized=rollout.normalized,
    )
