"""sde_step in every backend: values against float64, x' to the bit, and the promises about bits,
rows, threads and strides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastgrpo_kernels import (
    Transition,
    gaussian_noise,
    grpo_loss,
    guided_velocity,
    sde_log_prob,
    sde_step,
)
from fastgrpo_kernels.dispatch import operation, unsupported_reason
from fastgrpo_kernels.sde import reference
from fastgrpo_kernels.sde.triton_transition import finish_log_probs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import (
    BF16,
    F16,
    F32,
    F64,
    TABLE,
    AsExactAsEager,
    column,
    mixed_steps,
    noise_of_backend,
    of_rows,
    randn,
    random_transition,
    same_bits,
    textbook_log_prob,
    textbook_mean,
)
from torch import Tensor

slow = pytest.mark.slow


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("guidance_scale", [None, pytest.param(1.0, marks=slow), 5.0])
@pytest.mark.parametrize(
    "dtypes",
    [
        (F32, F32),
        (F32, BF16),
        (BF16, F32),
        *(pytest.param(both, marks=slow) for both in ((BF16, BF16), (F16, F16))),
    ],
)
@pytest.mark.parametrize("normalized", [True, False])
def test_values(
    backend: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    dtypes: tuple[torch.dtype, torch.dtype],
    guidance_scale: float | None,
    normalized: bool,
) -> None:
    """Given the noise, x' has the bits of the formula in torch's own operations, and its
    log-probability is as exact as theirs.
    """
    transition = random_transition(
        4, (3, 7, 5), device, dtypes, guidance_scale, normalized=normalized
    )
    seeds = torch.arange(4, device=device) * 11
    got, log_probs = sde_step(transition, seeds=seeds, step=seeds + 2)
    noise = noise_of_backend(seeds, seeds + 2, (3, 7, 5))
    eager, exact = (
        textbook_mean(transition, dtype) + column(transition.std, noise.to(dtype)) * noise.to(dtype)
        for dtype in (F32, F64)
    )
    assert torch.equal(got, eager.to(dtypes[0]))
    as_exact_as_eager("next_latents", got, eager.to(dtypes[0]), exact)
    as_exact_as_eager(
        "log_probs", log_probs, *(textbook_log_prob(transition, got, dtype) for dtype in (F32, F64))
    )


def test_float64_is_the_reference_s() -> None:
    transition = random_transition(5, (9,), "cpu", (F64, F64), 3.0)
    seeds = torch.arange(5)
    got, log_probs = sde_step(transition, seeds=seeds, step=1)
    noise = gaussian_noise(seeds, 1, (9,)).double()
    exact = textbook_mean(transition, F64) + column(transition.std, noise) * noise
    assert got.dtype == log_probs.dtype == F64
    torch.testing.assert_close(got, exact, rtol=1e-14, atol=1e-14)
    expected = textbook_log_prob(transition, got, F64)
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"sde_step: the backend 'triton' cannot serve .*float64"):
        sde_step(transition, seeds=seeds, step=1, backend="triton")


def test_noise_is_that_of_the_seed_and_step(backend: str, device: str) -> None:
    seeds = torch.tensor([0, -1, 2**40 + 5, -(2**63), 2**63 - 1], device=device)
    steps = torch.tensor([0, 1, 2**31, 2**32 - 1, 15], device=device)
    for numel in (5, 1025):
        expected = gaussian_noise(seeds.cpu(), steps.cpu(), (numel,))
        noise = noise_of_backend(seeds, steps, (numel,)).cpu()
        if backend in ("reference", "cpp"):
            assert torch.equal(noise, expected)
        # The bound of `triton_philox`.
        torch.testing.assert_close(noise, expected, rtol=2.0**-21, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_and_triton_make_the_same_step(device: str) -> None:
    transition = random_transition(5, (3001,), device, (F32, BF16))
    seeds = torch.arange(5, device=device)
    if reason := unsupported_reason("cuda", "sde_step", transition.latents):
        pytest.skip(reason)
    by_triton, by_cuda = (
        sde_step(transition, seeds=seeds, step=seeds, backend=name) for name in ("triton", "cuda")
    )
    assert same_bits(by_triton, by_cuda)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_numbers_scalars_and_tensors_give_the_same_bits(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    x, v = randn(3, 33, seed=1, dtype=dtype, device=device), randn(3, 33, seed=2, device=device)
    a, b, std = (value.item() for value in TABLE[2])
    seeds = torch.arange(3, device=device)
    expected = sde_step(Transition(x, v, a, b, std), seeds=seeds, step=3)
    forms: list[tuple[Any, ...]] = [
        tuple(TABLE[2]),  # as table.a[i] is: float64 scalar tensors
        tuple(value.expand(3) for value in TABLE[2]),
        tuple(value.to(device, F32).expand(3) for value in TABLE[2]),
        (a, TABLE[2, 1], TABLE[2, 2].repeat(3)),
    ]
    for form in forms:
        step = torch.full((3,), 3, device=device)
        got = sde_step(Transition(x, v, *form), seeds=seeds, step=step)
        assert same_bits(got, expected)


def test_the_ops_use_guided_velocity(backend: str, device: str) -> None:
    transition = random_transition(4, (21,), device, guidance_scale=5.0)
    x, cond, *step, uncond, w, _ = transition
    seeds = torch.arange(4, device=device)
    inside = sde_step(transition, seeds=seeds, step=1)
    outside = sde_step(Transition(x, guided_velocity(cond, uncond, w), *step), seeds=seeds, step=1)
    assert same_bits(inside, outside)


def test_log_prob_is_taken_from_the_rounded_latents(backend: str, device: str) -> None:
    """In bf16 the rounding is as large as the noise: the log-probability of the unrounded x'
    differs visibly.
    """
    x, v = randn(4, 500, dtype=BF16, device=device) * 20, randn(4, 500, seed=2, device=device)
    ones, seeds = torch.ones(4), torch.arange(4, device=device)
    transition = Transition(x, v, ones, -0.01 * ones, 0.05 * ones)
    x_next, log_probs = sde_step(transition, seeds=seeds, step=0)
    unrounded = textbook_mean(transition, F64) + 0.05 * noise_of_backend(seeds, 0, (500,))
    expected = textbook_log_prob(transition, x_next, F64)
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-4, atol=0)
    assert ((log_probs - textbook_log_prob(transition, unrounded, F64)).abs() > 0.01).all()


@pytest.mark.parametrize(
    ("storage", "velocity_dtype", "uncond_dtype", "normalized"),
    [
        (F32, BF16, BF16, True),
        (F32, F32, None, True),
        (BF16, F16, F32, False),
        (F16, F64, BF16, True),
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
    for shape in ((1,), (96, 8, 1, 1), (5, 7, 31)):
        transition = random_transition(
            3, shape, device, (storage, velocity_dtype), normalized=normalized
        )
        if uncond_dtype is not None:
            uncond = randn(3, *shape, seed=2, dtype=uncond_dtype, device=device)
            transition = transition._replace(velocity_uncond=uncond, guidance_scale=4.5)
        seeds = torch.arange(3, device=device)
        x_next, log_probs = sde_step(transition, seeds=seeds, step=9)
        transition.velocity.requires_grad_()  # as in training
        again = sde_log_prob(transition, x_next)
        assert again.requires_grad
        assert torch.equal(again.detach(), log_probs)
        _, stats = grpo_loss(transition, x_next, log_probs, seeds.float())
        assert torch.equal(stats.log_probs, log_probs)
        on_cpu = Transition(*(v.cpu() if isinstance(v, Tensor) else v for v in transition))
        by_reference = reference.sde_log_prob(on_cpu, x_next.cpu())
        assert torch.equal(by_reference.detach(), log_probs.cpu())


def test_the_sum_of_tiles_has_no_order(device: str) -> None:
    """The last kernel by itself, with more tiles and more rows than it takes at a time."""
    std = torch.tensor([0.25, 0.0, 0.07] * 43, device=device)
    if reason := unsupported_reason("triton", "sde_step", std):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    partials = torch.randint(0, 2**40, (129, 2500), generator=generator).to(device) * 2.0**-32
    for tiles, rows in ((1, 129), (2, 129), (2500, 3)):
        part, std = partials.double()[:rows, :tiles].contiguous(), std[:rows]
        got = finish_log_probs(part, std, 7, False)
        expected = torch.where(std > 0, (-(part.sum(1) / 7)).float(), math.nan)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        flipped = finish_log_probs(part.flip(1).contiguous(), std, 7, True)
        assert torch.equal(flipped[::3], finish_log_probs(part, std, 7, True)[::3])


def rollout_and_training(transition: Transition, rows: list[int]) -> list[Tensor]:
    """All that the ops give per sample for these rows of a batch, gradients included."""
    part = of_rows(transition, rows)
    leaves = part.velocity.detach().requires_grad_(), part.velocity_uncond.detach().requires_grad_()
    part = part._replace(velocity=leaves[0], velocity_uncond=leaves[1])
    seeds = torch.tensor(rows, dtype=torch.int64, device=part.latents.device)
    x_next, log_probs = sde_step(part, seeds=seeds, step=seeds + 2)
    again = sde_log_prob(part, x_next)
    return [x_next, log_probs, again.detach(), *torch.autograd.grad(again.sum(), leaves)]


@given(
    batch=st.integers(1, 4),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([F32, BF16, F16]),
    data=st.data(),
)
@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bits_do_not_depend_on_the_batch(
    backend: str,
    device: str,
    batch: int,
    shape: list[int],
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    transition = random_transition(batch, tuple(shape), device, (dtype, dtype), 3.0)
    whole = rollout_and_training(transition, list(range(batch)))
    # Some of the samples, in any order and layout.
    rows = data.draw(st.lists(st.integers(0, batch - 1), max_size=batch, unique=True))
    layout = data.draw(st.sampled_from(["dense", "transposed", "every other"]))
    tensors = {n: getattr(transition, n) for n in ("latents", "velocity", "velocity_uncond")}
    if layout == "transposed":
        tensors = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in tensors.items()}
    elif layout == "every other":
        tensors = {n: torch.stack((t, t + 1), 1).flatten(0, 1)[::2] for n, t in tensors.items()}
    part = rollout_and_training(transition._replace(**tensors), rows)
    assert same_bits(part, [full[rows] for full in whole])


@pytest.mark.parametrize("numel", [768, 2049, 262_145])
def test_bits_do_not_depend_on_the_batch_at_real_sizes(
    backend: str, device: str, numel: int
) -> None:
    if backend == "triton" and device == "cpu" and numel > 5000:
        pytest.skip("the interpreter takes a minute")
    transition = random_transition(3, (numel,), device, guidance_scale=3.0)
    whole = rollout_and_training(transition, [0, 1, 2])
    for rows in ([2], [2, 0]):
        part = rollout_and_training(transition, rows)
        assert same_bits(part, [full[rows] for full in whole])


@pytest.mark.usefixtures("two_threads")
def test_bits_do_not_depend_on_threads(backend: str) -> None:
    """torch.sum splits the sum of one large sample over two threads, but not those of a batch: its
    terms must not mind.
    """
    if backend not in ("reference", "cpp"):
        pytest.skip("has no CPU threads")
    transition = random_transition(4, (262_145,), "cpu", guidance_scale=3.0)
    batches = ([0, 1, 2, 3], [0], [3])
    two = [rollout_and_training(transition, rows) for rows in batches]
    torch.set_num_threads(1)
    whole = rollout_and_training(transition, batches[0])
    for rows, results in zip(batches, two, strict=True):
        assert same_bits(results, [full[rows] for full in whole])


def test_one_first_noise_for_a_whole_group(backend: str, device: str) -> None:
    transition = random_transition(3, (6, 7), device)
    x, seeds = transition.latents[:1].expand(3, 6, 7), torch.arange(3, device=device)
    got, expected = (
        sde_step(transition._replace(latents=latents), seeds=seeds, step=0)
        for latents in (x, x.contiguous())
    )
    assert same_bits(got, expected)


def test_a_sample_with_nan_leaves_the_others_alone(backend: str, device: str) -> None:
    transition = random_transition(3, (50,), device)
    seeds = torch.arange(3, device=device)
    clean = sde_step(transition, seeds=seeds, step=0)
    transition.velocity[1, 7] = math.nan
    spoilt = sde_step(transition, seeds=seeds, step=0)
    assert same_bits([value[[0, 2]] for value in spoilt], [value[[0, 2]] for value in clean])
    assert spoilt[1][1].isnan()


@pytest.mark.parametrize("normalized", [True, False])
def test_rows_without_noise_are_ode_steps(backend: str, device: str, normalized: bool) -> None:
    transition = random_transition(3, (40,), device, normalized=normalized)
    x, v, a, b, std, *_ = transition
    a[1], b[1], std[1] = 1.0, -0.25, 0.0
    x_next, log_probs = sde_step(transition, seeds=torch.arange(3, device=device), step=0)
    assert torch.equal(x_next[1], x[1] - 0.25 * v[1])
    assert log_probs.isnan().tolist() == [False, True, False]


def test_empty_batch(backend: str, device: str) -> None:
    empty, none = torch.empty(0, 3, 4, device=device), torch.empty(0)
    seeds = torch.empty(0, dtype=torch.int64, device=device)
    for coefficients in ((1.0, -0.1, 0.2), (none, none, none)):
        x_next, log_probs = sde_step(Transition(empty, empty, *coefficients), seeds=seeds, step=0)
        assert x_next.shape == (0, 3, 4)
        assert log_probs.shape == (0,)


def test_rollout_takes_no_gradient(backend: str, device: str) -> None:
    transition = random_transition(2, (5,), device)
    transition.latents.requires_grad_(), transition.velocity.requires_grad_()
    results = sde_step(transition, seeds=torch.arange(2, device=device), step=0)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_value_of_a_device_tensor_is_read(backend: str) -> None:
    """On the meta device, where reading a value is an error: so on a GPU the host never waits."""
    if reason := unsupported_reason(backend, "sde_step", torch.empty(0, device="meta")):
        pytest.skip(reason)
    x = torch.zeros(2, 5, device="meta")
    seeds, ones = torch.zeros(2, dtype=torch.int64, device="meta"), torch.ones(2, device="meta")
    for coefficients in ((ones, ones, ones), (1.0, -0.1, 0.2)):
        transition = Transition(x, x, *coefficients, velocity_uncond=x, guidance_scale=2.0)
        x_next, log_probs = sde_step(transition, seeds=seeds, step=seeds, backend=backend)
        loss, _ = grpo_loss(transition, x, log_probs, ones, backend=backend)
        assert x_next.device.type == log_probs.device.type == loss.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph(backend: str, device: str) -> None:
    """Captured with device tensors, replayed on other values: what the eager call gives."""
    transition = random_transition(2, (5000,), device, (F32, BF16))
    step = (value.to(device, F32) for value in mixed_steps(2))
    transition = Transition(transition.latents, transition.velocity, *step)
    seeds = torch.arange(2, device=device)

    def call() -> tuple[Tensor, Tensor]:
        return sde_step(transition, seeds=seeds, step=seeds)

    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    transition.latents.copy_(randn(2, 5000, seed=5, device=device))
    seeds += 7
    graph.replay()
    assert same_bits(captured, call())


def test_opcheck(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("is not a registered operation")
    x, v, *step, uncond, w, _ = random_transition(3, (7, 5), device, guidance_scale=5.0)
    coefficients = [value.to(device, F32) for value in step]
    seeds = torch.arange(3, device=device)
    for other, scale in ((uncond, w), (None, 1.0)):
        arguments = (x, v, other, *coefficients, seeds, seeds + 1, scale, True)
        torch.library.opcheck(operation(backend, "sde_step"), arguments)


def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    transition = random_transition(3, (7, 5), device, guidance_scale=3.0)
    seeds = torch.arange(3, device=device)

    def call(x: Tensor, v: Tensor, uncond: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        step = transition._replace(latents=2 * x, velocity=v, velocity_uncond=uncond, b=-0.1)
        return sde_step(step, seeds=seeds, step=seeds)

    arguments = (transition.latents, transition.velocity, transition.velocity_uncond, seeds)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(*arguments), call(*arguments))


zeros = torch.zeros
BAD_TRANSITIONS = [
    (
        {"latents": zeros(2, 3).int()},
        "latents: expected a float tensor with the batch first, got torch.int32",
    ),
    ({"latents": torch.tensor(1.0)}, r"latents: .* got torch.float32 \[\]"),
    ({"latents": [[0.0]]}, r"latents: .* got list \[\[0.0\]\]"),
    (
        {"latents": zeros(2, 0)},
        r"latents: expected at least one element per sample, got shape \[2, 0\]",
    ),
    (
        {"velocity": zeros(2, 4)},
        r"velocity: expected a float tensor \[2, 3\], got torch.float32 \[2, 4\]",
    ),
    ({"velocity": zeros(2, 3).long()}, r"velocity: .* got torch.int64"),
    (
        {"velocity": zeros(2, 3, device="meta")},
        "velocity: expected it on (cpu|cuda:0), got on meta",
    ),
    (
        {"velocity_uncond": zeros(3)},
        r"velocity_uncond: expected a float tensor \[2, 3\], got .* \[3\]",
    ),
    (
        {"guidance_scale": 5.0},
        "velocity_uncond: expected a tensor for guidance_scale 5.0, got None",
    ),
    (
        {"velocity_uncond": zeros(2, 3), "guidance_scale": math.nan},
        "guidance_scale: .* finite, got float nan",
    ),
    (
        {"velocity_uncond": zeros(2, 3), "guidance_scale": "5"},
        "guidance_scale: .* got str '5'",
    ),
    (
        {"a": zeros(3)},
        r"a: expected a number or a float tensor \[2\], got torch.float32 \[3\]",
    ),
    ({"b": zeros(2, 1)}, r"b: expected a number .*, got torch.float32 \[2, 1\]"),
    ({"a": zeros(2).int()}, r"a: .* got torch.int32 \[2\]"),
    ({"b": "x"}, "b: expected a number or a float tensor .* got str 'x'"),
    ({"a": True}, "a: .* got bool True"),
    ({"a": math.inf}, r"a: expected finite values, got \[inf\]"),
    ({"b": torch.tensor([0.0, math.nan])}, r"b: expected finite values, got \[0.0, nan\]"),
    ({"std": -0.5}, r"std: expected values of 0 or above, got \[-0.5\]"),
    ({"std": torch.tensor([0.5, -0.5])}, r"std: expected values of 0 or above, got \[0.5, -0.5\]"),
    ({"std": torch.tensor(-1.0)}, r"std: expected values of 0 or above, got \[-1.0\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TRANSITIONS)
def test_bad_transitions(backend: str, device: str, change: dict[str, Any], message: str) -> None:
    """Coefficients stay on the CPU, where their values are checked."""
    samples = zeros(2, 3, device=device)
    latents = change.get("latents")
    if backend != "reference" and isinstance(latents, Tensor) and not latents.is_floating_point():
        message = f"the backend '{backend}' cannot serve this call: .*torch.int32"
    moved = {
        name: value.to(device)
        if name in ("latents", "velocity", "velocity_uncond")
        and isinstance(value, Tensor)
        and not value.is_meta
        else value
        for name, value in change.items()
    }
    transition = Transition(samples, samples, 1.0, -0.1, 0.1)._replace(**moved)
    with pytest.raises(ValueError, match=message):
        sde_step(transition, seeds=torch.arange(2), step=0)
    with pytest.raises(ValueError, match=message):
        sde_log_prob(transition, samples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seeds": torch.arange(3)},
            r"seeds: expected one per sample, \[2\], got torch.int64 \[3\]",
        ),
        ({"seeds": zeros(2)}, r"seeds: expected an int64 tensor \[B\], got torch.float32 \[2\]"),
        ({"seeds": None}, "seeds: .* got NoneType None"),
        ({"step": -1}, "step: .* got -1"),
        ({"step": torch.arange(3)}, r"step: .* \[2\], got torch.int64 \[3\]"),
    ],
)
def test_bad_noise_keys(backend: str, device: str, change: dict[str, Any], message: str) -> None:
    transition = random_transition(2, (3,), device)
    with pytest.raises(ValueError, match=message):
        sde_step(transition, **({"seeds": torch.arange(2), "step": 0} | change))
