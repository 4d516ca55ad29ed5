"""sde_log_prob in every backend: values and both gradients against float64, the gradients to the bit
against the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgrpo_kernels import sde_log_prob
from fastgrpo_kernels.dispatch import operation
from fastgrpo_kernels.sde import reference
from torch import Tensor

# (a, b, std) of method.md's test vectors: dance, 16 steps, shift 5, eta 0.5; steps 0, 4, 8, 12, 15.
TABLE = torch.tensor(
    [
        (0.99836, -0.01316, 0.05735),
        (0.99722, -0.02101, 0.07217),
        (0.99432, -0.03883, 0.09731),
        (0.98214, -0.09598, 0.14940),
        (0.87500, -0.34375, 0.25000),
    ],
    dtype=torch.float64,
)
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
AsExactAsEager = Callable[[str, Tensor, Tensor, Tensor], None]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(
        device, dtype
    )


def mixed_steps(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [B] of a batch that mixes steps: fp32 values in float64, on the CPU."""
    rows = TABLE[torch.arange(batch) % len(TABLE)].float().double()
    return rows[:, 0], rows[:, 1], rows[:, 2]


def transition(
    batch: int,
    shape: tuple[int, ...],
    storage: torch.dtype,
    velocity_dtype: torch.dtype,
    device: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, x', v_cond, v_uncond, with an x' that lies where the noise would put it."""
    x, v, uncond = (
        randn(batch, *shape, seed=seed, dtype=dtype, device=device)
        for seed, dtype in enumerate([storage, *[velocity_dtype] * 2])
    )
    std = mixed_steps(batch)[2].reshape(-1, *[1] * len(shape)).to(device)
    x_next = (x.double() + std * randn(batch, *shape, seed=9, dtype=F64, device=device)).to(storage)
    return x, x_next, v, uncond


def textbook(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    step: tuple[Tensor, Tensor, Tensor],
    w: float,
    normalized: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The log-probability by torch's operations in one dtype, differentiable in the velocities."""
    x, x_next, v, uncond = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    assert x is not None
    assert x_next is not None
    assert v is not None
    a, b, std = (value.to(x).reshape(-1, *[1] * (x.dim() - 1)) for value in step)
    if uncond is not None:
        v = uncond + w * (v - uncond)
    mean = a * x + b * v
    density = (
        torch.distributions.Normal(mean, std, validate_args=False).log_prob(x_next)
        if normalized
        else -(x_next - mean).square()
    )
    return density.flatten(1).mean(1)


# -------- values


def test_by_hand(backend: str, device: str) -> None:
    """x = 1, v = 2, a = 0.5, b = -0.25: mean 0; x' = 1 at std 0.5: -2 - ln 0.5 - ln(2 pi) / 2."""
    x, v, x_next = (
        torch.ones(1, 3, device=device),
        torch.full((1, 3), 2.0, device=device),
        torch.ones(1, 3, device=device),
    )
    got = sde_log_prob(x, x_next, v, 0.5, -0.25, 0.5)
    assert got.item() == pytest.approx(
        -2.0 + math.log(2.0) - 0.5 * math.log(2.0 * math.pi), rel=1e-7
    )
    assert sde_log_prob(x, x_next, v, 0.5, -0.25, 0.5, normalized=False).item() == -1.0


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("cfg_grad", ["both", "cond_only"])
@pytest.mark.parametrize("guidance_scale", [None, 1.0, 5.0])
@pytest.mark.parametrize(
    ("storage", "velocity_dtype"), [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16)]
)
def test_value_and_gradients(
    backend: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    storage: torch.dtype,
    velocity_dtype: torch.dtype,
    guidance_scale: float | None,
    cfg_grad: str,
    normalized: bool,
) -> None:
    """Against autograd of the float64 statement; the gradients also have the reference's bits."""
    batch, w = 5, guidance_scale or 1.0
    shape = (
        (3, 7, 53) if (guidance_scale, cfg_grad) == (5.0, "both") else (7, 5)
    )  # one of more tiles than one
    x, x_next, v, uncond = transition(batch, shape, storage, velocity_dtype, device)
    step, weights = mixed_steps(batch), torch.linspace(-1.0, 2.0, batch, device=device)

    def differentiate(
        log_prob: Callable[[Tensor, Tensor | None], Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        leaves = {"velocity": v.detach().clone().to(dtype).requires_grad_()}
        if guidance_scale is not None:
            leaves["velocity_uncond"] = (
                uncond.detach()
                .clone()
                .to(dtype)
                .requires_grad_(cfg_grad == "both" or dtype == velocity_dtype)
            )
        value = log_prob(leaves["velocity"], leaves.get("velocity_uncond"))
        (value * weights.to(value)).sum().backward()
        return {"log_prob": value.detach()} | {
            name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
        }

    options: dict[str, Any] = {"guidance_scale": w, "cfg_grad": cfg_grad, "normalized": normalized}
    ours = differentiate(
        lambda v, u: sde_log_prob(x, x_next, v, *step, velocity_uncond=u, **options), velocity_dtype
    )
    theirs = differentiate(
        lambda v, u: reference.sde_log_prob(x, x_next, v, *step, velocity_uncond=u, **options),
        velocity_dtype,
    )

    def by_textbook(v: Tensor, u: Tensor | None, dtype: torch.dtype) -> Tensor:
        return textbook(
            (x, x_next, v, u if u is None or cfg_grad == "both" else u.detach()),
            step,
            w,
            normalized,
            dtype,
        )

    eager = differentiate(lambda v, u: by_textbook(v, u, F32), velocity_dtype)
    exact = differentiate(lambda v, u: by_textbook(v, u, F64), F64)
    expected = {"log_prob", "velocity"} | (
        {"velocity_uncond"} if guidance_scale is not None and cfg_grad == "both" else set()
    )
    assert ours.keys() == theirs.keys() == eager.keys() == exact.keys() == expected
    for name, value in ours.items():
        as_exact_as_eager(name, value, eager[name], exact[name])
        assert torch.equal(value, theirs[name]), name


def test_closed_form_of_the_gradient(backend: str, device: str) -> None:
    """method.md: b (x' - mean) / (s^2 P), times w and 1 - w; 2 b (x' - mean) / P for cps."""
    x, x_next, v, uncond = transition(5, (33,), F32, F32, device)
    step, w = mixed_steps(5), 4.0
    a, b, std = (value.to(device)[:, None] for value in step)
    error = (
        x_next.double()
        - a * x.double()
        - b * (uncond.double() + w * (v.double() - uncond.double()))
    )
    for normalized, closed in ((True, b * error / (std**2 * 33)), (False, 2 * b * error / 33)):
        leaves = v.clone().requires_grad_(), uncond.clone().requires_grad_()
        sde_log_prob(
            x,
            x_next,
            leaves[0],
            *step,
            velocity_uncond=leaves[1],
            guidance_scale=w,
            normalized=normalized,
        ).sum().backward()
        for leaf, share in zip(leaves, (w, 1 - w), strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(
                leaf.grad.double(), share * closed, rtol=1e-4, atol=1e-6 * closed.abs().max().item()
            )


def test_a_long_sample_is_summed_exactly(backend: str, device: str) -> None:
    """Goal G8: within 1e-6 of float64."""
    x, x_next, v, uncond = transition(1, (50_001,), F32, BF16, device)
    step = mixed_steps(5)[0][3:4], mixed_steps(5)[1][3:4], mixed_steps(5)[2][3:4]
    got = sde_log_prob(x, x_next, v, *step, velocity_uncond=uncond, guidance_scale=5.0)
    assert abs(got.item() - textbook((x, x_next, v, uncond), step, 5.0, True, F64).item()) < 1e-6


def test_gradcheck() -> None:
    """In float64, which is the reference's; twice there."""
    x, x_next, v, uncond = transition(3, (5,), F64, F64, "cpu")
    step = mixed_steps(3)

    def log_prob(v: Tensor, uncond: Tensor) -> Tensor:
        return sde_log_prob(x, x_next, v, *step, velocity_uncond=uncond, guidance_scale=2.5)

    leaves = v.requires_grad_(), uncond.requires_grad_()
    torch.testing.assert_close(
        log_prob(*leaves),
        textbook((x, x_next, *leaves), step, 2.5, True, F64),
        rtol=1e-12,
        atol=1e-12,
    )
    assert torch.autograd.gradcheck(log_prob, leaves)
    assert torch.autograd.gradgradcheck(log_prob, leaves)


# -------- corner cases


@pytest.mark.parametrize("trained", ["velocity", "velocity_uncond"])
def test_one_branch_alone(backend: str, device: str, trained: str) -> None:
    x, x_next, v, uncond = transition(4, (21,), F32, BF16, device)
    step = mixed_steps(4)
    both = v.clone().requires_grad_(), uncond.clone().requires_grad_()
    sde_log_prob(
        x, x_next, both[0], *step, velocity_uncond=both[1], guidance_scale=3.0
    ).sum().backward()
    one = (
        v.requires_grad_(trained == "velocity"),
        uncond.requires_grad_(trained == "velocity_uncond"),
    )
    sde_log_prob(
        x, x_next, one[0], *step, velocity_uncond=one[1], guidance_scale=3.0
    ).sum().backward()
    for alone, together in zip(one, both, strict=True):
        assert together.grad is not None
        assert (alone.grad is None) == (not alone.requires_grad)
        assert alone.grad is None or torch.equal(alone.grad, together.grad)


def test_latents_and_coefficients_are_data(backend: str, device: str) -> None:
    x, x_next, v = (randn(2, 5, seed=seed, device=device).requires_grad_() for seed in range(3))
    std = torch.tensor([0.1, 0.2], requires_grad=True)
    sde_log_prob(x, x_next, v, 1.0, -0.1, std).sum().backward()
    assert v.grad is not None
    assert x.grad is None
    assert x_next.grad is None
    assert std.grad is None


@pytest.mark.parametrize("normalized", [True, False])
def test_a_row_without_noise_has_no_log_prob_and_no_gradient(
    backend: str, device: str, normalized: bool
) -> None:
    x, x_next, v, _ = transition(3, (40,), F32, F32, device)
    a, b, std = (value.clone() for value in mixed_steps(3))
    std[1] = 0.0
    v.requires_grad_()
    log_probs = sde_log_prob(x, x_next, v, a, b, std, normalized=normalized)
    assert log_probs.isnan().tolist() == [False, True, False]
    # the NaN stays in the value: no gradient from row 1, the others' as without it
    log_probs.sum().backward()
    alone = v.detach()[[0, 2]].requires_grad_()
    kept = [value[[0, 2]] for value in (a, b, std)]
    sde_log_prob(x[[0, 2]], x_next[[0, 2]], alone, *kept, normalized=normalized).sum().backward()
    assert v.grad is not None
    assert alone.grad is not None
    assert torch.equal(v.grad[[0, 2]], alone.grad)
    assert not v.grad[1].any()


def test_empty_batch(backend: str, device: str) -> None:
    empty, none = torch.empty(0, 3, 4, device=device), torch.empty(0)
    for coefficients in ((1.0, -0.1, 0.2), (none, none, none)):
        velocity = empty.clone().requires_grad_()
        log_probs = sde_log_prob(empty, empty, velocity, *coefficients)
        log_probs.sum().backward()
        assert log_probs.shape == (0,)
        assert velocity.grad is not None
        assert velocity.grad.shape == (0, 3, 4)


def test_two_calls_give_the_same_bits(backend: str, device: str) -> None:
    x, x_next, v, uncond = transition(3, (1100,), F32, BF16, device)

    def call() -> list[Tensor]:
        leaves = v.clone().requires_grad_(), uncond.clone().requires_grad_()
        value = sde_log_prob(
            x, x_next, leaves[0], *mixed_steps(3), velocity_uncond=leaves[1], guidance_scale=2.0
        )
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    assert all(torch.equal(one, other) for one, other in zip(call(), call(), strict=True))


# -------- torch


def test_opcheck(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("is not a registered operation")
    x, x_next, v, uncond = transition(3, (7, 5), F32, F32, device)
    step, gradient = [value.to(device, F32) for value in mixed_steps(3)], randn(3, device=device)
    loss = torch.tensor(2.0, device=device)
    forward, backward = (
        operation(backend, "sde_log_prob"),
        operation(backend, "sde_log_prob_backward"),
    )
    leaves = v.clone().requires_grad_(), uncond.clone().requires_grad_()
    torch.library.opcheck(forward, (x, x_next, *leaves, *step, 5.0, True))
    torch.library.opcheck(forward, (x, x_next, leaves[0], None, *step, 1.0, False))
    torch.library.opcheck(backward, (gradient, None, x, x_next, v, uncond, *step, 5.0, True, True))
    torch.library.opcheck(backward, (gradient, loss, x, x_next, v, None, *step, 1.0, False, False))


def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    x, x_next, v, uncond = transition(3, (7, 5), F32, F32, device)
    step = [value.to(device) for value in mixed_steps(3)]

    def call(v: Tensor, uncond: Tensor) -> Tensor:
        return sde_log_prob(x, x_next, 2 * v, *step, velocity_uncond=uncond, guidance_scale=3.0)

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = v.clone().requires_grad_(), uncond.clone().requires_grad_()
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# -------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"next_latents": torch.zeros(2, 4)},
            r"next_latents: expected a float tensor \[2, 3\], got .* \[2, 4\]",
        ),
        (
            {"next_latents": torch.zeros(2, 3).bfloat16()},
            "next_latents: expected the dtype of latents, torch.float32",
        ),
        ({"cfg_grad": "none"}, "cfg_grad: expected one of both, cond_only, got 'none'"),
    ],
)
def test_bad_stored_transition(
    backend: str, device: str, change: dict[str, Any], message: str
) -> None:
    """What it shares with `sde_step` is tested there."""
    good: dict[str, Any] = {
        name: torch.zeros(2, 3) for name in ("latents", "next_latents", "velocity")
    } | change
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in good.items()
    }
    with pytest.raises(ValueError, match=message):
        sde_log_prob(**moved, a=1.0, b=-0.1, std=0.1)
