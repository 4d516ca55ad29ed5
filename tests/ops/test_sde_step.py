"""sde_step in every backend: values against float64, x' to the bit, and the promises about bits,
rows, threads and strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastgrpo_kernels import gaussian_noise, grpo_loss, guided_velocity, sde_log_prob, sde_step
from fastgrpo_kernels.dispatch import operation, unsupported_reason
from fastgrpo_kernels.sde import reference
from fastgrpo_kernels.sde.transition import finish_log_probs
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
few_examples = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(
        device, dtype
    )


def mixed_steps(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [B] of a batch that mixes steps: fp32 values in float64, on the CPU."""
    rows = TABLE[torch.arange(batch) % len(TABLE)].float().double()
    return rows[:, 0], rows[:, 1], rows[:, 2]


def column(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def statement(
    x: Tensor,
    v: Tensor,
    uncond: Tensor | None,
    w: float,
    step: tuple[Tensor, Tensor, Tensor],
    noise: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Mean and unrounded x', by torch's operations in one dtype, each rounded on its own."""
    x, v = x.to(dtype), v.to(dtype)
    if uncond is not None:
        v = uncond.to(dtype) + w * (v - uncond.to(dtype))
    mean = column(step[0], x) * x + column(step[1], x) * v
    return mean, mean + column(step[2], x) * noise.to(dtype)


def textbook_log_prob(x_next: Tensor, mean: Tensor, std: Tensor, normalized: bool) -> Tensor:
    """Mean log-density over a sample's elements, by torch.distributions, or cps' bare squared
    error; in the mean's dtype.
    """
    if normalized:
        density = torch.distributions.Normal(mean, column(std, mean), validate_args=False).log_prob(
            x_next.to(mean.dtype)
        )
    else:
        density = -(x_next.to(mean.dtype) - mean).square()
    return density.flatten(1).mean(1)


def noise_of_family(seeds: Tensor, steps: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """The noise itself: a step from 0 to 0 with std 1."""
    zeros = torch.zeros(len(seeds), *shape, device=seeds.device)
    return sde_step(zeros, zeros, 0.0, 0.0, 1.0, seeds=seeds, step=steps)[0]


# -------- values


@pytest.mark.parametrize("guidance_scale", [None, 1.0, 5.0])
@pytest.mark.parametrize(
    ("storage", "velocity_dtype"), [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16), (BF16, F32)]
)
def test_values(
    backend: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    storage: torch.dtype,
    velocity_dtype: torch.dtype,
    guidance_scale: float | None,
) -> None:
    """x' has the bits of the formula in torch's own operations, given the noise; its
    log-probability is as exact as theirs.
    """
    batch, shape, w = 5, (3, 7, 5), guidance_scale or 1.0
    x, v, uncond = (
        randn(batch, *shape, seed=seed, dtype=dtype, device=device)
        for seed, dtype in enumerate([storage, *[velocity_dtype] * 2])
    )
    guidance: dict[str, Any] = (
        {} if guidance_scale is None else {"velocity_uncond": uncond, "guidance_scale": w}
    )
    step, seeds = mixed_steps(batch), torch.arange(batch, device=device) * 11
    noise = noise_of_family(seeds, seeds + 2, shape)
    inputs = (x, v, guidance.get("velocity_uncond"), w, step, noise)
    (mean, eager), (mean64, exact) = statement(*inputs, F32), statement(*inputs, F64)
    for normalized in (True, False):
        got, log_probs = sde_step(
            x, v, *step, seeds=seeds, step=seeds + 2, normalized=normalized, **guidance
        )
        assert torch.equal(got, eager.to(storage))
        as_exact_as_eager("next_latents", got, eager.to(storage), exact)
        eager_log_probs, exact_log_probs = (
            textbook_log_prob(got, m, step[2], normalized) for m in (mean, mean64)
        )
        as_exact_as_eager("log_probs", log_probs, eager_log_probs, exact_log_probs)


def test_float64_is_the_reference_s() -> None:
    x, v, uncond = (randn(5, 9, seed=seed, dtype=F64) for seed in range(3))
    a, b, std = mixed_steps(5)
    seeds = torch.arange(5)
    got, log_probs = sde_step(
        x, v, a, b, std, seeds=seeds, step=1, velocity_uncond=uncond, guidance_scale=3.0
    )
    mean, exact = statement(x, v, uncond, 3.0, (a, b, std), gaussian_noise(seeds, 1, (9,)), F64)
    assert got.dtype == log_probs.dtype == F64
    torch.testing.assert_close(got, exact, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        log_probs, textbook_log_prob(got, mean, std, True), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(ValueError, match=r"sde_step: the backend 'triton' cannot serve .*float64"):
        sde_step(x, v, a, b, std, seeds=seeds, step=1, backend="triton")


def test_noise_is_that_of_the_seed_and_step(backend: str, device: str) -> None:
    seeds = torch.tensor([0, -1, 2**40 + 5, -(2**63), 2**63 - 1], device=device)
    steps = torch.tensor([0, 1, 2**31, 2**32 - 1, 15], device=device)
    for numel in (1, 5, 1025):
        wanted = gaussian_noise(seeds.cpu(), steps.cpu(), (numel,))
        noise = noise_of_family(seeds, steps, (numel,)).cpu()
        if backend in ("reference", "cpp"):
            assert torch.equal(noise, wanted)
        torch.testing.assert_close(
            noise, wanted, rtol=2.0**-21, atol=0
        )  # the bound of `triton_random`


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_and_triton_make_the_same_step(device: str) -> None:
    x, v, seeds = (
        randn(5, 3001, device=device),
        randn(5, 3001, seed=1, dtype=BF16, device=device),
        torch.arange(5, device=device),
    )
    if reason := unsupported_reason("cuda", "sde_step", x):
        pytest.skip(reason)
    by_triton, by_cuda = (
        sde_step(x, v, *mixed_steps(5), seeds=seeds, step=seeds, backend=backend)
        for backend in ("triton", "cuda")
    )
    assert torch.equal(by_triton[0], by_cuda[0])
    assert torch.equal(by_triton[1], by_cuda[1])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_numbers_scalars_and_tensors_give_the_same_bits(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    batch = 5
    x, v = (
        randn(batch, 33, seed=1, dtype=dtype, device=device),
        randn(batch, 33, seed=2, device=device),
    )
    a, b, std = (value.item() for value in TABLE[2])
    seeds = torch.arange(batch, device=device)
    wanted = sde_step(x, v, a, b, std, seeds=seeds, step=3)
    forms: list[tuple[Any, Any, Any]] = [
        (TABLE[2, 0], TABLE[2, 1], TABLE[2, 2]),  # what table.a[i] gives: scalar float64 tensors
        tuple(value.expand(batch) for value in TABLE[2]),  # type: ignore[list-item]
        tuple(value.to(device, F32).expand(batch) for value in TABLE[2]),  # type: ignore[list-item]
        (a, TABLE[2, 1], TABLE[2, 2].repeat(batch)),
    ]
    for form in forms:
        got = sde_step(x, v, *form, seeds=seeds, step=torch.full((batch,), 3, device=device))
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


def test_the_ops_use_guided_velocity(backend: str, device: str) -> None:
    x, cond, uncond = (randn(4, 21, seed=seed, device=device) for seed in range(3))
    seeds = torch.arange(4, device=device)
    inside = sde_step(
        x, cond, *mixed_steps(4), seeds=seeds, step=1, velocity_uncond=uncond, guidance_scale=5.0
    )
    outside = sde_step(x, guided_velocity(cond, uncond, 5.0), *mixed_steps(4), seeds=seeds, step=1)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


def test_log_prob_is_taken_from_the_rounded_latents(backend: str, device: str) -> None:
    """In bf16 the rounding is as large as the noise: a log-prob of the unrounded x' would differ
    visibly.
    """
    x, v = (
        randn(4, 500, seed=1, dtype=BF16, device=device) * 20,
        randn(4, 500, seed=2, device=device),
    )
    seeds, step = (
        torch.arange(4, device=device),
        (torch.ones(4), torch.full((4,), -0.01), torch.full((4,), 0.05)),
    )
    x_next, log_probs = sde_step(x, v, *step, seeds=seeds, step=0)
    mean, unrounded = statement(x, v, None, 1.0, step, noise_of_family(seeds, 0, (500,)), F64)
    torch.testing.assert_close(
        log_probs.double(), textbook_log_prob(x_next, mean, step[2], True), rtol=1e-4, atol=0
    )
    assert ((log_probs - textbook_log_prob(unrounded, mean, step[2], True)).abs() > 0.01).all()


# -------- bits


@pytest.mark.parametrize(
    ("storage", "velocity_dtype", "uncond_dtype", "normalized"),
    [
        (F32, BF16, BF16, True),
        (F32, F32, None, True),
        (BF16, F16, F32, False),
        (F16, F64, BF16, True),
        (F32, BF16, BF16, False),
    ],
)
def test_a_stored_transition_has_one_log_prob(
    backend: str,
    device: str,
    storage: torch.dtype,
    velocity_dtype: torch.dtype,
    uncond_dtype: torch.dtype | None,
    normalized: bool,
) -> None:
    """The same bits from sde_step, sde_log_prob and grpo_loss, and from this backend and the
    reference.
    """
    for shape in ((1,), (3,), (96, 8, 1, 1), (5, 7, 31)):
        x, v = (
            randn(5, *shape, seed=0, dtype=storage, device=device),
            randn(5, *shape, seed=1, dtype=velocity_dtype, device=device),
        )
        options: dict[str, Any] = {"normalized": normalized}
        if uncond_dtype is not None:
            options |= {
                "velocity_uncond": randn(5, *shape, seed=2, dtype=uncond_dtype, device=device),
                "guidance_scale": 4.5,
            }
        step, seeds = mixed_steps(5), torch.arange(5, device=device)
        x_next, log_probs = sde_step(x, v, *step, seeds=seeds, step=9, **options)
        v.requires_grad_()  # as in training
        again = sde_log_prob(x, x_next, v, *step, **options)
        assert again.requires_grad
        assert torch.equal(again.detach(), log_probs)
        _, stats = grpo_loss(x, x_next, v, log_probs, seeds.float(), *step, **options)
        assert torch.equal(stats.log_probs, log_probs)
        options = {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        by_reference = reference.sde_log_prob(
            x.cpu(), x_next.cpu(), v.detach().cpu(), *step, **options
        )
        assert torch.equal(by_reference, log_probs.cpu())


def test_the_sum_of_tiles_has_no_order(device: str) -> None:
    """The last stage on its own, with more tiles than it takes at a time, and more rows."""
    std = torch.tensor([0.25, 0.0, 0.07] * 43, device=device)
    if reason := unsupported_reason("triton", "sde_step", std):
        pytest.skip(reason)
    partials = (
        torch.randint(0, 2**40, (129, 2500), generator=torch.Generator().manual_seed(0))
        .double()
        .to(device)
        * 2.0**-32
    )
    for tiles in (1, 2, 2500):
        part = partials[:, :tiles].contiguous()
        got = finish_log_probs(part, std, 7, False)
        wanted = torch.where(std > 0, (-(part.sum(1) / 7)).float(), math.nan)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(
            finish_log_probs(part.flip(1).contiguous(), std, 7, True)[0],
            finish_log_probs(part, std, 7, True)[0],
        )


def rollout_and_training(x: Tensor, v: Tensor, uncond: Tensor, rows: list[int]) -> list[Tensor]:
    """Everything per-sample that the ops give for these rows of a batch, gradients included."""
    a, b, std = (value[rows] for value in mixed_steps(len(x)))
    x, v, uncond = (
        x[rows],
        v[rows].detach().requires_grad_(),
        uncond[rows].detach().requires_grad_(),
    )
    seeds = torch.tensor(rows, dtype=torch.int64, device=x.device)
    options: dict[str, Any] = {"velocity_uncond": uncond, "guidance_scale": 3.0}
    x_next, log_probs = sde_step(x, v, a, b, std, seeds=seeds, step=seeds + 2, **options)
    again = sde_log_prob(x, x_next, v, a, b, std, **options)
    gradients = torch.autograd.grad(again.sum(), (v, uncond))
    return [x_next, log_probs, again.detach(), *gradients]


@given(
    batch=st.integers(1, 7),
    shape=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    dtype=st.sampled_from([F32, BF16, F16]),
    data=st.data(),
)
@few_examples
def test_bits_do_not_depend_on_the_batch(
    backend: str,
    device: str,
    batch: int,
    shape: list[int],
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    tensors = [randn(batch, *shape, seed=seed, dtype=dtype, device=device) for seed in range(3)]
    whole = rollout_and_training(*tensors, list(range(batch)))
    rows = data.draw(
        st.lists(st.integers(0, batch - 1), max_size=batch, unique=True)
    )  # a part, in any order
    layout = data.draw(st.sampled_from(["dense", "transposed", "every other"]))
    if layout == "transposed":
        tensors = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors]
    elif layout == "every other":
        tensors = [
            torch.stack((tensor, tensor + 1), dim=1).flatten(0, 1)[::2] for tensor in tensors
        ]
    for part, full in zip(rollout_and_training(*tensors, rows), whole, strict=True):
        assert torch.equal(part, full[rows])


@pytest.mark.parametrize("numel", [767, 768, 4097, 40_000, 262_145])
def test_bits_do_not_depend_on_the_batch_at_real_sizes(
    backend: str, device: str, numel: int
) -> None:
    if backend == "triton" and device == "cpu" and numel > 5000:
        pytest.skip("the interpreter takes a minute")
    x, v, uncond = (randn(4, numel, seed=seed, device=device) for seed in range(3))
    whole = rollout_and_training(x, v, uncond, [0, 1, 2, 3])
    for rows in ([3], [2, 0, 1]):
        for part, full in zip(rollout_and_training(x, v, uncond, rows), whole, strict=True):
            assert torch.equal(part, full[rows])


@pytest.mark.usefixtures("two_threads")
def test_bits_do_not_depend_on_threads(backend: str) -> None:
    """torch.sum splits the sum of one large sample over two threads, but not those of a batch: its
    terms must not mind.
    """
    if backend not in ("reference", "cpp"):
        pytest.skip("has no CPU threads")
    x, v, uncond = (randn(4, 262_145, seed=seed) for seed in range(3))
    batches = ([0, 1, 2, 3], [0], [3])
    two = [rollout_and_training(x, v, uncond, rows) for rows in batches]
    torch.set_num_threads(1)
    whole = rollout_and_training(x, v, uncond, batches[0])
    for rows, results in zip(batches, two, strict=True):
        for part, full in zip(results, whole, strict=True):
            assert torch.equal(part, full[rows])


def test_one_first_noise_for_a_whole_group(backend: str, device: str) -> None:
    x, v, seeds = (
        randn(1, 6, 7, device=device).expand(3, 6, 7),
        randn(3, 6, 7, seed=1, device=device),
        torch.arange(3, device=device),
    )
    got, wanted = (
        sde_step(latents, v, *mixed_steps(3), seeds=seeds, step=0)
        for latents in (x, x.contiguous())
    )
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_a_sample_with_nan_leaves_the_others_alone(backend: str, device: str) -> None:
    x, v, seeds = (
        randn(3, 50, seed=1, device=device),
        randn(3, 50, seed=2, device=device),
        torch.arange(3, device=device),
    )
    clean = sde_step(x, v, *mixed_steps(3), seeds=seeds, step=0)
    v[1, 7] = math.nan
    spoilt = sde_step(x, v, *mixed_steps(3), seeds=seeds, step=0)
    assert torch.equal(spoilt[0][[0, 2]], clean[0][[0, 2]])
    assert torch.equal(spoilt[1][[0, 2]], clean[1][[0, 2]])
    assert spoilt[1][1].isnan()


# -------- corner cases


@pytest.mark.parametrize("normalized", [True, False])
def test_rows_without_noise_are_ode_steps(backend: str, device: str, normalized: bool) -> None:
    x, v, seeds = (
        randn(3, 40, seed=1, device=device),
        randn(3, 40, seed=2, device=device),
        torch.arange(3, device=device),
    )
    a, b, std = (value.clone() for value in mixed_steps(3))
    a[1], b[1], std[1] = 1.0, -0.25, 0.0
    x_next, log_probs = sde_step(x, v, a, b, std, seeds=seeds, step=0, normalized=normalized)
    assert torch.equal(x_next[1], x[1] - 0.25 * v[1])
    assert log_probs.isnan().tolist() == [False, True, False]


def test_empty_batch(backend: str, device: str) -> None:
    empty, none = torch.empty(0, 3, 4, device=device), torch.empty(0)
    seeds = torch.empty(0, dtype=torch.int64, device=device)
    for coefficients in ((1.0, -0.1, 0.2), (none, none, none)):
        x_next, log_probs = sde_step(empty, empty, *coefficients, seeds=seeds, step=0)
        assert x_next.shape == (0, 3, 4)
        assert log_probs.shape == (0,)


def test_rollout_takes_no_gradient(backend: str, device: str) -> None:
    x, v = randn(2, 5, device=device).requires_grad_(), randn(2, 5, device=device).requires_grad_()
    x_next, log_probs = sde_step(x, v, 1.0, -0.1, 0.2, seeds=torch.arange(2, device=device), step=0)
    assert not x_next.requires_grad
    assert not log_probs.requires_grad


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_value_of_a_device_tensor_is_read(backend: str) -> None:
    """On the meta device, where reading a value is an error: so on a GPU the host never waits."""
    if reason := unsupported_reason(backend, "sde_step", torch.empty(0, device="meta")):
        pytest.skip(reason)
    x, v, uncond, old = (torch.zeros(2, 5, device="meta") for _ in range(4))
    seeds, ones = torch.zeros(2, dtype=torch.int64, device="meta"), torch.ones(2, device="meta")
    for coefficients in ((ones, ones, ones), (1.0, -0.1, 0.2)):
        x_next, log_probs = sde_step(
            x,
            v,
            *coefficients,
            seeds=seeds,
            step=seeds,
            velocity_uncond=uncond,
            guidance_scale=2.0,
            backend=backend,
        )
        assert x_next.device.type == log_probs.device.type == "meta"
        loss, _ = grpo_loss(x, old, v, log_probs, ones, *coefficients, backend=backend)
        assert loss.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph(backend: str, device: str) -> None:
    """Captured with device tensors and replayed on other values: what the eager call gives for
    them.
    """
    x, v, seeds = (
        randn(2, 5000, device=device),
        randn(2, 5000, seed=1, dtype=BF16, device=device),
        torch.arange(2, device=device),
    )
    step = [value.to(device, F32) for value in mixed_steps(2)]
    call: Callable[[], tuple[Tensor, Tensor]] = lambda: sde_step(  # noqa: E731
        x, v, *step, seeds=seeds, step=seeds
    )
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.copy_(randn(2, 5000, seed=5, device=device))
    seeds += 7
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip(captured, call(), strict=True))


# -------- torch


def test_opcheck(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("is not a registered operation")
    x, v, uncond = (randn(3, 7, 5, seed=seed, device=device) for seed in range(3))
    step, seeds = (
        [value.to(device, F32) for value in mixed_steps(3)],
        torch.arange(3, device=device),
    )
    for other, w in ((uncond, 5.0), (None, 1.0)):
        torch.library.opcheck(
            operation(backend, "sde_step"), (x, v, other, *step, seeds, seeds + 1, w, True)
        )


def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    x, v, uncond = (randn(3, 7, 5, seed=seed, device=device) for seed in range(3))
    step, seeds = [value.to(device) for value in mixed_steps(3)], torch.arange(3, device=device)

    def call(x: Tensor, v: Tensor, uncond: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        return sde_step(
            2 * x,
            v,
            step[0],
            -0.1,
            step[2],
            seeds=seeds,
            step=seeds,
            velocity_uncond=uncond,
            guidance_scale=3.0,
        )

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(x, v, uncond, seeds), call(x, v, uncond, seeds), strict=True):
        assert torch.equal(got, wanted)


# -------- bad input

GOOD: dict[str, Any] = {
    "latents": torch.zeros(2, 3),
    "velocity": torch.zeros(2, 3),
    "a": 1.0,
    "b": -0.1,
    "std": 0.1,
}
SHARED = [
    (
        {"latents": torch.zeros(2, 3).int()},
        "latents: expected a float tensor with the batch first, got torch.int32",
    ),
    ({"latents": torch.tensor(1.0)}, r"latents: .* got torch.float32 \[\]"),
    ({"latents": [[0.0]]}, r"latents: .* got list \[\[0.0\]\]"),
    (
        {"latents": torch.zeros(2, 0)},
        r"latents: expected at least one element per sample, got shape \[2, 0\]",
    ),
    (
        {"velocity": torch.zeros(2, 4)},
        r"velocity: expected a float tensor \[2, 3\], got torch.float32 \[2, 4\]",
    ),
    ({"velocity": torch.zeros(1, 3)}, r"velocity: .* got torch.float32 \[1, 3\]"),
    ({"velocity": torch.zeros(2, 3).long()}, r"velocity: .* got torch.int64"),
    (
        {"velocity": torch.zeros(2, 3, device="meta")},
        "velocity: expected it on (cpu|cuda:0), got on meta",
    ),
    (
        {"velocity_uncond": torch.zeros(3)},
        r"velocity_uncond: expected a float tensor \[2, 3\], got .* \[3\]",
    ),
    (
        {"guidance_scale": 5.0},
        "velocity_uncond: expected a tensor for guidance_scale 5.0, got None",
    ),
    (
        {"velocity_uncond": torch.zeros(2, 3), "guidance_scale": math.nan},
        "guidance_scale: .* finite, got float nan",
    ),
    (
        {"velocity_uncond": torch.zeros(2, 3), "guidance_scale": "5"},
        "guidance_scale: .* got str '5'",
    ),
    (
        {"a": torch.zeros(3)},
        r"a: expected a number or a float tensor \[2\], got torch.float32 \[3\]",
    ),
    (
        {"b": torch.zeros(2, 1)},
        r"b: expected a number or a float tensor \[2\], got torch.float32 \[2, 1\]",
    ),
    ({"a": torch.zeros(2).int()}, r"a: .* got torch.int32 \[2\]"),
    ({"b": "x"}, "b: expected a number or a float tensor .* got str 'x'"),
    ({"a": True}, "a: .* got bool True"),
    ({"a": math.inf}, r"a: expected finite values, got \[inf\]"),
    ({"b": torch.tensor([0.0, math.nan])}, r"b: expected finite values, got \[0.0, nan\]"),
    ({"std": -0.5}, r"std: expected values of 0 or above, got \[-0.5\]"),
    ({"std": torch.tensor([0.5, -0.5])}, r"std: expected values of 0 or above, got \[0.5, -0.5\]"),
    ({"std": torch.tensor(-1.0)}, r"std: expected values of 0 or above, got \[-1.0\]"),
]


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Samples to the device; coefficients stay on the CPU, where their values are checked."""
    moved = ("latents", "velocity", "velocity_uncond", "next_latents")
    is_moved = {
        name: name in moved and isinstance(value, Tensor) and value.device.type == "cpu"
        for name, value in arguments.items()
    }
    return {
        name: value.to(device) if is_moved[name] else value for name, value in arguments.items()
    }


@pytest.mark.parametrize(("change", "message"), SHARED)
def test_bad_arguments_of_both_ops(
    backend: str, device: str, change: dict[str, Any], message: str
) -> None:
    latents = change.get("latents", GOOD["latents"])
    if backend != "reference" and isinstance(latents, Tensor) and not latents.is_floating_point():
        message = f"the backend '{backend}' cannot serve this call: .* this is torch.int32"
    with pytest.raises(ValueError, match=message):
        sde_step(**on(device, GOOD | {"seeds": torch.arange(2), "step": 0} | change))
    with pytest.raises(ValueError, match=message):
        sde_log_prob(**on(device, GOOD | {"next_latents": torch.zeros(2, 3)} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seeds": torch.arange(3)},
            r"seeds: expected one per sample, \[2\], got torch.int64 \[3\]",
        ),
        (
            {"seeds": torch.zeros(2)},
            r"seeds: expected an int64 tensor \[B\], got torch.float32 \[2\]",
        ),
        ({"seeds": None}, "seeds: .* got NoneType None"),
        ({"step": -1}, "step: .* got -1"),
        ({"step": torch.arange(3)}, r"step: .* \[2\], got torch.int64 \[3\]"),
    ],
)
def test_bad_noise_keys(backend: str, device: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sde_step(**on(device, GOOD | {"seeds": torch.arange(2), "step": 0} | change))
