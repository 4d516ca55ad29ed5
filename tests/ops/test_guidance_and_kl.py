"""guided_velocity and gaussian_kl, which are plain PyTorch in every backend."""

from __future__ import annotations

import pytest
import torch
from fastgrpo_kernels import gaussian_kl, guided_velocity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# method.md's test vectors: (b, std) of dance at steps 0, 4, 8, 12, 15.
TABLE = torch.tensor(
    [
        (-0.01316, 0.05735),
        (-0.02101, 0.07217),
        (-0.03883, 0.09731),
        (-0.09598, 0.14940),
        (-0.34375, 0.25000),
    ],
    dtype=torch.float64,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def mixed_steps(batch: int) -> tuple[Tensor, Tensor]:
    rows = TABLE[torch.arange(batch) % len(TABLE)]
    return rows[:, 0], rows[:, 1]


def test_guided_velocity() -> None:
    cond, uncond = (
        randn(3, 4, seed=1, dtype=torch.bfloat16),
        randn(3, 4, seed=2, dtype=torch.bfloat16),
    )
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
        assert torch.equal(leaves[0].grad, torch.full((3, 4), 5.0))  # type: ignore[arg-type]
        if to_uncond is None:
            assert leaves[1].grad is None
        else:
            assert torch.equal(leaves[1].grad, torch.full((3, 4), to_uncond))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kl_is_that_of_two_gaussians(dtype: torch.dtype) -> None:
    batch, shape = 6, (4, 9)
    v, ref = (
        randn(batch, *shape, seed=2, dtype=dtype).requires_grad_(),
        randn(batch, *shape, seed=3, dtype=dtype),
    )
    b, std = mixed_steps(batch)
    got = gaussian_kl(v, ref.requires_grad_(), b, std)
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
    v, ref = (
        randn(3, 5, dtype=torch.float64, seed=3).requires_grad_(),
        randn(3, 5, dtype=torch.float64, seed=4),
    )
    assert torch.autograd.gradcheck(lambda v: gaussian_kl(v, ref, *mixed_steps(3)), (v,))


@given(batch=st.integers(1, 9), numel=st.integers(1, 300), data=st.data())
@settings(deadline=None, max_examples=20)
def test_kl_of_a_sample_hardly_depends_on_the_batch(
    batch: int, numel: int, data: st.DataObject
) -> None:
    """Its sum is float64's, in no fixed order: at most the last rounding to fp32 can show."""
    v, ref = randn(batch, numel, seed=1), randn(batch, numel, seed=2)
    b, std = mixed_steps(batch)
    rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch, unique=True))
    part, whole = (
        gaussian_kl(v[rows], ref[rows], b[rows], std[rows]),
        gaussian_kl(v, ref, b, std)[rows],
    )
    torch.testing.assert_close(part, whole, rtol=2.0**-23, atol=0)


def test_kl_of_nothing_and_on_meta() -> None:
    empty = torch.empty(0, 3, 4)
    assert gaussian_kl(empty, empty, 1.0, 0.2).shape == (0,)
    v, ones = torch.zeros(2, 5, device="meta"), torch.ones(2, device="meta")
    assert gaussian_kl(v, v, ones, ones).shape == (2,)


def test_bad_velocities() -> None:
    velocity = torch.zeros(2, 3)
    with pytest.raises(
        ValueError,
        match=r"velocity_ref: expected a float tensor \[2, 3\], got torch.float32 \[2, 2\]",
    ):
        gaussian_kl(velocity, torch.zeros(2, 2), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"std: expected values of 0 or above, got \[-1.0\]"):
        gaussian_kl(velocity, velocity, 1.0, -1.0)
    with pytest.raises(
        ValueError,
        match=r"velocity: expected a float tensor with the batch first, got torch.int64",
    ):
        guided_velocity(velocity.long())
    with pytest.raises(
        ValueError, match=r"cfg_grad: expected one of both, cond_only, got 'uncond'"
    ):
        guided_velocity(velocity, velocity, 2.0, cfg_grad="uncond")
    with pytest.raises(
        ValueError, match=r"velocity_uncond: expected a tensor for guidance_scale 2.0, got None"
    ):
        guided_velocity(velocity, guidance_scale=2.0)
