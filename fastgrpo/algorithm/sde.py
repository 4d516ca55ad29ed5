"""Noise schedules, and the coefficients of one affine step of every sampler.

docs/method.md, section 1. Rectified flow: x_sigma = (1 - sigma) x0 + sigma eps, velocity
v = eps - x0, sigma falls from 1 to 0, D = sigma_i - sigma_{i+1} > 0. A step is
x' = a x + b v + std eps. The tables are float64 on the host; `fastgrpo_kernels` rounds them once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
"""The scale of a model's timestep: 1000 sigma, in Wan and HunyuanVideo alike."""


@dataclass(frozen=True)
class SDECoefficients:
    """x' = a x + b v + std eps for each of the N steps.

    Attributes:
        a, b, std: [N] float64 on the host.
        normalized: Whether the log-probability has the Gaussian's 1 / (2 std^2) and normaliser
            (all kinds but `cps`).
    """

    a: Tensor
    b: Tensor
    std: Tensor
    normalized: bool


def sigma_schedule(num_steps: int, shift: float) -> Tensor:
    """sigma = shift t / (1 + (shift - 1) t) for t = linspace(1, 0, N + 1).

    Args:
        num_steps: N >= 1.
        shift: Above 0.

    Returns:
        [N + 1] float64, from 1 to 0.
    """
    assert num_steps >= 1
    assert 0 < shift < math.inf
    t = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    sigmas = shift * t / (1.0 + (shift - 1.0) * t)
    sigmas[0] = 1.0  # shift / (1 + (shift - 1)) is an ulp off for some shifts
    return sigmas


def timesteps(sigmas: Tensor, rounding: str = "trunc") -> Tensor:
    """The timestep that the model is told at each step: 1000 sigma.

    Args:
        sigmas: [N + 1] of `sigma_schedule`. The last entry is where the last step ends and has no
            timestep.
        rounding: "trunc" (to an integer, as DanceGRPO does) or "none".

    Returns:
        [N] float64.
    """
    assert rounding in ("trunc", "none")
    scaled = NUM_TRAIN_TIMESTEPS * sigmas[:-1].double()
    # A timestep that is an integer may come out an ulp short of it (749.9999999999999 for N 5,
    # shift 2).
    return torch.floor(scaled + 1e-9) if rounding == "trunc" else scaled


def sde_coefficients(sigmas: Tensor, kind: str = "dance", eta: float = 0.5) -> SDECoefficients:
    """The coefficients of one sampler over a schedule.

    Samplers (docs/method.md, section 1):

    - ``dance``: Eq. 2 (DanceGRPO) with noise level sigma_t = eta.
    - ``flow``: Flow-GRPO, sigma_t = eta sqrt(sigma / (1 - sigma)); at sigma = 1 the denominator
      uses the schedule's second entry.
    - ``linear``: Flow-GRPO's Wan script and Flash-GRPO; sigma_t falls linearly in sigma from the
      second entry to the last.
    - ``cps``: coefficient-preserving sampling; noise is taken out of the step, not added.
    - ``ode``: Eq. 1, deterministic.

    Args:
        sigmas: [N + 1], strictly falling inside [0, 1].
        kind: One of the samplers above.
        eta: Noise level >= 0, at most 1 for `cps`; `linear` and `ode` do not use it.
    """
    sigmas = sigmas.detach().to("cpu", torch.float64)
    assert bool((sigmas[:-1] > sigmas[1:]).all()), sigmas
    sigma, step = sigmas[:-1], sigmas[:-1] - sigmas[1:]
    if kind == "cps":
        return _coefficient_preserving(sigma, sigmas[1:], eta)
    if kind == "ode":
        return SDECoefficients(
            torch.ones_like(step), -step, torch.zeros_like(step), normalized=True
        )
    if kind == "dance":
        noise_level = torch.full_like(sigma, eta)
    elif kind == "flow":
        noise_level = eta * torch.sqrt(sigma / (1.0 - torch.where(sigma == 1.0, sigmas[1], sigma)))
    else:
        assert kind == "linear"
        noise_level = sigmas[-1] + (sigmas[1] - sigmas[-1]) * sigma
    return _euler_maruyama(sigma, step, noise_level)


def _euler_maruyama(sigma: Tensor, step: Tensor, noise_level: Tensor) -> SDECoefficients:
    """One Euler-Maruyama step of Eq. 2, dx = (v - sigma_t^2 score / 2) dsigma + sigma_t dw.

    The score follows from the velocity: -(x + (1 - sigma) v) / sigma.
    """
    drift = noise_level**2 * step / (2.0 * sigma)
    return SDECoefficients(
        1.0 - drift, -step - drift * (1.0 - sigma), noise_level * torch.sqrt(step), normalized=True
    )


def _coefficient_preserving(sigma: Tensor, sigma_next: Tensor, eta: float) -> SDECoefficients:
    """x' = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) x1 + std eps.

    With x0 = x - sigma v and x1 = x + (1 - sigma) v.
    """
    std = sigma_next * math.sin(0.5 * math.pi * eta)
    kept = sigma_next * math.cos(0.5 * math.pi * eta)
    a, b = (1.0 - sigma_next) + kept, -sigma * (1.0 - sigma_next) + kept * (1.0 - sigma)
    return SDECoefficients(a, b, std, normalized=False)


def x0_prediction(latents: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latents that a velocity points to: x - sigma v.

    Args:
        latents, velocity: [B, ...] of one shape, any float dtype, guidance already applied.
        sigma: A number in [0, 1], or a tensor [] or [B].

    Returns:
        Like `latents`, in fp32 (float64 for float64 latents).
    """
    assert velocity.shape == latents.shape
    dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
    if isinstance(sigma, Tensor):
        sigma = sigma.to(latents.device, dtype, non_blocking=True)
        sigma = sigma.reshape(-1, *[1] * (latents.dim() - 1)) if sigma.dim() else sigma
    return latents.to(dtype) - sigma * velocity.to(dtype)
