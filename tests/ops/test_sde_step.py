"""sde_step, sde_log_prob, guided_velocity and gaussian_kl against float64 statements, and the promises about bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastgrpo_kernels import gaussian_kl, gaussian_noise, grpo_loss, guided_velocity, sde_log_prob, sde_step
from hypothesis import given, settings
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
STORAGE = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixed_steps(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [B] of a batch that mixes steps."""
    rows = TABLE[torch.arange(batch) % len(TABLE)]
    return rows[:, 0], rows[:, 1], rows[:, 2]


def column(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (like.dim() - 1))


def exact_mean(x: Tensor, v: Tensor, a: Tensor, b: Tensor, uncond: Tensor | None = None, w: float = 1.0) -> Tensor:
    """a x + b v in float64, v guided as the textbook has it: (1 - w) v_uncond + w v_cond."""
    x, v = x.double(), v.double()
    if uncond is not None:
        v = (1 - w) * uncond.double() + w * v
    return column(a, x) * x + column(b, x) * v


def exact_log_prob(x_next: Tensor, mean: Tensor, std: Tensor, normalized: bool = True) -> Tensor:
    """Mean log-density over a sample's elements, by torch.distributions, or cps' bare squared error."""
    if normalized:
        log_density = torch.distributions.Normal(mean, column(std, mean)).log_prob(x_next.double())
    else:
        log_density = -(x_next.double() - mean).square()
    return log_density.flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("guidance_scale", [None, 1.0, 5.0])
@pytest.mark.parametrize("dtype", STORAGE)
def test_step_and_log_prob_values(dtype: torch.dtype, guidance_scale: float | None, normalized: bool) -> None:
    batch, shape = 7, (4, 3, 5)
    x, v = randn(batch, *shape, seed=1, dtype=dtype), randn(batch, *shape, seed=2, dtype=dtype)
    guidance: dict[str, Any] = {}
    if guidance_scale is not None:
        guidance = {"velocity_uncond": randn(batch, *shape, seed=3, dtype=dtype), "guidance_scale": guidance_scale}
    a, b, std = mixed_steps(batch)
    seeds, steps = torch.arange(batch) * 11, torch.arange(batch)
    got, log_probs = sde_step(x, v, a, b, std, seeds=seeds, step=steps, normalized=normalized, **guidance)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    assert (log_probs.dtype, log_probs.shape) == (torch.float64 if dtype == torch.float64 else torch.float32, (batch,))
    mean = exact_mean(x, v, a, b, guidance.get("velocity_uncond"), guidance.get("guidance_scale", 1.0))
    exact = mean + column(std, x) * gaussian_noise(seeds, steps, shape).double()
    # Half an ulp of the storage, beside fp32's own error.
    near = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 1e-5 + 0.5 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), exact, rtol=near, atol=near)
    near = 1e-11 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(log_probs.double(), exact_log_prob(got, mean, std, normalized), rtol=near, atol=near)


def test_log_prob_by_hand() -> None:
    """x = 1, v = 2, a = 0.5, b = -0.25: mean 0; x' = 1 at std 0.5: -2 - ln 0.5 - ln(2 pi) / 2."""
    x, v, x_next = torch.ones(1, 3), torch.full((1, 3), 2.0), torch.ones(1, 3)
    got = sde_log_prob(x, x_next, v, 0.5, -0.25, 0.5)
    assert got.item() == pytest.approx(-2.0 + math.log(2.0) - 0.5 * math.log(2.0 * math.pi), rel=1e-6)
    assert sde_log_prob(x, x_next, v, 0.5, -0.25, 0.5, normalized=False).item() == -1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_scalars_and_tensors_give_the_same_bits(dtype: torch.dtype) -> None:
    batch = 5
    x, v = randn(batch, 33, seed=1, dtype=dtype), randn(batch, 33, seed=2)
    a, b, std = (value.item() for value in TABLE[2])
    seeds = torch.arange(batch)
    wanted = sde_step(x, v, a, b, std, seeds=seeds, step=3)
    forms = [
        tuple(TABLE[2]),  # what table.a[i] gives: scalar float64 tensors
        tuple(value.expand(batch) for value in TABLE[2]),
        tuple(value.float().expand(batch) for value in TABLE[2]),
        (a, TABLE[2, 1], TABLE[2, 2].repeat(batch)),
    ]
    for form in forms:
        got = sde_step(x, v, *form, seeds=seeds, step=torch.full((batch,), 3))
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


def test_guided_velocity() -> None:
    cond, uncond = randn(3, 4, seed=1, dtype=torch.bfloat16), randn(3, 4, seed=2, dtype=torch.bfloat16)
    got = guided_velocity(cond, uncond, 5.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), 5 * cond.double() - 4 * uncond.double(), rtol=1e-6, atol=1e-6)
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


def test_the_ops_use_guided_velocity() -> None:
    x, cond, uncond = (randn(4, 21, seed=seed) for seed in range(3))
    a, b, std = mixed_steps(4)
    seeds = torch.arange(4)
    inside = sde_step(x, cond, a, b, std, seeds=seeds, step=1, velocity_uncond=uncond, guidance_scale=5.0)
    outside = sde_step(x, guided_velocity(cond, uncond, 5.0), a, b, std, seeds=seeds, step=1)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


# -------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("dtype", STORAGE)
def test_stored_transition_gives_the_bits_of_the_rollout(dtype: torch.dtype, guided: bool, normalized: bool) -> None:
    for shape in ((1,), (3,), (17,), (96, 8, 1, 1), (5, 7, 11)):
        x, v, uncond = (randn(6, *shape, seed=seed, dtype=dtype) for seed in range(3))
        options: dict[str, Any] = {"normalized": normalized}
        if guided:
            options |= {"velocity_uncond": uncond, "guidance_scale": 4.5}
        a, b, std = mixed_steps(6)
        x_next, log_probs = sde_step(x, v, a, b, std, seeds=torch.arange(6), step=9, **options)
        v.requires_grad_()  # as in training
        again = sde_log_prob(x, x_next, v, a, b, std, **options)
        assert again.requires_grad
        assert torch.equal(again.detach(), log_probs)


def test_log_prob_is_taken_from_the_rounded_latents() -> None:
    """In bf16 the rounding is as large as the noise: a log-prob of the unrounded x' would differ visibly."""
    x, v = randn(4, 500, seed=1, dtype=torch.bfloat16) * 20, randn(4, 500, seed=2)
    seeds = torch.arange(4)
    a, b, std = 1.0, -0.01, 0.05
    x_next, log_probs = sde_step(x, v, a, b, std, seeds=seeds, step=0)
    mean = exact_mean(x, v, torch.tensor([a] * 4), torch.tensor([b] * 4))
    stds = torch.tensor([std] * 4, dtype=torch.float64)
    torch.testing.assert_close(log_probs.double(), exact_log_prob(x_next, mean, stds), rtol=1e-4, atol=0)
    unrounded = exact_log_prob(mean + std * gaussian_noise(seeds, 0, (500,)).double(), mean, stds)
    assert ((log_probs - unrounded).abs() > 0.01).all()


def rollout_and_training(x: Tensor, v: Tensor, uncond: Tensor, rows: list[int]) -> list[Tensor]:
    """Everything per-sample that the ops give for these rows of a batch, gradients included."""
    a, b, std = (value[rows] for value in mixed_steps(len(x)))
    x, v, uncond = x[rows], v[rows].detach().requires_grad_(), uncond[rows].detach().requires_grad_()
    seeds = torch.tensor(rows, dtype=torch.int64)
    options: dict[str, Any] = {"velocity_uncond": uncond, "guidance_scale": 3.0}
    x_next, log_probs = sde_step(x, v, a, b, std, seeds=seeds, step=seeds + 2, **options)
    again = sde_log_prob(x, x_next, v, a, b, std, **options)
    kl = gaussian_kl(v, uncond, b, std)
    gradients = torch.autograd.grad(again.sum() + kl.sum(), (v, uncond))
    return [x_next, log_probs, again.detach(), kl.detach(), *gradients]


@given(
    batch=st.integers(1, 21),
    shape=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
@settings(deadline=None, max_examples=120)
def test_bits_do_not_depend_on_the_batch(batch: int, shape: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    x, v, uncond = (randn(batch, *shape, seed=seed, dtype=dtype) for seed in range(3))
    whole = rollout_and_training(x, v, uncond, list(range(batch)))
    rows = data.draw(st.lists(st.integers(0, batch - 1), max_size=batch, unique=True))  # a part, in any order
    for part, full in zip(rollout_and_training(x, v, uncond, rows), whole, strict=True):
        assert torch.equal(part, full[rows])


@pytest.mark.parametrize("numel", [767, 768, 4097, 40_000, 262_145])
def test_bits_do_not_depend_on_the_batch_at_real_sizes(numel: int) -> None:
    x, v, uncond = (randn(4, numel, seed=seed) for seed in range(3))
    whole = rollout_and_training(x, v, uncond, [0, 1, 2, 3])
    for rows in ([0], [3], [1, 2], [2, 0, 1]):
        for part, full in zip(rollout_and_training(x, v, uncond, rows), whole, strict=True):
            assert torch.equal(part, full[rows])


@pytest.mark.usefixtures("two_threads")
def test_bits_do_not_depend_on_threads() -> None:
    """torch.sum fails this: with two threads it splits the sum of one large sample, but not those of a batch."""
    x, v, uncond = (randn(4, 262_145, seed=seed) for seed in range(3))
    batches = ([0, 1, 2, 3], [0], [1], [2], [3])
    two = [rollout_and_training(x, v, uncond, rows) for rows in batches]
    torch.set_num_threads(1)
    whole = rollout_and_training(x, v, uncond, batches[0])
    for rows, results in zip(batches, two, strict=True):
        for part, full in zip(results, whole, strict=True):
            assert torch.equal(part, full[rows])


def test_bits_do_not_depend_on_strides() -> None:
    x, v, uncond = (randn(5, 6, 7, seed=seed) for seed in range(3))
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (x, v, uncond)]
    every_other = [torch.stack((tensor, tensor + 1), dim=1).flatten(0, 1)[::2] for tensor in (x, v, uncond)]
    wanted = rollout_and_training(x, v, uncond, [4, 1, 0])
    a, b, std = mixed_steps(5)
    dense = sde_step(x, v, a, b, std, seeds=torch.arange(5), step=0)
    for tensors in (strided, every_other):
        assert not all(tensor.is_contiguous() for tensor in tensors)
        got = sde_step(tensors[0], tensors[1], a, b, std, seeds=torch.arange(5), step=0)
        assert torch.equal(got[0], dense[0])
        assert torch.equal(got[1], dense[1])
        for one, other in zip(rollout_and_training(*tensors, [4, 1, 0]), wanted, strict=True):
            assert torch.equal(one, other)
    expanded = x[:1].expand(5, 6, 7)  # the same first noise for a whole group
    assert torch.equal(
        sde_step(expanded, v, a, b, std, seeds=torch.arange(5), step=0)[1],
        sde_step(expanded.contiguous(), v, a, b, std, seeds=torch.arange(5), step=0)[1],
    )


def test_a_sample_with_nan_leaves_the_others_alone() -> None:
    x, v = randn(3, 50, seed=1), randn(3, 50, seed=2)
    a, b, std = mixed_steps(3)
    clean = sde_step(x, v, a, b, std, seeds=torch.arange(3), step=0)
    v[1, 7] = math.nan
    spoilt = sde_step(x, v, a, b, std, seeds=torch.arange(3), step=0)
    assert torch.equal(spoilt[0][[0, 2]], clean[0][[0, 2]])
    assert torch.equal(spoilt[1][[0, 2]], clean[1][[0, 2]])
    assert spoilt[1][1].isnan()


# -------------------------------------------------------------------------------------------------- corner cases


@pytest.mark.parametrize("normalized", [True, False])
def test_rows_without_noise_are_ode_steps(normalized: bool) -> None:
    x, v = randn(3, 40, seed=1), randn(3, 40, seed=2).requires_grad_()
    a, b, std = (value.clone() for value in mixed_steps(3))
    a[1], b[1], std[1] = 1.0, -0.25, 0.0
    x_next, log_probs = sde_step(x, v, a, b, std, seeds=torch.arange(3), step=0, normalized=normalized)
    torch.testing.assert_close(x_next[1], x[1] - 0.25 * v[1].detach(), rtol=1e-6, atol=1e-6)
    assert log_probs.isnan().tolist() == [False, True, False]
    again = sde_log_prob(x, x_next, v, a, b, std, normalized=normalized)
    assert torch.equal(again[[0, 2]].detach(), log_probs[[0, 2]])
    assert again[1].isnan()
    again.sum().backward()  # the NaN stays in the value: no gradient from row 1, the others' as without it
    alone = v.detach()[[0, 2]].requires_grad_()
    kept = [value[[0, 2]] for value in (a, b, std)]
    sde_log_prob(x[[0, 2]], x_next[[0, 2]], alone, *kept, normalized=normalized).sum().backward()
    assert v.grad is not None
    assert alone.grad is not None
    assert torch.equal(v.grad[[0, 2]], alone.grad)
    assert not v.grad[1].any()


def test_empty_batch() -> None:
    empty, none = torch.empty(0, 3, 4), torch.empty(0)
    seeds = torch.empty(0, dtype=torch.int64)
    for a, b, std in ((1.0, -0.1, 0.2), (none, none, none)):
        x_next, log_probs = sde_step(empty, empty, a, b, std, seeds=seeds, step=0)
        assert x_next.shape == (0, 3, 4)
        assert log_probs.shape == (0,)
        assert sde_log_prob(empty, empty, empty, a, b, std).shape == (0,)
        assert gaussian_kl(empty, empty, b, std).shape == (0,)


def test_no_value_of_a_device_tensor_is_read() -> None:
    """On the meta device, where reading a value is an error: so on a GPU the host never waits."""
    x, v, uncond, old = (torch.zeros(2, 5, device="meta") for _ in range(4))
    seeds, ones = torch.zeros(2, dtype=torch.int64, device="meta"), torch.ones(2, device="meta")
    for coefficients in ((ones, ones, ones), (1.0, -0.1, 0.2)):
        x_next, log_probs = sde_step(x, v, *coefficients, seeds=seeds, step=seeds, velocity_uncond=uncond, guidance_scale=2.0)
        assert x_next.device.type == log_probs.device.type == "meta"
        loss, _ = grpo_loss(x, old, v, log_probs, ones, *coefficients)
        assert loss.device.type == "meta"
        assert gaussian_kl(v, uncond, *coefficients[1:]).shape == (2,)


def test_rollout_takes_no_gradient() -> None:
    x, v = randn(2, 5).requires_grad_(), randn(2, 5).requires_grad_()
    x_next, log_probs = sde_step(x, v, 1.0, -0.1, 0.2, seeds=torch.arange(2), step=0)
    assert not x_next.requires_grad
    assert not log_probs.requires_grad


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("cfg_grad", ["both", "cond_only"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_both_branches(dtype: torch.dtype, cfg_grad: str, normalized: bool) -> None:
    """Against autograd of the float64 statement, and against method.md's closed form."""
    batch, shape, w = 5, (3, 7), 4.0
    x, x_next = randn(batch, *shape, seed=1, dtype=dtype), randn(batch, *shape, seed=2, dtype=dtype)
    v = randn(batch, *shape, seed=3, dtype=dtype).requires_grad_()
    uncond = randn(batch, *shape, seed=4, dtype=dtype).requires_grad_()
    a, b, std = mixed_steps(batch)
    weights = torch.linspace(-1.0, 2.0, batch, dtype=torch.float64)
    options: dict[str, Any] = {"cfg_grad": cfg_grad, "normalized": normalized}
    got = sde_log_prob(x, x_next, v, a, b, std, velocity_uncond=uncond, guidance_scale=w, **options)
    (got * weights.to(got.dtype)).sum().backward()

    v64, uncond64 = v.detach().double().requires_grad_(), uncond.detach().double().requires_grad_()
    mean = exact_mean(x, v64, a, b, uncond64, w)
    (exact_log_prob(x_next, mean, std, normalized) * weights).sum().backward()
    near = {torch.float64: 1e-11, torch.float32: 2e-4}.get(dtype, 1e-2)
    assert v.grad is not None
    assert v64.grad is not None
    scale = v64.grad.abs().max().item()
    torch.testing.assert_close(v.grad.double(), v64.grad, rtol=near, atol=near * scale)
    if cfg_grad == "cond_only":
        assert uncond.grad is None
    else:
        assert uncond.grad is not None
        assert uncond64.grad is not None
        torch.testing.assert_close(uncond.grad.double(), uncond64.grad, rtol=near, atol=near * scale)
    error = x_next.double() - mean.detach()
    numel = math.prod(shape)
    closed = column(b, x) * error * (2 / numel if not normalized else 1 / (numel * column(std, x) ** 2))
    torch.testing.assert_close(v64.grad, w * closed * column(weights, x), rtol=1e-10, atol=1e-10 * scale)


def test_gradcheck() -> None:
    x, x_next = randn(3, 5, dtype=torch.float64, seed=1), randn(3, 5, dtype=torch.float64, seed=2)
    a, b, std = mixed_steps(3)
    v = randn(3, 5, dtype=torch.float64, seed=3).requires_grad_()
    uncond = randn(3, 5, dtype=torch.float64, seed=4).requires_grad_()

    def log_prob(v: Tensor, uncond: Tensor) -> Tensor:
        return sde_log_prob(x, x_next, v, a, b, std, velocity_uncond=uncond, guidance_scale=2.5)

    def divergence(v: Tensor) -> Tensor:
        return gaussian_kl(v, uncond.detach(), b, std)

    assert torch.autograd.gradcheck(log_prob, (v, uncond))
    assert torch.autograd.gradgradcheck(log_prob, (v, uncond))
    assert torch.autograd.gradcheck(divergence, (v,))


def test_latents_and_coefficients_are_data() -> None:
    x, x_next, v = (randn(2, 5, seed=seed).requires_grad_() for seed in range(3))
    std = torch.tensor([0.1, 0.2], requires_grad=True)
    sde_log_prob(x, x_next, v, 1.0, -0.1, std).sum().backward()
    assert v.grad is not None
    assert x.grad is None
    assert x_next.grad is None
    assert std.grad is None


@pytest.mark.parametrize("dtype", STORAGE)
def test_kl_is_that_of_two_gaussians(dtype: torch.dtype) -> None:
    batch, shape = 6, (4, 9)
    x = randn(batch, *shape, seed=1, dtype=torch.float64)
    v, ref = randn(batch, *shape, seed=2, dtype=dtype).requires_grad_(), randn(batch, *shape, seed=3, dtype=dtype)
    a, b, std = mixed_steps(batch)
    got = gaussian_kl(v, ref.requires_grad_(), b, std)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ours, theirs = (torch.distributions.Normal(exact_mean(x, velocity.detach(), a, b), column(std, x)) for velocity in (v, ref))
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


# ---------------------------------------------------------------------------------------------------- bad input

GOOD: dict[str, Any] = {
    "latents": torch.zeros(2, 3),
    "velocity": torch.zeros(2, 3),
    "a": 1.0,
    "b": -0.1,
    "std": 0.1,
}
SHARED = [
    ({"latents": torch.zeros(2, 3).int()}, "latents: expected a float tensor with the batch first, came torch.int32"),
    ({"latents": torch.tensor(1.0)}, r"latents: .* came torch.float32 \[\]"),
    ({"latents": [[0.0]]}, r"latents: .* came list \[\[0.0\]\]"),
    ({"latents": torch.zeros(2, 0)}, r"latents: expected at least one element per sample, came shape \[2, 0\]"),
    ({"velocity": torch.zeros(2, 4)}, r"velocity: expected a float tensor \[2, 3\], came torch.float32 \[2, 4\]"),
    ({"velocity": torch.zeros(1, 3)}, r"velocity: .* came torch.float32 \[1, 3\]"),
    ({"velocity": torch.zeros(2, 3).long()}, r"velocity: .* came torch.int64"),
    ({"velocity": torch.zeros(2, 3, device="meta")}, "velocity: expected it on cpu, came on meta"),
    ({"velocity_uncond": torch.zeros(3)}, r"velocity_uncond: expected a float tensor \[2, 3\], came .* \[3\]"),
    ({"guidance_scale": 5.0}, "velocity_uncond: expected a tensor for guidance_scale 5.0, came None"),
    ({"velocity_uncond": torch.zeros(2, 3), "guidance_scale": math.nan}, "guidance_scale: .* finite, came float nan"),
    ({"velocity_uncond": torch.zeros(2, 3), "guidance_scale": "5"}, "guidance_scale: .* came str '5'"),
    ({"a": torch.zeros(3)}, r"a: expected a number or a float tensor \[2\], came torch.float32 \[3\]"),
    ({"b": torch.zeros(2, 1)}, r"b: expected a number or a float tensor \[2\], came torch.float32 \[2, 1\]"),
    ({"a": torch.zeros(2).int()}, r"a: .* came torch.int32 \[2\]"),
    ({"b": "x"}, "b: expected a number or a float tensor .* came str 'x'"),
    ({"a": True}, "a: .* came bool True"),
    ({"a": math.inf}, r"a: expected finite values, came \[inf\]"),
    ({"b": torch.tensor([0.0, math.nan])}, r"b: expected finite values, came \[0.0, nan\]"),
    ({"std": -0.5}, r"std: expected values of 0 or above, came \[-0.5\]"),
    ({"std": torch.tensor([0.5, -0.5])}, r"std: expected values of 0 or above, came \[0.5, -0.5\]"),
    ({"std": torch.tensor(-1.0)}, r"std: expected values of 0 or above, came \[-1.0\]"),
]


@pytest.mark.parametrize(("change", "message"), SHARED)
def test_bad_arguments_of_both_ops(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sde_step(**(GOOD | {"seeds": torch.arange(2), "step": 0} | change))
    with pytest.raises(ValueError, match=message):
        sde_log_prob(**(GOOD | {"next_latents": torch.zeros(2, 3)} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": torch.arange(3)}, r"seeds: expected one per sample, \[2\], came torch.int64 \[3\]"),
        ({"seeds": torch.zeros(2)}, r"seeds: expected an int64 tensor \[B\], came torch.float32 \[2\]"),
        ({"seeds": None}, "seeds: .* came NoneType None"),
        ({"step": -1}, "step: .* came -1"),
        ({"step": torch.arange(3)}, r"step: .* \[2\], came torch.int64 \[3\]"),
    ],
)
def test_bad_noise_keys(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sde_step(**(GOOD | {"seeds": torch.arange(2), "step": 0} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next_latents": torch.zeros(2, 4)}, r"next_latents: expected a float tensor \[2, 3\], came .* \[2, 4\]"),
        ({"next_latents": torch.zeros(2, 3).bfloat16()}, "next_latents: expected the dtype of latents, torch.float32"),
        ({"cfg_grad": "none"}, "cfg_grad: expected one of both, cond_only, came 'none'"),
    ],
)
def test_bad_stored_transition(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sde_log_prob(**(GOOD | {"next_latents": torch.zeros(2, 3)} | change))


def test_bad_velocities() -> None:
    velocity = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"velocity_ref: expected a float tensor \[2, 3\], came torch.float32 \[2, 2\]"):
        gaussian_kl(velocity, torch.zeros(2, 2), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"std: expected values of 0 or above, came \[-1.0\]"):
        gaussian_kl(velocity, velocity, 1.0, -1.0)
    with pytest.raises(ValueError, match=r"velocity: expected a float tensor with the batch first, came torch.int64"):
        guided_velocity(velocity.long())
    with pytest.raises(ValueError, match=r"cfg_grad: expected one of both, cond_only, came 'uncond'"):
        guided_velocity(velocity, velocity, 2.0, cfg_grad="uncond")
    with pytest.raises(ValueError, match=r"velocity_uncond: expected a tensor for guidance_scale 2.0, came None"):
        guided_velocity(velocity, guidance_scale=2.0)
