"""Schedules and coefficient tables against float64 statements of the published samplers, written
with no affine form.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from fastgrpo_kernels import Transition, gaussian_noise, sde_step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo.algorithm.sde import (
    SDECoefficients,
    sde_coefficients,
    sigma_schedule,
    timesteps,
    x0_prediction,
)

SHAPE = (3, 2, 5)
# docs/method.md, section 1: 16 steps, shift 5; i, sigma, D, then a, b, s of dance at eta 0.5.
VECTORS = [
    (0, 1.00000, 0.01316, 0.99836, -0.01316, 0.05735),
    (4, 0.93750, 0.02083, 0.99722, -0.02101, 0.07217),
    (8, 0.83333, 0.03788, 0.99432, -0.03883, 0.09731),
    (12, 0.62500, 0.08929, 0.98214, -0.09598, 0.14940),
    (15, 0.25000, 0.25000, 0.87500, -0.34375, 0.25000),
]
PUBLISHED = [
    ("dance", 0.5),
    ("dance", 0.3),
    ("flow", 0.7),
    ("linear", 0.5),
    ("cps", 0.7),
    ("cps", 1.0),
    ("ode", 0.5),
]


def euler_maruyama(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, noise_level: float
) -> tuple[Tensor, float]:
    """Eq. 2 over one step: dx = (v - sigma_t^2 / 2 * score) dsigma + sigma_t dw, the score of
    x_sigma from Tweedie's formula.

    x_sigma = (1 - sigma) x0 + sigma eps gives score = -(x - (1 - sigma) x0) / sigma^2 with x0 =
    x - sigma v.
    """
    dsigma = sigma_next - sigma  # negative: the step goes from noise to data
    x0 = x - sigma * v
    score = -(x - (1 - sigma) * x0) / sigma**2
    drift = v - 0.5 * noise_level**2 * score
    return x + drift * dsigma, noise_level * math.sqrt(-dsigma)


def coefficient_preserving(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, eta: float
) -> tuple[Tensor, float]:
    """Coefficient-preserving sampling: as much noise is left out of the predicted x1 as is added
    fresh.
    """
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    std = sigma_next * math.sin(eta * math.pi / 2)
    return (1 - sigma_next) * x0 + math.sqrt(max(sigma_next**2 - std**2, 0.0)) * x1, std


def statement(
    kind: str, eta: float, sigmas: list[float], i: int, x: Tensor, v: Tensor
) -> tuple[Tensor, float]:
    """Mean and std of step i, one published sampler after the other."""
    sigma, sigma_next = sigmas[i], sigmas[i + 1]
    if kind == "cps":
        return coefficient_preserving(x, v, sigma, sigma_next, eta)
    if kind == "ode":
        return x + (sigma_next - sigma) * v, 0.0
    if kind == "dance":
        noise_level = eta
    elif kind == "flow":
        noise_level = eta * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
    else:
        sigma_max, sigma_min = sigmas[1], sigmas[-1]
        noise_level = sigma_min + (sigma_max - sigma_min) * sigma
    return euler_maruyama(x, v, sigma, sigma_next, noise_level)


@pytest.mark.parametrize(("kind", "eta"), PUBLISHED)
@pytest.mark.parametrize(("num_steps", "shift"), [(16, 5.0), (1, 1.0), (10, 3.0)])
def test_every_step_is_the_published_sampler(
    kind: str, eta: float, num_steps: int, shift: float
) -> None:
    """Through sde_step in float64, all N steps mixed in one batch."""
    sigmas = sigma_schedule(num_steps, shift)
    table = sde_coefficients(sigmas, kind, eta)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_steps, *SHAPE, dtype=torch.float64, generator=generator)
    v = torch.randn(num_steps, *SHAPE, dtype=torch.float64, generator=generator)
    seeds, steps = torch.arange(num_steps) + 77, torch.arange(num_steps)
    transition = Transition(x, v, table.a, table.b, table.std, normalized=table.normalized)
    got, log_probs = sde_step(transition, seeds=seeds, step=steps)
    noise = gaussian_noise(seeds, steps, SHAPE).double()
    for i in range(num_steps):
        mean, std = statement(kind, eta, sigmas.tolist(), i, x[i], v[i])
        torch.testing.assert_close(got[i], mean + std * noise[i], rtol=1e-12, atol=1e-12)
        assert table.std[i].item() == pytest.approx(std, rel=1e-12, abs=1e-12)
        if table.std[i] == 0:
            assert math.isnan(log_probs[i])
        elif kind == "cps":
            assert log_probs[i].item() == pytest.approx(
                -(got[i] - mean).square().mean().item(), rel=1e-9
            )
        else:
            expected = torch.distributions.Normal(mean, std).log_prob(got[i]).mean()
            assert log_probs[i].item() == pytest.approx(expected.item(), rel=1e-10)


def test_table_layout() -> None:
    sigmas = sigma_schedule(16, 5.0)
    for kind, eta in PUBLISHED:
        table = sde_coefficients(sigmas, kind, eta)
        assert isinstance(table, SDECoefficients)
        assert table.normalized == (kind != "cps")
        for column in (table.a, table.b, table.std):
            assert column.dtype == torch.float64
            assert column.shape == (16,)
            assert column.isfinite().all()
    default = sde_coefficients(sigmas)
    assert torch.equal(default.std, sde_coefficients(sigmas, "dance", 0.5).std)
    from_fp32 = sde_coefficients(sigmas.float())
    torch.testing.assert_close(from_fp32.b, default.b, rtol=1e-5, atol=1e-7)
    assert from_fp32.b.dtype == torch.float64


@pytest.mark.parametrize(("i", "sigma", "difference", "a", "b", "std"), VECTORS)
def test_vectors_of_the_method(
    i: int, sigma: float, difference: float, a: float, b: float, std: float
) -> None:
    sigmas = sigma_schedule(16, 5.0)
    table = sde_coefficients(sigmas, "dance", 0.5)
    got = (sigmas[i], sigmas[i] - sigmas[i + 1], table.a[i], table.b[i], table.std[i])
    assert [round(value.item(), 5) for value in got] == [sigma, difference, a, b, std]


def test_noise_levels_of_flow_and_linear_at_the_ends() -> None:
    sigmas = sigma_schedule(16, 5.0)
    second, last = sigmas[1].item(), sigmas[15].item()
    flow = sde_coefficients(sigmas, "flow", 0.7)
    assert flow.std[0].item() == pytest.approx(
        0.7 / math.sqrt(1 - second) * math.sqrt(1 - second), rel=1e-12
    )
    assert flow.std[15].item() == pytest.approx(
        0.7 * math.sqrt(0.25 / 0.75) * math.sqrt(last), rel=1e-12
    )
    linear = sde_coefficients(sigmas, "linear")
    assert linear.std[0].item() == pytest.approx(second * math.sqrt(1 - second), rel=1e-12)
    assert linear.std[15].item() == pytest.approx(second * 0.25 * 0.5, rel=1e-12)


@given(eta=st.floats(0.0, 1.0), num_steps=st.integers(1, 30), shift=st.floats(0.5, 12.0))
@settings(deadline=None, max_examples=60)
def test_cps_keeps_the_noise_level_of_every_step(eta: float, num_steps: int, shift: float) -> None:
    """On x = (1 - sigma) x0 + sigma eps, v = eps - x0: x' has (1 - sigma') of x0 and noise of total
    variance sigma'^2.
    """
    sigmas = sigma_schedule(num_steps, shift)
    table = sde_coefficients(sigmas, "cps", eta)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    of_x0 = table.a * (1 - sigma) - table.b
    of_eps = table.a * sigma + table.b
    torch.testing.assert_close(of_x0, 1 - sigma_next, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        of_eps.square() + table.std.square(), sigma_next.square(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["dance", "flow", "cps"])
def test_without_noise_every_sampler_is_the_ode(kind: str) -> None:
    sigmas = sigma_schedule(16, 5.0)
    still, ode = sde_coefficients(sigmas, kind, 0.0), sde_coefficients(sigmas, "ode")
    torch.testing.assert_close(still.a, ode.a, rtol=0, atol=1e-15)
    torch.testing.assert_close(still.b, ode.b, rtol=0, atol=1e-15)
    assert torch.equal(still.std, ode.std)


@pytest.mark.parametrize(("num_steps", "shift"), [(16, 5.0), (50, 3.0), (10, 1.0)])
def test_ode_is_diffusers_flow_match_euler(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])
    sigmas = sigma_schedule(num_steps, shift)
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        scheduler.timesteps.double(), timesteps(sigmas, "none"), rtol=1e-6, atol=0
    )
    table = sde_coefficients(sigmas, "ode")
    generator = torch.Generator().manual_seed(2)
    theirs = ours = torch.randn(2, *SHAPE, generator=generator)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, *SHAPE, generator=generator)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        transition = Transition(ours, velocity, table.a[i], table.b[i], table.std[i])
        ours, _ = sde_step(transition, seeds=torch.arange(2), step=i)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(num_steps=st.integers(1, 100), shift=st.integers(1, 20))
@settings(deadline=None, max_examples=100)
def test_schedule_and_timesteps_equal_exact_fractions(num_steps: int, shift: int) -> None:
    sigmas = sigma_schedule(num_steps, float(shift))
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    t = [Fraction(num_steps - i, num_steps) for i in range(num_steps + 1)]
    exact = [shift * value / (1 + (shift - 1) * value) for value in t]
    assert sigmas.tolist() == pytest.approx([float(value) for value in exact], rel=1e-14)
    assert timesteps(sigmas).tolist() == [int(1000 * value) for value in exact[:-1]]
    assert timesteps(sigmas, "none").tolist() == pytest.approx(
        [1000 * float(value) for value in exact[:-1]], rel=1e-14
    )


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.42, 0.43, 1e-6, 1e6])
def test_any_shift_begins_at_one_exactly(shift: float) -> None:
    """shift / (1 + (shift - 1)) is 1 + 2e-16 for 0.2, and 1 - 1e-16 for others."""
    sigmas = sigma_schedule(16, shift)
    assert sigmas[0] == 1.0
    assert bool((sigmas[:-1] > sigmas[1:]).all())
    assert bool((sde_coefficients(sigmas, "flow").std[:-1] < 1.0).all())


def test_timesteps_by_hand() -> None:
    sigmas = sigma_schedule(16, 5.0)
    truncated = timesteps(sigmas, "trunc")
    assert truncated.dtype == torch.float64
    assert truncated[[0, 4, 8, 12, 15]].tolist() == [1000, 937, 833, 625, 250]
    # 2 * 0.6 / 1.6 is 0.75, which float64 reaches from below.
    assert timesteps(sigma_schedule(5, 2.0)).tolist()[2] == 750


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_x0_prediction_recovers_the_data(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x0, eps = torch.randn(2, 4, *SHAPE, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    column = sigma[:, None, None, None]
    latents, velocity = ((1 - column) * x0 + column * eps).to(dtype), (eps - x0).to(dtype)
    got = x0_prediction(latents, velocity, sigma)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = latents.double() - column * velocity.double()
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        got.double(), x0, rtol=0, atol={torch.bfloat16: 0.05}.get(dtype, 1e-6)
    )
    for i, value in enumerate(sigma.tolist()):
        assert torch.equal(
            x0_prediction(latents[i : i + 1], velocity[i : i + 1], value), got[i : i + 1]
        )
        assert torch.equal(
            x0_prediction(latents[i : i + 1], velocity[i : i + 1], sigma[i]), got[i : i + 1]
        )


def test_x0_prediction_of_an_empty_batch() -> None:
    empty = torch.empty(0, *SHAPE)
    assert x0_prediction(empty, empty, torch.empty(0)).shape == (0, *SHAPE)
