"""An update whose loss or gradient is not finite touches nothing, and leaves the next one alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_training import Recorder, same_bits, small_rollout
from torch import nn

from fastgrpo.config import UpdateConfig
from fastgrpo.training.update import (
    update,
)

ADVANTAGES = {0: 1.5, 1: -0.5, 2: -1.0, 3: 0.25, 4: 7.0, 5: -6.5}


def scale_gradient(parameter: nn.Parameter, factor: float) -> None:
    parameter.register_hook(
        lambda grad: (
            torch.full_like(grad, factor) if math.isnan(factor) or factor == 0 else grad * factor
        )
    )


@pytest.mark.parametrize(
    "fault",
    [
        "NaN state",
        "infinite state",
        "NaN log-probability",
        "infinite gradient",
        "NaN gradient",
        "infinite loss alone",
    ],
)
def test_what_is_not_finite_skips_the_step_and_touches_nothing(
    tiny_policy: Any, one_rank: Any, fault: str
) -> None:
    policy = tiny_policy()
    rollout = small_rollout(policy, sde_window="single")
    (step,) = rollout.trainable_steps[0]
    if fault == "NaN state":
        rollout.latents[1, step + 1, 0, 0, 0, 0] = math.nan
    elif fault == "infinite state":
        rollout.latents[1, step + 1, 0, 0, 0, 0] = math.inf
    elif fault == "NaN log-probability":
        rollout.log_probs[1, step] = math.nan
    elif fault == "infinite loss alone":
        rollout.log_probs[1, step] = -math.inf  # ratio infinite, advantage negative
        for p in policy.transformer.parameters():
            scale_gradient(p, 0.0)
    else:
        scale_gradient(policy.transformer.B, math.inf if fault == "infinite gradient" else math.nan)
    optimizer = torch.optim.AdamW(policy.transformer.parameters(), lr=0.01)
    for p in policy.transformer.parameters():  # a state to keep
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.full_like(p, 0.1),
            "exp_avg_sq": torch.full_like(p, 0.2),
        }
    before = copy.deepcopy((policy.transformer.state_dict(), optimizer.state_dict()))
    made: list[int] = []
    cfg = UpdateConfig(num_best=2, num_worst=1, optimizer_steps=1)
    stats = update(
        policy, optimizer, rollout, [0, 1, 2], ADVANTAGES, cfg, after_step=lambda: made.append(1)
    )
    assert stats.skipped == [True]
    assert made == []
    assert same_bits(policy.transformer.state_dict(), before[0])
    for number, state in optimizer.state_dict()["state"].items():
        assert {k: v.tolist() for k, v in state.items()} == {
            k: v.tolist() for k, v in before[1]["state"][number].items()
        }
    assert all(p.grad is None for p in policy.transformer.parameters())
    assert not (math.isfinite(stats.losses[0]) and math.isfinite(stats.grad_norms[0]))


def test_a_skipped_step_leaves_the_next_one_alone(tiny_policy: Any, one_rank: Any) -> None:
    policy = tiny_policy()
    rollout = small_rollout(policy)
    cfg = UpdateConfig(num_best=1, num_worst=1, max_grad_norm=1e9)
    alone = Recorder(policy)
    update(policy, alone, rollout, [1, 4], ADVANTAGES, cfg)
    rollout.latents[0] = math.nan
    optimizer, made = Recorder(policy), []
    stats = update(
        policy,
        optimizer,
        rollout,
        [0, 1, 3, 4],
        ADVANTAGES,
        cfg,
        after_step=lambda: made.append(1),
    )
    assert stats.skipped == [True, False]
    assert made == [1]
    assert same_bits(optimizer.seen[0], alone.seen[0])
