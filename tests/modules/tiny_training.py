"""What the tests of a training step share: small rollouts, and weights that have moved."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import RolloutConfig
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.trajectory import Rollout

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a dog"]
SMALL: dict[str, Any] = {
    "height": 2,
    "width": 2,
    "num_frames": 2,
    "num_inference_steps": 6,
    "num_generations": 3,
    "micro_batch_size": 2,
    "guidance_scale": 1.0,
}


def small_rollout(
    policy: Any,
    prompts: list[str] = PROMPTS,
    *,
    dtype: torch.dtype = torch.float32,
    sample: bool = True,
    share_first_step: bool = True,
    **settings: Any,
) -> Rollout:
    """A rollout of TinyPolicy: two prompts with three videos each, six steps."""
    cfg = RolloutConfig(**(SMALL | settings))
    rollout = start_rollout(
        policy, prompts, cfg, seed=3, iteration=1, first_slot=0, device=CPU, compute_dtype=dtype
    )
    rollout.latents.fill_(math.nan)  # what is not written shows
    if sample:
        for _ in sample_videos(policy, rollout, share_first_step=share_first_step):
            pass
    return rollout


def moved(policy: Any, by: float, seed: int = 1) -> Any:
    """The same policy with other trained weights: no longer the one that made the rollout."""
    other, draw = copy.copy(policy), torch.Generator().manual_seed(seed)
    other.transformer = copy.deepcopy(policy.transformer)
    with torch.no_grad():
        for p in other.transformer.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=draw)
    return other


def weights_of(policy: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.transformer.named_parameters()}


def same_bits(one: Iterable[Any] | Mapping[str, Tensor], other: Any) -> bool:
    """Whether two lists of tensors, or two dictionaries, are equal bit for bit."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and same_bits(one.values(), other.values())
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if not k.startswith("time/") and k != "step_time"}


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients that each step was given."""

    def __init__(self, policy: Any, lr: float = 0.0) -> None:
        super().__init__(policy.transformer.parameters(), lr=lr)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        super().step(closure)
