"""Every operation in plain PyTorch: the specification that faster kernels must meet, and the path a CPU takes.

One stochastic step of every sampler of the family (method.md section 1; Eqs. 1 and 2 of the paper) is affine:

    v    = v_uncond + w (v_cond - v_uncond)          classifier-free guidance
    mean = a x + b v            x' = mean + s eps    eps ~ N(0, I)
    logp = mean over a sample's elements of [ -(x' - mean)^2 / (2 s^2) - ln s - ln(2 pi) / 2 ]

Shapes: B samples of P elements each, [B, ...]; a, b, s are one number or one per sample. Arithmetic is fp32, whatever
the inputs' dtype, and float64 for float64 latents.

A sample's bits do not depend on the rest of the batch, on the number of threads or on strides: everything between
samples is elementwise and correctly rounded (products and sums, no fused multiply-add), and the one reduction is a
fixed tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo_kernels.philox import describe, gaussian_noise

Coefficient = float | Tensor
"""A number, a scalar tensor, or a tensor [B]; any float dtype (the table's float64 is rounded once, here)."""

CFG_GRADS = ("both", "cond_only")
_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class GRPOStats(NamedTuple):
    """What the loss saw, detached. fp32 (float64 for float64 input)."""

    log_probs: Tensor
    """[B] log-probabilities under the current weights."""
    ratio: Tensor
    """[B] exp(log_probs - old_log_probs)."""
    clipped: Tensor
    """[B] bool: samples whose gradient the clip has removed (ratio beyond the edge that their advantage pushes to)."""
    clip_fraction: Tensor
    """Scalar: share of clipped samples."""
    approx_kl: Tensor
    """Scalar: mean of (log_probs - old_log_probs)^2 / 2; unlike ratio - 1 - ln ratio it does not cancel in fp32."""


# ---------------------------------------------------------------------------------------------------------- public


def guided_velocity(
    velocity: Tensor, velocity_uncond: Tensor | None = None, guidance_scale: float = 1.0, *, cfg_grad: str = "both"
) -> Tensor:
    """v_uncond + w (v_cond - v_uncond), or v_cond where there is no unconditional branch. Differentiable.

    velocity, velocity_uncond: [B, ...] of one shape, any float dtype. guidance_scale: w, a number; other than 1 it
    needs velocity_uncond. cfg_grad: "both" (w to the conditional branch, 1 - w to the other) or "cond_only" (nothing to
    the other; Flow-GRPO). Returns fp32 (float64 for float64 velocity). ValueError otherwise.
    """
    _check_samples("velocity", velocity)
    _check_guidance(velocity, velocity_uncond, guidance_scale, cfg_grad)
    return _guide(velocity, velocity_uncond, guidance_scale, cfg_grad, _compute_dtype(velocity))


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
    """One step of the rollout: x' = a x + b v + s eps, with the log-probability of the x' that is stored. No gradient.

    latents: x [B, ...], float. velocity, velocity_uncond: shape of latents, any float dtype. a, b, std: numbers or [B],
    std not negative. seeds [B] int64 and step (int or [B] int64): key of the noise, see `gaussian_noise`. normalized:
    False for `cps`, see `sde_log_prob`.
    Returns x' like latents, rounded to their dtype BEFORE its log-probability [B] is taken (fp32; float64 for float64),
    so that the first training pass over unchanged weights gives a ratio of exactly 1. A row with std == 0 is an ODE
    step: x' = mean, and its log-probability, which does not exist, is NaN.
    ValueError for shapes, dtypes or lengths that disagree; the values of device tensors are not checked, for which the
    host would have to wait.
    """
    mean, std_B = _transition(latents, velocity, a, b, std, velocity_uncond, guidance_scale, "both")
    if isinstance(seeds, Tensor) and seeds.shape != latents.shape[:1]:
        raise ValueError(f"seeds: expected one per sample, [{latents.shape[0]}], came {describe(seeds)}")
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
    """Log-probability [B] of the stored transition x -> x', averaged over elements; differentiable in both velocities.

    next_latents: x', shape and dtype of latents. cfg_grad as `guided_velocity`, the rest as `sde_step`. Latents and
    coefficients are data: no gradient reaches them. The bits are those that `sde_step` gave for this transition.
    With e = x' - mean and P elements per sample, d logp / dv = b e / (s^2 P). normalized=False is the log-probability
    of `cps`, -mean(e^2), with d logp / dv = 2 b e / P. NaN, and no gradient, where std == 0.
    """
    mean, std_B = _transition(latents, velocity, a, b, std, velocity_uncond, guidance_scale, cfg_grad)
    _check_like("next_latents", next_latents, latents)
    if next_latents.dtype != latents.dtype:
        raise ValueError(f"next_latents: expected the dtype of latents, {latents.dtype}, came {next_latents.dtype}")
    return _log_prob(_rows(next_latents.detach(), mean.dtype), mean, std_B, normalized)


def clipped_ratio_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip: float = 5.0,
) -> tuple[Tensor, GRPOStats]:
    """L = -mean of min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = exp(log_probs - old_log_probs) (Eq. 11).

    log_probs, old_log_probs, advantages: [B] float; A is clamped to [-adv_clip, adv_clip]. clip_range: eps in [0, 1).
    adv_clip > 0, infinity for no clamp. Differentiable in log_probs alone. On the edge itself (rho == 1 +- eps) the
    gradient still passes. The loss of an empty batch is 0. ValueError for other shapes, dtypes or values.
    """
    _check_samples("log_probs", log_probs)
    for name, tensor in (("log_probs", log_probs), ("old_log_probs", old_log_probs), ("advantages", advantages)):
        _check_vector(name, tensor, log_probs.shape[0])
    _check_number("clip_range", clip_range, "in [0, 1)", lambda eps: 0.0 <= eps < 1.0)
    _check_number("adv_clip", adv_clip, "above 0", lambda bound: bound > 0.0)
    dtype, device = _compute_dtype(log_probs), log_probs.device
    log_ratio = log_probs.to(dtype) - old_log_probs.detach().to(device, dtype)
    # exp in float64, then rounded: the same bits whether the element meets the vectorised or the scalar exponential.
    ratio = torch.exp(log_ratio.double()).to(dtype)
    advantages = advantages.detach().to(device, dtype).clamp(-adv_clip, adv_clip)
    # Where the minimum picks the clipped term, written out: minimum() would split the gradient of a tie in two.
    clipped = ((advantages > 0) & (ratio > 1.0 + clip_range)) | ((advantages < 0) & (ratio < 1.0 - clip_range))
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
    """`sde_log_prob`, then `clipped_ratio_loss`: the objective of one training pass (Eq. 11), a mean over the batch.

    Differentiable in velocity and velocity_uncond. Arguments, results and errors are those of the two functions.
    """
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
    return clipped_ratio_loss(log_probs, old_log_probs, advantages, clip_range=clip_range, adv_clip=adv_clip)


def gaussian_kl(velocity: Tensor, velocity_ref: Tensor, b: Coefficient, std: Coefficient) -> Tensor:
    """Exact KL [B] of one transition to the reference policy's, per element: mean of (b (v - v_ref))^2 / (2 s^2).

    Both transitions start at the same x, so a x cancels. velocity, velocity_ref: [B, ...], any float dtype, guidance
    already applied (`guided_velocity`); no gradient reaches the reference. fp32 (float64 for float64 velocity). NaN,
    and no gradient, where std == 0. ValueError as in `sde_step`.
    """
    _check_samples("velocity", velocity)
    _check_like("velocity_ref", velocity_ref, velocity)
    dtype = _compute_dtype(velocity)
    b_B, std_B = (_coefficient(name, value, velocity, dtype) for name, value in (("b", b), ("std", std)))
    shift = b_B[:, None] * (_rows(velocity, dtype) - _rows(velocity_ref.detach(), dtype))
    stochastic = std_B > 0
    safe = torch.where(stochastic, std_B, 1.0)
    return torch.where(stochastic, _row_mean(shift.square()) / (2.0 * safe * safe), math.nan)


# -------------------------------------------------------------------------------------------------------- formulas


def _guide(cond: Tensor, uncond: Tensor | None, scale: float, cfg_grad: str, dtype: torch.dtype) -> Tensor:
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
    """Check the arguments that all ops share; mean [B, P] and std [B] of the transition."""
    _check_samples("latents", latents)
    _check_like("velocity", velocity, latents)
    _check_guidance(velocity, velocity_uncond, guidance_scale, cfg_grad)
    dtype = _compute_dtype(latents)
    a_B = _coefficient("a", a, latents, dtype)
    b_B = _coefficient("b", b, latents, dtype)
    std_B = _coefficient("std", std, latents, dtype)
    combined = _rows(_guide(velocity, velocity_uncond, guidance_scale, cfg_grad, dtype), dtype)
    return a_B[:, None] * _rows(latents.detach(), dtype) + b_B[:, None] * combined, std_B


def _log_prob(next_latents: Tensor, mean: Tensor, std_B: Tensor, normalized: bool) -> Tensor:
    error = _row_mean((next_latents - mean).square())
    stochastic = std_B > 0
    if not normalized:
        return torch.where(stochastic, -error, math.nan)
    # 1 in place of 0: an ODE row of a mixed batch must not send 0 * inf = NaN back into the weights.
    safe = torch.where(stochastic, std_B, 1.0)
    log_std = torch.log(safe.double()).to(safe.dtype)  # float64, then rounded: see `clipped_ratio_loss`
    return torch.where(stochastic, -error / (2.0 * safe * safe) - log_std - _HALF_LOG_TWO_PI, math.nan)


class _RowSum(torch.autograd.Function):
    """Sum of each row, [B, P] -> [B], along one fixed binary tree: the upper half onto the lower, again and again.

    torch.sum orders its terms by threads, by strides and by the shape of the whole tensor: its bits change with them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.shape = rows.shape
        total, width = rows.clone(), rows.shape[1]
        while width > 1:
            half = (width + 1) // 2
            total[:, : width - half].add_(total[:, half:width])
            width = half
        return total[:, 0].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0][:, None].expand(ctx.shape)


def _row_mean(rows: Tensor) -> Tensor:
    row_sum: Callable[[Tensor], Tensor] = _RowSum.apply
    return row_sum(rows) / rows.shape[1]


def _rows(samples: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, ...] -> [B, P]; P is spelt out because an empty batch leaves -1 undecided."""
    return samples.to(dtype).reshape(samples.shape[0], math.prod(samples.shape[1:]))


def _compute_dtype(samples: Tensor) -> torch.dtype:
    return torch.float64 if samples.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------- checks


def _coefficient(name: str, value: Coefficient, samples: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient as [B] in the dtype of the arithmetic. Values of device tensors are not checked, see `sde_step`."""
    batch = samples.shape[0]
    if isinstance(value, Tensor):
        if value.shape not in ((), (batch,)) or value.dtype not in _FLOATS:
            raise ValueError(f"{name}: expected a number or a float tensor [{batch}], came {describe(value)}")
        if value.device.type == "cpu":
            _check_coefficients(name, value.reshape(-1).tolist())
        return value.detach().to(samples.device, dtype, non_blocking=True).expand(batch)
    if not _is_number(value):
        raise ValueError(f"{name}: expected a number or a float tensor [{batch}], came {describe(value)}")
    _check_coefficients(name, [value])
    return torch.full((batch,), float(value), dtype=dtype, device=samples.device)


def _check_coefficients(name: str, values: list[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name}: expected finite values, came {values}")
    if name == "std" and any(value < 0 for value in values):
        raise ValueError(f"std: expected values of 0 or above, came {values}")


def _check_samples(name: str, samples: Tensor) -> None:
    if not isinstance(samples, Tensor) or samples.dtype not in _FLOATS or samples.dim() < 1:
        raise ValueError(f"{name}: expected a float tensor with the batch first, came {describe(samples)}")
    if 0 in samples.shape[1:]:
        raise ValueError(f"{name}: expected at least one element per sample, came shape {list(samples.shape)}")


def _check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS or tensor.shape != like.shape:
        raise ValueError(f"{name}: expected a float tensor {list(like.shape)}, came {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected it on {like.device}, came on {tensor.device}")


def _check_vector(name: str, tensor: Tensor, batch: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS or tensor.shape != (batch,):
        raise ValueError(f"{name}: expected a float tensor [{batch}], came {describe(tensor)}")


def _check_guidance(velocity: Tensor, velocity_uncond: Tensor | None, guidance_scale: float, cfg_grad: str) -> None:
    if cfg_grad not in CFG_GRADS:
        raise ValueError(f"cfg_grad: expected one of {', '.join(CFG_GRADS)}, came {cfg_grad!r}")
    _check_number("guidance_scale", guidance_scale, "that is finite", math.isfinite)
    if velocity_uncond is not None:
        _check_like("velocity_uncond", velocity_uncond, velocity)
    elif guidance_scale != 1.0:
        raise ValueError(f"velocity_uncond: expected a tensor for guidance_scale {guidance_scale}, came None")


def _check_number(name: str, value: float, wanted: str, valid: Callable[[float], bool]) -> None:
    if not _is_number(value) or not valid(value):
        raise ValueError(f"{name}: expected a number {wanted}, came {describe(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
