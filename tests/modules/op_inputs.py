"""Inputs of the transition's ops for their tests, and the textbook that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastgrpo_kernels import Transition, sde_step
from torch import Tensor

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
AsExactAsEager = Callable[[str, Tensor, Tensor, Tensor], None]

# (a, b, std) of the test vectors in docs/method.md: dance, 16 steps, shift 5, eta 0.5; steps 0, 4,
# 8, 12 and 15.
TABLE = torch.tensor(
    [
        (0.99836, -0.01316, 0.05735),
        (0.99722, -0.02101, 0.07217),
        (0.99432, -0.03883, 0.09731),
        (0.98214, -0.09598, 0.14940),
        (0.87500, -0.34375, 0.25000),
    ],
    dtype=F64,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(device, dtype)


def mixed_steps(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [B] of a batch that mixes steps: fp32 values in float64, on the CPU."""
    a, b, std = TABLE[torch.arange(batch) % len(TABLE)].float().double().T
    return a, b, std


def random_transition(
    batch: int,
    shape: tuple[int, ...],
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    guidance_scale: float | None = None,
    **options: Any,
) -> Transition:
    """A transition of mixed steps. dtypes: of latents and velocities. None: no second branch."""
    x, v, uncond = (
        randn(batch, *shape, seed=seed, dtype=dtype, device=device)
        for seed, dtype in enumerate((dtypes[0], dtypes[1], dtypes[1]))
    )
    if guidance_scale is not None:
        options |= {"velocity_uncond": uncond, "guidance_scale": guidance_scale}
    return Transition(x, v, *mixed_steps(batch), **options)


def of_rows(transition: Transition, rows: list[int]) -> Transition:
    """The same samples in another batch."""
    return Transition(*(v[rows] if isinstance(v, Tensor) else v for v in transition))


def column(value: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to go with `like`."""
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def likely_next(transition: Transition) -> Tensor:
    """An x' where the noise would put it, from other noise than the ops make."""
    x = transition.latents
    noise = randn(*x.shape, seed=9, dtype=F64, device=x.device.type)
    return (x.double() + column(transition.std, noise) * noise).to(x.dtype)


def textbook_mean(transition: Transition, dtype: torch.dtype) -> Tensor:
    """a x + b v by torch's operations in one dtype, each rounded on its own."""
    x, v = transition.latents.to(dtype), transition.velocity.to(dtype)
    if transition.velocity_uncond is not None:
        uncond = transition.velocity_uncond.to(dtype)
        v = uncond + transition.guidance_scale * (v - uncond)
    return column(transition.a, x) * x + column(transition.b, x) * v


def textbook_log_prob(transition: Transition, x_next: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean log-density over a sample by torch.distributions, or the squared error of cps."""
    mean, x_next = textbook_mean(transition, dtype), x_next.to(dtype)
    if transition.normalized:
        std = column(transition.std, mean)
        density = torch.distributions.Normal(mean, std, validate_args=False).log_prob(x_next)
    else:
        density = -(x_next - mean).square()
    return density.flatten(1).mean(1)


def textbook_loss(
    new: Tensor, old: Tensor, advantages: Tensor, clip_range: float, adv_clip: float
) -> Tensor:
    """Eq. 11 with min and clip, in the dtype of its arguments."""
    ratio = (new - old).exp()
    advantages = torch.clamp(advantages, -adv_clip, adv_clip)
    return -torch.min(
        ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    ).mean()


def differentiate(
    function: Callable[[Transition], Tensor],
    transition: Transition,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """A function's value, and the gradients of its sum in the velocities that have one, by name.

    dtype: of the velocities; None: their own.
    """
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
        for name, tensor in transition._asdict().items()
        if name in ("velocity", "velocity_uncond") and tensor is not None
    }
    value = function(transition._replace(**leaves))
    value.sum().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"value": value.detach()} | gradients


def noise_of_backend(seeds: Tensor, steps: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """The noise itself: a step from 0 to 0 with std 1."""
    zeros = torch.zeros(len(seeds), *shape, device=seeds.device)
    return sde_step(Transition(zeros, zeros, 0.0, 0.0, 1.0), seeds=seeds, step=steps)[0]


def same_bits(ones: Any, others: Any) -> bool:
    """Whether two sequences hold equal tensors."""
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))
