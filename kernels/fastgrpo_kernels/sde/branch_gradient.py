"""branch_gradient: the gradient of a trained transition at ratio 1 from its seed alone, before any
forward pass.

On the first update after a rollout rho == 1, so dL/dlogp = -A / B; and e = x' - mean is s eps,
whose eps the seed gives back. So

    dL/dv = -A b eps / (s P) * scale            cps: -A 2 b s eps / P * scale          times w for v_cond, 1 - w for v_uncond

is known before the forward: run one branch of the guidance forward and backward, free it, then
the other (method.md section 1; scale = 1 / B for the mean that `grpo_loss` takes). It equals the
joint backward up to the rounding of the stored x'.

Shapes: B samples of P elements each, [B, ...]; advantages A and b, s are [B]; T tiles a sample.
One pass, which only writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..checks import Coefficient
from ..dispatch import jit, operation, select_backend, tl, triton_op
from ..random.triton_philox import normal_tile
from . import reference
from .transition import LAUNCH, TILE, locate


@jit
def _branch_gradient_kernel(
    seeds,
    steps,
    factor,
    grad_velocity,
    grad_uncond,
    P,
    num_tiles,
    guidance_scale,
    NEEDS_UNCOND: tl.constexpr,
    TILE: tl.constexpr,
):
    row, first, offset, lanes, inside = locate(num_tiles, P, TILE)
    guided = normal_tile(tl.load(seeds + row), tl.load(steps + row), first, TILE) * tl.load(
        factor + row
    )
    cond = guided * guidance_scale
    tl.store(grad_velocity + offset + lanes, cond.to(grad_velocity.dtype.element_ty), mask=inside)
    if NEEDS_UNCOND:
        tl.store(
            grad_uncond + offset + lanes,
            (guided - cond).to(grad_uncond.dtype.element_ty),
            mask=inside,
        )


@triton_op("branch_gradient")
def _branch_gradient(
    seeds: Tensor,
    steps: Tensor,
    factor: Tensor,
    shape: Sequence[int],
    guidance_scale: float,
    needs_uncond: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """factor: fp32 [B], what the noise is multiplied by. The second result is empty, [0], unless
    needed.
    """
    batch, P = seeds.shape[0], math.prod(shape)
    grad_velocity, grad_uncond = _branch_gradient_fake(
        seeds, steps, factor, shape, guidance_scale, needs_uncond, dtype
    )
    if not batch:
        return grad_velocity, grad_uncond
    num_tiles = -(-P // TILE)
    with torch.cuda.device_of(seeds):
        _branch_gradient_kernel[(batch * num_tiles,)](
            seeds,
            steps,
            factor,
            grad_velocity,
            grad_uncond,
            P,
            num_tiles,
            guidance_scale,
            NEEDS_UNCOND=needs_uncond,
            TILE=TILE,
            **LAUNCH,
        )
    return grad_velocity, grad_uncond


@_branch_gradient.register_fake
def _branch_gradient_fake(
    seeds: Tensor,
    steps: Tensor,
    factor: Tensor,
    shape: Sequence[int],
    guidance_scale: float,
    needs_uncond: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    sizes = (seeds.shape[0], *shape)
    return factor.new_empty(sizes, dtype=dtype), factor.new_empty(
        sizes if needs_uncond else (0,), dtype=dtype
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the loss in both velocities of the transition that `sde_step` made from these
    seeds, where the ratio is 1.

    seeds [B] int64, step (int or [B] int64): the key of the transition's noise. advantages: A
    [B], float, clamped to [-adv_clip, adv_clip]. b, std: the transition's, numbers or [B].
    shape: of one sample. guidance_scale: w. scale: 1 / B for the mean that `grpo_loss` takes,
    times what the loss itself is multiplied by. normalized: False for `cps`. dtype: of the
    velocities. device: of the results; default, where the seeds are. backend: "triton",
    "reference" or None. Returns dL/dv_cond [B, *shape], and dL/dv_uncond, which is None for
    guidance_scale 1 or cfg_grad "cond_only". Rows with std == 0 are 0. ValueError for shapes,
    dtypes or lengths that disagree, or a backend that cannot serve. Source: performance.md, exact
    saving 2; method.md section 1, "Gradient of the log-prob".
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a float dtype, got {dtype!r}")
    like = (
        torch.empty(0, dtype=dtype, device=seeds.device if device is None else device)
        if isinstance(seeds, Tensor)
        else seeds
    )
    backend = select_backend("branch_gradient", like, backend)
    if backend == "reference":
        return reference.branch_gradient(
            seeds,
            step,
            advantages,
            b,
            std,
            shape,
            guidance_scale=guidance_scale,
            scale=scale,
            adv_clip=adv_clip,
            cfg_grad=cfg_grad,
            normalized=normalized,
            dtype=dtype,
            device=device,
        )
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
    seeds = checks.seed_vector(seeds, None, device)
    steps = checks.step_vector(step, seeds.shape[0], target)
    both = cfg_grad == "both" and guidance_scale != 1.0
    cond, uncond = operation(backend, "branch_gradient")(
        seeds, steps, factor, list(shape), float(guidance_scale), both, dtype
    )
    return cond, uncond if both else None
