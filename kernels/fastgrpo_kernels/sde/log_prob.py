"""sde_log_prob: the log-probability of a stored transition, and its gradient in both velocities,
each in one pass.

    v = v_uncond + w (v_cond - v_uncond)      mean = a x + b v      e = x' - mean          (method.md section 1)
    logp = mean over a sample's elements of [ -e^2 / (2 s^2) - ln s - ln(2 pi) / 2 ]      cps: -mean of e^2
    dlogp/dv = b e / (s^2 P)      cps: 2 b e / P            times w for v_cond, 1 - w for v_uncond

Shapes: B samples of P elements each, [B, ...], seen as [B, P]; a, b, s and log-probabilities are
[B]; T tiles a sample. Forward: one program a tile, which leaves the tile's sum of squares, then
a small one that adds them up. Backward: one program a tile reads the tensors again (e is made,
not stored) and writes both gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..checks import Coefficient
from ..dispatch import NAMESPACE, has_library, jit, operation, select_backend, tl, triton_op
from . import reference
from .transition import (
    LAUNCH,
    TILE,
    empty_partials,
    exact_sum,
    finish_log_probs,
    locate,
    transition_arguments,
    transition_mean,
)


@jit
def _sde_log_prob_kernel(
    latents,
    next_latents,
    velocity,
    velocity_uncond,
    a,
    b,
    std,
    partials,
    P,
    num_tiles,
    guidance_scale,
    GUIDED: tl.constexpr,
    TILE: tl.constexpr,
):
    row, _, offset, lanes, inside = locate(num_tiles, P, TILE)
    mean = transition_mean(
        latents,
        velocity,
        velocity_uncond,
        tl.load(a + row),
        tl.load(b + row),
        guidance_scale,
        offset,
        lanes,
        inside,
        GUIDED,
    )
    error = tl.load(next_latents + offset + lanes, mask=inside, other=0.0).to(tl.float32) - mean
    tl.store(
        partials + tl.program_id(0), exact_sum(error * error, tl.load(std + row))
    )  # a lane outside adds nothing: it loads zeros


@jit
def _sde_log_prob_backward_kernel(
    grad_log_probs,
    grad_loss,
    latents,
    next_latents,
    velocity,
    velocity_uncond,
    a,
    b,
    std,
    grad_velocity,
    grad_uncond,
    P,
    num_tiles,
    guidance_scale,
    OF_LOSS: tl.constexpr,
    GUIDED: tl.constexpr,
    NEEDS_UNCOND: tl.constexpr,
    NORMALIZED: tl.constexpr,
    TILE: tl.constexpr,
):
    row, _, offset, lanes, inside = locate(num_tiles, P, TILE)
    gradient, slope, deviation = tl.load(grad_log_probs + row), tl.load(b + row), tl.load(std + row)
    if OF_LOSS:
        gradient = gradient * tl.load(grad_loss)
    stochastic = deviation > 0
    weight = tl.full([], -1.0, tl.float64) / P
    if NORMALIZED:
        s = tl.where(stochastic, deviation, 1.0).to(tl.float64)
        weight = -1.0 / (2.0 * s * s * P)
    c = tl.where(
        stochastic, (gradient.to(tl.float64) * weight).to(tl.float32), 0.0
    )  # dL/d(e^2); an ODE row has none
    mean = transition_mean(
        latents,
        velocity,
        velocity_uncond,
        tl.load(a + row),
        slope,
        guidance_scale,
        offset,
        lanes,
        inside,
        GUIDED,
    )
    error = tl.load(next_latents + offset + lanes, mask=inside, other=0.0).to(tl.float32) - mean
    guided = (c * (2.0 * error)) * -slope
    cond = guided
    if GUIDED:
        cond = guided * guidance_scale
    tl.store(grad_velocity + offset + lanes, cond.to(grad_velocity.dtype.element_ty), mask=inside)
    if NEEDS_UNCOND:
        tl.store(
            grad_uncond + offset + lanes,
            (guided - cond).to(grad_uncond.dtype.element_ty),
            mask=inside,
        )


def transition_error(
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    guidance_scale: float,
) -> tuple[int, Tensor]:
    """P, and the tiles' sums of squared errors, float64 [B, T]. Not for an empty batch."""
    P, partials = empty_partials(latents)
    _sde_log_prob_kernel[(partials.numel(),)](
        latents,
        next_latents,
        velocity,
        velocity if velocity_uncond is None else velocity_uncond,
        a,
        b,
        std,
        partials,
        P,
        partials.shape[1],
        guidance_scale,
        GUIDED=velocity_uncond is not None,
        TILE=TILE,
        **LAUNCH,
    )
    return P, partials


@triton_op("sde_log_prob")
def _sde_log_prob(
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    guidance_scale: float,
    normalized: bool,
) -> Tensor:
    if not latents.shape[0]:
        return torch.empty_like(std)
    with torch.cuda.device_of(latents):
        P, partials = transition_error(
            latents, next_latents, velocity, velocity_uncond, a, b, std, guidance_scale
        )
        return finish_log_probs(partials, std, P, normalized)


@triton_op("sde_log_prob_backward")
def _sde_log_prob_backward(
    grad_log_probs: Tensor,
    grad_loss: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    guidance_scale: float,
    normalized: bool,
    needs_uncond: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both velocities; the second is empty, [0], unless needed. grad_log_probs [B],
    times grad_loss [] where there is one.
    """
    grad_velocity = torch.empty_like(velocity)
    grad_uncond = torch.empty_like(velocity) if needs_uncond else velocity.new_empty(0)
    if not latents.shape[0]:
        return grad_velocity, grad_uncond
    P = latents.numel() // latents.shape[0]
    num_tiles = -(-P // TILE)
    with torch.cuda.device_of(latents):
        _sde_log_prob_backward_kernel[(latents.shape[0] * num_tiles,)](
            grad_log_probs,
            grad_log_probs if grad_loss is None else grad_loss,
            latents,
            next_latents,
            velocity,
            velocity if velocity_uncond is None else velocity_uncond,
            a,
            b,
            std,
            grad_velocity,
            grad_uncond,
            P,
            num_tiles,
            guidance_scale,
            OF_LOSS=grad_loss is not None,
            GUIDED=velocity_uncond is not None,
            NEEDS_UNCOND=needs_uncond,
            NORMALIZED=normalized,
            TILE=TILE,
            **LAUNCH,
        )
    return grad_velocity, grad_uncond


# -------- shapes and autograd


def _sde_log_prob_fake(
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    guidance_scale: float,
    normalized: bool,
) -> Tensor:
    return torch.empty_like(std)


def _sde_log_prob_backward_fake(
    grad_log_probs: Tensor,
    grad_loss: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    guidance_scale: float,
    normalized: bool,
    needs_uncond: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(velocity), torch.empty_like(
        velocity
    ) if needs_uncond else velocity.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.guidance_scale, ctx.normalized = inputs
    ctx.save_for_backward(*tensors)


def _register(namespace: str, backend: str) -> None:
    def backward(ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        needs_uncond = ctx.needs_input_grad[3]
        cond, uncond = operation(backend, "sde_log_prob_backward")(
            grad_log_probs.contiguous(),
            None,
            *ctx.saved_tensors,
            ctx.guidance_scale,
            ctx.normalized,
            needs_uncond,
        )
        return None, None, cond, uncond if needs_uncond else None, *[None] * 5

    torch.library.register_fake(f"{namespace}::sde_log_prob", _sde_log_prob_fake)
    torch.library.register_fake(f"{namespace}::sde_log_prob_backward", _sde_log_prob_backward_fake)
    torch.library.register_autograd(f"{namespace}::sde_log_prob", backward, setup_context=_save)


_register(NAMESPACE, "triton")
if has_library():
    _register("fastgrpo", "cpp")


# -------- public


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
    backend: str | None = None,
) -> Tensor:
    """Log-probability [B] of the stored transition x -> x', averaged over elements; differentiable
    in both velocities.

    next_latents: x', shape and dtype of latents. cfg_grad as `guided_velocity`, the rest as
    `sde_step`. Latents and coefficients are data: no gradient reaches them. The bits are those
    that `sde_step` gave for this transition, in whichever backend. With e = x' - mean and P
    elements per sample, d logp / dv = b e / (s^2 P). normalized=False is the log-probability of
    `cps`, -mean(e^2), with d logp / dv = 2 b e / P. NaN, and no gradient, where std == 0. Once
    differentiable; float64 twice. ValueError as `sde_step`. Source: method.md section 1.
    """
    backend = select_backend("sde_log_prob", latents, backend)
    if backend == "reference":
        return reference.sde_log_prob(
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
    x, *rest = transition_arguments(
        latents, velocity, velocity_uncond, a, b, std, guidance_scale, cfg_grad
    )
    checks.check_stored(next_latents, latents)
    return operation(backend, "sde_log_prob")(
        x, next_latents.detach().contiguous(), *rest, float(guidance_scale), normalized
    )
