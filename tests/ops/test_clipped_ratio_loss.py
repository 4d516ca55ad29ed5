"""clipped_ratio_loss in every backend: the float64 statement of Eq. 11, and both sides of every
clip edge.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastgrpo_kernels import GRPOStats, clipped_ratio_loss
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_inputs import BF16, F32, F64, AsExactAsEager, randn, textbook_loss

few_examples = settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_loss_by_hand(backend: str, device: str, dtype: torch.dtype) -> None:
    """Ratios 2, 1/2, 1, 2, 1/2 with advantages 1, 1, 3, -1, -1 at clip 0.2: 1.2 + 0.5 + 3 - 2 - 0.8
    = 1.9.
    """
    if dtype == F64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    near = 1e-12 if dtype == F64 else 5e-7
    old = torch.tensor([-1.0, 0.5, 2.0, 0.0, 0.25], dtype=dtype, device=device)
    new = old + torch.tensor([2.0, 0.5, 1.0, 2.0, 0.5], dtype=dtype, device=device).log()
    loss, stats = clipped_ratio_loss(
        new, old, torch.tensor([1.0, 1.0, 3.0, -1.0, -1.0]), clip_range=0.2
    )
    assert loss.item() == pytest.approx(-1.9 / 5, rel=near)
    assert isinstance(stats, GRPOStats)
    assert stats.ratio.tolist() == pytest.approx([2.0, 0.5, 1.0, 2.0, 0.5], rel=near)
    assert torch.equal(stats.log_probs, new)
    assert stats.clipped.tolist() == [True, False, False, False, True]
    assert stats.clip_fraction.item() == pytest.approx(
        2 / 5
    )  # the first and the last: the others move back to 1
    assert stats.approx_kl.item() == pytest.approx(0.5 * 4 * math.log(2.0) ** 2 / 5, rel=near)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("log_ratio", [0.25, -0.25, 1e-4, -1e-4])
@pytest.mark.parametrize("advantage", [3.0, -3.0, 0.0])
def test_clip_edges(
    backend: str, device: str, dtype: torch.dtype, log_ratio: float, advantage: float
) -> None:
    """On the edge itself the gradient passes; one ulp beyond it, only on the pessimistic side."""
    if dtype == F64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    old, adv = torch.zeros(1, dtype=dtype, device=device), torch.tensor([advantage], dtype=dtype)
    moved = torch.full((1,), log_ratio, dtype=dtype, device=device)
    ratio = clipped_ratio_loss(moved, old, adv)[1].ratio.item()
    on_edge = abs(ratio - 1.0)  # exact, and so is 1 + on_edge, or 1 - on_edge
    ulp = torch.finfo(dtype).eps
    for clip_range, beyond in ((on_edge, False), (on_edge - ulp, True), (on_edge + ulp, False)):
        new = moved.clone().requires_grad_()
        loss, stats = clipped_ratio_loss(new, old, adv, clip_range=clip_range)
        loss.backward()
        clipped = beyond and advantage * log_ratio > 0
        assert stats.clip_fraction.item() == float(clipped), clip_range
        edge = 1.0 + math.copysign(clip_range, log_ratio)
        assert loss.item() == pytest.approx(-advantage * (edge if clipped else ratio), rel=ulp)
        assert new.grad is not None
        assert new.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio, rel=2 * ulp)


Rows = list[tuple[float, float, float]]
some_rows = st.lists(
    st.tuples(st.floats(-3, 3), st.floats(-0.5, 0.5), st.floats(-8, 8)), min_size=1, max_size=9
)


@given(
    rows=some_rows,
    clip_range=st.sampled_from([0.0, 1e-4, 0.1, 0.3]),
    adv_clip=st.sampled_from([0.5, 5.0, math.inf]),
)
@settings(deadline=None, max_examples=100)
def test_loss_equals_the_textbook_in_float64(
    rows: Rows, clip_range: float, adv_clip: float
) -> None:
    old = torch.tensor([row[0] for row in rows], dtype=F64)
    new = (old + torch.tensor([row[1] for row in rows], dtype=F64)).requires_grad_()
    advantages = torch.tensor([row[2] for row in rows], dtype=F64)
    loss, stats = clipped_ratio_loss(new, old, advantages, clip_range=clip_range, adv_clip=adv_clip)
    exact = textbook_loss(new, old, advantages, clip_range, adv_clip)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12, abs=1e-14)
    (gradient,) = torch.autograd.grad(loss, new)
    (exact_gradient,) = torch.autograd.grad(exact, new)
    # Where clip(rho) == rho to the last bit but not in the gradient (clip 0 at rho 1), the
    # textbook's tie is arbitrary.
    decided = ((stats.ratio - 1).abs() - clip_range).abs() > 1e-12
    torch.testing.assert_close(gradient[decided], exact_gradient[decided], rtol=1e-12, atol=1e-15)
    assert 0.0 <= stats.clip_fraction.item() <= 1.0
    assert stats.approx_kl.item() == pytest.approx(
        0.5 * (new - old).square().mean().item(), rel=1e-12, abs=1e-300
    )


@given(
    rows=some_rows,
    clip_range=st.sampled_from([1e-4, 0.1, 0.3]),
    adv_clip=st.sampled_from([0.5, 5.0, math.inf]),
)
@few_examples
def test_loss_and_gradient_against_float64(
    backend: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    rows: Rows,
    clip_range: float,
    adv_clip: float,
) -> None:
    old, moves, advantages = torch.tensor(rows, dtype=F32, device=device).T.contiguous()
    new = (old + moves).requires_grad_()
    loss, stats = clipped_ratio_loss(new, old, advantages, clip_range=clip_range, adv_clip=adv_clip)
    new64 = new.detach().double().requires_grad_()
    eager, exact = (
        textbook_loss(new, old, advantages, clip_range, adv_clip),
        textbook_loss(new64, old, advantages, clip_range, adv_clip),
    )
    as_exact_as_eager(
        "ratio", stats.ratio, (new - old).exp().detach(), (new64 - old).exp().detach()
    )
    gradients = [
        torch.autograd.grad(value, leaf)[0]
        for value, leaf in ((loss, new), (eager, new), (exact, new64))
    ]
    decided = (
        (stats.ratio.double() - 1).abs() - clip_range
    ).abs() > 1e-6  # else the rounding of the ratio decides
    if decided.all():
        # The terms may cancel, and eager may be lucky: an ulp is one of their size.
        terms = (stats.ratio * advantages.clamp(-adv_clip, adv_clip)).double().abs().mean()
        assert (loss - exact).abs() <= 2 * (eager - exact).abs() + torch.finfo(F32).eps * terms
        as_exact_as_eager("gradient", *gradients)
    for name, got, expected in (
        ("clip_fraction", stats.clip_fraction, stats.clipped.float().mean()),
        ("approx_kl", stats.approx_kl, 0.5 * (new - old).detach().square().mean()),
    ):
        assert got.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-37), name


def test_a_batch_of_any_size(backend: str, device: str) -> None:
    """The kernels take 128 rows at a time."""
    for batch in (1, 127, 128, 129, 300):
        old, moves, advantages = (randn(batch, seed=seed, device=device) for seed in range(3))
        new = (old + 0.1 * moves).requires_grad_()
        loss, stats = clipped_ratio_loss(new, old, advantages, clip_range=0.05)
        exact = textbook_loss(new.detach().double(), old.double(), advantages.double(), 0.05, 5.0)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6)
        assert stats.clip_fraction.item() == pytest.approx(stats.clipped.double().mean().item())
        alone, _ = clipped_ratio_loss(new[-1:], old[-1:], advantages[-1:], clip_range=0.05)
        (gradient,) = torch.autograd.grad(alone, new)
        (together,) = torch.autograd.grad(loss, new)
        torch.testing.assert_close(together[-1] * batch, gradient[-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("advantage", [5.0, 5.5, math.inf])
def test_advantages_are_clamped(backend: str, device: str, advantage: float) -> None:
    zero = torch.zeros(2, device=device)
    for adv, adv_clip, expected in (
        (advantage, 5.0, -3.0),
        (-advantage, 5.0, 2.0),
        (-advantage, 2.0, 0.5),
    ):
        loss, _ = clipped_ratio_loss(zero, zero, torch.tensor([adv, 1.0]), adv_clip=adv_clip)
        assert loss.item() == expected


def test_only_log_probs_are_trained(backend: str, device: str) -> None:
    new, old, advantages = (
        randn(4, seed=seed, device=device).requires_grad_() for seed in range(3)
    )
    loss, stats = clipped_ratio_loss(new, old, advantages)
    loss.backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantages.grad is None
    assert not any(value.requires_grad for value in stats)


def test_dtypes_follow_the_log_probs(backend: str, device: str) -> None:
    old, advantages = randn(4, seed=1, dtype=F64), randn(4, seed=2, dtype=F64)
    for dtype, computed in (
        (F32, F32),
        (BF16, F32),
        *([(F64, F64)] if backend == "reference" else []),
    ):
        new = old.to(device, dtype).requires_grad_()
        loss, stats = clipped_ratio_loss(
            new, old.to(dtype), advantages
        )  # float64 advantages, on the CPU, as computed
        assert loss.dtype == computed
        assert all(
            value.dtype == (torch.bool if name == "clipped" else computed)
            for name, value in stats._asdict().items()
        )
        torch.testing.assert_close(loss.double().cpu(), -advantages.mean(), rtol=1e-6, atol=1e-7)
        loss.backward()
        assert new.grad is not None
        assert new.grad.dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"log_probs": torch.zeros(3, 1)},
            r"log_probs: expected a float tensor \[3\], got torch.float32 \[3, 1\]",
        ),
        ({"log_probs": torch.zeros(3).int()}, "log_probs: .* got torch.int32"),
        ({"log_probs": torch.tensor(0.0)}, r"log_probs: .* got torch.float32 \[\]"),
        (
            {"old_log_probs": torch.zeros(2)},
            r"old_log_probs: expected a float tensor \[3\], got torch.float32 \[2\]",
        ),
        ({"old_log_probs": [0.0] * 3}, r"old_log_probs: .* got list"),
        ({"advantages": torch.zeros(1)}, r"advantages: .* \[3\], got torch.float32 \[1\]"),
        ({"advantages": torch.zeros(3).long()}, "advantages: .* got torch.int64"),
        ({"clip_range": -0.1}, r"clip_range: expected a number in \[0, 1\), got float -0.1"),
        ({"clip_range": 1.0}, r"clip_range: .* got float 1.0"),
        ({"clip_range": math.nan}, r"clip_range: .* got float nan"),
        ({"clip_range": None}, r"clip_range: .* got NoneType None"),
        ({"adv_clip": 0.0}, "adv_clip: expected a number above 0, got float 0.0"),
        ({"adv_clip": math.nan}, "adv_clip: .* got float nan"),
    ],
)
def test_bad_loss_arguments(
    backend: str, device: str, change: dict[str, Any], message: str
) -> None:
    arguments = {n: torch.zeros(3) for n in ("log_probs", "old_log_probs", "advantages")} | change
    arguments["log_probs"] = arguments["log_probs"].to(device)
    if not arguments["log_probs"].is_floating_point() and backend != "reference":
        message = f"the backend '{backend}' cannot serve this call: .*torch.int32"
    with pytest.raises(ValueError, match=message):
        clipped_ratio_loss(**arguments)
