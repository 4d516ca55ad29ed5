"""Noise schedules, and the table of coefficients that makes one affine step of every sampler
(method.md section 1).

Rectified flow: x_sigma = (1 - sigma) x0 + sigma eps, velocity v = eps - x0, sigma falls from 1
to 0, D = sigma_i - sigma_{i+1} > 0. A step is x' = a x + b v + std eps. The tables are float64
on the host; `fastgrpo_kernels` rounds them once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SDE_KINDS = ("dance", "flow", "linear", "cps", "ode")
TIMESTEP_ROUNDINGS = ("trunc", "none")
NUM_TRAIN_TIMESTEPS = 1000
"""The scale of a model's timestep: 1000 sigma, in Wan and HunyuanVideo alike."""


@dataclass(frozen=True)
class SDECoefficients:
    """x' = a x + b v + std eps for each of the N steps; a, b, std float64 [N] on the host.

    normalized: whether the log-probability has the Gaussian's 1 / (2 std^2) and normaliser (all
    kinds but `cps`).
    """

    a: Tensor
    b: Tensor
    std: Tensor
    normalized: bool


def sigma_schedule(num_steps: int, shift: float) -> Tensor:
    """sigma = shift t / (1 + (shift - 1) t) for t = linspace(1, 0, N + 1): float64 [N + 1], from 1
    to 0.

    ValueError unless num_steps is an int >= 1 and shift a finite number above 0.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_steps: expected an int of at least 1, got {num_steps!r}")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: expected a finite number above 0, got {shift!r}")
    t = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift * t / (1.0 + (shift - 1.0) * t)


def timesteps(sigmas: Tensor, rounding: str = "trunc") -> Tensor:
    """What the model is told at each of the N steps: 1000 sigma, float64 [N], truncated to an
    integer or as it is.

    sigmas: [N + 1] of `sigma_schedule`; its last entry is where the last step ends and has no
    timestep. rounding: "trunc" (DanceGRPO) or "none". ValueError for another rounding or a
    schedule that `sde_coefficients` would refuse.
    """
    if rounding not in TIMESTEP_ROUNDINGS:
        raise ValueError(
            f"rounding: expected one of {', '.join(TIMESTEP_ROUNDINGS)}, got {rounding!r}"
        )
    scaled = NUM_TRAIN_TIMESTEPS * _checked(sigmas)[:-1]
    # A timestep that is an integer may come out an ulp short of it (749.9999999999999 for N 5,
    # shift 2).
    return torch.floor(scaled + 1e-9) if rounding == "trunc" else scaled


def sde_coefficients(sigmas: Tensor, kind: str = "dance", eta: float = 0.5) -> SDECoefficients:
    """The table of one sampler over a schedule.

    sigmas: [N + 1], strictly falling inside [0, 1]. kind:

        dance   Eq. 2 (DanceGRPO) with noise level sigma_t = eta
        flow    Flow-GRPO: sigma_t = eta sqrt(sigma / (1 - sigma)); at sigma = 1 the denominator uses the second entry
        linear  Flow-GRPO's Wan script, Flash-GRPO: sigma_t falls linearly in sigma from the second entry to the last
        cps     coefficient-preserving sampling: the noise is taken out of the step, not added on top
        ode     Eq. 1, deterministic

    eta: noise level >= 0; `cps` takes [0, 1]; `linear` and `ode` have none. ValueError
    otherwise.
    """
    sigmas = _checked(sigmas)
    if kind not in SDE_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(SDE_KINDS)}, got {kind!r}")
    most = 1.0 if kind == "cps" else math.inf
    if not (math.isfinite(eta) and 0.0 <= eta <= most):
        raise ValueError(f"eta: expected a number in [0, {most}] for {kind}, got {eta!r}")
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
    """x' = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) x1 + std eps, with x0 = x - sigma v and x1 = x
    + (1 - sigma) v.
    """
    std, kept = (
        sigma_next * math.sin(0.5 * math.pi * eta),
        sigma_next * math.cos(0.5 * math.pi * eta),
    )
    a, b = (1.0 - sigma_next) + kept, -sigma * (1.0 - sigma_next) + kept * (1.0 - sigma)
    return SDECoefficients(a, b, std, normalized=False)


def x0_prediction(latents: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latents that a velocity points to, x - sigma v: fp32 (float64 for float64 latents).

    latents, velocity: [B, ...] of one shape, any float dtype, guidance already applied. sigma: a
    number in [0, 1] or a tensor [] or [B] (its values are checked on the CPU only). ValueError
    otherwise.
    """
    if (
        not latents.is_floating_point()
        or not velocity.is_floating_point()
        or velocity.shape != latents.shape
    ):
        raise ValueError(
            f"velocity: expected a float tensor like latents, {latents.dtype} {list(latents.shape)}, "
            f"got {velocity.dtype} {list(velocity.shape)}"
        )
    dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
    if isinstance(sigma, Tensor):
        if sigma.shape not in ((), latents.shape[:1]) or not sigma.is_floating_point():
            raise ValueError(
                f"sigma: expected a float tensor [{len(latents)}], got {sigma.dtype} {list(sigma.shape)}"
            )
        values = sigma.reshape(-1).tolist() if sigma.device.type == "cpu" else []
        sigma = sigma.to(latents.device, dtype, non_blocking=True)
        sigma = sigma.reshape(-1, *[1] * (latents.dim() - 1)) if sigma.dim() else sigma
    else:
        values = [sigma]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"sigma: expected values in [0, 1], got {values}")
    return latents.to(dtype) - sigma * velocity.to(dtype)


def _checked(sigmas: Tensor) -> Tensor:
    """A schedule as float64 on the host; ValueError unless it is [N + 1], N >= 1, strictly falling
    inside [0, 1].
    """
    if (
        not isinstance(sigmas, Tensor)
        or not sigmas.is_floating_point()
        or sigmas.dim() != 1
        or len(sigmas) < 2
    ):
        got = f"{sigmas.dtype} {list(sigmas.shape)}" if isinstance(sigmas, Tensor) else repr(sigmas)
        raise ValueError(
            f"sigmas: expected a float tensor [N + 1] of at least 2 entries, got {got}"
        )
    sigmas = sigmas.detach().to("cpu", torch.float64)
    if not (bool((sigmas[:-1] > sigmas[1:]).all()) and sigmas[0] <= 1.0 and sigmas[-1] >= 0.0):
        raise ValueError(
            f"sigmas: expected values falling strictly inside [0, 1], got {sigmas.tolist()}"
        )
    return sigmas
