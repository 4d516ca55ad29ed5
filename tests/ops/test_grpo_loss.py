"""clipped_ratio_loss and grpo_loss in every backend: float64 statement of Eq. 11, both sides of
every clip edge, ratio exactly 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgrpo_kernels import GRPOStats, clipped_ratio_loss, grpo_loss, sde_log_prob, sde_step
from fastgrpo_kernels.dispatch import operation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

# method.md's test vectors: (a, b, std) of dance at steps 0, 4, 8, 12, 15.
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


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(
        device, dtype
    )


def mixed_steps(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [B] of a batch that mixes steps: fp32 values in float64, on the CPU."""
    rows = TABLE[torch.arange(batch) % len(TABLE)].float().double()
    return rows[:, 0], rows[:, 1], rows[:, 2]


def textbook_loss(
    new: Tensor, old: Tensor, advantages: Tensor, clip_range: float, adv_clip: float
) -> Tensor:
    """Eq. 11 with min and clip, in the dtype of its arguments."""
    ratio = (new - old).exp()
    advantages = torch.clamp(advantages, -adv_clip, adv_clip)
    return -torch.min(
        ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    ).mean()


def textbook_log_prob(
    x: Tensor,
    x_next: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    w: float,
    step: tuple[Tensor, Tensor, Tensor],
    gaussian: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Log-probability of a transition by torch's operations in one dtype."""
    a, b, std = (value.to(x.device, dtype)[:, None] for value in step)
    x, x_next, v = x.to(dtype), x_next.to(dtype), cond.to(dtype)
    if uncond is not None:
        v = uncond.to(dtype) + w * (v - uncond.to(dtype))
    mean = a * x + b * v
    density = (
        torch.distributions.Normal(mean, std, validate_args=False).log_prob(x_next)
        if gaussian
        else -((x_next - mean) ** 2)
    )
    return density.mean(1)


# -------- the clipped loss


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
    """Exactly on the edge the gradient passes; one ulp beyond it, it passes only on the pessimistic
    side.
    """
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
    for name, got, wanted in (
        ("clip_fraction", stats.clip_fraction, stats.clipped.float().mean()),
        ("approx_kl", stats.approx_kl, 0.5 * (new - old).detach().square().mean()),
    ):
        assert got.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-37), name


def test_a_batch_of_any_size(backend: str, device: str) -> None:
    """Some hundreds, which the kernels take in several bites."""
    for batch in (1, 127, 128, 129, 700):
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


@pytest.mark.parametrize("advantage", [5.0, 5.5, 100.0, math.inf])
def test_advantages_are_clamped(backend: str, device: str, advantage: float) -> None:
    zero = torch.zeros(2, device=device)
    for adv, adv_clip, wanted in (
        (advantage, 5.0, -3.0),
        (-advantage, 5.0, 2.0),
        (-advantage, 2.0, 0.5),
    ):
        assert (
            clipped_ratio_loss(zero, zero, torch.tensor([adv, 1.0]), adv_clip=adv_clip)[0].item()
            == wanted
        )


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


# -------- the whole objective


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("cfg_grad", ["both", "cond_only"])
@pytest.mark.parametrize("guidance_scale", [None, 1.0, 5.0])
@pytest.mark.parametrize(
    ("storage", "velocity_dtype"), [(F32, F32), (F32, BF16), (BF16, F16), (F64, F64)]
)
def test_loss_and_gradients(
    backend: str,
    device: str,
    as_exact_as_eager: AsExactAsEager,
    storage: torch.dtype,
    velocity_dtype: torch.dtype,
    guidance_scale: float | None,
    cfg_grad: str,
    normalized: bool,
) -> None:
    """Mixed steps, advantages of both signs, some rows clipped, against autograd of the float64
    statement.
    """
    if storage == F64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    batch, numel, clip_range, w = 10, 33, 0.015, guidance_scale or 1.0
    x = randn(batch, numel, seed=1, dtype=storage, device=device)
    cond, moved, uncond = (
        randn(batch, numel, seed=seed, dtype=velocity_dtype, device=device) for seed in (2, 3, 4)
    )
    step, seeds = mixed_steps(batch), torch.arange(batch, device=device)
    options: dict[str, Any] = {"guidance_scale": w, "normalized": normalized}
    guided = {"velocity_uncond": uncond} if guidance_scale is not None else {}
    x_next, _ = sde_step(x, cond, *step, seeds=seeds, step=seeds, **options, **guided)
    cond = cond + 0.1 * moved
    # Ratios on both sides of both edges, each with advantages of both signs.
    exact_log_probs = textbook_log_prob(
        x, x_next, cond, uncond if guided else None, w, step, normalized, F64
    )
    old = (exact_log_probs - torch.linspace(-0.06, 0.06, batch, dtype=F64, device=device)).to(
        F64 if storage == F64 else F32
    )
    advantages = torch.tensor([1.5, -0.5] * (batch // 2)) * torch.linspace(0.2, 6.0, batch)

    def differentiate(
        objective: Callable[[Tensor, Tensor | None], Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        leaves = {"velocity": cond.detach().to(dtype, copy=True).requires_grad_()}
        if guided:
            leaves["velocity_uncond"] = uncond.detach().to(dtype, copy=True).requires_grad_()
        loss = objective(leaves["velocity"], leaves.get("velocity_uncond"))
        loss.backward()
        return {"loss": loss.detach()} | {
            name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
        }

    def ours(v: Tensor, u: Tensor | None) -> Tensor:
        loss, stats = grpo_loss(
            x,
            x_next,
            v,
            old,
            advantages,
            *step,
            velocity_uncond=u,
            clip_range=clip_range,
            cfg_grad=cfg_grad,
            **options,
        )
        assert stats.clip_fraction.item() == pytest.approx(0.4)
        assert stats.clipped.sum() == 4
        log_ratio = exact_log_probs - old
        assert stats.approx_kl.item() == pytest.approx(
            0.5 * log_ratio.square().mean().item(), rel=1e-3
        )
        torch.testing.assert_close(stats.ratio.double(), log_ratio.exp(), rtol=3e-5, atol=0)
        return loss

    def by_textbook(v: Tensor, u: Tensor | None, dtype: torch.dtype) -> Tensor:
        u = u if u is None or cfg_grad == "both" else u.detach()
        new = textbook_log_prob(x, x_next, v, u, w, step, normalized, dtype)
        return textbook_loss(new, old.to(dtype), advantages.to(device, dtype), clip_range, 5.0)

    got = differentiate(ours, velocity_dtype)
    eager = differentiate(lambda v, u: by_textbook(v, u, F32), velocity_dtype)
    exact = differentiate(lambda v, u: by_textbook(v, u, F64), F64)
    assert (
        got.keys()
        == eager.keys()
        == exact.keys()
        == {"loss", "velocity"} | (set(guided) if cfg_grad == "both" else set())
    )
    for name, value in got.items():
        if storage == F64:
            torch.testing.assert_close(
                value, exact[name], rtol=1e-10, atol=1e-10 * exact[name].abs().max().item()
            )
        else:
            as_exact_as_eager(name, value, eager[name], exact[name])


def test_gradcheck() -> None:
    x, cond, uncond = (randn(5, 4, seed=seed, dtype=F64) for seed in range(3))
    step = mixed_steps(5)
    x_next, old = sde_step(
        x, cond, *step, seeds=torch.arange(5), step=0, velocity_uncond=uncond, guidance_scale=2.0
    )
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5])

    def loss(cond: Tensor, uncond: Tensor) -> Tensor:
        options: dict[str, Any] = {
            "velocity_uncond": uncond,
            "guidance_scale": 2.0,
            "clip_range": 0.01,
        }
        return grpo_loss(x, x_next, cond, old, advantages, *step, **options)[0]

    moved = (cond + 0.1 * randn(5, 4, seed=9, dtype=F64)).requires_grad_(), uncond.requires_grad_()
    assert torch.autograd.gradcheck(loss, moved)


@pytest.mark.parametrize(("guided", "normalized"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(("storage", "velocity_dtype"), [(F32, BF16), (BF16, BF16), (BF16, F32)])
def test_unchanged_weights_give_a_ratio_of_exactly_one(
    backend: str,
    device: str,
    storage: torch.dtype,
    velocity_dtype: torch.dtype,
    guided: bool,
    normalized: bool,
) -> None:
    """Rolled out in one batch, trained in others: the bits of all three functions agree, so ratio -
    1 is 0.0, not small.
    """
    batch = 5
    x = randn(batch, 96, 8, 1, 1, seed=1, dtype=storage, device=device)
    cond, uncond = (
        randn(batch, 96, 8, 1, 1, seed=seed, dtype=velocity_dtype, device=device) for seed in (2, 3)
    )
    step, seeds = mixed_steps(batch), torch.arange(batch, device=device)
    base: dict[str, Any] = {"normalized": normalized}
    guidance = {"velocity_uncond": uncond, "guidance_scale": 5.0} if guided else {}
    x_next, old = sde_step(x, cond, *step, seeds=seeds, step=seeds % 5, **base, **guidance)
    advantages = randn(batch, seed=4, device=device)
    for rows in ([*range(batch)], [3, 1], [4]):
        part = {"velocity_uncond": uncond[rows], "guidance_scale": 5.0} if guided else {}
        velocity, coefficients = cond[rows].requires_grad_(), [value[rows] for value in step]
        loss, stats = grpo_loss(
            x[rows],
            x_next[rows],
            velocity,
            old[rows],
            advantages[rows],
            *coefficients,
            **base,
            **part,
        )
        assert torch.equal(stats.ratio, torch.ones(len(rows), device=device))
        assert torch.equal(stats.log_probs, old[rows])
        log_probs = sde_log_prob(x[rows], x_next[rows], velocity, *coefficients, **base, **part)
        assert torch.equal(log_probs.detach(), old[rows])
        assert stats.approx_kl.item() == stats.clip_fraction.item() == 0.0
        assert loss.item() == pytest.approx(-advantages[rows].mean().item(), rel=1e-5, abs=1e-6)
        loss.backward()
        assert velocity.grad is not None
        assert velocity.grad.any()


def test_a_gradient_step_makes_good_transitions_likelier(backend: str, device: str) -> None:
    x, velocity = randn(4, 50, seed=1, device=device), randn(4, 50, seed=2, device=device)
    step = mixed_steps(4)
    x_next, old = sde_step(x, velocity, *step, seeds=torch.arange(4, device=device), step=0)
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0], device=device)
    moving = velocity.clone().requires_grad_()
    grpo_loss(x, x_next, moving, old, advantages, *step)[0].backward()
    assert moving.grad is not None
    new = sde_log_prob(x, x_next, velocity - 0.1 * moving.grad, *step)
    assert torch.equal(torch.sign(new - old), torch.sign(advantages))


@given(batch=st.integers(1, 7), numel=st.integers(1, 301), data=st.data())
@few_examples
def test_a_sample_counts_the_same_in_every_batch(
    backend: str, device: str, batch: int, numel: int, data: st.DataObject
) -> None:
    """Statistics bit for bit, and gradients once the mean over the batch (a power of two here) is
    undone.
    """
    x, x_next, velocity = (randn(batch, numel, seed=seed, device=device) for seed in range(3))
    a, b, std = mixed_steps(batch)
    old = sde_log_prob(x, x_next, velocity + 1e-3, a, b, std)
    advantages = randn(batch, seed=5, device=device)

    def sample(rows: list[int], copies: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, filled up to `copies` so that the division by the batch is exact."""
        index = (rows * copies)[:copies]
        v = velocity[index].requires_grad_()
        loss, stats = grpo_loss(
            x[index],
            x_next[index],
            v,
            old[index],
            advantages[index],
            a[index],
            b[index],
            std[index],
        )
        (gradient,) = torch.autograd.grad(loss * copies, v)
        return stats.log_probs[0], stats.ratio[0], gradient[0]

    rows = data.draw(st.permutations(range(batch)))
    for one, other in zip(sample([rows[0]], 1), sample(list(rows), 8), strict=True):
        assert torch.equal(one, other)


def test_a_row_without_noise_spoils_the_loss_not_the_gradients(backend: str, device: str) -> None:
    x, x_next, velocity = (randn(3, 20, seed=seed, device=device) for seed in range(3))
    a, b, std = (value.clone() for value in mixed_steps(3))
    std[1] = 0.0
    spoilt = velocity.clone().requires_grad_()
    loss, stats = grpo_loss(x, x_next, spoilt, torch.zeros(3), torch.ones(3), a, b, std)
    assert loss.isnan()
    assert stats.ratio.isnan().tolist() == [False, True, False]
    loss.backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert not spoilt.grad[1].any()


def test_empty_batch_has_no_loss(backend: str, device: str) -> None:
    empty, none = torch.empty(0, 6, requires_grad=True, device=device), torch.empty(0)
    loss, stats = grpo_loss(empty.detach(), empty.detach(), empty, none, none, 1.0, -0.1, 0.2)
    loss.backward()
    assert loss.item() == stats.clip_fraction.item() == stats.approx_kl.item() == 0.0
    assert stats.ratio.shape == stats.log_probs.shape == (0,)
    assert clipped_ratio_loss(none.to(device), none, none)[0].item() == 0.0


def test_non_contiguous_input(backend: str, device: str) -> None:
    x, x_next, velocity = (randn(6, 4, 5, seed=seed, device=device) for seed in range(3))
    step = mixed_steps(6)
    old, advantages = (
        randn(6, 2, seed=4, device=device)[:, 0],
        randn(12, seed=5, device=device)[::2],
    )
    results = []
    for strided in (False, True):
        tensors = [
            tensor.transpose(1, 2).contiguous().transpose(1, 2) if strided else tensor
            for tensor in (x, x_next, velocity)
        ]
        rows = [value if strided else value.contiguous() for value in (old, advantages)]
        coefficients = [
            torch.stack((value, value), dim=1)[:, 1] if strided else value for value in step
        ]
        tensors[2].requires_grad_()
        loss, stats = grpo_loss(*tensors, *rows, *coefficients)
        results.append((loss.detach(), stats.ratio, *torch.autograd.grad(loss, tensors[2])))
    assert all(torch.equal(dense, other) for dense, other in zip(*results, strict=True))


# -------- torch


def objective(device: str) -> tuple[list[Tensor], list[Tensor]]:
    """x, x', v_cond, v_uncond; then old log-probabilities, advantages, a, b, std."""
    tensors = [randn(3, 7, 5, seed=seed, device=device) for seed in range(4)]
    return tensors, [
        randn(3, seed=9, device=device),
        randn(3, seed=8, device=device),
        *(value.to(device, F32) for value in mixed_steps(3)),
    ]


def test_opcheck(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("is not a registered operation")
    (x, x_next, v, uncond), (old, advantages, *step) = objective(device)
    leaves = v.requires_grad_(), uncond.requires_grad_()
    whole = operation(backend, "grpo_loss")
    torch.library.opcheck(whole, (x, x_next, *leaves, old, advantages, *step, 5.0, True, 0.1, 5.0))
    torch.library.opcheck(
        whole, (x, x_next, leaves[0], None, old, advantages, *step, 1.0, False, 0.1, math.inf)
    )
    new = (0.1 * old).requires_grad_()
    torch.library.opcheck(
        operation(backend, "clipped_ratio_loss"),
        (new, new.detach() + 0.01, advantages, 0.1, 5.0),
    )


def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    (x, x_next, v, uncond), (old, advantages, *step) = objective(device)

    def call(v: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options: dict[str, Any] = {"velocity_uncond": uncond, "guidance_scale": 3.0}
        loss, stats = grpo_loss(x, x_next, 2 * v, old, advantages, *step, **options)
        apart, _ = clipped_ratio_loss(
            sde_log_prob(x, x_next, v, *step, **options), old, advantages, clip_range=0.2
        )
        return loss + apart, stats.ratio, stats.clipped

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = v.clone().requires_grad_(), uncond.clone().requires_grad_()
        loss, *seen = function(*leaves)
        results.append([loss.detach(), *seen, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph(backend: str, device: str) -> None:
    """Forward and backward captured with device tensors, replayed on other values: what the eager
    call gives for them.
    """
    (x, x_next, v, uncond), data = objective(device)
    leaves = v.requires_grad_(), uncond.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        loss, stats = grpo_loss(
            x, x_next, leaves[0], *data, velocity_uncond=leaves[1], guidance_scale=3.0
        )
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
    assert all(torch.equal(got, wanted) for got, wanted in zip(captured, call(), strict=True))


# -------- bad input


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Samples and log-probabilities to the device; coefficients stay on the CPU, where their values
    are checked.
    """
    moved = ("latents", "next_latents", "velocity", "log_probs")
    return {name: value.to(device) if name in moved else value for name, value in arguments.items()}


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
        (
            {"advantages": torch.zeros(1)},
            r"advantages: expected a float tensor \[3\], got torch.float32 \[1\]",
        ),
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
    good: dict[str, Any] = {
        name: torch.zeros(3) for name in ("log_probs", "old_log_probs", "advantages")
    }
    if (
        "log_probs" in change
        and not change["log_probs"].is_floating_point()
        and backend != "reference"
    ):
        message = f"the backend '{backend}' cannot serve this call: .* this is torch.int32"
    with pytest.raises(ValueError, match=message):
        clipped_ratio_loss(**on(device, good | change))


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
        (
            {"guidance_scale": 3.0},
            "velocity_uncond: expected a tensor for guidance_scale 3.0, got None",
        ),
        ({"std": -0.1}, r"std: expected values of 0 or above, got \[-0.1\]"),
        ({"clip_range": 2.0}, "clip_range: .* got float 2.0"),
    ],
)
def test_bad_objective_arguments(
    backend: str, device: str, change: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {
        name: torch.zeros(2, 3) for name in ("latents", "next_latents", "velocity")
    }
    good |= {
        "old_log_probs": torch.zeros(2),
        "advantages": torch.zeros(2),
        "a": 1.0,
        "b": -0.1,
        "std": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        grpo_loss(**on(device, good | change))
