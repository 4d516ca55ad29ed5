"""sde_log_prob in every backend: value and both gradients against float64, and the gradients to the
bit against the reference.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from fastgrpo_kernels import Transition, sde_log_prob
from fastgrpo_kernels.dispatch import operation
from fastgrpo_kernels.sde import reference
from op_inputs import (
    BF16,
    F16,
    F32,
    F64,
    AsExactAsEager,
    column,
    differentiate,
    likely_next,
    of_rows,
    randn,
    random_transition,
    same_bits,
    textbook_log_prob,
    textbook_mean,
)
from torch import Tensor

slow = pytest.mark.slow


def test_by_hand(backend: str, device: str) -> None:
    """x = 1, v = 2, a = 0.5, b = -0.25: mean 0; x' = 1 at std 0.5: -2 - ln 0.5 - ln(2 pi) / 2."""
    ones = torch.ones(1, 3, device=device)
    transition = Transition(ones, 2 * ones, 0.5, -0.25, 0.5)
    exact = -2.0 + math.log(2.0) - 0.5 * math.log(2.0 * math.pi)
    assert sde_log_prob(transition, ones).item() == pytest.approx(exact, rel=1e-7)
    assert sde_log_prob(transition._replace(normalized=False), ones).item() == -1.0


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
    "dtypes",
    [
        (F32, F32),
        (F32, BF16),
        *(pytest.param(both, marks=slow) for both in ((BF16, BF16), (F16, F16))),
    ],
)
def test_value_and_gradients(
    backend: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    dtypes: tuple[torch.dtype, torch.dtype],
    guidance_scale: float | None,
    cfg_grad: str,
    normalized: bool,
) -> None:
    shape = (3, 7, 53) if (guidance_scale, cfg_grad) == (5.0, "both") else (7, 5)  # 2 tiles, 1 tile
    transition = random_transition(5, shape, device, dtypes, guidance_scale, normalized=normalized)
    x_next, weights = likely_next(transition), torch.linspace(-1.0, 2.0, 5, device=device)

    def by_op(op: Any, t: Transition) -> Tensor:
        return op(t, x_next, cfg_grad=cfg_grad) * weights

    def by_textbook(dtype: torch.dtype, t: Transition) -> Tensor:
        if t.velocity_uncond is not None and cfg_grad == "cond_only":
            t = t._replace(velocity_uncond=t.velocity_uncond.detach())
        return textbook_log_prob(t, x_next, dtype) * weights.to(dtype)

    ours = differentiate(functools.partial(by_op, sde_log_prob), transition)
    specified = differentiate(functools.partial(by_op, reference.sde_log_prob), transition)
    eager = differentiate(functools.partial(by_textbook, F32), transition)
    exact = differentiate(functools.partial(by_textbook, F64), transition, F64)
    both = guidance_scale is not None and cfg_grad == "both"
    names = {"value", "velocity"} | ({"velocity_uncond"} if both else set())
    assert ours.keys() == specified.keys() == eager.keys() == exact.keys() == names
    for name, value in ours.items():
        as_exact_as_eager(name, value, eager[name], exact[name])
        assert torch.equal(value, specified[name]), name


def test_closed_form_of_the_gradient(backend: str, device: str) -> None:
    """docs/method.md: b (x' - mean) / (s^2 P), times w and 1 - w; 2 b (x' - mean) / P for cps."""
    transition = random_transition(5, (33,), device, guidance_scale=4.0)
    x_next = likely_next(transition)
    error = x_next.double() - textbook_mean(transition, F64)
    b, std = column(transition.b, error), column(transition.std, error)
    for normalized, closed in ((True, b * error / (std**2 * 33)), (False, 2 * b * error / 33)):
        got = differentiate(
            lambda t: sde_log_prob(t, x_next), transition._replace(normalized=normalized)
        )
        near = {"rtol": 1e-4, "atol": 1e-6 * closed.abs().max().item()}
        torch.testing.assert_close(got["velocity"].double(), 4.0 * closed, **near)
        torch.testing.assert_close(got["velocity_uncond"].double(), -3.0 * closed, **near)


def test_a_long_sample_is_summed_exactly(backend: str, device: str) -> None:
    """Within 1e-6 of float64, the accuracy that docs/performance.md promises."""
    transition = of_rows(random_transition(4, (10_001,), device, (F32, BF16), 5.0), [3])
    x_next = likely_next(transition)
    exact = textbook_log_prob(transition, x_next, F64)
    assert abs(sde_log_prob(transition, x_next).item() - exact.item()) < 1e-6


def test_gradcheck() -> None:
    """In float64, which the reference serves; there twice."""
    transition = random_transition(3, (5,), "cpu", (F64, F64), 2.5)
    x_next = likely_next(transition)

    def log_prob(v: Tensor, uncond: Tensor) -> Tensor:
        return sde_log_prob(transition._replace(velocity=v, velocity_uncond=uncond), x_next)

    leaves = transition.velocity.requires_grad_(), transition.velocity_uncond.requires_grad_()
    exact = textbook_log_prob(transition, x_next, F64)
    torch.testing.assert_close(log_prob(*leaves), exact, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(log_prob, leaves)
    assert torch.autograd.gradgradcheck(log_prob, leaves)


@pytest.mark.parametrize("trained", ["velocity", "velocity_uncond"])
def test_a_gradient_in_one_branch_only(backend: str, device: str, trained: str) -> None:
    transition = random_transition(4, (21,), device, (F32, BF16), 3.0)
    x_next = likely_next(transition)
    both = differentiate(lambda t: sde_log_prob(t, x_next), transition)
    leaf = getattr(transition, trained).requires_grad_()
    sde_log_prob(transition, x_next).sum().backward()
    assert torch.equal(leaf.grad, both[trained])


def test_latents_and_coefficients_are_data(backend: str, device: str) -> None:
    x, x_next, v = (randn(2, 5, seed=seed, device=device).requires_grad_() for seed in range(3))
    std = torch.tensor([0.1, 0.2], requires_grad=True)
    sde_log_prob(Transition(x, v, 1.0, -0.1, std), x_next).sum().backward()
    assert v.grad is not None
    assert x.grad is x_next.grad is std.grad is None


@pytest.mark.parametrize("normalized", [True, False])
def test_a_row_without_noise_has_no_log_prob_and_no_gradient(
    backend: str, device: str, normalized: bool
) -> None:
    transition = random_transition(3, (40,), device, normalized=normalized)
    x_next = likely_next(transition)
    transition.std[1] = 0.0
    got = differentiate(lambda t: sde_log_prob(t, x_next), transition)
    assert got["value"].isnan().tolist() == [False, True, False]
    assert not got["velocity"][1].any()
    # The NaN stays in the value: the gradients of the others are those without this row.
    rows = [0, 2]
    others = differentiate(lambda t: sde_log_prob(t, x_next[rows]), of_rows(transition, rows))
    assert torch.equal(got["velocity"][rows], others["velocity"])


def test_empty_batch(backend: str, device: str) -> None:
    empty, none = torch.empty(0, 3, 4, device=device), torch.empty(0)
    for coefficients in ((1.0, -0.1, 0.2), (none, none, none)):
        transition = Transition(empty, empty, *coefficients)
        got = differentiate(lambda t: sde_log_prob(t, empty), transition)
        assert got["value"].shape == (0,)
        assert got["velocity"].shape == (0, 3, 4)


def test_opcheck(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("is not a registered operation")
    transition = random_transition(3, (7, 5), device, guidance_scale=5.0)
    x, v, *step, uncond, w, _ = transition
    x_next, coefficients = likely_next(transition), [value.to(device, F32) for value in step]
    gradient, loss = randn(3, device=device), torch.tensor(2.0, device=device)
    forward = operation(backend, "sde_log_prob")
    backward = operation(backend, "sde_log_prob_backward")
    data = (x, x_next, v, uncond, *coefficients, w, True)
    torch.library.opcheck(backward, (gradient, None, *data, True))
    alone = (x, x_next, v, None, *coefficients, 1.0, False)
    torch.library.opcheck(backward, (gradient, loss, *alone, False))
    v.requires_grad_(), uncond.requires_grad_()
    torch.library.opcheck(forward, data)
    torch.library.opcheck(forward, alone)


def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    transition = random_transition(3, (7, 5), device, guidance_scale=3.0)
    x_next = likely_next(transition)

    def call(t: Transition) -> Tensor:
        return sde_log_prob(t._replace(velocity=2 * t.velocity), x_next)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    got, expected = (differentiate(function, transition) for function in (compiled, call))
    assert same_bits(got.values(), expected.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"next_latents": torch.zeros(2, 4)},
            r"next_latents: expected a float tensor \[2, 3\], got .* \[2, 4\]",
        ),
        (
            {"next_latents": torch.zeros(2, 3).bfloat16()},
            "next_latents: expected the dtype of latents, torch.float32, got torch.bfloat16",
        ),
        ({"cfg_grad": "none"}, "cfg_grad: expected one of both, cond_only, got 'none'"),
    ],
)
def test_bad_stored_transition(
    backend: str, device: str, change: dict[str, Any], message: str
) -> None:
    """Bad transitions are tested with `sde_step`."""
    arguments = {"next_latents": torch.zeros(2, 3)} | change
    arguments["next_latents"] = arguments["next_latents"].to(device)
    with pytest.raises(ValueError, match=message):
        sde_log_prob(random_transition(2, (3,), device), **arguments)
