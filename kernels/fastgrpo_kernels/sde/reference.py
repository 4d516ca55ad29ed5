"""The operations of a transition in plain PyTorch: the specification that faster kernels must meet,
and the path of float64.

One stochastic step of every sampler of the backend (method.md section 1; Eqs. 1 and 2 of the
paper) is affine:

    v    = v_uncond + w (v_cond - v_uncond)          classifier-free guidance
    mean = a x + b v            x' = mean + s eps    eps ~ N(0, I)
    logp = mean over a sample's elements of [ -(x' - mean)^2 / (2 s^2) - ln s - ln(2 pi) / 2 ]

Shapes: B samples of P elements each, [B, ...]; a, b, s are one number or one per sample.
Arithmetic is fp32, whatever the inputs' dtype, and float64 for float64 latents. Signatures are
those of the public functions, which have the full docstrings (`sde_step.py`, `grpo_loss.py`,
...), less `backend`.

A sample's bits do not depend on the rest of the batch, on threads, on strides, nor on which
backend computed them: everything between samples is elementwise and correctly rounded (products
and sums, no fused multiply-add), and the one sum is exact, see `_exact_row_sum`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..checks import Coefficient, compute_dtype
from ..random.philox import gaussian_noise

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class GRPOStats(NamedTuple):
    """What the loss saw, detached. fp32 (float64 for float64 input)."""

    log_probs: Tensor
    """[B] log-probabilities under the current weights."""
    ratio: Tensor
    """[B] exp(log_probs - old_log_probs)."""
    clipped: Tensor
    """[B] bool: samples whose gradient the clip has removed (ratio beyond the edge that their
    advantage pushes to).
    """
    clip_fraction: Tensor
    """Scalar: share of clipped samples."""
    approx_kl: Tensor
    """Scalar: mean of (log_probs - old_log_probs)^2 / 2; unlike ratio - 1 - ln ratio it does not
    cancel in fp32.
    """


def guided_velocity(
    velocity: Tensor,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    *,
    cfg_grad: str = "both",
) -> Tensor:
    """v_uncond + w (v_cond - v_uncond), or v_cond where there is no unconditional branch.
    Differentiable.

    velocity, velocity_uncond: [B, ...] of one shape, any float dtype. guidance_scale: w, a
    number; other than 1 it needs velocity_uncond. cfg_grad: "both" (w to the conditional branch,
    1 - w to the other) or "cond_only" (nothing to the other; Flow-GRPO). Returns fp32 (float64
    for float64 velocity). ValueError otherwise.
    """
    checks.check_samples("velocity", velocity)
    checks.check_guidance(velocity, velocity_uncond, guidance_scale, cfg_grad)
    return _guide(velocity, velocity_uncond, guidance_scale, cfg_grad, compute_dtype(velocity))


@torch.no_grad()
def sde_step(
    latents: Tensor,
    velocity: Tensor,
    a: Coefficient,
    b: Coefficient,
    std: Coefficient,
    *,
    seeds: Tensor,
    step: int | Tensor,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    normalized: bool = True,
) -> tuple[Tensor, Tensor]:
    """The specification of `fastgrpo_kernels.sde.step`."""
    mean, std_B = _transition(latents, velocity, a, b, std, velocity_uncond, guidance_scale, "both")
    seeds = checks.seed_vector(seeds, latents.shape[0], latents.device)
    noise = gaussian_noise(seeds, step, latents.shape[1:], latents.device)
    next_latents = (mean + std_B[:, None] * _rows(noise, mean.dtype)).to(latents.dtype)
    log_probs = _log_prob(_rows(next_latents, mean.dtype), mean, std_B, normalized)
    return next_latents.reshape(latents.shape), log_probs


def sde_log_prob(
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    a: Coefficient,
    b: Coefficient,
    std: Coefficient,
    *,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    cfg_grad: str = "both",
    normalized: bool = True,
) -> Tensor:
    """The specification of `fastgrpo_kernels.sde.log_prob`."""
    mean, std_B = _transition(
        latents, velocity, a, b, std, velocity_uncond, guidance_scale, cfg_grad
    )
    checks.check_stored(next_latents, latents)
    return _log_prob(_rows(next_latents.detach(), mean.dtype), mean, std_B, normalized)


def clipped_ratio_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip: float = 5.0,
) -> tuple[Tensor, GRPOStats]:
    """The specification of `fastgrpo_kernels.clipped_ratio_loss`."""
    checks.check_loss(log_probs, old_log_probs, advantages, clip_range, adv_clip)
    dtype, device = compute_dtype(log_probs), log_probs.device
    log_ratio = log_probs.to(dtype) - old_log_probs.detach().to(device, dtype)
    # exp in float64, then rounded: the same bits whether the element meets the vectorised or the
    # scalar exponential.
    ratio = torch.exp(log_ratio.double()).to(dtype)
    advantages = advantages.detach().to(device, dtype).clamp(-adv_clip, adv_clip)
    # Where the minimum picks the clipped term, written out: minimum() would split the gradient of a
    # tie in two.
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
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    a: Coefficient,
    b: Coefficient,
    std: Coefficient,
    *,
    clip_range: float = 1e-4,
    adv_clip: float = 5.0,
    velocity_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    cfg_grad: str = "both",
    normalized: bool = True,
) -> tuple[Tensor, GRPOStats]:
    """The specification of `fastgrpo_kernels.sde.loss`."""
    log_probs = sde_log_prob(
        latents,
        next_latents,
        velocity,
        a,
        b,
        std,
        velocity_uncond=velocity_uncond,
        guidance_scale=guidance_scale,
        cfg_grad=cfg_grad,
        normalized=normalized,
    )
    return clipped_ratio_loss(
        log_probs, old_log_probs, advantages, clip_range=clip_range, adv_clip=adv_clip
    )


@torch.no_grad()
def branch_gradient(
    seeds: Tensor,
    step: int | Tensor,
    advantages: Tensor,
    b: Coefficient,
    std: Coefficient,
    shape: Sequence[int],
    *,
    guidance_scale: float = 1.0,
    scale: float = 1.0,
    adv_clip: float = 5.0,
    cfg_grad: str = "both",
    normalized: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The specification of `fastgrpo_kernels.sde.branch_gradient`."""
    factor, target = checks.branch_factor(
        seeds,
        advantages,
        b,
        std,
        shape,
        guidance_scale,
        scale,
        adv_clip,
        cfg_grad,
        normalized,
        device,
    )
    guided = _rows(gaussian_noise(seeds, step, shape, target), torch.float32) * factor[:, None]
    cond = guided * guidance_scale
    uncond = guided - cond
    sizes = (seeds.shape[0], *shape)
    both = cfg_grad == "both" and guidance_scale != 1.0
    return cond.to(dtype).reshape(sizes), uncond.to(dtype).reshape(sizes) if both else None


def gaussian_kl(velocity: Tensor, velocity_ref: Tensor, b: Coefficient, std: Coefficient) -> Tensor:
    """Exact KL [B] of one transition to the reference policy's, per element: mean of (b (v -
    v_ref))^2 / (2 s^2).

    Both transitions start at the same x, so a x cancels. velocity, velocity_ref: [B, ...], any
    float dtype, guidance already applied (`guided_velocity`); no gradient reaches the reference.
    fp32 (float64 for float64 velocity). NaN, and no gradient, where std == 0. ValueError as in
    `sde_step`.
    """
    checks.check_samples("velocity", velocity)
    checks.check_like("velocity_ref", velocity_ref, velocity)
    dtype = compute_dtype(velocity)
    b_B, std_B = (
        checks.coefficient(name, value, velocity.shape[0], velocity.device, dtype)
        for name, value in (("b", b), ("std", std))
    )
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


def _transition(
    latents: Tensor,
    velocity: Tensor,
    a: Coefficient,
    b: Coefficient,
    std: Coefficient,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    cfg_grad: str,
) -> tuple[Tensor, Tensor]:
    """Check the arguments that the ops of a transition share; its mean [B, P] and std [B]."""
    checks.check_transition(latents, velocity, velocity_uncond, guidance_scale, cfg_grad)
    dtype = compute_dtype(latents)
    a_B, b_B, std_B = checks.coefficients(a, b, std, latents)
    combined = _rows(_guide(velocity, velocity_uncond, guidance_scale, cfg_grad, dtype), dtype)
    return a_B[:, None] * _rows(latents.detach(), dtype) + b_B[:, None] * combined, std_B


def _log_prob(next_latents: Tensor, mean: Tensor, std_B: Tensor, normalized: bool) -> Tensor:
    error = _exact_row_sum((next_latents - mean).square(), std_B) / mean.shape[1]
    stochastic = std_B > 0
    if normalized:
        # 1 in place of 0: an ODE row of a mixed batch must not send 0 * inf = NaN back into the
        # weights.
        safe = torch.where(stochastic, std_B, 1.0).double()
        error = error / (2.0 * safe * safe) + torch.log(safe) + _HALF_LOG_TWO_PI
    return torch.where(stochastic, (-error).to(mean.dtype), math.nan)


def _exact_row_sum(rows: Tensor, unit_B: Tensor) -> Tensor:
    """Sum of each fp32 row, [B, P] -> [B] float64, whose bits do not depend on the order of the
    terms.

    Terms are rounded to a multiple of q = 2^(2k - 24), 2^k <= unit < 2^(k+1) (here 2^-24 to
    2^-26 of the variance), by adding and taking away a number whose last float64 bit is worth q.
    A float64 sum of such multiples is exact below 2^53 q, that is while the sum of term / unit^2
    stays under 2^29: no order, split, thread or device can change it. Beyond, and for float64
    rows, which are not rounded, it is an ordinary float64 sum.
    """
    if rows.dtype == torch.float64:
        return rows.sum(1)
    k = torch.frexp(unit_B).exponent - 1
    magic = torch.ldexp(torch.full_like(k, 3, dtype=torch.float64), 2 * k + 27)[
        :, None
    ]  # 1.5 * 2^(2k + 28)
    return ((rows.double() + magic) - magic).sum(1)


def _rows(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, ...] -> [B, P]; P is spelt out because an empty batch leaves -1 undecided."""
    return samples.to(dtype).reshape(samples.shape[0], math.prod(samples.shape[1:]))
