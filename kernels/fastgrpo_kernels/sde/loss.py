"""grpo_loss: the objective of one training pass (Eq. 11): `sde_log_prob`, then
`clipped_ratio_loss`, which is an op of its own too.

    rho = exp(logp - logp_old)
    L = -mean over samples of min(rho A, clip(rho, 1 - eps, 1 + eps) A)

Shapes: B samples of P elements, [B, ...] viewed as [B, P]; T tiles per sample; log-probabilities,
advantages A and a, b, s [B]. Forward: the kernel of `sde_log_prob` leaves the sums of squares of
the tiles, and one program turns them into log-probabilities, the loss, its statistics and dL/dlogp.
Backward: the kernel of `sde_log_prob`, which multiplies dL/dlogp by the gradient of the loss. bf16
velocities and fp32 latents move 28 bytes per element, forward and backward together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import jit, operation, register, select_backend, tl, triton_op
from . import reference
from .log_prob import squared_errors, transition_gradients
from .reference import GRPOStats
from .transition import Transition, check_loss, check_stored, op_arguments
from .triton_transition import LAUNCH, finishing_block, log_probs_of

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss [], ratio [B], clipped [B] bool, clip_fraction [], approx_kl [], dloss/dlogp [B]"""


@jit
def clipped_terms(log_probs, old_log_probs, advantages, batch, low, high, adv_clip):
    """Per sample, fp32: logp - logp_old, rho, clipped or not, min(rho A, clip(rho) A), and
    dL/dlogp, where L is a mean over `batch` samples.
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
    """One program for the whole batch. log_probs are written if FROM_TILES, else read. Sums over
    the batch are float64.
    """
    objectives = tl.zeros([ROWS], tl.float64)
    clip_count = tl.zeros([ROWS], tl.float64)
    squares = tl.zeros([ROWS], tl.float64)
    for start in range(0, B, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        valid = rows < B
        if FROM_TILES:
            new = log_probs_of(partials, std, P, num_tiles, rows, valid, NORMALIZED, COLUMNS)
            tl.store(log_probs + rows, new, mask=valid)
        else:
            new = tl.load(log_probs + rows, mask=valid, other=0.0)
        old = tl.load(old_log_probs + rows, mask=valid, other=0.0)
        advantage = tl.load(advantages + rows, mask=valid, other=0.0)
        log_ratio, ratio, clipped, objective, gradient = clipped_terms(
            new, old, advantage, batch, low, high, adv_clip
        )
        tl.store(ratios + rows, ratio, mask=valid)
        tl.store(clips + rows, clipped, mask=valid)
        tl.store(grad_log_probs + rows, gradient, mask=valid)
        objectives += tl.where(valid, objective, 0.0)
        clip_count += tl.where(valid & clipped, 1.0, 0.0)
        squares += tl.where(valid, log_ratio * log_ratio, 0.0)
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
) -> LossOutputs:
    """The loss of these log-probabilities.

    With tiles = (P, sums of the tiles [B, T], std) log_probs is an output: the log-probabilities
    that follow from the tiles are written into it.
    """
    results = _empty_results(log_probs)
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
            errors = squared_errors(
                latents, next_latents, velocity, velocity_uncond, a, b, std, guidance_scale
            )
        tiles = (*errors, std)
    results = _launch_loss(
        tiles, log_probs, old_log_probs, advantages, normalized, clip_range, adv_clip
    )
    return results[0], log_probs, *results[1:]


def _empty_results(log_probs: Tensor, *args: object) -> LossOutputs:
    loss, clip_fraction, approx_kl = (log_probs.new_empty(()) for _ in range(3))
    ratio, gradient = torch.empty_like(log_probs), torch.empty_like(log_probs)
    clipped = torch.empty_like(log_probs, dtype=torch.bool)
    return loss, ratio, clipped, clip_fraction, approx_kl, gradient


def _grpo_loss_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    std = args[8]
    results = _empty_results(std)
    return results[0], torch.empty_like(std), *results[1:]


def _save_clipped(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _only_the_loss_has_a_gradient(ctx, output)
    ctx.save_for_backward(output[-1])


def _clipped_backward(_: str, ctx: Any, grad_loss: Tensor, *__: Tensor) -> tuple[Any, ...]:
    (grad_log_probs,) = ctx.saved_tensors
    return grad_log_probs * grad_loss, None, None, None, None


def _save_objective(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _only_the_loss_has_a_gradient(ctx, output)
    ctx.guidance_scale, ctx.normalized = inputs[9:11]
    ctx.save_for_backward(
        output[-1], *inputs[:4], *inputs[6:9]
    )  # all but old_log_probs, advantages


def _objective_backward(
    backend: str, ctx: Any, grad_loss: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    grad_log_probs, *tensors = ctx.saved_tensors
    cond, uncond = transition_gradients(backend, ctx, grad_log_probs, grad_loss, tensors)
    return None, None, cond, uncond, *[None] * 9


def _only_the_loss_has_a_gradient(ctx: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


register("clipped_ratio_loss", _empty_results, _clipped_backward, _save_clipped)
register("grpo_loss", _grpo_loss_fake, _objective_backward, _save_objective)


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
    (Eq. 11; docs/method.md, section 2).

    Differentiable in log_probs. On the edge itself (rho == 1 +- eps) the gradient still passes.

    Args:
        log_probs: [B], float, as old_log_probs and advantages.
        old_log_probs: Those of the rollout.
        advantages: A, clamped to [-adv_clip, adv_clip].
        clip_range: eps in [0, 1).
        adv_clip: Above 0; infinity for no clamp.
        backend: One of `dispatch.BACKENDS`; None for the default.

    Returns:
        The loss [], fp32 (float64 for float64), 0 for an empty batch; and its statistics.

    Raises:
        ValueError: log_probs, old_log_probs and advantages are not float tensors [B], clip_range or
            adv_clip is out of its range, or the backend cannot serve.
    """
    backend = select_backend("clipped_ratio_loss", log_probs, backend)
    if backend == "reference":
        return reference.clipped_ratio_loss(
            log_probs, old_log_probs, advantages, clip_range=clip_range, adv_clip=adv_clip
        )
    check_loss(log_probs, old_log_probs, advantages, clip_range, adv_clip)
    new = log_probs.to(torch.float32).contiguous()
    loss, *stats, _ = operation(backend, "clipped_ratio_loss")(
        new, *_as_constants(new, old_log_probs, advantages), float(clip_range), float(adv_clip)
    )
    return loss, GRPOStats(new.detach(), *stats)


def grpo_loss(
    transition: Transition,
    next_latents: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip: float = 5.0,
    cfg_grad: str = "both",
    backend: str | None = None,
) -> tuple[Tensor, GRPOStats]:
    """`sde_log_prob`, then `clipped_ratio_loss`: the objective of one training pass (Eq. 11), a
    mean over the batch.

    Differentiable in both velocities. Arguments and results are those of the two functions; the
    log-probabilities have the bits that `sde_step` and `sde_log_prob` give.

    Raises:
        ValueError: The shapes, dtypes or devices in the transition do not fit; next_latents has
            another shape, dtype or device than the latents; old_log_probs or advantages is no float
            tensor [B]; clip_range, adv_clip, guidance_scale or cfg_grad is out of its range; or the
            backend cannot serve.
    """
    backend = select_backend("grpo_loss", transition.latents, backend)
    if backend == "reference":
        return reference.grpo_loss(
            transition,
            next_latents,
            old_log_probs,
            advantages,
            clip_range=clip_range,
            adv_clip=adv_clip,
            cfg_grad=cfg_grad,
        )
    x, velocity, uncond, *coefficients = op_arguments(transition, cfg_grad)
    check_stored(next_latents, transition.latents)
    check_loss(coefficients[0], old_log_probs, advantages, clip_range, adv_clip)
    loss, *stats, _ = operation(backend, "grpo_loss")(
        x,
        next_latents.detach().contiguous(),
        velocity,
        uncond,
        *_as_constants(x, old_log_probs, advantages),
        *coefficients,
        float(transition.guidance_scale),
        transition.normalized,
        float(clip_range),
        float(adv_clip),
    )
    return loss, GRPOStats(*stats)


def _as_constants(like: Tensor, *values: Tensor) -> list[Tensor]:
    return [
        value.detach().to(like.device, torch.float32, non_blocking=True).contiguous()
        for value in values
    ]
