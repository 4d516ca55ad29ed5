"""A policy whose forwards are written down, and what the backward passes of an update give."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import UpdateConfig
from fastgrpo.training.trajectory import Rollout
from fastgrpo.training.update import (
    TrainedTransition,
    UpdateStatistics,
    accumulate_gradients,
)


class Watched:
    """A policy whose forwards are written down: which branch, whether it keeps a graph, what comes
    back into it, what it keeps alive.
    """

    def __init__(self, policy: Any, rollout: Rollout) -> None:
        self.policy, self.transformer = policy, policy.transformer
        self.uncond = (
            None if rollout.unconditional is None else next(iter(rollout.unconditional.values()))[0]
        )
        self.calls: list[str] = []
        self.gradients: dict[str, Tensor] = {}
        self.now = self.peak = 0

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        branch = (
            "cond"
            if self.uncond is None
            or not torch.equal(next(iter(conditioning.values()))[0], self.uncond)
            else "uncond"
        )
        with torch.autograd.graph.saved_tensors_hooks(
            functools.partial(Kept, self), lambda kept: kept.tensor
        ):
            velocity = self.policy.velocity(latents, timesteps, conditioning)
        self.calls.append(branch + ("+" if velocity.requires_grad else ""))
        if velocity.requires_grad:
            velocity.register_hook(functools.partial(self.gradients.__setitem__, branch))
        return velocity


class Kept:
    """A tensor that a forward keeps for its backward; counted as long as it lives."""

    def __init__(self, watched: Watched, tensor: Tensor) -> None:
        self.watched, self.tensor, self.size = (
            watched,
            tensor,
            tensor.numel() * tensor.element_size(),
        )
        watched.now += self.size
        watched.peak = max(watched.peak, watched.now)

    def __del__(self) -> None:
        self.watched.now -= self.size


@dataclasses.dataclass
class Outcome:
    gradients: list[Tensor]
    magnitudes: list[Tensor]
    """Sum of the magnitudes of all the terms that each gradient was added up from."""
    loss: float
    stats: UpdateStatistics
    watched: Watched


def backward_of(
    policy: Any,
    rollout: Rollout,
    transitions: Sequence[TrainedTransition],
    cfg: UpdateConfig,
    *,
    on_policy: bool,
    reference: Any = None,
) -> Outcome:
    watched, stats = Watched(policy, rollout), statistics_at(on_policy)
    trained = [p for p in policy.transformer.parameters() if p.requires_grad]
    magnitudes = [torch.zeros_like(p) for p in trained]
    hooks = [
        p.register_hook(functools.partial(add_magnitude, m))
        for p, m in zip(trained, magnitudes, strict=True)
    ]
    policy.transformer.zero_grad(set_to_none=True)
    loss = accumulate_gradients(
        watched, rollout, transitions, len(transitions), 7.0, cfg, reference, stats
    )
    for hook in hooks:
        hook.remove()
    return Outcome([p.grad.clone() for p in trained], magnitudes, loss, stats, watched)


def statistics_at(on_policy: bool) -> UpdateStatistics:
    return UpdateStatistics(skipped=[] if on_policy else [False])


def add_magnitude(total: Tensor, term: Tensor) -> None:
    total += term.abs()
