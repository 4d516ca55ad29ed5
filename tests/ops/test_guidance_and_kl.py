"""guided_velocity and gaussian_kl, which are plain PyTorch in every backend, and `describe`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastgrpo_kernels import gaussian_kl, guided_velocity
from fastgrpo_kernels.checks import describe
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import BF16, F16, F32, F64, mixed_steps, randn
from torch import Tensor


def test_guided_velocity() -> None:
    cond, uncond = (randn(3, 4, seed=seed, dtype=BF16) for seed in (1, 2))
    got = guided_velocity(cond, uncond, 5.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), 5 * cond.double() - 4 * uncond.double(), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(guided_velocity(cond), cond.float())
    assert torch.equal(guided_velocity(cond, cond, 7.5), cond.float())
    assert guided_velocity(cond.double(), uncond.double(), 2.0).dtype == torch.float64
    for cfg_grad, to_uncond in (("both", -4.0), ("cond_only", None)):
        leaves = cond.float().requires_grad_(), uncond.float().requires_grad_()
        guided_velocity(*leaves, 5.0, cfg_grad=cfg_grad).sum().backward()
        assert leaves[0].grad.eq(5.0).all()
        assert (leaves[1].grad is None) == (to_uncond is None)
        assert to_uncond is None or leaves[1].grad.eq(to_uncond).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_kl_is_that_of_two_gaussians(dtype: torch.dtype) -> None:
    batch, shape = 6, (4, 9)
    v, ref = (randn(batch, *shape, seed=seed, dtype=dtype).requires_grad_() for seed in (2, 3))
    _, b, std = mixed_steps(batch)
    got = gaussian_kl(v, ref, b, std)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ours, theirs = (
        torch.distributions.Normal(
            b[:, None, None] * velocity.detach().double(), std[:, None, None].expand(batch, *shape)
        )
        for velocity in (v, ref)
    )
    exact = torch.distributions.kl_divergence(ours, theirs).flatten(1).mean(1)
    near = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=near, atol=0)
    assert not gaussian_kl(v, v, b, std).any()
    got.sum().backward()
    assert v.grad is not None
    assert ref.grad is None
    std_with_ode = std.clone()
    std_with_ode[2] = 0.0
    assert gaussian_kl(v, ref, b, std_with_ode).isnan().nonzero().flatten().tolist() == [2]


def test_kl_gradcheck() -> None:
    v, ref = (randn(3, 5, seed=seed, dtype=F64) for seed in (3, 4))
    _, b, std = mixed_steps(3)
    assert torch.autograd.gradcheck(lambda v: gaussian_kl(v, ref, b, std), v.requires_grad_())


@given(batch=st.integers(1, 9), numel=st.integers(1, 300), data=st.data())
@settings(deadline=None, max_examples=20)
def test_kl_of_a_sample_hardly_depends_on_the_batch(
    batch: int, numel: int, data: st.DataObject
) -> None:
    """Its sum is a float64 one, in no fixed order: at most the last rounding to fp32 shows."""
    v, ref = randn(batch, numel, seed=1), randn(batch, numel, seed=2)
    _, b, std = mixed_steps(batch)
    rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch, unique=True))
    part, whole = gaussian_kl(v[rows], ref[rows], b[rows], std[rows]), gaussian_kl(v, ref, b, std)
    torch.testing.assert_close(part, whole[rows], rtol=2.0**-23, atol=0)


def test_kl_of_nothing_and_on_meta() -> None:
    empty = torch.empty(0, 3, 4)
    assert gaussian_kl(empty, empty, 1.0, 0.2).shape == (0,)
    v, ones = torch.zeros(2, 5, device="meta"), torch.ones(2, device="meta")
    assert gaussian_kl(v, v, ones, ones).shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda v: gaussian_kl(v, torch.zeros(2, 2), 1.0, 1.0),
            r"velocity_ref: expected a float tensor \[2, 3\], got torch.float32 \[2, 2\]",
        ),
        (lambda v: gaussian_kl(v, v, 1.0, -1.0), r"std: expected values of 0 or above, got \[-1"),
        (
            lambda v: guided_velocity(v.long()),
            r"velocity: expected a float tensor with the batch first, got torch.int64",
        ),
        (
            lambda v: guided_velocity(v, v, 2.0, cfg_grad="uncond"),
            "cfg_grad: expected one of both, cond_only, got 'uncond'",
        ),
        (
            lambda v: guided_velocity(v, guidance_scale=2.0),
            "velocity_uncond: expected a tensor for guidance_scale 2.0, got None",
        ),
    ],
)
def test_bad_velocities(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


def test_tensors_by_dtype_and_shape_and_all_else_by_type_and_value() -> None:
    assert describe(torch.zeros(2, 3, dtype=torch.int32)) == "torch.int32 [2, 3]"
    assert describe(torch.tensor(1.0)) == "torch.float32 []"
    assert describe("7") == "str '7'"
    assert describe(None) == "NoneType None"
