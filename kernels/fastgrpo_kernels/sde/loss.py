"""grpo_loss: the objective of one training pass (Eq. 11). `sde_log_prob`, then clipped_ratio_loss,
which is here on its own too.

    rho = exp(logp - logp_old)         L = -mean over samples of min(rho A, clip(rho, 1 - eps, 1 + eps) A)

Shapes: B samples of P elements each, [B, ...], seen as [B, P]; T tiles a sample;
log-probabilities, advantages A and a, b, s are [B]. Forward: the kernel of `sde_log_prob` leaves
the tiles' sums of squares, and one program makes of them the log-probabilities, the loss, its
statistics and dL/dlogp. Backward: the kernel of `sde_log_prob`, which multiplies dL/dlogp by the
loss's own gradient. With bf16 velocities and fp32 latents 28 bytes an element move, there and
back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..checks import Coefficient
from ..dispatch import NAMESPACE, has_library, jit, operation, select_backend, tl, triton_op
from . import reference
from .log_prob import transition_error
from .reference import GRPOStats
from .transition import (
    LAUNCH,
    finishing_block,
    log_probs_of,
    transition_arguments,
)

Loss = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss [], ratio [B], clipped [B] bool, clip_fraction [], approx_kl [], dloss/dlogp [B]"""


@jit
def clipped_terms(log_probs, old_log_probs, advantages, batch, low, high, adv_clip):
    """Of each sample, fp32: logp - logp_old, rho, whether clipped, min(rho A, clip(rho) A), and
    dL/dlogp where L is a mean over `batch`.
    """
    log_ratio = log_probs - old_log_probs
    ratio = tl.exp(log_ratio.to(tl.float64)).to(tl.float32)
    advantage = tl.where(
        advantages > adv_clip, adv_clip, tl.where(advantages < -adv_clip, -adv_clip, advantages)
    )
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    objective = tl.where(clipped, tl.where(advantage > 0, high, low), ratio) * advantage
    return (
        log_ratio,
        ratio,
        clipped,
        objective,
        tl.where(clipped, 0.0, -tl.div_rn(advantage * ratio, batch)),
    )


@jit
def _grpo_loss_kernel(
    partials,
    std,
    log_probs,
    old_log_probs,
    advantages,
    loss,
    ratios,
    clips,
    clip_fraction,
    approx_kl,
    grad_log_probs,
    P,
    num_tiles,
    B,
    batch,
    low,
    high,
    adv_clip,
    FROM_TILES: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for the whole batch. log_probs are written FROM_TILES, else read. Sums over the
    batch are float64.
    """
    objectives, clip_count, squares = (
        tl.zeros([ROWS], tl.float64),
        tl.zeros([ROWS], tl.float64),
        tl.zeros([ROWS], tl.float64),
    )
    for start in range(0, B, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        present = rows < B
        if FROM_TILES:
            new = log_probs_of(partials, std, P, num_tiles, rows, present, NORMALIZED, COLUMNS)
            tl.store(log_probs + rows, new, mask=present)
        else:
            new = tl.load(log_probs + rows, mask=present, other=0.0)
        old = tl.load(old_log_probs + rows, mask=present, other=0.0)
        advantage = tl.load(advantages + rows, mask=present, other=0.0)
        log_ratio, ratio, clipped, objective, gradient = clipped_terms(
            new, old, advantage, batch, low, high, adv_clip
        )
        tl.store(ratios + rows, ratio, mask=present)
        tl.store(clips + rows, clipped, mask=present)
        tl.store(grad_log_probs + rows, gradient, mask=present)
        objectives += tl.where(present, objective, 0.0)
        clip_count += tl.where(present & clipped, 1.0, 0.0)
        squares += tl.where(present, log_ratio * log_ratio, 0.0)
    tl.store(loss, (-tl.sum(objectives) / batch).to(tl.float32))
    tl.store(clip_fraction, (tl.sum(clip_count) / batch).to(tl.float32))
    tl.store(approx_kl, (0.5 * tl.sum(squares) / batch).to(tl.float32))


def _launch_loss(
    tiles: tuple[int, Tensor, Tensor] | None,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    normalized: bool,
    clip_range: float,
    adv_clip: float,
) -> Loss:
    """The loss of these log-probabilities; with tiles = (P, their sums [B, T], std), of those that
    it then writes into log_probs.
    """
    results = _clipped_ratio_loss_fake(log_probs, old_log_probs, advantages, clip_range, adv_clip)
    P, partials, std = tiles or (1, log_probs[:, None], log_probs)
    batch, num_tiles = partials.shape
    with torch.cuda.device_of(log_probs):
        _grpo_loss_kernel[(1,)](
            partials,
            std,
            log_probs,
            old_log_probs,
            advantages,
            *results,
            P,
            num_tiles,
            batch,
            float(max(batch, 1)),
            1.0 - clip_range,
            1.0 + clip_range,
            adv_clip,
            FROM_TILES=tiles is not None,
            NORMALIZED=normalized,
            **finishing_block(num_tiles),
            **LAUNCH,
        )
    return results


@triton_op("clipped_ratio_loss")
def _clipped_ratio_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float, adv_clip: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _launch_loss(None, log_probs, old_log_probs, advantages, True, clip_range, adv_clip)


@triton_op("grpo_loss")
def _grpo_loss(
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    old_log_probs: Tensor,
    advantages: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    guidance_scale: float,
    normalized: bool,
    clip_range: float,
    adv_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_probs, tiles = torch.empty_like(std), None
    if latents.shape[0]:
        with torch.cuda.device_of(latents):
            tiles = (
                *transition_error(
                    latents, next_latents, velocity, velocity_uncond, a, b, std, guidance_scale
                ),
                std,
            )
    results = _launch_loss(
        tiles, log_probs, old_log_probs, advantages, normalized, clip_range, adv_clip
    )
    return results[0], log_probs, *results[1:]


# -------- shapes and autograd


def _clipped_ratio_loss_fake(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float, adv_clip: float
) -> Loss:
    loss, clip_fraction, approx_kl = (log_probs.new_empty(()) for _ in range(3))
    ratio, gradient = torch.empty_like(log_probs), torch.empty_like(log_probs)
    return (
        loss,
        ratio,
        torch.empty_like(log_probs, dtype=torch.bool),
        clip_fraction,
        approx_kl,
        gradient,
    )


def _grpo_loss_fake(
    latents: Tensor,
    next_latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    old_log_probs: Tensor,
    advantages: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    guidance_scale: float,
    normalized: bool,
    clip_range: float,
    adv_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = _clipped_ratio_loss_fake(std, old_log_probs, advantages, clip_range, adv_clip)
    return results[0], torch.empty_like(std), *results[1:]


def _save_clipped(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _only_the_loss(ctx, output)
    ctx.save_for_backward(output[-1])


def _clipped_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return gradient * grad_loss, None, None, None, None


def _save_objective(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _only_the_loss(ctx, output)
    (
        latents,
        next_latents,
        velocity,
        velocity_uncond,
        _,
        _,
        a,
        b,
        std,
        ctx.guidance_scale,
        ctx.normalized,
        *_,
    ) = inputs
    ctx.save_for_backward(output[-1], latents, next_latents, velocity, velocity_uncond, a, b, std)


def _only_the_loss(ctx: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _register(namespace: str, backend: str) -> None:
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_log_probs, *transition = ctx.saved_tensors
        needs_uncond = ctx.needs_input_grad[3]
        cond, uncond = operation(backend, "sde_log_prob_backward")(
            grad_log_probs, grad_loss, *transition, ctx.guidance_scale, ctx.normalized, needs_uncond
        )
        return None, None, cond, uncond if needs_uncond else None, *[None] * 9

    torch.library.register_fake(f"{namespace}::clipped_ratio_loss", _clipped_ratio_loss_fake)
    torch.library.register_autograd(
        f"{namespace}::clipped_ratio_loss", _clipped_backward, setup_context=_save_clipped
    )
    torch.library.register_fake(f"{namespace}::grpo_loss", _grpo_loss_fake)
    torch.library.register_autograd(
        f"{namespace}::grpo_loss", backward, setup_context=_save_objective
    )


_register(NAMESPACE, "triton")
if has_library():
    _register("fastgrpo", "cpp")


# -------- public


def clipped_ratio_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip: float = 5.0,
    backend: str | None = None,
) -> tuple[Tensor, GRPOStats]:
    """L = -mean of min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = exp(log_probs - old_log_probs)
    (Eq. 11).

    log_probs, old_log_probs, advantages: [B] float; A is clamped to [-adv_clip, adv_clip].
    clip_range: eps in [0, 1). adv_clip > 0, infinity for no clamp. Differentiable in log_probs
    alone. On the edge itself (rho == 1 +- eps) the gradient still passes. The loss of an empty
    batch is 0. backend: a backend of `dispatch.BACKENDS`, or None. Returns the loss [],
    fp32 (float64 for float64), and what it saw. ValueError for other shapes, dtypes or values,
    or a backend that cannot serve. Source: method.md section 2.
    """
    backend = select_backend("clipped_ratio_loss", log_probs, backend)
    if backend == "reference":
        return reference.clipped_ratio_loss(
            log_probs, old_log_probs, advantages, clip_range=clip_range, adv_clip=adv_clip
        )
    checks.check_loss(log_probs, old_log_probs, advantages, clip_range, adv_clip)
    new = log_probs.to(torch.float32).contiguous()
    data = _loss_data(old_log_probs, advantages, new)
    loss, *seen, _ = operation(backend, "clipped_ratio_loss")(
        new, *data, float(clip_range), float(adv_clip)
    )
    return loss, GRPOStats(new.detach(), *seen)


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
    backend: str | None = None,
) -> tuple[Tensor, GRPOStats]:
    """`sde_log_prob`, then `clipped_ratio_loss`: the objective of one training pass (Eq. 11), a
    mean over the batch.

    Differentiable in velocity and velocity_uncond. Arguments, results and errors are those of
    the two functions; the log-probabilities have the bits that `sde_step` and `sde_log_prob`
    give. Source: method.md section 2.
    """
    backend = select_backend("grpo_loss", latents, backend)
    if backend == "reference":
        return reference.grpo_loss(
            latents,
            next_latents,
            velocity,
            old_log_probs,
            advantages,
            a,
            b,
            std,
            clip_range=clip_range,
            adv_clip=adv_clip,
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance_scale,
            cfg_grad=cfg_grad,
            normalized=normalized,
        )
    x, *rest, a_B, b_B, std_B = transition_arguments(
        latents, velocity, velocity_uncond, a, b, std, guidance_scale, cfg_grad
    )
    checks.check_stored(next_latents, latents)
    checks.check_loss(std_B, old_log_probs, advantages, clip_range, adv_clip)
    data = _loss_data(old_log_probs, advantages, std_B)
    loss, *seen, _ = operation(backend, "grpo_loss")(
        x,
        next_latents.detach().contiguous(),
        *rest,
        *data,
        a_B,
        b_B,
        std_B,
        float(guidance_scale),
        normalized,
        float(clip_range),
        float(adv_clip),
    )
    return loss, GRPOStats(*seen)


def _loss_data(old_log_probs: Tensor, advantages: Tensor, like: Tensor) -> list[Tensor]:
    return [
        value.detach().to(like.device, torch.float32, non_blocking=True).contiguous()
        for value in (old_log_probs, advantages)
    ]
