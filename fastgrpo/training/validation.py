"""Sample given captions with fixed noise and score them: evaluation during a run, and the `sample`
command.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.config import RolloutConfig
from fastgrpo.distributed.collectives import gather, rank, world_size
from fastgrpo.interfaces import Policy
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training.decode import decode
from fastgrpo.training.rollout import sample_groups, start_rollout
from fastgrpo.training.trajectory import derive_seed, using_weights


@dataclass(frozen=True)
class ValidationSet:
    """Scores of P prompts with G videos each, over all ranks, and the first video of each of the
    first `len(videos)` prompts.
    """

    prompts: list[str]
    scores_PGK: list[list[list[float]]]
    valid_PG: list[list[bool]]
    videos: Tensor
    """[n, T, 3, H, W] uint8, on the CPU."""

    @property
    def prompts_shown(self) -> list[str]:
        return self.prompts[: len(self.videos)]

    @property
    def scores_shown(self) -> list[list[float]]:
        """Scores of the videos that are shown; NaN for one without a score."""
        rows = zip(self.scores_PGK[: len(self.videos)], self.valid_PG, strict=False)
        return [s[0] if v[0] else [float("nan")] * len(s[0]) for s, v in rows]

    def stage_means(self, num_stages: int) -> list[float]:
        """Mean of each stage over the valid videos; NaN where there is none."""
        rows = [
            row
            for s, v in zip(self.scores_PGK, self.valid_PG, strict=True)
            for row, ok in zip(s, v, strict=True)
            if ok
        ]
        return [
            sum(row[k] for row in rows) / len(rows) if rows else float("nan")
            for k in range(num_stages)
        ]


@torch.no_grad()
def sample_validation(
    policy: Policy,
    judge: ScoringQueue,
    prompts: list[str],
    cfg: RolloutConfig,
    *,
    seed: int,
    num_videos: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    weights: Mapping[str, Tensor] | None = None,
) -> ValidationSet:
    """Videos of all prompts by the sampler of `cfg`, dealt over ranks; the noise depends on seed
    and prompt number only.

    weights: what to sample with instead of the network's own (the EMA), for `using_weights`.
    Every rank makes the same number of passes: where prompts do not come out even, the last
    ranks repeat some and drop the result.
    """
    share = -(-len(prompts) // world_size())
    first = rank() * share
    mine = [prompts[slot % len(prompts)] for slot in range(first, first + share)]
    kept = max(0, min(share, num_videos - first))
    together = cfg.micro_batch_size // math.gcd(
        cfg.micro_batch_size, cfg.num_generations
    )  # prompts that fill micro-batches evenly
    videos: list[Tensor] = []
    with using_weights(policy, weights):
        for begin in range(0, share, together):  # a rollout keeps every state of its videos
            rollout = start_rollout(
                policy,
                mine[begin : begin + together],
                cfg,
                seed=derive_seed(seed, "validation"),
                iteration=0,
                first_slot=first + begin,
                device=device,
                compute_dtype=compute_dtype,
            )
            for sample in sample_groups(policy, rollout, share_first_step=cfg.share_first_step):
                frames = decode(policy, sample.latents)
                judge.submit(frames, sample.prompts, policy.fps)
                for video, picture in zip(sample.videos, frames, strict=True):
                    prompt, generation = divmod(video, cfg.num_generations)
                    if generation == 0 and begin + prompt < kept:
                        videos.append((picture.nan_to_num() * 255).round().to(torch.uint8).cpu())
    ranks = gather((*judge.collect(cfg.num_generations), videos))
    scores, valid, shown = ([item for of_rank in ranks for item in of_rank[i]] for i in range(3))
    num_shown = min(num_videos, len(prompts))
    return ValidationSet(
        prompts,
        scores[: len(prompts)],
        valid[: len(prompts)],
        torch.stack(shown[:num_shown]) if num_shown else torch.empty(0),
    )
