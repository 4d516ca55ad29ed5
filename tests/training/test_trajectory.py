"""Coefficients by video and step, and the forward that rollout and update share."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_training import small_rollout

from fastgrpo.training.trajectory import TransitionIndex, branch_velocities

empty_rollout = functools.partial(small_rollout, sample=False, num_inference_steps=5)
X = torch.randn(4, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))


def test_counts_and_coefficients_by_prompt_and_step(tiny_policy: Any) -> None:
    rollout = empty_rollout(tiny_policy(), ["a", "b", "c"])
    assert (rollout.num_videos, rollout.num_steps) == (9, 5)
    assert rollout.latents.shape == (9, 6, 3, 2, 2, 2)
    assert rollout.log_probs.shape == (9, 5)
    rollout.a, rollout.b, rollout.std = (
        torch.arange(15.0).view(3, 5) + shift for shift in (0, 100, 200)
    )
    index: TransitionIndex = rollout.index([0, 2, 3, 8, 8], [4, 0, 1, 2, 4])
    assert index.prompts == [0, 0, 1, 2, 2]
    assert (index.samples.tolist(), index.steps.tolist()) == ([0, 2, 3, 8, 8], [4, 0, 1, 2, 4])
    for shift, got in zip((0, 100, 200), rollout.coefficients(index), strict=True):
        assert got.tolist() == [shift + n for n in (4.0, 0.0, 6.0, 12.0, 14.0)]


@pytest.mark.parametrize("rounding", ["trunc", "none"])
def test_branches_are_the_policys_own_velocities(tiny_policy: Any, rounding: str) -> None:
    policy = tiny_policy()
    rollout = empty_rollout(policy, ["a", "b", "c"], guidance_scale=3.0, timestep_rounding=rounding)
    index = rollout.index([7, 0, 3, 7], [2, 2, 4, 1])
    conditional, unconditional = branch_velocities(policy, rollout, X, index)
    # docs/method.md, section 1, for 5 steps and shift 5.
    exact = [1000 * 5 * t / (1 + 4 * t) for t in (0.6, 0.6, 0.2, 0.8)]
    times = torch.tensor([t // 1 for t in exact] if rounding == "trunc" else exact)
    assert torch.equal(conditional, policy.velocity(X, times, policy.encode(["c", "a", "b", "c"])))
    assert unconditional is not None
    assert torch.equal(unconditional, policy.velocity(X, times, policy.encode([""] * 4)))
    assert not torch.equal(conditional, unconditional)


def test_without_guidance_there_is_one_branch_and_one_forward(tiny_policy: Any) -> None:
    policy = tiny_policy()
    rollout = empty_rollout(policy, ["a"])
    assert rollout.unconditional is None
    policy.batch_sizes.clear()
    at = torch.zeros(2, 3, 2, 2, 2), rollout.index([0, 1], [0, 1])
    _, unconditional = branch_velocities(policy, rollout, *at)
    assert unconditional is None
    assert policy.batch_sizes == [2]


def test_bf16_runs_the_forward_and_leaves_the_weights(tiny_policy: Any) -> None:
    policy = tiny_policy()
    rollout = empty_rollout(policy, ["a"], guidance_scale=2.0)
    at = X[:2], rollout.index([0, 1], [1, 1])
    full = branch_velocities(policy, rollout, *at)
    rollout.compute_dtype = torch.bfloat16
    for exact, rounded in zip(full, branch_velocities(policy, rollout, *at), strict=True):
        assert exact is not None
        assert rounded is not None
        # The weights of the products have 8 bits; 24 terms of about 1 / sqrt(24) each.
        assert 1e-5 < (exact - rounded.float()).abs().max().item() < 0.05
    assert all(p.dtype == torch.float32 for p in policy.transformer.parameters())


def test_branches_carry_gradients_to_the_weights(tiny_policy: Any) -> None:
    policy = tiny_policy()
    rollout = empty_rollout(policy, ["a"], guidance_scale=2.0)
    at = torch.ones(1, 3, 2, 2, 2), rollout.index([0], [0])
    for branch in branch_velocities(policy, rollout, *at):
        assert branch is not None
        (gradient,) = torch.autograd.grad(branch.sum(), [policy.transformer.A])
        assert gradient.abs().max() > 0
