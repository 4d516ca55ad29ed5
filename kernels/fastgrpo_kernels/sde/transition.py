"""One stochastic step of a sampler, and the checks that the ops of a transition share.

Every sampler of flow matching here is affine (docs/method.md, section 1; Eqs. 1 and 2 of the
paper):

    v    = v_uncond + w (v_cond - v_uncond)          classifier-free guidance
    mean = a x + b v
    x'   = mean + s eps                              eps ~ N(0, I)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..checks import Coefficient, compute_dtype


class Transition(NamedTuple):
    """The distribution of x' given x: a normal one with mean a x + b v and standard deviation s."""

    latents: Tensor
    """x [B, ...], any float dtype, with at least one element per sample."""
    velocity: Tensor
    """v, or v_cond under guidance: shape and device of the latents, any float dtype."""
    a: Coefficient
    """A number or a tensor [B], as b and std."""
    b: Coefficient
    std: Coefficient
    """s, not negative. 0 is an ODE step: x' = mean, without a log-probability."""
    velocity_uncond: Tensor | None = None
    """v_uncond, like velocity; None: no guidance."""
    guidance_scale: float = 1.0
    """w, a number. Any other than 1 needs velocity_uncond."""
    normalized: bool = True
    """False for the log-probability of `cps`, -mean(e^2); see `sde_log_prob`."""


def check_transition(transition: Transition, cfg_grad: str) -> None:
    """Check tensors, guidance and its gradient; `coefficients` checks a, b and std."""
    checks.check_samples("latents", transition.latents)
    checks.check_like("velocity", transition.velocity, transition.latents)
    check_guidance(
        transition.velocity, transition.velocity_uncond, transition.guidance_scale, cfg_grad
    )


def check_guidance(
    velocity: Tensor, velocity_uncond: Tensor | None, guidance_scale: float, cfg_grad: str
) -> None:
    """Both branches of classifier-free guidance, or one and a scale of 1."""
    check_guidance_scale(guidance_scale, cfg_grad)
    if velocity_uncond is not None:
        checks.check_like("velocity_uncond", velocity_uncond, velocity)
    elif guidance_scale != 1.0:
        checks.fail("velocity_uncond", f"a tensor for guidance_scale {guidance_scale}", "None")


def check_guidance_scale(guidance_scale: float, cfg_grad: str) -> None:
    """A finite scale, and where its gradient goes."""
    if cfg_grad not in checks.CFG_GRADS:
        checks.fail("cfg_grad", f"one of {', '.join(checks.CFG_GRADS)}", repr(cfg_grad))
    checks.check_number("guidance_scale", guidance_scale, "that is finite", math.isfinite)


def check_stored(next_latents: Tensor, latents: Tensor) -> None:
    """x' has the shape, dtype and device of x."""
    checks.check_like("next_latents", next_latents, latents)
    if next_latents.dtype != latents.dtype:
        expected = f"the dtype of latents, {latents.dtype}"
        checks.fail("next_latents", expected, str(next_latents.dtype))


def check_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float, adv_clip: float
) -> None:
    """The arguments of the clipped loss: three vectors [B] and two bounds."""
    checks.check_samples("log_probs", log_probs)
    for name, tensor in (
        ("log_probs", log_probs),
        ("old_log_probs", old_log_probs),
        ("advantages", advantages),
    ):
        checks.check_vector(name, tensor, log_probs.shape[0])
    checks.check_number("clip_range", clip_range, "in [0, 1)", lambda eps: 0.0 <= eps < 1.0)
    check_adv_clip(adv_clip)


def check_adv_clip(adv_clip: float) -> None:
    """The bound of the advantages; infinity for none."""
    checks.check_number("adv_clip", adv_clip, "above 0", lambda bound: bound > 0.0)


def coefficients(transition: Transition) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and std, each [B] in the dtype of the transition's arithmetic."""
    x = transition.latents
    a, b, std = (
        checks.coefficient(name, value, x, compute_dtype(x))
        for name, value in (("a", transition.a), ("b", transition.b), ("std", transition.std))
    )
    return a, b, std


def op_arguments(
    transition: Transition, cfg_grad: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The transition, checked, as the registered ops take it.

    Returns:
        latents, velocity, velocity_uncond, a, b, std: contiguous, without a gradient where none may
        flow; both velocities of one dtype of at most 32 bits; the coefficients fp32 [B].
    """
    check_transition(transition, cfg_grad)
    velocity, uncond = transition.velocity, transition.velocity_uncond
    dtype = velocity.dtype
    if uncond is not None:
        dtype = torch.promote_types(dtype, uncond.dtype)
    if dtype == torch.float64:
        dtype = torch.float32
    if uncond is not None:
        uncond = (uncond if cfg_grad == "both" else uncond.detach()).to(dtype).contiguous()
    return (
        transition.latents.detach().contiguous(),
        velocity.to(dtype).contiguous(),
        uncond,
        *coefficients(transition),
    )
