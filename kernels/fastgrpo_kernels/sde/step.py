"""sde_step: one step of the rollout in one pass. Guidance, affine step, noise, rounding to storage,
log-probability.

    v    = v_uncond + w (v_cond - v_uncond)          classifier-free guidance
    mean = a x + b v            x' = mean + s eps    eps ~ N(0, I)          (Eqs. 1 and 2 of the paper; method.md section 1)
    logp = mean over a sample's elements of [ -(x' - mean)^2 / (2 s^2) - ln s - ln(2 pi) / 2 ]

Shapes: B samples of P elements each, [B, ...], seen as [B, P]; a, b, s are [B]; T tiles a
sample. The noise is made in registers from (seed, step, element), so with bf16 velocities and
fp32 latents 12 bytes an element move. Kernels: one program a tile, which leaves the tile's sum
of squares, then a small one that adds them up to a log-probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..checks import Coefficient
from ..dispatch import has_library, jit, operation, select_backend, tl, triton_op
from ..random.triton_philox import normal_tile
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
    row, first, offset, lanes, inside = locate(num_tiles, P, TILE)
    s = tl.load(std + row)
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
    noise = normal_tile(tl.load(seeds + row), tl.load(steps + row), first, TILE)
    stored = (mean + s * noise).to(next_latents.dtype.element_ty)
    tl.store(next_latents + offset + lanes, stored, mask=inside)
    error = stored.to(tl.float32) - mean
    tl.store(partials + tl.program_id(0), exact_sum(tl.where(inside, error * error, 0.0), s))


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


def _sde_step_fake(
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
    return torch.empty_like(latents), torch.empty_like(std)


_sde_step.register_fake(_sde_step_fake)
if has_library():
    torch.library.register_fake("fastgrpo::sde_step", _sde_step_fake)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the rollout: x' = a x + b v + s eps, with the log-probability of the x' that is
    stored. No gradient.

    latents: x [B, ...], float. velocity, velocity_uncond: shape of latents, any float dtype. a,
    b, std: numbers or [B], std not negative. seeds [B] int64 and step (int or [B] int64): key of
    the noise, see `gaussian_noise`. normalized: False for `cps`, see `sde_log_prob`.
    backend: a backend of `dispatch.BACKENDS`, or None for its choice. Returns x' like
    latents, rounded to their dtype BEFORE its log-probability [B] is taken (fp32; float64 for
    float64), so that the first training pass over unchanged weights gives a ratio of exactly 1.
    A row with std == 0 is an ODE step: x' = mean, and its log-probability, which does not exist,
    is NaN. Same bits in every backend but for the noise, which on a GPU may differ by 2^-21 of
    itself (`triton_random`). ValueError for shapes, dtypes or lengths that disagree, or a backend
    that cannot serve; the values of device tensors are not checked, for which the host would
    have to wait. Source: method.md section 1, Eqs. 1 and 2 of the paper.
    """
    backend = select_backend("sde_step", latents, backend)
    if backend == "reference":
        return reference.sde_step(
            latents,
            velocity,
            a,
            b,
            std,
            seeds=seeds,
            step=step,
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance_scale,
            normalized=normalized,
        )
    arguments = transition_arguments(
        latents, velocity, velocity_uncond, a, b, std, guidance_scale, "both"
    )
    seeds = checks.seed_vector(seeds, latents.shape[0], latents.device)
    steps = checks.step_vector(step, latents.shape[0], latents.device)
    return operation(backend, "sde_step")(
        *arguments, seeds, steps, float(guidance_scale), normalized
    )
