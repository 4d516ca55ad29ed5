"""sde_step: one step of the rollout in one pass. Guidance, affine step, noise, rounding to storage,
log-probability.

    v    = v_uncond + w (v_cond - v_uncond)
    mean = a x + b v            x' = mean + s eps    eps ~ N(0, I)
    logp = mean over a sample's elements of [ -(x' - mean)^2 / (2 s^2) - ln s - ln(2 pi) / 2 ]

Eqs. 1 and 2 of the paper; docs/method.md, section 1.

Shapes: B samples of P elements, [B, ...] viewed as [B, P]; a, b, s [B]; T tiles per sample. The
noise is made in registers from (seed, step, element), so bf16 velocities and fp32 latents move 12
bytes per element. Kernels: one program per tile, which leaves the tile's sum of squares; then a
small one that adds them up to a log-probability. It is a launch of its own: for the last program of
the first to do its work they would have to count themselves, in memory that is zero before each
call, which takes a launch as well, or that calls share, which two streams must not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..dispatch import jit, operation, register, select_backend, tl, triton_op
from ..random.triton_philox import normal_tile
from . import reference
from .transition import Transition, op_arguments
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
def _sde_step_kernel(
    latents,
    velocity,
    velocity_uncond,
    a,
    b,
    std,
    seeds,
    steps,
    next_latents,
    partials,
    P,
    num_tiles,
    guidance_scale,
    GUIDED: tl.constexpr,
    TILE: tl.constexpr,
):
    row, first, base, offsets, mask = program_offsets(num_tiles, P, TILE)
    s = tl.load(std + row)
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
    noise = normal_tile(tl.load(seeds + row), tl.load(steps + row), first, TILE)
    # The log-probability is that of the stored x', after its rounding.
    stored = (mean + s * noise).to(next_latents.dtype.element_ty)
    tl.store(next_latents + base + offsets, stored, mask=mask)
    error = stored.to(tl.float32) - mean
    tl.store(partials + tl.program_id(0), exact_sum(tl.where(mask, error * error, 0.0), s))


@triton_op("sde_step")
def _sde_step(
    latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    seeds: Tensor,
    steps: Tensor,
    guidance_scale: float,
    normalized: bool,
) -> tuple[Tensor, Tensor]:
    next_latents = torch.empty_like(latents)
    if not latents.shape[0]:
        return next_latents, torch.empty_like(std)
    P, partials = empty_partials(latents)
    with torch.cuda.device_of(latents):
        _sde_step_kernel[(partials.numel(),)](
            latents,
            velocity,
            velocity if velocity_uncond is None else velocity_uncond,
            a,
            b,
            std,
            seeds,
            steps,
            next_latents,
            partials,
            P,
            partials.shape[1],
            guidance_scale,
            GUIDED=velocity_uncond is not None,
            TILE=TILE,
            **LAUNCH,
        )
        return next_latents, finish_log_probs(partials, std, P, normalized)


def _sde_step_fake(latents: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(latents), latents.new_empty(latents.shape[0], dtype=torch.float32)


register("sde_step", _sde_step_fake)


@torch.no_grad()
def sde_step(
    transition: Transition, *, seeds: Tensor, step: int | Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Draw x' = a x + b v + s eps, and take the log-probability of the x' that is stored.

    No gradient. x' is rounded to the dtype of the latents BEFORE its log-probability is taken, so
    that the first training pass over unchanged weights gives a ratio of exactly 1. Which backends
    give the same bits: kernels/README.md.

    Args:
        transition: The step.
        seeds: [B] int64; with `step` the key of the noise, see `gaussian_noise`.
        step: An int for all samples, or [B] int64.
        backend: One of `dispatch.BACKENDS`; None for the default.

    Returns:
        x', with shape and dtype of the latents, and its log-probability [B], fp32 (float64 for
        float64 latents). Where std == 0, x' is the mean and the log-probability, which does not
        exist, is NaN.

    Raises:
        ValueError: Shapes, dtypes, devices or values do not fit, or the backend cannot serve.
            Values of GPU tensors are not checked, for which the host would have to wait.
    """
    x = transition.latents
    backend = select_backend("sde_step", x, backend)
    if backend == "reference":
        return reference.sde_step(transition, seeds=seeds, step=step)
    arguments = op_arguments(transition, "both")
    seeds = checks.seed_vector(seeds, x.shape[0], x.device)
    steps = checks.step_vector(step, x.shape[0], x.device)
    return operation(backend, "sde_step")(
        *arguments, seeds, steps, float(transition.guidance_scale), transition.normalized
    )
