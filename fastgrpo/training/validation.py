"""Sample given prompts with fixed noise and score them: the evaluation of a run, and the `sample`
command.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import RolloutConfig
from fastgrpo.distributed.collectives import gather, rank, world_size
from fastgrpo.distributed.sharding import gathered
from fastgrpo.files import atomic_folder
from fastgrpo.interfaces import Policy
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training.decode import decode
from fastgrpo.training.metrics import Stopwatch
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.sample_files import save_samples
from fastgrpo.training.step import AbortableQueue, Trainer
from fastgrpo.training.weights import using_weights


@dataclass(frozen=True)
class ValidationSet:
    """Scores of P prompts with G videos each, over all ranks, and some of the videos.

    Attributes:
        prompts: P prompts.
        scores_PGK: Scores by prompt, video and stage.
        valid_PG: Which videos have a score.
        videos: [n, T, 3, H, W] uint8 on the CPU: the first video of each of the first n prompts.
    """

    prompts: list[str]
    scores_PGK: list[list[list[float]]]
    valid_PG: list[list[bool]]
    videos: Tensor

    @property
    def prompts_shown(self) -> list[str]:
        """The prompts of `videos`."""
        return self.prompts[: len(self.videos)]

    @property
    def scores_shown(self) -> list[list[float]]:
        """Scores [n][K] of `videos`; NaN for one without a score."""
        rows = zip(self.scores_PGK[: len(self.videos)], self.valid_PG, strict=False)
        return [s[0] if v[0] else [math.nan] * len(s[0]) for s, v in rows]

    def stage_means(self, num_stages: int) -> list[float]:
        """Mean of each stage over the valid videos; NaN if there is none."""
        rows = [
            row
            for scores_GK, valid_G in zip(self.scores_PGK, self.valid_PG, strict=True)
            for row, valid in zip(scores_GK, valid_G, strict=True)
            if valid
        ]
        return [
            sum(row[k] for row in rows) / len(rows) if rows else math.nan for k in range(num_stages)
        ]


def evaluate(
    trainer: Trainer,
    prompts: list[str],
    iteration: int,
    must_abort_rollout: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score the validation prompts with the same noise every time, and save the first videos.

    Returns:
        The `eval/...` metrics; none without prompts.

    Raises:
        RolloutInterrupted: As `Trainer.step`.
    """
    if not prompts:
        return {}
    config, stages, clock = trainer.config, trainer.judge.reward.stages, Stopwatch()
    cfg, policy = config.evaluation, trainer.policy
    sampler = dataclasses.replace(
        config.rollout,
        sde=cfg.sde,
        sde_window="all",
        num_generations=cfg.num_generations,
        same_noise=False,  # an ODE makes the same video of the same noise
    )
    with (
        clock.phase("evaluation"),
        gathered(policy.transformer, config.parallel.keep_gathered),
        using_weights(policy, trainer.evaluation_weights),
    ):
        validation = sample_validation(
            policy,
            AbortableQueue(trainer.judge, must_abort_rollout),
            prompts,
            sampler,
            seed=config.seed,
            num_videos=cfg.num_videos,
            device=trainer.device,
            compute_dtype=trainer.compute_dtype,
        )
        if rank() == 0 and len(validation.videos):
            folder = config.run_folder / "samples" / f"iteration_{iteration:06d}"
            with atomic_folder(folder) as partial:
                save_samples(
                    partial,
                    validation.videos,
                    validation.prompts_shown,
                    policy.fps,
                    validation.scores_shown,
                    stages,
                )
    means = zip(stages, validation.stage_means(len(stages)), strict=True)
    return {
        **{f"eval/rewards/{stage}/mean": value for stage, value in means},
        "eval/num_invalid_videos": sum(valid_G.count(False) for valid_G in validation.valid_PG),
        "time/evaluation": clock.seconds["evaluation"],
    }


@torch.no_grad()
def sample_validation(
    policy: Policy,
    judge: ScoringQueue | AbortableQueue,
    prompts: list[str],
    cfg: RolloutConfig,
    *,
    seed: int,
    num_videos: int,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> ValidationSet:
    """Sample all prompts and score them. All ranks call this; each takes its share.

    Args:
        policy: Sampled with the weights that it has.
        judge: Scores the videos.
        prompts: P prompts.
        cfg: The sampler, and G in `num_generations`.
        seed: The noise depends on it and on the prompt's number only.
        num_videos: How many prompts' first videos are kept.
        device: Where the trajectories lie.
        compute_dtype: Of the forward pass.

    Raises:
        RolloutInterrupted: By an `AbortableQueue`.
    """
    # Every rank makes the same number of passes, since sharded ranks must call the network
    # together. The last ranks repeat prompts as needed, and the repeats are dropped at the end.
    share = -(-len(prompts) // world_size())
    first = rank() * share
    own = [prompts[slot % len(prompts)] for slot in range(first, first + share)]
    num_kept = max(0, min(share, num_videos - first))
    # A rollout keeps every state of its videos, so only few prompts at a time: the fewest that
    # fill whole micro-batches.
    together = cfg.micro_batch_size // math.gcd(cfg.micro_batch_size, cfg.num_generations)
    videos: list[Tensor] = []
    for begin in range(0, share, together):
        rollout = start_rollout(
            policy,
            own[begin : begin + together],
            cfg,
            seed=derive_seed(seed, "held out"),
            iteration=0,
            first_slot=first + begin,
            device=device,
            compute_dtype=compute_dtype,
        )
        for batch in sample_videos(policy, rollout, share_first_step=cfg.share_first_step):
            frames = decode(policy, batch.latents)
            judge.submit(frames, batch.prompts, policy.fps)
            for index, video in zip(batch.sample_indices, frames, strict=True):
                prompt, generation = divmod(index, cfg.num_generations)
                if generation == 0 and begin + prompt < num_kept:
                    videos.append((video.nan_to_num() * 255).round().to(torch.uint8).cpu())
    ranks = gather((*judge.collect(cfg.num_generations), videos))
    scores, valid, shown = ([item for of_rank in ranks for item in of_rank[i]] for i in range(3))
    return ValidationSet(
        prompts,
        scores[: len(prompts)],
        valid[: len(prompts)],
        torch.stack(shown[:num_videos]) if shown[:num_videos] else torch.empty(0),
    )
