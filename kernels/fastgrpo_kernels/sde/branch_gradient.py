"""branch_gradient: the gradient of a trained transition at ratio 1, from its seed only, before any
forward pass.

On the first update after a rollout rho == 1, so dL/dlogp = -A / B; and e = x' - mean is s eps,
whose eps the seed gives back. So

    dL/dv = -A b eps / (s P) * scale          times w for v_cond, 1 - w for v_uncond

(`cps`: -A 2 b s eps / P * scale) is known before the forward: run one branch of the guidance
forward and backward, free it, then the other. scale = 1 / B gives the mean that `grpo_loss` takes.
It equals the joint backward up to the rounding of the stored x'. docs/method.md, section 1.

Shapes: B samples of P elements, [B, ...]; advantages A, b and s [B]; T tiles per sample. One pass,
which only writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..dispatch import jit, operation, register, select_backend, tl, triton_op
from ..random.triton_philox import normal_tile
from . import reference
from .transition import Transition
from .triton_transition import LAUNCH, TILE, program_offsets


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
    row, first, base, offsets, mask = program_offsets(num_tiles, P, TILE)
    noise = normal_tile(tl.load(seeds + row), tl.load(steps + row), first, TILE)
    guided = noise * tl.load(factor + row)
    cond = guided * guidance_scale
    tl.store(grad_velocity + base + offsets, cond.to(grad_velocity.dtype.element_ty), mask=mask)
    if NEEDS_UNCOND:
        uncond = (guided - cond).to(grad_uncond.dtype.element_ty)
        tl.store(grad_uncond + base + offsets, uncond, mask=mask)


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
    results = _branch_gradient_fake(
        seeds, steps, factor, shape, guidance_scale, needs_uncond, dtype
    )
    if not seeds.shape[0]:
        return results
    P = math.prod(shape)
    num_tiles = -(-P // TILE)
    with torch.cuda.device_of(seeds):
        _branch_gradient_kernel[(seeds.shape[0] * num_tiles,)](
            seeds,
            steps,
            factor,
            *results,
            P,
            num_tiles,
            guidance_scale,
            NEEDS_UNCOND=needs_uncond,
            TILE=TILE,
            **LAUNCH,
        )
    return results


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
    uncond = factor.new_empty(sizes if needs_uncond else (0,), dtype=dtype)
    return factor.new_empty(sizes, dtype=dtype), uncond


register("branch_gradient", _branch_gradient_fake)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the loss in both velocities of the transition that `sde_step` made from these
    seeds, where the ratio is 1.

    Args:
        transition: The step. Of latents and velocities only shape, dtype and device of `velocity`
            are used; its values may be anything, and `velocity_uncond` may be None.
        advantages: A [B], float, clamped to [-adv_clip, adv_clip].
        seeds: As `sde_step` had them.
        step: As `sde_step` had it.
        scale: 1 / B for the mean that `grpo_loss` takes, times what the loss itself is multiplied
            by.
        adv_clip: Above 0; infinity for no clamp.
        cfg_grad: As `sde_log_prob`.
        backend: "triton", "reference" or None for the default.

    Returns:
        dL/dv_cond, with shape and dtype of the velocity, and dL/dv_uncond, which is None for
        guidance_scale 1 or cfg_grad "cond_only". Rows with std == 0 are 0.

    Raises:
        ValueError: As `sde_step`.
    """
    velocity = transition.velocity
    backend = select_backend("branch_gradient", velocity, backend)
    if backend == "reference":
        return reference.branch_gradient(
            transition,
            advantages,
            seeds=seeds,
            step=step,
            scale=scale,
            adv_clip=adv_clip,
            cfg_grad=cfg_grad,
        )
    factor = reference.noise_factor(transition, advantages, scale, adv_clip, cfg_grad)
    seeds = checks.seed_vector(seeds, velocity.shape[0], velocity.device)
    steps = checks.step_vector(step, velocity.shape[0], velocity.device)
    w = float(transition.guidance_scale)
    both = cfg_grad == "both" and w != 1.0
    cond, uncond = operation(backend, "branch_gradient")(
        seeds, steps, factor, list(velocity.shape[1:]), w, both, velocity.dtype
    )
    return cond, uncond if both else None
