"""grpo_loss in every backend: loss and gradients against float64, a ratio of exactly 1."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from fastgrpo_kernels import (
    Transition,
    clipped_ratio_loss,
    grpo_loss,
    sde_log_prob,
    sde_step,
)
from fastgrpo_kernels.dispatch import operation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import (
    BF16,
    F16,
    F32,
    F64,
    AsExactAsEager,
    differentiate,
    likely_next,
    of_rows,
    randn,
    random_transition,
    same_bits,
    textbook_log_prob,
    textbook_loss,
)
from torch import Tensor

slow = pytest.mark.slow
few_examples = settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("guidance_scale", "cfg_grad"),
    [
        (None, "both"),
        (5.0, "both"),
        (5.0, "cond_only"),
        *(pytest.param(1.0, kind, marks=slow) for kind in ("both", "cond_only")),
    ],
)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (F32, BF16), pytest.param((BF16, F16), marks=slow), (F64, F64)]
)
def test_loss_and_gradients(
    backend: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    dtypes: tuple[torch.dtype, torch.dtype],
    guidance_scale: float | None,
    cfg_grad: str,
    normalized: bool,
) -> None:
    """Mixed steps, advantages of both signs, some rows clipped, against autograd of the float64
    statement.
    """
    if dtypes[0] == F64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    batch, clip_range = 10, 0.015
    transition = random_transition(
        batch, (33,), device, dtypes, guidance_scale, normalized=normalized
    )
    seeds = torch.arange(batch, device=device)
    x_next, _ = sde_step(transition, seeds=seeds, step=seeds)
    moved = 0.1 * randn(batch, 33, seed=3, dtype=dtypes[1], device=device)
    transition = transition._replace(velocity=transition.velocity + moved)
    # Ratios on both sides of both edges, each with advantages of both signs.
    log_ratio = torch.linspace(-0.06, 0.06, batch, dtype=F64, device=device)
    new = textbook_log_prob(transition, x_next, F64)
    old = (new - log_ratio).to(F64 if dtypes[0] == F64 else F32)
    advantages = torch.tensor([1.5, -0.5] * (batch // 2)) * torch.linspace(0.2, 6.0, batch)
    advantages = advantages.to(device)

    def by_op(t: Transition) -> Tensor:
        options: dict[str, Any] = {"clip_range": clip_range, "cfg_grad": cfg_grad}
        loss, stats = grpo_loss(t, x_next, old, advantages, **options)
        assert stats.clip_fraction.item() == pytest.approx(0.4)
        assert stats.clipped.sum() == 4
        approx_kl = 0.5 * (new - old).square().mean().item()
        assert stats.approx_kl.item() == pytest.approx(approx_kl, rel=1e-3)
        torch.testing.assert_close(stats.ratio.double(), (new - old).exp(), rtol=3e-5, atol=0)
        return loss

    def by_textbook(dtype: torch.dtype, t: Transition) -> Tensor:
        if t.velocity_uncond is not None and cfg_grad == "cond_only":
            t = t._replace(velocity_uncond=t.velocity_uncond.detach())
        log_probs = textbook_log_prob(t, x_next, dtype)
        return textbook_loss(log_probs, old.to(dtype), advantages.to(dtype), clip_range, 5.0)

    got = differentiate(by_op, transition)
    eager = differentiate(functools.partial(by_textbook, F32), transition)
    exact = differentiate(functools.partial(by_textbook, F64), transition, F64)
    both = guidance_scale is not None and cfg_grad == "both"
    names = {"value", "velocity"} | ({"velocity_uncond"} if both else set())
    assert got.keys() == eager.keys() == exact.keys() == names
    # The terms of the mean may cancel, and eager may be lucky: an ulp is one of their size.
    terms = ((new - old).exp() * advantages.clamp(-5.0, 5.0)).abs().mean()
    near = 2 * (eager["value"] - exact["value"]).abs() + torch.finfo(F32).eps * terms
    assert (got.pop("value") - exact["value"]).abs() <= near
    for name, value in got.items():
        if dtypes[0] == F64:
            near = 1e-10 * exact[name].abs().max().item()
            torch.testing.assert_close(value, exact[name], rtol=1e-10, atol=near)
        else:
            as_exact_as_eager(name, value, eager[name], exact[name])


def test_gradcheck() -> None:
    transition = random_transition(5, (4,), "cpu", (F64, F64), 2.0)
    x_next, old = sde_step(transition, seeds=torch.arange(5), step=0)
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5])

    def loss(cond: Tensor, uncond: Tensor) -> Tensor:
        moved = transition._replace(velocity=cond, velocity_uncond=uncond)
        return grpo_loss(moved, x_next, old, advantages, clip_range=0.01)[0]

    cond = transition.velocity + 0.1 * randn(5, 4, seed=9, dtype=F64)
    leaves = cond.requires_grad_(), transition.velocity_uncond.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(
    ("guidance_scale", "normalized"), [(5.0, True), (None, True), (5.0, False)]
)
@pytest.mark.parametrize(
    "dtypes", [(F32, BF16), (BF16, F32), pytest.param((BF16, BF16), marks=slow)]
)
def test_unchanged_weights_give_a_ratio_of_exactly_one(
    backend: str,
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    guidance_scale: float | None,
    normalized: bool,
) -> None:
    """Rolled out in one batch, trained in others: the bits of all three functions agree, so ratio -
    1 is 0.0, not small.
    """
    transition = random_transition(
        5, (96, 8, 1, 1), device, dtypes, guidance_scale, normalized=normalized
    )
    seeds, advantages = torch.arange(5, device=device), randn(5, seed=4, device=device)
    x_next, old = sde_step(transition, seeds=seeds, step=seeds % 5)
    for rows in ([*range(5)], [3, 1], [4]):
        part = of_rows(transition, rows)
        part.velocity.requires_grad_()
        loss, stats = grpo_loss(part, x_next[rows], old[rows], advantages[rows])
        assert torch.equal(stats.ratio, torch.ones(len(rows), device=device))
        assert torch.equal(stats.log_probs, old[rows])
        assert torch.equal(sde_log_prob(part, x_next[rows]).detach(), old[rows])
        assert stats.approx_kl.item() == stats.clip_fraction.item() == 0.0
        assert loss.item() == pytest.approx(-advantages[rows].mean().item(), rel=1e-5, abs=1e-6)
        loss.backward()
        assert part.velocity.grad is not None
        assert part.velocity.grad.any()


def test_a_gradient_step_makes_good_transitions_likelier(backend: str, device: str) -> None:
    transition = random_transition(4, (50,), device)
    x_next, old = sde_step(transition, seeds=torch.arange(4, device=device), step=0)
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0], device=device)
    got = differentiate(lambda t: grpo_loss(t, x_next, old, advantages)[0], transition)
    moved = transition._replace(velocity=transition.velocity - 0.1 * got["velocity"])
    new = sde_log_prob(moved, x_next)
    assert torch.equal(torch.sign(new - old), torch.sign(advantages))


@given(batch=st.integers(1, 7), numel=st.integers(1, 301), data=st.data())
@few_examples
def test_a_sample_counts_the_same_in_every_batch(
    backend: str, device: str, batch: int, numel: int, data: st.DataObject
) -> None:
    """Statistics bit for bit, and gradients once the mean over the batch (a power of two here) is
    undone.
    """
    transition = random_transition(batch, (numel,), device)
    x_next, advantages = likely_next(transition), randn(batch, seed=5, device=device)
    old = sde_log_prob(transition._replace(velocity=transition.velocity + 1e-3), x_next)

    def sample(rows: list[int], copies: int) -> list[Tensor]:
        """The first row, in a batch filled up to `copies`."""
        index = (rows * copies)[:copies]
        part = of_rows(transition, index)
        leaf = part.velocity.requires_grad_()
        loss, stats = grpo_loss(part, x_next[index], old[index], advantages[index])
        (gradient,) = torch.autograd.grad(loss * copies, leaf)
        return [stats.log_probs[0], stats.ratio[0], gradient[0]]

    rows = data.draw(st.permutations(range(batch)))
    assert same_bits(sample([rows[0]], 1), sample(list(rows), 8))


def test_a_row_without_noise_spoils_the_loss_not_the_gradients(backend: str, device: str) -> None:
    transition = random_transition(3, (20,), device)
    x_next, ones = likely_next(transition), torch.ones(3)
    transition.std[1] = 0.0
    got = differentiate(lambda t: grpo_loss(t, x_next, ones, ones)[0], transition)
    _, stats = grpo_loss(transition, x_next, ones, ones)
    assert got["value"].isnan()
    assert stats.ratio.isnan().tolist() == [False, True, False]
    assert got["velocity"].isfinite().all()
    assert not got["velocity"][1].any()


def test_empty_batch_has_no_loss(backend: str, device: str) -> None:
    empty, none = torch.empty(0, 6, device=device), torch.empty(0)
    transition = Transition(empty, empty.clone().requires_grad_(), 1.0, -0.1, 0.2)
    loss, stats = grpo_loss(transition, empty, none, none)
    loss.backward()
    assert loss.item() == stats.clip_fraction.item() == stats.approx_kl.item() == 0.0
    assert stats.ratio.shape == stats.log_probs.shape == (0,)
    assert clipped_ratio_loss(none.to(device), none, none)[0].item() == 0.0


def test_non_contiguous_input(backend: str, device: str) -> None:
    transition = random_transition(6, (4, 5), device)
    data = (likely_next(transition), randn(6, seed=4, device=device), randn(6, seed=5))

    def strided(value: Tensor) -> Tensor:
        return torch.stack((value, value + 1), dim=-1)[..., 0]

    results = []
    for form in (torch.Tensor.contiguous, strided):
        part = Transition(*(form(value) for value in transition[:5]))
        leaf = part.velocity.requires_grad_()
        loss, stats = grpo_loss(part, *map(form, data))
        results.append((loss.detach(), stats.ratio, *torch.autograd.grad(loss, leaf)))
    assert same_bits(*results)


def objective(device: str) -> tuple[Transition, Tensor, Tensor, Tensor]:
    """A transition, all of it on the device, x', old log-probabilities and advantages."""
    transition = random_transition(3, (7, 5), device, guidance_scale=3.0)
    step = {name: getattr(transition, name).to(device, F32) for name in ("a", "b", "std")}
    log_probs, advantages = (randn(3, seed=seed, device=device) for seed in (9, 8))
    return transition._replace(**step), likely_next(transition), log_probs, advantages


def test_opcheck(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("is not a registered operation")
    transition, x_next, old, advantages = objective(device)
    x, v, *step, uncond, w, _ = transition
    v.requires_grad_(), uncond.requires_grad_()
    whole = operation(backend, "grpo_loss")
    torch.library.opcheck(whole, (x, x_next, v, uncond, old, advantages, *step, w, True, 0.1, 5.0))
    torch.library.opcheck(
        whole, (x, x_next, v, None, old, advantages, *step, 1.0, False, 0.1, math.inf)
    )
    new = (0.1 * old).requires_grad_()
    arguments = (new, new.detach() + 0.01, advantages, 0.1, 5.0)
    torch.library.opcheck(operation(backend, "clipped_ratio_loss"), arguments)


def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    transition, *data = objective(device)

    def call(t: Transition) -> Tensor:
        loss, stats = grpo_loss(t._replace(velocity=2 * t.velocity), *data)
        apart, _ = clipped_ratio_loss(sde_log_prob(t, data[0]), *data[1:], clip_range=0.2)
        return loss + apart + stats.ratio

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    got, expected = (differentiate(function, transition) for function in (compiled, call))
    assert same_bits(got.values(), expected.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph(backend: str, device: str) -> None:
    """Forward and backward captured with device tensors, replayed on other values: what the eager
    call gives for them.
    """
    transition, x_next, *data = objective(device)
    leaves = transition.velocity.requires_grad_(), transition.velocity_uncond.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        loss, stats = grpo_loss(transition, x_next, *data)
        return loss.detach(), stats.ratio, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x_next.copy_(randn(3, 7, 5, seed=20, device=device))
    graph.replay()
    assert same_bits(captured, call())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"old_log_probs": torch.zeros(3)},
            r"old_log_probs: expected a float tensor \[2\], got torch.float32 \[3\]",
        ),
        ({"advantages": torch.zeros(2, 1)}, r"advantages: .* \[2\], got torch.float32 \[2, 1\]"),
        (
            {"next_latents": torch.zeros(2, 4)},
            r"next_latents: .* \[2, 3\], got torch.float32 \[2, 4\]",
        ),
        ({"cfg_grad": ""}, "cfg_grad: expected one of both, cond_only, got ''"),
        ({"clip_range": 2.0}, "clip_range: .* got float 2.0"),
    ],
)
def test_bad_objective_arguments(
    backend: str, device: str, change: dict[str, Any], message: str
) -> None:
    """Bad transitions are tested with `sde_step`."""
    arguments = {"old_log_probs": torch.zeros(2), "advantages": torch.zeros(2)} | change
    arguments["next_latents"] = change.get("next_latents", torch.zeros(2, 3)).to(device)
    with pytest.raises(ValueError, match=message):
        grpo_loss(random_transition(2, (3,), device), **arguments)
