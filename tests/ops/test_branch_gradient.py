"""branch_gradient: what the joint backward of a transition gives at ratio 1, without having seen
the transition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgrpo_kernels import branch_gradient, gaussian_noise, grpo_loss, sde_step
from fastgrpo_kernels.dispatch import operation, unsupported_reason
from fastgrpo_kernels.sde import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


def noise_of_family(seeds: Tensor, steps: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """The noise itself: a step from 0 to 0 with std 1."""
    zeros = torch.zeros(len(seeds), *shape, device=seeds.device)
    return sde_step(zeros, zeros, 0.0, 0.0, 1.0, seeds=seeds, step=steps)[0]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("cfg_grad", ["both", "cond_only"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize(("storage", "dtype"), [(F32, F32), (F32, BF16), (BF16, F32)])
def test_it_is_the_joint_backward_but_for_the_rounding_of_the_latents(
    triton_or_reference: str,
    device: str,
    storage: torch.dtype,
    dtype: torch.dtype,
    guidance_scale: float,
    cfg_grad: str,
    normalized: bool,
) -> None:
    """Through a rollout by `sde_step` and `grpo_loss` of it: e and s eps differ by the rounding of
    mean and x', half an ulp each.
    """
    batch, w = 4, guidance_scale
    shape = (
        (3, 7, 53) if (w, cfg_grad, storage) == (5.0, "both", F32) else (3, 7, 5)
    )  # of two tiles, of one
    x, v, uncond = (
        randn(batch, *shape, seed=seed, dtype=kind, device=device)
        for seed, kind in enumerate([storage, dtype, dtype])
    )
    step, seeds, advantages = (
        mixed_steps(batch),
        torch.arange(batch, device=device) * 31,
        torch.tensor([1.5, -0.5, 7.0, -0.01]),
    )
    guidance: dict[str, Any] = {"guidance_scale": w, "normalized": normalized}
    unconditional = {} if w == 1.0 else {"velocity_uncond": uncond}
    x_next, old = sde_step(x, v, *step, seeds=seeds, step=seeds + 1, **guidance, **unconditional)
    leaves = v.requires_grad_(), uncond.requires_grad_()
    loss, stats = grpo_loss(
        x, x_next, v, old, advantages, *step, cfg_grad=cfg_grad, **guidance, **unconditional
    )
    assert torch.equal(stats.ratio, torch.ones(batch, device=device))
    loss.backward()

    cond, other = branch_gradient(
        seeds,
        seeds + 1,
        advantages,
        *step[1:],
        shape,
        scale=1 / batch,
        cfg_grad=cfg_grad,
        dtype=dtype,
        **guidance,
    )
    _, b, std = (value.to(device).reshape(-1, 1, 1, 1) for value in step)
    amplitude = (
        advantages.clamp(-5, 5).to(device).reshape(-1, 1, 1, 1) * b / math.prod(shape) / batch
    )
    slope = (amplitude / std**2 if normalized else 2 * amplitude).abs()  # dL/dv is this times e
    # Half an ulp of x', and a few of fp32's for the terms of the mean: |uncond| and |w v| are at
    # most some 25.
    rounding = torch.finfo(storage).eps / 2 * x_next.double().abs() + torch.finfo(F32).eps * (
        2 * x.double().abs() + 25 * b.abs()
    )
    for name, got, leaf, share in (
        ("velocity", cond, leaves[0], w),
        ("velocity_uncond", other, leaves[1], 1 - w),
    ):
        if name == "velocity_uncond" and (w == 1.0 or cfg_grad == "cond_only"):
            assert got is None
            assert leaf.grad is None
            continue
        assert got is not None
        assert leaf.grad is not None
        assert (got.dtype, got.shape) == (leaf.grad.dtype, leaf.grad.shape)
        assert leaf.grad.abs().max() > 0
        allowed = (
            abs(share) * slope * rounding
            + torch.finfo(dtype).eps * leaf.grad.double().abs()
            + 1e-12 * slope
        )
        assert ((got.double() - leaf.grad.double()).abs() <= allowed).all(), name


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_values(
    triton_or_reference: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    dtype: torch.dtype,
    normalized: bool,
) -> None:
    """Against the formula in float64, given the noise, and torch's operations in fp32."""
    batch, shape, w, scale = 5, (2, 511), 4.0, 0.125
    seeds, advantages = (
        torch.arange(batch, device=device) - 2,
        torch.tensor([1.0, -9.0, 0.3, 9.0, 0.0]),
    )
    _, b, std = mixed_steps(batch)
    got = branch_gradient(
        seeds,
        3,
        advantages,
        b,
        std,
        shape,
        guidance_scale=w,
        scale=scale,
        adv_clip=2.0,
        normalized=normalized,
        dtype=dtype,
    )
    noise = noise_of_family(seeds, 3, shape)

    def statement(kind: torch.dtype) -> list[Tensor]:
        A, b_B, s = (
            value.to(device, kind).reshape(-1, 1, 1) for value in (advantages.clamp(-2, 2), b, std)
        )
        weight = b_B / s if normalized else 2 * b_B * s
        guided = -A * weight * noise.to(kind) * (scale / math.prod(shape))
        return [w * guided, (1 - w) * guided]

    for name, value, eager, exact in zip(
        ("velocity", "velocity_uncond"), got, statement(F32), statement(F64), strict=True
    ):
        assert value is not None
        assert value.dtype == dtype
        as_exact_as_eager(name, value, eager.to(dtype), exact)


def test_the_noise_is_that_of_the_seeds(triton_or_reference: str, device: str) -> None:
    """b = -1, s = 1, A = P: the noise, which also the reference on the CPU gives within the bound
    of `triton_random`.
    """
    seeds, steps = (
        torch.tensor([0, -1, 2**40 + 5], device=device),
        torch.tensor([0, 2**32 - 1, 7], device=device),
    )
    for numel in (1, 5, 1025):
        noise, none = branch_gradient(
            seeds, steps, torch.full((3,), float(numel)), -1.0, 1.0, (numel,), adv_clip=math.inf
        )
        assert none is None
        torch.testing.assert_close(
            noise.cpu(), gaussian_noise(seeds.cpu(), steps.cpu(), (numel,)), rtol=2.0**-20, atol=0
        )
        assert torch.equal(noise, noise_of_family(seeds, steps, (numel,)))


@given(
    batch=st.integers(1, 6),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([F32, BF16]),
    data=st.data(),
)
@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bits_do_not_depend_on_the_batch(
    triton_or_reference: str,
    device: str,
    batch: int,
    shape: list[int],
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    _, b, std = mixed_steps(batch)
    seeds, advantages = torch.arange(batch, device=device), randn(batch)

    def call(rows: list[int]) -> tuple[Tensor, Tensor | None]:
        return branch_gradient(
            seeds[rows],
            seeds[rows] + 1,
            advantages[rows],
            b[rows],
            std[rows],
            shape,
            guidance_scale=3.0,
            dtype=dtype,
        )

    rows = data.draw(st.lists(st.integers(0, batch - 1), max_size=batch, unique=True))
    for part, whole in zip(call(rows), call(list(range(batch))), strict=True):
        assert part is not None
        assert whole is not None
        assert torch.equal(part, whole[rows])


def test_forms_of_the_arguments(triton_or_reference: str, device: str) -> None:
    """Numbers, scalars, tensors here or on the CPU, strided seeds, a torch.Size: the same bits,
    where the seeds are or where asked for.
    """
    seeds, advantages = torch.arange(6, device=device), randn(6)
    wanted = branch_gradient(seeds, 3, advantages, -0.1, 0.2, (5, 3), guidance_scale=2.0)
    strided, shape = torch.stack((seeds, seeds), dim=1)[:, 0], torch.Size((5, 3))
    b, std = torch.tensor(-0.1, dtype=F64), torch.full((6,), 0.2, dtype=F64, device=device)
    for got in (
        branch_gradient(
            strided,
            torch.full((6,), 3, device=device),
            advantages.to(device),
            b,
            std,
            shape,
            guidance_scale=2.0,
        ),
        branch_gradient(
            seeds.cpu(), 3, advantages, b, std.cpu(), shape, guidance_scale=2.0, device=device
        ),
    ):
        for one, other in zip(got, wanted, strict=True):
            assert one is not None
            assert other is not None
            assert one.device.type == device
            assert torch.equal(one, other)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_row_without_noise_has_no_gradient(
    triton_or_reference: str, device: str, normalized: bool
) -> None:
    std = torch.tensor([0.1, 0.0, 0.2])
    cond, uncond = branch_gradient(
        torch.arange(3, device=device),
        0,
        torch.ones(3),
        -0.1,
        std,
        (7,),
        guidance_scale=3.0,
        normalized=normalized,
    )
    assert uncond is not None
    for gradient in (cond, uncond):
        assert gradient.isfinite().all()
        assert gradient.ne(0).any(1).tolist() == [True, False, True]


def test_empty_batch(triton_or_reference: str, device: str) -> None:
    none = torch.empty(0)
    cond, uncond = branch_gradient(
        torch.empty(0, dtype=torch.int64, device=device),
        0,
        none,
        none,
        none,
        (3, 4),
        guidance_scale=2.0,
    )
    assert uncond is not None
    assert cond.shape == uncond.shape == (0, 3, 4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_value_of_a_device_tensor_is_read(backend: str) -> None:
    if reason := unsupported_reason(backend, "branch_gradient", torch.empty(0, device="meta")):
        pytest.skip(reason)
    seeds, ones = torch.zeros(2, dtype=torch.int64, device="meta"), torch.ones(2, device="meta")
    cond, _ = branch_gradient(seeds, seeds, ones, ones, ones, (5,), backend=backend)
    assert cond.device.type == "meta"


def test_families() -> None:
    """csrc/ does not have it: forced for a call that is said, forced for all it is left to the
    others.
    """
    arguments = (torch.arange(2), 0, torch.ones(2), -0.1, 0.2, (3,))
    with pytest.raises(
        ValueError,
        match="branch_gradient: the backend 'cpp' cannot serve this call: csrc/ has",
    ):
        branch_gradient(*arguments, backend="cpp")
    assert torch.equal(branch_gradient(*arguments)[0], reference.branch_gradient(*arguments)[0])


def test_opcheck(device: str) -> None:
    if reason := unsupported_reason("triton", "branch_gradient", torch.empty(0, device=device)):
        pytest.skip(reason)
    arguments = (
        torch.arange(3, device=device),
        torch.arange(3, device=device),
        randn(3, device=device),
    )
    for needs_uncond, dtype in ((True, BF16), (False, F32)):
        torch.library.opcheck(
            operation("triton", "branch_gradient"), (*arguments, [4, 5], 3.0, needs_uncond, dtype)
        )


def test_compiles_without_a_graph_break(triton_or_reference: str, device: str) -> None:
    seeds, advantages, step = (
        torch.arange(3, device=device),
        randn(3, device=device),
        [value.to(device) for value in mixed_steps(3)],
    )

    def call(seeds: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor | None]:
        return branch_gradient(
            seeds, 2 * seeds, advantages, *step[1:], (4, 5), guidance_scale=3.0, scale=0.25
        )

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(seeds, advantages), call(seeds, advantages), strict=True):
        assert got is not None
        assert wanted is not None
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seeds": torch.zeros(2)},
            r"seeds: expected an int64 tensor \[B\], got torch.float32 \[2\]",
        ),
        ({"seeds": None}, "seeds: .* got NoneType None"),
        ({"step": -1}, "step: .* got -1"),
        ({"step": torch.arange(3)}, r"step: .* \[2\], got torch.int64 \[3\]"),
        (
            {"advantages": torch.zeros(3)},
            r"advantages: expected a float tensor \[2\], got torch.float32 \[3\]",
        ),
        (
            {"b": torch.zeros(3)},
            r"b: expected a number or a float tensor \[2\], got torch.float32 \[3\]",
        ),
        ({"std": -0.1}, r"std: expected values of 0 or above, got \[-0.1\]"),
        ({"shape": (3, 0)}, r"shape: expected positive sizes of one sample, got \(3, 0\)"),
        ({"shape": ()}, r"shape: .* got \(\)"),
        ({"guidance_scale": math.nan}, "guidance_scale: .* finite, got float nan"),
        ({"scale": math.inf}, "scale: .* finite, got float inf"),
        ({"adv_clip": 0.0}, "adv_clip: expected a number above 0, got float 0.0"),
        ({"dtype": torch.int32}, "dtype: expected a float dtype, got torch.int32"),
        ({"cfg_grad": "uncond"}, "cfg_grad: expected one of both, cond_only, got 'uncond'"),
    ],
)
def test_bad_arguments(
    triton_or_reference: str, device: str, change: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {
        "seeds": torch.arange(2),
        "step": 0,
        "advantages": torch.zeros(2),
        "b": -0.1,
        "std": 0.1,
        "shape": (3,),
    }
    with pytest.raises(ValueError, match=message):
        branch_gradient(**(good | change), device=device)
