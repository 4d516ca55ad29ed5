"""clipped_ratio_loss and grpo_loss: float64 statement of Eq. 11, both sides of every clip edge, ratio exactly 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastgrpo_kernels import GRPOStats, clipped_ratio_loss, grpo_loss, sde_log_prob, sde_step
from hypothesis import given, settings
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


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixed_steps(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = TABLE[torch.arange(batch) % len(TABLE)]
    return rows[:, 0], rows[:, 1], rows[:, 2]


def textbook_loss(new: Tensor, old: Tensor, advantages: Tensor, clip_range: float, adv_clip: float) -> Tensor:
    """Eq. 11 with min and clip, float64."""
    ratio = (new - old).exp()
    advantages = torch.clamp(advantages, -adv_clip, adv_clip)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()


def textbook_log_prob(
    x: Tensor,
    x_next: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    w: float,
    step: tuple[Tensor, Tensor, Tensor],
    gaussian: bool,
) -> Tensor:
    """Log-probability of a transition in float64, guidance as (1 - w) v_uncond + w v_cond."""
    a, b, std = (value[:, None] for value in step)
    v = cond if uncond is None else (1 - w) * uncond + w * cond
    mean = a * x + b * v
    density = torch.distributions.Normal(mean, std).log_prob(x_next) if gaussian else -((x_next - mean) ** 2)
    return density.mean(1)


# ------------------------------------------------------------------------------------------------ the clipped loss


def test_loss_by_hand() -> None:
    """Ratios 2, 1/2, 1, 2, 1/2 with advantages 1, 1, 3, -1, -1 at clip 0.2: 1.2 + 0.5 + 3 - 2 - 0.8 = 1.9."""
    old = torch.tensor([-1.0, 0.5, 2.0, 0.0, 0.25], dtype=torch.float64)
    new = old + torch.tensor([2.0, 0.5, 1.0, 2.0, 0.5], dtype=torch.float64).log()
    loss, stats = clipped_ratio_loss(new, old, torch.tensor([1.0, 1.0, 3.0, -1.0, -1.0]), clip_range=0.2)
    assert loss.item() == pytest.approx(-1.9 / 5, rel=1e-12)
    assert isinstance(stats, GRPOStats)
    assert stats.ratio.tolist() == pytest.approx([2.0, 0.5, 1.0, 2.0, 0.5], rel=1e-12)
    assert torch.equal(stats.log_probs, new)
    assert stats.clipped.tolist() == [True, False, False, False, True]
    assert stats.clip_fraction.item() == pytest.approx(2 / 5)  # the first and the last: the others move back to 1
    assert stats.approx_kl.item() == pytest.approx(0.5 * 4 * math.log(2.0) ** 2 / 5, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [0.25, -0.25, 1e-4, -1e-4])
@pytest.mark.parametrize("advantage", [3.0, -3.0, 0.0])
def test_clip_edges(dtype: torch.dtype, log_ratio: float, advantage: float) -> None:
    """Exactly on the edge the gradient passes; one ulp beyond it, it passes only on the pessimistic side."""
    old, adv = torch.zeros(1, dtype=dtype), torch.tensor([advantage], dtype=dtype)
    ratio = clipped_ratio_loss(torch.full((1,), log_ratio, dtype=dtype), old, adv)[1].ratio.item()
    on_edge = abs(ratio - 1.0)  # exact, and so is 1 + on_edge, or 1 - on_edge
    ulp = torch.finfo(dtype).eps
    for clip_range, beyond in ((on_edge, False), (on_edge - ulp, True), (on_edge + ulp, False)):
        new = torch.full((1,), log_ratio, dtype=dtype, requires_grad=True)
        loss, stats = clipped_ratio_loss(new, old, adv, clip_range=clip_range)
        loss.backward()
        clipped = beyond and advantage * log_ratio > 0
        assert stats.clip_fraction.item() == float(clipped), clip_range
        edge = 1.0 + math.copysign(clip_range, log_ratio)
        assert loss.item() == pytest.approx(-advantage * (edge if clipped else ratio), rel=ulp)
        assert new.grad is not None
        assert new.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio, rel=2 * ulp)


@given(
    rows=st.lists(
        st.tuples(st.floats(-3, 3), st.floats(-0.5, 0.5), st.floats(-8, 8)),
        min_size=1,
        max_size=9,
    ),
    clip_range=st.sampled_from([0.0, 1e-4, 0.1, 0.3]),
    adv_clip=st.sampled_from([0.5, 5.0, math.inf]),
)
@settings(deadline=None, max_examples=200)
def test_loss_equals_the_textbook(rows: list[tuple[float, float, float]], clip_range: float, adv_clip: float) -> None:
    old = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    new = (old + torch.tensor([row[1] for row in rows], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    loss, stats = clipped_ratio_loss(new, old, advantages, clip_range=clip_range, adv_clip=adv_clip)
    exact = textbook_loss(new, old, advantages, clip_range, adv_clip)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12, abs=1e-14)
    (gradient,) = torch.autograd.grad(loss, new)
    (exact_gradient,) = torch.autograd.grad(exact, new)
    # Where clip(rho) == rho to the last bit but not in the gradient (clip 0 at rho 1), the textbook's tie is arbitrary.
    decided = ((stats.ratio - 1).abs() - clip_range).abs() > 1e-12
    torch.testing.assert_close(gradient[decided], exact_gradient[decided], rtol=1e-12, atol=1e-15)
    assert 0.0 <= stats.clip_fraction.item() <= 1.0
    assert stats.approx_kl.item() == pytest.approx(0.5 * (new - old).square().mean().item(), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("advantage", [5.0, 5.5, 100.0, math.inf])
def test_advantages_are_clamped(advantage: float) -> None:
    zero = torch.zeros(2)
    loss, _ = clipped_ratio_loss(zero, zero, torch.tensor([advantage, 1.0]))
    assert loss.item() == -3.0
    loss, _ = clipped_ratio_loss(zero, zero, torch.tensor([-advantage, 1.0]))
    assert loss.item() == 2.0
    loss, _ = clipped_ratio_loss(zero, zero, torch.tensor([-advantage, 1.0]), adv_clip=2.0)
    assert loss.item() == 0.5


def test_only_log_probs_are_trained() -> None:
    new, old, advantages = (randn(4, seed=seed).requires_grad_() for seed in range(3))
    loss, stats = clipped_ratio_loss(new, old, advantages)
    loss.backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantages.grad is None
    assert not any(value.requires_grad for value in stats)


def test_dtypes_follow_the_log_probs() -> None:
    old, advantages = randn(4, seed=1), randn(4, seed=2)
    for dtype, computed in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        loss, stats = clipped_ratio_loss(old.to(dtype), old.to(dtype), advantages)  # float64 advantages, as computed
        assert loss.dtype == computed
        assert all(value.dtype == (torch.bool if name == "clipped" else computed) for name, value in stats._asdict().items())
        torch.testing.assert_close(loss.double(), -advantages.mean(), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ the whole objective


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("cfg_grad", ["both", "cond_only"])
@pytest.mark.parametrize("guidance_scale", [None, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients(dtype: torch.dtype, guidance_scale: float | None, cfg_grad: str, normalized: bool) -> None:
    """Mixed steps, advantages of both signs, some rows clipped, against autograd of the float64 statement."""
    batch, numel, clip_range = 10, 33, 0.015
    x = randn(batch, numel, seed=1, dtype=dtype)
    cond, moved = randn(batch, numel, seed=2, dtype=dtype), randn(batch, numel, seed=3, dtype=dtype)
    uncond = None if guidance_scale is None else randn(batch, numel, seed=4, dtype=dtype)
    w = 1.0 if guidance_scale is None else guidance_scale
    step = mixed_steps(batch)
    options: dict[str, Any] = {"velocity_uncond": uncond, "guidance_scale": w, "normalized": normalized}
    x_next, _ = sde_step(x, cond, *step, seeds=torch.arange(batch), step=torch.arange(batch), **options)
    cond = (cond + 0.1 * moved).requires_grad_()
    if uncond is not None:
        options["velocity_uncond"] = uncond.requires_grad_()
    cond64 = cond.detach().double().requires_grad_()
    uncond64 = None if uncond is None else uncond.detach().double().requires_grad_()
    new64 = textbook_log_prob(x.double(), x_next.double(), cond64, uncond64, w, step, normalized)
    # Ratios on both sides of both edges, each with advantages of both signs.
    old = new64.detach() - torch.linspace(-0.06, 0.06, batch, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.5] * (batch // 2), dtype=torch.float64) * torch.linspace(0.2, 6.0, batch)
    loss, stats = grpo_loss(x, x_next, cond, old, advantages, *step, clip_range=clip_range, cfg_grad=cfg_grad, **options)
    loss.backward()
    exact = textbook_loss(new64, old, advantages, clip_range, 5.0)
    exact.backward()
    assert stats.clip_fraction.item() == pytest.approx(0.4)
    near = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(loss.double(), exact, rtol=near, atol=near)
    torch.testing.assert_close(stats.log_probs.double(), new64.detach(), rtol=near, atol=near)
    assert cond.grad is not None
    assert cond64.grad is not None
    scale = cond64.grad.abs().max().item()
    torch.testing.assert_close(cond.grad.double(), cond64.grad, rtol=near, atol=near * scale)
    if uncond is not None:
        assert uncond64 is not None
        if cfg_grad == "cond_only":
            assert uncond.grad is None
        else:
            assert uncond.grad is not None
            assert uncond64.grad is not None
            torch.testing.assert_close(uncond.grad.double(), uncond64.grad, rtol=near, atol=near * scale)


def test_gradcheck() -> None:
    x, cond, uncond = (randn(5, 4, seed=seed) for seed in range(3))
    step = mixed_steps(5)
    x_next, old = sde_step(x, cond, *step, seeds=torch.arange(5), step=0, velocity_uncond=uncond, guidance_scale=2.0)
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5])

    def loss(cond: Tensor, uncond: Tensor) -> Tensor:
        options: dict[str, Any] = {"velocity_uncond": uncond, "guidance_scale": 2.0, "clip_range": 0.01}
        return grpo_loss(x, x_next, cond, old, advantages, *step, **options)[0]

    moved = (cond + 0.1 * randn(5, 4, seed=9)).requires_grad_(), uncond.requires_grad_()
    assert torch.autograd.gradcheck(loss, moved)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("velocity_dtype", [torch.float32, torch.bfloat16])
def test_unchanged_weights_give_a_ratio_of_exactly_one(
    velocity_dtype: torch.dtype, storage: torch.dtype, guided: bool, normalized: bool
) -> None:
    """Rolled out in one batch, trained in others: the bits of all three functions agree, so ratio - 1 is 0.0, not small."""
    batch = 13
    x = randn(batch, 96, 8, 1, 1, seed=1, dtype=storage)
    cond, uncond = (randn(batch, 96, 8, 1, 1, seed=seed, dtype=velocity_dtype) for seed in (2, 3))
    a, b, std = mixed_steps(batch)
    seeds, steps = torch.arange(batch), torch.arange(batch) % 5
    base: dict[str, Any] = {"normalized": normalized}
    guidance = {"velocity_uncond": uncond, "guidance_scale": 5.0} if guided else {}
    x_next, old = sde_step(x, cond, a, b, std, seeds=seeds, step=steps, **base, **guidance)
    advantages = randn(batch, seed=4)
    for rows in (torch.arange(batch), torch.tensor([12, 3]), torch.tensor([7]), torch.arange(batch - 1, -1, -2)):
        part = {"velocity_uncond": uncond[rows], "guidance_scale": 5.0} if guided else {}
        velocity = cond[rows].requires_grad_()
        loss, stats = grpo_loss(x[rows], x_next[rows], velocity, old[rows], advantages[rows], a[rows], b[rows], std[rows], **base, **part)
        assert torch.equal(stats.ratio, torch.ones(len(rows)))
        assert torch.equal(stats.log_probs, old[rows])
        log_probs = sde_log_prob(x[rows], x_next[rows], velocity, a[rows], b[rows], std[rows], **base, **part)
        assert torch.equal(log_probs.detach(), old[rows])
        assert stats.approx_kl.item() == stats.clip_fraction.item() == 0.0
        assert loss.item() == pytest.approx(-advantages[rows].mean().item(), rel=1e-5, abs=1e-6)
        loss.backward()
        assert velocity.grad is not None
        assert velocity.grad.any()


def test_a_gradient_step_makes_good_transitions_likelier() -> None:
    x, velocity = randn(4, 50, seed=1), randn(4, 50, seed=2)
    step = mixed_steps(4)
    x_next, old = sde_step(x, velocity, *step, seeds=torch.arange(4), step=0)
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0])
    moving = velocity.clone().requires_grad_()
    grpo_loss(x, x_next, moving, old, advantages, *step)[0].backward()
    assert moving.grad is not None
    new = sde_log_prob(x, x_next, velocity - 1e-3 * moving.grad, *step)
    assert torch.equal(torch.sign(new - old), torch.sign(advantages).double())


@given(batch=st.integers(1, 15), numel=st.integers(1, 301), data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_sample_counts_the_same_in_every_batch(batch: int, numel: int, data: st.DataObject) -> None:
    """Statistics bit for bit, and gradients once the mean over the batch (a power of two here) is undone."""
    x, x_next, velocity = (randn(batch, numel, seed=seed, dtype=torch.float32) for seed in range(3))
    a, b, std = mixed_steps(batch)
    old = sde_log_prob(x, x_next, velocity + 1e-3, a, b, std)
    advantages = randn(batch, seed=5)

    def sample(rows: list[int], copies: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, filled up to `copies` so that the division by the batch is exact."""
        index = (rows * copies)[:copies]
        v = velocity[index].requires_grad_()
        loss, stats = grpo_loss(x[index], x_next[index], v, old[index], advantages[index], a[index], b[index], std[index])
        (gradient,) = torch.autograd.grad(loss * copies, v)
        return stats.log_probs[0], stats.ratio[0], gradient[0]

    rows = data.draw(st.permutations(range(batch)))
    alone = sample([rows[0]], 1)
    for together in (sample(list(rows), 16), sample(list(rows), 32)):
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other)


def test_a_row_without_noise_spoils_the_loss_not_the_gradients() -> None:
    x, x_next, velocity = (randn(3, 20, seed=seed) for seed in range(3))
    a, b, std = (value.clone() for value in mixed_steps(3))
    old, advantages = torch.zeros(3), torch.ones(3)
    std[1] = 0.0
    spoilt = velocity.clone().requires_grad_()
    loss, stats = grpo_loss(x, x_next, spoilt, old, advantages, a, b, std)
    assert loss.isnan()
    assert stats.ratio.isnan().tolist() == [False, True, False]
    loss.backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert not spoilt.grad[1].any()


def test_empty_batch_has_no_loss() -> None:
    empty, none = torch.empty(0, 6, requires_grad=True), torch.empty(0)
    loss, stats = grpo_loss(empty.detach(), empty.detach(), empty, none, none, 1.0, -0.1, 0.2)
    loss.backward()
    assert loss.item() == stats.clip_fraction.item() == stats.approx_kl.item() == 0.0
    assert stats.ratio.shape == (0,)


def test_non_contiguous_input() -> None:
    x, x_next, velocity = (randn(6, 4, 5, seed=seed, dtype=torch.float32) for seed in range(3))
    step = mixed_steps(6)
    old, advantages = randn(6, 2, seed=4, dtype=torch.float32)[:, 0], randn(12, seed=5)[::2]
    dense = grpo_loss(x, x_next, velocity, old.contiguous(), advantages.contiguous(), *step)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (x, x_next, velocity)]
    other = grpo_loss(*strided, old, advantages, *(torch.stack((v, v), dim=1)[:, 1] for v in step))
    assert torch.equal(dense[0], other[0])
    assert torch.equal(dense[1].ratio, other[1].ratio)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(3, 1)}, r"log_probs: expected a float tensor \[3\], came torch.float32 \[3, 1\]"),
        ({"log_probs": torch.zeros(3).int()}, "log_probs: .* came torch.int32"),
        ({"log_probs": torch.tensor(0.0)}, r"log_probs: .* came torch.float32 \[\]"),
        ({"old_log_probs": torch.zeros(2)}, r"old_log_probs: expected a float tensor \[3\], came torch.float32 \[2\]"),
        ({"old_log_probs": [0.0] * 3}, r"old_log_probs: .* came list"),
        ({"advantages": torch.zeros(1)}, r"advantages: expected a float tensor \[3\], came torch.float32 \[1\]"),
        ({"advantages": torch.zeros(3).long()}, "advantages: .* came torch.int64"),
        ({"clip_range": -0.1}, r"clip_range: expected a number in \[0, 1\), came float -0.1"),
        ({"clip_range": 1.0}, r"clip_range: .* came float 1.0"),
        ({"clip_range": math.nan}, r"clip_range: .* came float nan"),
        ({"clip_range": None}, r"clip_range: .* came NoneType None"),
        ({"adv_clip": 0.0}, "adv_clip: expected a number above 0, came float 0.0"),
        ({"adv_clip": math.nan}, "adv_clip: .* came float nan"),
    ],
)
def test_bad_loss_arguments(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {name: torch.zeros(3) for name in ("log_probs", "old_log_probs", "advantages")}
    with pytest.raises(ValueError, match=message):
        clipped_ratio_loss(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_log_probs": torch.zeros(3)}, r"old_log_probs: expected a float tensor \[2\], came torch.float32 \[3\]"),
        ({"advantages": torch.zeros(2, 1)}, r"advantages: .* \[2\], came torch.float32 \[2, 1\]"),
        ({"next_latents": torch.zeros(2, 4)}, r"next_latents: .* \[2, 3\], came torch.float32 \[2, 4\]"),
        ({"cfg_grad": ""}, "cfg_grad: expected one of both, cond_only, came ''"),
        ({"guidance_scale": 3.0}, "velocity_uncond: expected a tensor for guidance_scale 3.0, came None"),
        ({"std": -0.1}, r"std: expected values of 0 or above, came \[-0.1\]"),
        ({"clip_range": 2.0}, "clip_range: .* came float 2.0"),
    ],
)
def test_bad_objective_arguments(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {name: torch.zeros(2, 3) for name in ("latents", "next_latents", "velocity")}
    good |= {"old_log_probs": torch.zeros(2), "advantages": torch.zeros(2), "a": 1.0, "b": -0.1, "std": 0.1}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(good | change))
