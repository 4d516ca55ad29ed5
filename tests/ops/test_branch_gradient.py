"""branch_gradient: what the joint backward of a transition gives at ratio 1, without having seen
the transition.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastgrpo_kernels import Transition, branch_gradient, gaussian_noise, grpo_loss, sde_step
from fastgrpo_kernels.dispatch import operation, unsupported_reason
from fastgrpo_kernels.sde import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import (
    BF16,
    F16,
    F32,
    F64,
    AsExactAsEager,
    column,
    differentiate,
    mixed_steps,
    noise_of_backend,
    of_rows,
    randn,
    random_transition,
    same_bits,
)
from torch import Tensor

slow = pytest.mark.slow


def unseen(
    shape: tuple[int, ...], step: Any, device: str, dtype: torch.dtype = F32, **options: Any
) -> Transition:
    """A transition whose latents and velocities nobody knows."""
    unknown = torch.full(shape, math.nan, dtype=dtype, device=device)
    return Transition(unknown, unknown, *step, **options)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("guidance_scale", "cfg_grad"), [(None, "both"), (5.0, "both"), (5.0, "cond_only")]
)
@pytest.mark.parametrize(
    "dtypes", [(F32, BF16), *(pytest.param(both, marks=slow) for both in ((F32, F32), (BF16, F32)))]
)
def test_it_is_the_joint_backward_but_for_the_rounding_of_the_latents(
    triton_or_reference: str,
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    guidance_scale: float | None,
    cfg_grad: str,
    normalized: bool,
) -> None:
    """Through a rollout by `sde_step` and `grpo_loss` of it: e and s eps differ by the rounding of
    mean and x', half an ulp each.
    """
    # Two tiles, or one.
    batch, shape = 3, (3, 7, 53) if (guidance_scale, cfg_grad) == (5.0, "both") else (3, 7, 5)
    transition = random_transition(
        batch, shape, device, dtypes, guidance_scale, normalized=normalized
    )
    seeds = torch.arange(batch, device=device) * 31
    advantages = torch.tensor([1.5, -0.5, 7.0])
    x_next, old = sde_step(transition, seeds=seeds, step=seeds + 1)

    def objective(t: Transition) -> Tensor:
        loss, stats = grpo_loss(t, x_next, old, advantages, cfg_grad=cfg_grad)
        assert torch.equal(stats.ratio, torch.ones(batch, device=device))
        return loss

    joint = differentiate(objective, transition)
    unknown = transition._replace(
        latents=torch.full_like(transition.velocity, math.nan), velocity_uncond=None
    )
    cond, uncond = branch_gradient(
        unknown, advantages, seeds=seeds, step=seeds + 1, scale=1 / batch, cfg_grad=cfg_grad
    )
    x, b, std = (
        column(value, x_next.double())
        for value in (transition.latents.double().flatten(1).abs().amax(1), *transition[3:5])
    )
    amplitude = column(advantages.clamp(-5, 5), b) * b / math.prod(shape) / batch
    slope = (amplitude / std**2 if normalized else 2 * amplitude).abs()  # dL/dv is this times e
    # Half an ulp of x', and a few of fp32's for the terms of the mean: |uncond| and |w v| are at
    # most some 25.
    rounding = torch.finfo(dtypes[0]).eps / 2 * x_next.double().abs() + torch.finfo(F32).eps * (
        2 * x + 25 * b.abs()
    )
    w = transition.guidance_scale
    for name, got, share in (("velocity", cond, w), ("velocity_uncond", uncond, 1 - w)):
        assert (got is None) == (name not in joint)
        if got is None:
            continue
        expected = joint[name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert expected.abs().max() > 0
        allowed = (
            abs(share) * slope * rounding
            + torch.finfo(dtypes[1]).eps * expected.double().abs()
            + 1e-12 * slope
        )
        assert ((got.double() - expected.double()).abs() <= allowed).all(), name


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=slow)])
def test_values(
    triton_or_reference: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    dtype: torch.dtype,
    normalized: bool,
) -> None:
    """Against the formula in float64, given the noise, and torch's operations in fp32."""
    shape, w, scale = (4, 2, 511), 4.0, 0.125
    seeds = torch.arange(4, device=device) - 2
    advantages, step = torch.tensor([1.0, -9.0, 0.3, 9.0]), mixed_steps(4)
    transition = unseen(shape, step, device, dtype, guidance_scale=w, normalized=normalized)
    got = branch_gradient(transition, advantages, seeds=seeds, step=3, scale=scale, adv_clip=2.0)
    noise = noise_of_backend(seeds, 3, shape[1:])

    def statement(kind: torch.dtype) -> list[Tensor]:
        A, b, std = (
            column(value, noise.to(kind)) for value in (advantages.clamp(-2, 2), *step[1:])
        )
        weight = b / std if normalized else 2 * b * std
        guided = -A * weight * noise.to(kind) * (scale / math.prod(shape[1:]))
        return [w * guided, (1 - w) * guided]

    for name, value, eager, exact in zip(
        ("velocity", "velocity_uncond"), got, statement(F32), statement(F64), strict=True
    ):
        assert value is not None
        assert value.dtype == dtype
        as_exact_as_eager(name, value, eager.to(dtype), exact)


def test_the_noise_is_that_of_the_seeds(triton_or_reference: str, device: str) -> None:
    """b = -1, s = 1, A = P: the noise, which the reference on the CPU also gives, within the bound
    of `triton_philox`.
    """
    seeds = torch.tensor([0, -1, 2**40 + 5], device=device)
    steps = torch.tensor([0, 2**32 - 1, 7], device=device)
    for numel in (5, 1025):
        transition = unseen((3, numel), (1.0, -1.0, 1.0), device)
        advantages = torch.full((3,), float(numel))
        noise, none = branch_gradient(
            transition, advantages, seeds=seeds, step=steps, adv_clip=math.inf
        )
        assert none is None
        expected = gaussian_noise(seeds.cpu(), steps.cpu(), (numel,))
        torch.testing.assert_close(noise.cpu(), expected, rtol=2.0**-20, atol=0)
        assert torch.equal(noise, noise_of_backend(seeds, steps, (numel,)))


@given(
    batch=st.integers(1, 4),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([F32, BF16]),
    data=st.data(),
)
@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bits_do_not_depend_on_the_batch(
    triton_or_reference: str,
    device: str,
    batch: int,
    shape: list[int],
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    transition = unseen((batch, *shape), mixed_steps(batch), device, dtype, guidance_scale=3.0)
    seeds, advantages = torch.arange(batch, device=device), randn(batch)

    def call(rows: list[int]) -> tuple[Tensor, Tensor | None]:
        part = of_rows(transition, rows)
        return branch_gradient(part, advantages[rows], seeds=seeds[rows], step=seeds[rows] + 1)

    rows = data.draw(st.lists(st.integers(0, batch - 1), max_size=batch, unique=True))
    assert same_bits(call(rows), [whole[rows] for whole in call(list(range(batch)))])


def test_forms_of_the_arguments(triton_or_reference: str, device: str) -> None:
    """Numbers, scalars, tensors on the device or on the CPU, strided seeds: the same bits."""
    seeds, advantages = torch.arange(3, device=device), randn(3)
    transition = unseen((3, 5, 3), (1.0, -0.1, 0.2), device, guidance_scale=2.0)
    expected = branch_gradient(transition, advantages, seeds=seeds, step=3)
    strided, steps = torch.stack((seeds, seeds), dim=1)[:, 0], torch.full((3,), 3, device=device)
    std = torch.full((3,), 0.2, dtype=F64)
    others = transition._replace(b=torch.tensor(-0.1, dtype=F64), std=std.to(device))
    got = branch_gradient(others, advantages.to(device), seeds=strided, step=steps)
    assert same_bits(got, expected)
    got = branch_gradient(others._replace(std=std), advantages, seeds=seeds.cpu(), step=3)
    assert same_bits(got, expected)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_row_without_noise_has_no_gradient(
    triton_or_reference: str, device: str, normalized: bool
) -> None:
    step = (1.0, -0.1, torch.tensor([0.1, 0.0, 0.2]))
    transition = unseen((3, 7), step, device, guidance_scale=3.0, normalized=normalized)
    seeds = torch.arange(3, device=device)
    for gradient in branch_gradient(transition, torch.ones(3), seeds=seeds, step=0):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.ne(0).any(1).tolist() == [True, False, True]


def test_empty_batch(triton_or_reference: str, device: str) -> None:
    none, seeds = torch.empty(0), torch.empty(0, dtype=torch.int64, device=device)
    transition = unseen((0, 3, 4), (none, none, none), device, guidance_scale=2.0)
    cond, uncond = branch_gradient(transition, none, seeds=seeds, step=0)
    assert uncond is not None
    assert cond.shape == uncond.shape == (0, 3, 4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_value_of_a_device_tensor_is_read(backend: str) -> None:
    if reason := unsupported_reason(backend, "branch_gradient", torch.empty(0, device="meta")):
        pytest.skip(reason)
    seeds, ones = torch.zeros(2, dtype=torch.int64, device="meta"), torch.ones(2, device="meta")
    transition = unseen((2, 5), (ones, ones, ones), "meta")
    cond, _ = branch_gradient(transition, ones, seeds=seeds, step=seeds, backend=backend)
    assert cond.device.type == "meta"


def test_backends_without_the_op() -> None:
    """csrc/ does not have it: an error if forced for a call; if forced for all, others serve it."""
    transition, ones, seeds = (
        unseen((2, 3), (1.0, -0.1, 0.2), "cpu"),
        torch.ones(2),
        torch.arange(2),
    )
    message = "branch_gradient: the backend 'cpp' cannot serve this call: csrc/ has"
    with pytest.raises(ValueError, match=message):
        branch_gradient(transition, ones, seeds=seeds, step=0, backend="cpp")
    got, _ = branch_gradient(transition, ones, seeds=seeds, step=0)
    assert torch.equal(got, reference.branch_gradient(transition, ones, seeds=seeds, step=0)[0])


def test_opcheck(device: str) -> None:
    if reason := unsupported_reason("triton", "branch_gradient", torch.empty(0, device=device)):
        pytest.skip(reason)
    seeds, factor = torch.arange(3, device=device), randn(3, device=device)
    for needs_uncond, dtype in ((True, BF16), (False, F32)):
        arguments = (seeds, seeds, factor, [4, 5], 3.0, needs_uncond, dtype)
        torch.library.opcheck(operation("triton", "branch_gradient"), arguments)


def test_compiles_without_a_graph_break(triton_or_reference: str, device: str) -> None:
    seeds, advantages = torch.arange(3, device=device), randn(3, device=device)
    step = [value.to(device) for value in mixed_steps(3)]
    transition = unseen((3, 4, 5), step, device, guidance_scale=3.0)

    def call(seeds: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor | None]:
        return branch_gradient(transition, advantages, seeds=seeds, step=2 * seeds, scale=0.25)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(seeds, advantages), call(seeds, advantages))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seeds": torch.zeros(2)},
            r"seeds: expected an int64 tensor \[B\], got torch.float32 \[2\]",
        ),
        (
            {"seeds": torch.arange(3)},
            r"seeds: expected one per sample, \[2\], got torch.int64 \[3\]",
        ),
        ({"step": -1}, "step: .* got -1"),
        ({"step": torch.arange(3)}, r"step: .* \[2\], got torch.int64 \[3\]"),
        (
            {"advantages": torch.zeros(3)},
            r"advantages: expected a float tensor \[2\], got torch.float32 \[3\]",
        ),
        ({"scale": math.inf}, "scale: .* finite, got float inf"),
        ({"adv_clip": 0.0}, "adv_clip: expected a number above 0, got float 0.0"),
        ({"cfg_grad": "uncond"}, "cfg_grad: expected one of both, cond_only, got 'uncond'"),
        (
            {"b": torch.zeros(3)},
            r"b: expected a number or a float tensor \[2\], got torch.float32 \[3\]",
        ),
        ({"std": -0.1}, r"std: expected values of 0 or above, got \[-0.1\]"),
        ({"velocity": torch.zeros(2, 0)}, "velocity: expected at least one element per sample"),
        ({"guidance_scale": math.nan}, "guidance_scale: .* finite, got float nan"),
    ],
)
def test_bad_arguments(
    triton_or_reference: str, device: str, change: dict[str, Any], message: str
) -> None:
    of_transition = {name: change[name] for name in change.keys() & set(Transition._fields)}
    transition = unseen((2, 3), (1.0, -0.1, 0.1), device)._replace(**of_transition)
    arguments = {"advantages": torch.zeros(2), "seeds": torch.arange(2), "step": 0}
    arguments |= {name: value for name, value in change.items() if name not in of_transition}
    with pytest.raises(ValueError, match=message):
        branch_gradient(transition, **arguments)
