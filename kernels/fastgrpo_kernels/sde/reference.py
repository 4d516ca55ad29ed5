"""The ops of a transition in plain PyTorch: the specification that faster kernels must meet, and
the path of float64.

    v    = v_uncond + w (v_cond - v_uncond)          classifier-free guidance
    mean = a x + b v            x' = mean + s eps    eps ~ N(0, I)
    logp = mean over a sample's elements of [ -(x' - mean)^2 / (2 s^2) - ln s - ln(2 pi) / 2 ]

(docs/method.md, section 1; Eqs. 1 and 2 of the paper.)

Shapes: B samples of P elements, [B, ...]; a, b, s: one number, or one per sample. The arithmetic is
fp32 for any dtype of the inputs, float64 for float64 latents. Signatures are those of the public
functions, which have the full docstrings (`step.py`, `log_prob.py`, `loss.py`,
`branch_gradient.py`), without `backend`.

Bits (kernels/README.md): everything per element is a correctly rounded product or sum without fused
multiply-add, and the one sum is exact, see `_exact_row_sum`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..checks import Coefficient, compute_dtype
from ..random.philox import gaussian_noise
from .transition import (
    Transition,
    check_adv_clip,
    check_guidance,
    check_guidance_scale,
    check_loss,
    check_stored,
    check_transition,
    coefficients,
)

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class GRPOStats(NamedTuple):
    """What the loss measured, without a gradient. fp32 (float64 for float64 input)."""

    log_probs: Tensor
    """[B] log-probabilities under the current weights."""
    ratio: Tensor
    """[B] exp(log_probs - old_log_probs)."""
    clipped: Tensor
    """[B] bool: the clip removed the gradient (ratio beyond the edge that the advantage pushes to).
    """
    clip_fraction: Tensor
    """[], share of clipped samples."""
    approx_kl: Tensor
    """[], mean of (log_probs - old_log_probs)^2 / 2. Unlike ratio - 1 - ln ratio it does not cancel
    in fp32.
    """


def guided_velocity(
    velocity: Tensor,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    *,
    cfg_grad: str = "both",
) -> Tensor:
    """v_uncond + w (v_cond - v_uncond), or v_cond without an unconditional branch. Differentiable.

    Args:
        velocity: [B, ...], any float dtype.
        velocity_uncond: Shape of velocity, or None.
        guidance_scale: w, a number; any other than 1 needs velocity_uncond.
        cfg_grad: "both" (w to the conditional branch, 1 - w to the other) or "cond_only" (nothing
            to the unconditional branch; Flow-GRPO).

    Returns:
        fp32, float64 for float64 velocity.

    Raises:
        ValueError: Shapes, dtypes or values do not fit.
    """
    checks.check_samples("velocity", velocity)
    check_guidance(velocity, velocity_uncond, guidance_scale, cfg_grad)
    return _guide(velocity, velocity_uncond, guidance_scale, cfg_grad, compute_dtype(velocity))


@torch.no_grad()
def sde_step(transition: Transition, *, seeds: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `step.sde_step`."""
    mean, std_B = _mean_and_std(transition, "both")
    x = transition.latents
    seeds = checks.seed_vector(seeds, x.shape[0], x.device)
    noise = gaussian_noise(seeds, step, x.shape[1:], x.device)
    next_latents = (mean + std_B[:, None] * _rows(noise, mean.dtype)).to(x.dtype)
    log_probs = _log_prob(_rows(next_latents, mean.dtype), mean, std_B, transition.normalized)
    return next_latents.reshape(x.shape), log_probs


def sde_log_prob(transition: Transition, next_latents: Tensor, *, cfg_grad: str = "both") -> Tensor:
    """The specification of `log_prob.sde_log_prob`."""
    mean, std_B = _mean_and_std(transition, cfg_grad)
    check_stored(next_latents, transition.latents)
    stored = _rows(next_latents.detach(), mean.dtype)
    return _log_prob(stored, mean, std_B, transition.normalized)


def clipped_ratio_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip: float = 5.0,
) -> tuple[Tensor, GRPOStats]:
    """The specification of `loss.clipped_ratio_loss`."""
    check_loss(log_probs, old_log_probs, advantages, clip_range, adv_clip)
    dtype, device = compute_dtype(log_probs), log_probs.device
    log_ratio = log_probs.to(dtype) - old_log_probs.detach().to(device, dtype)
    # exp in float64, then rounded: torch's vectorised and scalar exponentials then give the same
    # bits.
    ratio = torch.exp(log_ratio.double()).to(dtype)
    advantages = advantages.detach().to(device, dtype).clamp(-adv_clip, adv_clip)
    # Where the minimum is the clipped term, written out: minimum() would split the gradient of a
    # tie.
    clipped = ((advantages > 0) & (ratio > 1.0 + clip_range)) | (
        (advantages < 0) & (ratio < 1.0 - clip_range)
    )
    bounded = ratio.detach().clamp(1.0 - clip_range, 1.0 + clip_range)
    objective = torch.where(clipped, bounded, ratio) * advantages
    batch = max(log_probs.shape[0], 1)
    stats = GRPOStats(
        log_probs=log_probs.detach().to(dtype),
        ratio=ratio.detach(),
        clipped=clipped,
        clip_fraction=clipped.to(dtype).sum() / batch,
        approx_kl=0.5 * log_ratio.detach().square().sum() / batch,
    )
    return -objective.sum() / batch, stats


def grpo_loss(
    transition: Transition,
    next_latents: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip: float = 5.0,
    cfg_grad: str = "both",
) -> tuple[Tensor, GRPOStats]:
    """The specification of `loss.grpo_loss`."""
    log_probs = sde_log_prob(transition, next_latents, cfg_grad=cfg_grad)
    return clipped_ratio_loss(
        log_probs, old_log_probs, advantages, clip_range=clip_range, adv_clip=adv_clip
    )


@torch.no_grad()
def branch_gradient(
    transition: Transition,
    advantages: Tensor,
    *,
    seeds: Tensor,
    step: int | Tensor,
    scale: float = 1.0,
    adv_clip: float = 5.0,
    cfg_grad: str = "both",
) -> tuple[Tensor, Tensor | None]:
    """The specification of `branch_gradient.branch_gradient`."""
    velocity, w = transition.velocity, transition.guidance_scale
    factor = noise_factor(transition, advantages, scale, adv_clip, cfg_grad)
    seeds = checks.seed_vector(seeds, velocity.shape[0], velocity.device)
    noise = gaussian_noise(seeds, step, velocity.shape[1:], velocity.device)
    guided = _rows(noise, torch.float32) * factor[:, None]
    cond = guided * w
    uncond = guided - cond
    both = cfg_grad == "both" and w != 1.0
    return (
        cond.to(velocity.dtype).reshape(velocity.shape),
        uncond.to(velocity.dtype).reshape(velocity.shape) if both else None,
    )


def noise_factor(
    transition: Transition, advantages: Tensor, scale: float, adv_clip: float, cfg_grad: str
) -> Tensor:
    """What `branch_gradient` multiplies the noise by, fp32 [B]; its arguments are checked here."""
    velocity, normalized = transition.velocity, transition.normalized
    checks.check_samples("velocity", velocity)
    checks.check_vector("advantages", advantages, velocity.shape[0])
    check_guidance_scale(transition.guidance_scale, cfg_grad)
    checks.check_number("scale", scale, "that is finite", math.isfinite)
    check_adv_clip(adv_clip)
    # fp32 first, as the loss rounds them, then float64 up to the last rounding.
    b_B = checks.coefficient("b", transition.b, velocity, torch.float32).double()
    std_B = checks.coefficient("std", transition.std, velocity, torch.float32).double()
    advantage = advantages.detach().to(velocity.device, torch.float32, non_blocking=True)
    advantage = advantage.clamp(-adv_clip, adv_clip).double()
    weight = torch.where(std_B > 0, 1.0 / std_B, 0.0) if normalized else 2.0 * std_B
    return (-scale * advantage * b_B * weight / math.prod(velocity.shape[1:])).float()


def gaussian_kl(velocity: Tensor, velocity_ref: Tensor, b: Coefficient, std: Coefficient) -> Tensor:
    """Exact KL of one transition to the reference policy's: mean over elements of (b (v - v_ref))^2
    / (2 s^2).

    Both transitions start at the same x, so a x cancels. No gradient reaches velocity_ref.

    Args:
        velocity: [B, ...], any float dtype, with guidance applied (`guided_velocity`).
        velocity_ref: The reference policy's, shape of velocity.
        b: The transition's, a number or [B].
        std: The same.

    Returns:
        [B], fp32 (float64 for float64 velocity). NaN, without a gradient, where std == 0.

    Raises:
        ValueError: As `sde_step`.
    """
    checks.check_samples("velocity", velocity)
    checks.check_like("velocity_ref", velocity_ref, velocity)
    dtype = compute_dtype(velocity)
    b_B = checks.coefficient("b", b, velocity, dtype)
    std_B = checks.coefficient("std", std, velocity, dtype)
    shift = b_B[:, None] * (_rows(velocity, dtype) - _rows(velocity_ref.detach(), dtype))
    stochastic = std_B > 0
    safe = torch.where(stochastic, std_B, 1.0).double()
    kl = shift.double().square().mean(1) / (2.0 * safe * safe)
    return torch.where(stochastic, kl.to(dtype), math.nan)


def _guide(
    cond: Tensor, uncond: Tensor | None, scale: float, cfg_grad: str, dtype: torch.dtype
) -> Tensor:
    cond = cond.to(dtype)
    if uncond is None:
        return cond
    uncond = uncond.to(dtype) if cfg_grad == "both" else uncond.detach().to(dtype)
    return uncond + scale * (cond - uncond)


def _mean_and_std(transition: Transition, cfg_grad: str) -> tuple[Tensor, Tensor]:
    """Check the transition; its mean [B, P] and std [B]."""
    check_transition(transition, cfg_grad)
    x, velocity = transition.latents, transition.velocity
    dtype = compute_dtype(x)
    a_B, b_B, std_B = coefficients(transition)
    guided = _guide(
        velocity, transition.velocity_uncond, transition.guidance_scale, cfg_grad, dtype
    )
    return a_B[:, None] * _rows(x.detach(), dtype) + b_B[:, None] * _rows(guided, dtype), std_B


def _log_prob(next_latents: Tensor, mean: Tensor, std_B: Tensor, normalized: bool) -> Tensor:
    error = _exact_row_sum((next_latents - mean).square(), std_B) / mean.shape[1]
    stochastic = std_B > 0
    if normalized:
        # 1 in place of 0: an ODE row of a mixed batch must not send back 0 * inf = NaN.
        safe = torch.where(stochastic, std_B, 1.0).double()
        error = error / (2.0 * safe * safe) + torch.log(safe) + _HALF_LOG_TWO_PI
    return torch.where(stochastic, (-error).to(mean.dtype), math.nan)


def _exact_row_sum(rows: Tensor, unit_B: Tensor) -> Tensor:
    """Sum of each fp32 row, [B, P] -> [B] float64, whose bits do not depend on the order of the
    terms.

    Each term is rounded to a multiple of q = 2^(2k - 24), where 2^k <= unit < 2^(k+1): for a
    standard deviation as unit, 2^-24 to 2^-26 of the variance. A float64 sum of such multiples is
    exact below 2^53 q, that is while the sum of term / unit^2 stays under 2^29, so no order, split,
    thread or device can change it. Beyond that, and for float64 rows, which are not rounded, it is
    an ordinary float64 sum.
    """
    if rows.dtype == torch.float64:
        return rows.sum(1)
    k = torch.frexp(unit_B).exponent - 1
    # 1.5 * 2^(2k + 28), whose last float64 bit is worth q: adding and subtracting it rounds to q.
    rounder = torch.ldexp(torch.full_like(k, 3, dtype=torch.float64), 2 * k + 27)[:, None]
    return ((rows.double() + rounder) - rounder).sum(1)


def _rows(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, ...] -> [B, P]. P is computed: reshape cannot infer -1 for an empty batch."""
    return samples.to(dtype).reshape(samples.shape[0], math.prod(samples.shape[1:]))
