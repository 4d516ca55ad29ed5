"""sde_log_prob: the log-probability of a stored transition, and its gradient in both velocities,
each in one pass.

    v = v_uncond + w (v_cond - v_uncond)      mean = a x + b v      e = x' - mean
    logp = mean over a sample's elements of [ -e^2 / (2 s^2) - ln s - ln(2 pi) / 2 ]
    dlogp/dv = b e / (s^2 P)                  times w for v_cond, 1 - w for v_uncond

For `cps` logp = -mean of e^2 and dlogp/dv = 2 b e / P. docs/method.md, section 1.

Shapes: B samples of P elements, [B, ...] viewed as [B, P]; a, b, s and log-probabilities [B]; T
tiles per sample. Forward: one program per tile, which leaves the tile's sum of squares, then a
small one that adds them up. Backward: one program per tile reads the tensors again (e is computed,
not stored) and writes both gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import jit, operation, register, select_backend, tl, triton_op
from . import reference
from .transition import Transition, check_stored, op_arguments
from .triton_transition import (
    LAUNCH,
    TILE,
    empty_partials,
    exact_sum,
    finish_log_probs,
    program_offsets,
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
    row, _, base, offsets, mask = program_offsets(num_tiles, P, TILE)
    mean = transition_mean(
        latents,
        velocity,
        velocity_uncond,
        tl.load(a + row),
        tl.load(b + row),
        guidance_scale,
        base,
        offsets,
        mask,
        GUIDED,
    )
    # Beyond the mask all loads are 0, and so is the error.
    error = tl.load(next_latents + base + offsets, mask=mask, other=0.0).to(tl.float32) - mean
    tl.store(partials + tl.program_id(0), exact_sum(error * error, tl.load(std + row)))


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
    row, _, base, offsets, mask = program_offsets(num_tiles, P, TILE)
    gradient, slope, deviation = tl.load(grad_log_probs + row), tl.load(b + row), tl.load(std + row)
    if OF_LOSS:
        gradient = gradient * tl.load(grad_loss)
    stochastic = deviation > 0
    weight = tl.full([], -1.0, tl.float64) / P
    if NORMALIZED:
        s = tl.where(stochastic, deviation, 1.0).to(tl.float64)
        weight = -1.0 / (2.0 * s * s * P)
    # dL/d(e^2), the same for all elements of a sample; an ODE row has none.
    c = tl.where(stochastic, (gradient.to(tl.float64) * weight).to(tl.float32), 0.0)
    mean = transition_mean(
        latents,
        velocity,
        velocity_uncond,
        tl.load(a + row),
        slope,
        guidance_scale,
        base,
        offsets,
        mask,
        GUIDED,
    )
    error = tl.load(next_latents + base + offsets, mask=mask, other=0.0).to(tl.float32) - mean
    guided = (c * (2.0 * error)) * -slope
    cond = guided
    if GUIDED:
        cond = guided * guidance_scale
    tl.store(grad_velocity + base + offsets, cond.to(grad_velocity.dtype.element_ty), mask=mask)
    if NEEDS_UNCOND:
        uncond = (guided - cond).to(grad_uncond.dtype.element_ty)
        tl.store(grad_uncond + base + offsets, uncond, mask=mask)


def squared_errors(
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    guidance_scale: float,
) -> tuple[int, Tensor]:
    """P, and the sum of squared errors of each tile, float64 [B, T]. B must not be 0."""
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
        P, partials = squared_errors(
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
    """Gradients in both velocities of grad_log_probs [B], times grad_loss [] if given. The second
    is empty, [0], unless needed.
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


def _fake(latents: Tensor, *args: object) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.float32)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    velocity, needs_uncond = args[4], args[-1]
    uncond = torch.empty_like(velocity) if needs_uncond else velocity.new_empty(0)
    return torch.empty_like(velocity), uncond


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.guidance_scale, ctx.normalized = inputs
    ctx.save_for_backward(*tensors)


def _backward(backend: str, ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor | None, ...]:
    cond, uncond = transition_gradients(
        backend, ctx, grad_log_probs.contiguous(), None, ctx.saved_tensors
    )
    return None, None, cond, uncond, *[None] * 5


def transition_gradients(
    backend: str, ctx: Any, grad_log_probs: Tensor, grad_loss: Tensor | None, tensors: Any
) -> tuple[Tensor, Tensor | None]:
    """Both gradients by the backward op of a backend; the second is None where none is needed.

    Args:
        backend: Any but the reference.
        ctx: Of an op whose fourth argument is velocity_uncond.
        grad_log_probs: [B], contiguous.
        grad_loss: A factor [], or None.
        tensors: latents, next_latents, both velocities, a, b and std, as the op took them.
    """
    needs_uncond = ctx.needs_input_grad[3]
    cond, uncond = operation(backend, "sde_log_prob_backward")(
        grad_log_probs, grad_loss, *tensors, ctx.guidance_scale, ctx.normalized, needs_uncond
    )
    return cond, uncond if needs_uncond else None


register("sde_log_prob", _fake, _backward, _save)
register("sde_log_prob_backward", _backward_fake)


def sde_log_prob(
    transition: Transition,
    next_latents: Tensor,
    *,
    cfg_grad: str = "both",
    backend: str | None = None,
) -> Tensor:
    """Log-probability of a stored transition x -> x', a mean over the elements of each sample.

    Differentiable in both velocities, once (float64: twice). With e = x' - mean and P elements per
    sample, dlogp/dv = b e / (s^2 P). Latents and coefficients are data: no gradient reaches them.
    The bits are those that `sde_step` gave for this transition (kernels/README.md).

    Args:
        transition: The step. With `normalized` False the value is -mean(e^2), of which the gradient
            is 2 b e / P.
        next_latents: x', shape and dtype of the latents.
        cfg_grad: "both", or "cond_only": no gradient to the unconditional branch (Flow-GRPO).
        backend: One of `dispatch.BACKENDS`; None for the default.

    Returns:
        [B], fp32 (float64 for float64 latents). NaN, without a gradient, where std == 0.

    Raises:
        ValueError: As `sde_step`.
    """
    backend = select_backend("sde_log_prob", transition.latents, backend)
    if backend == "reference":
        return reference.sde_log_prob(transition, next_latents, cfg_grad=cfg_grad)
    x, *rest = op_arguments(transition, cfg_grad)
    check_stored(next_latents, transition.latents)
    return operation(backend, "sde_log_prob")(
        x,
        next_latents.detach().contiguous(),
        *rest,
        float(transition.guidance_scale),
        transition.normalized,
    )
