"""One training step of Self-Paced GRPO, in the paper's terms.

Departures from textbook GRPO (docs/method.md, sections 2 and 3):

1. The reward is a mixture of K stage scores, whose weights move with the generator's competence
   (Eqs. 4-9).
2. Only the best and the worst videos of a group are trained (best-of-n). Advantages are normalised
   over the whole group before that choice (Eq. 10).
3. The log-probability is a mean over elements, not a sum, and the clip range (1e-4) matches it.
4. There is no KL term unless `kl_coef` asks for one.
5. A video without a score leaves its group. A group without a signal is skipped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from fastgrpo.algorithm.advantages import choose_and_shuffle, group_advantages
from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.algorithm.self_paced import Pacer, group_statistics, mix
from fastgrpo.config import TrainConfig
from fastgrpo.distributed.collectives import gather, rank, world_size
from fastgrpo.distributed.sharding import gathered
from fastgrpo.errors import require
from fastgrpo.interfaces import Policy
from fastgrpo.rewards.queue import Scores, ScoringQueue
from fastgrpo.training.decode import decode
from fastgrpo.training.metrics import (
    Stopwatch,
    judge_metrics,
    memory_metrics,
    reward_metrics,
    update_metrics,
)
from fastgrpo.training.optimizer import make_optimizer
from fastgrpo.training.prompts import draw_prompts
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.trajectory import Group
from fastgrpo.training.update import UpdateStatistics, update
from fastgrpo.training.weights import WITHOUT_ADAPTERS, average_weights, copy_weights

POLL = 1.0
"""Seconds between two looks at a signal while the judge is waited for."""


class RolloutInterrupted(Exception):
    """A rollout was aborted, before any weight, counter or pacer state changed."""


class AbortableQueue:
    """A judge's queue that all ranks wait for together, so that a signal can end the wait.

    Args:
        judge: The queue.
        must_abort: As for `Trainer.step`.

    Raises:
        RolloutInterrupted: By both methods.
    """

    def __init__(self, judge: ScoringQueue, must_abort: Callable[[], bool]) -> None:
        self.judge, self.must_abort = judge, must_abort

    def submit(self, videos: Tensor, prompts: Sequence[str], fps: float) -> None:
        """As `ScoringQueue.submit`. All ranks call this together."""
        self._wait_until(self.judge.has_room)
        self.judge.submit(videos, prompts, fps)

    def collect(self, num_generations: int) -> tuple[list[Scores], list[list[bool]]]:
        """As `ScoringQueue.collect`. All ranks call this together."""
        self._wait_until(self.judge.is_done)
        return self.judge.collect(num_generations)

    def _wait_until(self, is_ready: Callable[[float], bool]) -> None:
        while True:
            ranks = gather((is_ready(POLL), self.must_abort()), "the judge of all ranks")
            ready, must_abort = zip(*ranks, strict=True)
            if any(must_abort):
                raise RolloutInterrupted
            if all(ready):
                return


class Trainer:
    """The state of a run, and the step that moves it on."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        judge: ScoringQueue,
        prompts: list[str],
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        from diffusers.optimization import get_scheduler

        cfg, network = config.update, policy.transformer
        self.config, self.policy, self.judge, self.prompts = config, policy, judge, prompts
        self.device, self.compute_dtype = device, compute_dtype
        self.pacer = Pacer(config.pacing, len(judge.reward.stages))
        self.trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer([*self.trainable.values()], cfg)
        schedule = get_scheduler(
            cfg.lr_scheduler,
            self.optimizer,
            num_warmup_steps=cfg.warmup_iterations,
            num_training_steps=max(1, config.iterations),
        )
        # A function of the iteration, so a checkpoint needs no state of the schedule.
        self.learning_rate_factor = schedule.lr_lambdas[0]
        # Reference and EMA are tensors sharded like the parameters, for `using_weights`: a network
        # under FSDP2 cannot be copied.
        self.reference: Mapping[str, Tensor] | None = None
        if cfg.kl_coef:
            has_adapters = getattr(network, "_hf_peft_config_loaded", False)
            self.reference = WITHOUT_ADAPTERS if has_adapters else copy_weights(self.trainable)
        self.ema = copy_weights(self.trainable) if cfg.ema_decay else None
        self.prompts_drawn = 0
        self.skipped_in_a_row = 0
        self.invalid_share = 0.0
        self.optimizer.register_step_pre_hook(self._note_optimizer_step)
        self.make_optimizer_state()
        # What an error in an iteration leaves behind: the state after the one before it is whole
        # until the optimizer's first step, and the other ranks can be told until the update.
        self.is_updating = self.weights_moved = False

    def step(
        self, iteration: int, must_abort_rollout: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """Sample, score, mix, normalise, choose, update.

        Args:
            iteration: Counted from 1.
            must_abort_rollout: Asked after every micro-batch of videos and while the judge is
                waited for, on every rank: true if a signal is older than PATIENCE seconds
                (`signals.StopRequest`).

        Returns:
            The metrics over all ranks.

        Raises:
            RolloutInterrupted: `must_abort_rollout` was true on at least one rank; raised on all.
        """
        cfg, G, clock = self.config, self.config.rollout.num_generations, Stopwatch()
        self.is_updating = self.weights_moved = False
        judge = AbortableQueue(self.judge, must_abort_rollout)
        self.set_learning_rate(iteration)
        # Each rank takes its block of the iteration's prompts. A slot is a prompt's number among
        # the iteration's prompts on all ranks.
        slots, prompts = self.next_prompts()
        # Seeds, stochastic steps and first noise follow from seed, iteration and slot, not from the
        # rank.
        rollout = start_rollout(
            self.policy,
            prompts,
            cfg.rollout,
            seed=cfg.seed,
            iteration=iteration,
            first_slot=slots[0],
            device=self.device,
            compute_dtype=self.compute_dtype,
        )
        # Eq. 2: sample with the SDE. The judge scores one micro-batch while the next is sampled.
        with clock.phase("rollout"), gathered(self.policy.transformer, cfg.parallel.keep_gathered):
            share_first_step = cfg.rollout.share_first_step
            for batch in sample_videos(self.policy, rollout, share_first_step=share_first_step):
                # Without a name, which would hold the last frames through the update.
                judge.submit(decode(self.policy, batch.latents), batch.prompts, self.policy.fps)
        with clock.phase("reward"):
            scores_PGK, valid_PG = judge.collect(G)
        # Eqs. 7-8: mean and saturation of each stage, over the valid videos of a group.
        groups = [
            Group(scores_GK, valid_G, group_statistics(scores_GK, valid_G, cfg.pacing.saturation))
            for scores_GK, valid_G in zip(scores_PGK, valid_PG, strict=True)
        ]
        # Competence takes in the groups of all ranks, so the weights do not depend on the rank.
        self.pacer.observe([*chain.from_iterable(gather([g.statistics for g in groups]))])
        for slot, group in zip(slots, groups, strict=True):
            if group.statistics is None:
                continue  # fewer than two valid videos: nothing to compare
            group.weights_K = self.pacer.weights(group.statistics)  # Eqs. 6 and 9
            group.rewards_G = mix(group.scores_GK, group.weights_K)  # Eq. 5
            group.advantages = group_advantages(group.rewards_G, group.valid_G)  # Eq. 10
            # Best-of-n, in an order of training that is drawn per prompt.
            order = derive_seed(cfg.seed, "order", iteration, slot)
            best, worst = cfg.update.num_best, cfg.update.num_worst
            group.chosen = choose_and_shuffle(group.advantages, best, worst, order)
        # Eq. 11: the clipped update. From here on a video is known by its index in the rollout.
        self.is_updating = True
        with clock.phase("update"):
            stats = update(
                self.policy,
                self.optimizer,
                rollout,
                [p * G + g for p, group in enumerate(groups) for g in group.chosen],
                {
                    p * G + g: A
                    for p, group in enumerate(groups)
                    for g, A in group.advantages.items()
                },
                cfg.update,
                reference=self.reference,
                after_step=self.update_ema,
            )
        metrics = self.count_and_report(iteration, groups, stats) | clock.metrics()
        self.is_updating = self.weights_moved = False
        return metrics

    def next_prompts(self) -> tuple[range, list[str]]:
        """This rank's slots among the iteration's prompts, and the prompts there."""
        cfg, share = self.config, self.config.rollout.num_prompts // world_size()
        slots = range(rank() * share, (rank() + 1) * share)
        first = self.prompts_drawn + slots[0]
        return slots, draw_prompts(self.prompts, first, share, cfg.seed, cfg.prompts.shuffle)

    def make_optimizer_state(self) -> None:
        """Make the optimizer's state at step 0.

        Otherwise torch makes it at the first checkpoint, by an optimizer step that it counts.
        """
        get_optimizer_state_dict(self.policy.transformer, self.optimizer)
        # AdamW counts steps per weight, apex per parameter group.
        for counted in (*self.optimizer.state.values(), *self.optimizer.param_groups):
            if "step" in counted:
                counted["step"] *= 0

    def _note_optimizer_step(self, *_: Any) -> None:
        self.weights_moved = True

    def set_learning_rate(self, iteration: int) -> None:
        cfg = self.config.update
        # The schedules count from 0, which would make the first iteration of a warm-up idle.
        done = iteration if iteration <= cfg.warmup_iterations else iteration - 1
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.learning_rate * self.learning_rate_factor(done)

    def update_ema(self) -> None:
        """Take the weights of one optimizer step into the EMA, if there is one."""
        if self.ema is not None:
            average_weights(self.ema, self.trainable, self.config.update.ema_decay)

    def count_and_report(
        self, iteration: int, groups: list[Group], stats: UpdateStatistics
    ) -> dict[str, Any]:
        """Move the counters on and return the iteration's metrics over all ranks."""
        judge = self.judge.counters(), self.judge.blocked_seconds()
        # One exchange: each costs the ranks a wait for the last of them.
        ranks = gather((groups, judge, stats), "what all ranks have done")
        every_group = [group for own, _, _ in ranks for group in own]
        self.prompts_drawn += self.config.rollout.num_prompts
        # An iteration without any score counts as an update that could not be made.
        nothing_scored = all(group.statistics is None for group in every_group)
        for skipped in [True] if nothing_scored else stats.skipped:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        validity = [*chain.from_iterable(group.valid_G for group in every_group)]
        self.invalid_share = validity.count(False) / len(validity)

        stages, pacing = self.judge.reward.stages, self.config.pacing
        seen: dict[str, float] = {}  # by the gates
        for name, values in (
            ("competence", self.pacer.competence),
            ("saturation", self.pacer.saturations),
        ):
            seen |= {f"{name}/{s}": v for s, v in zip(stages, values or (), strict=False)}
        return {
            "iteration": iteration,
            **reward_metrics(every_group, stages),
            **judge_metrics([judge for _, judge, _ in ranks]),
            **seen,
            "pacing/sharpness": pacing.sharpness,
            "pacing/sparsity_weight": pacing.sparsity_weight,
            "pacing/gate_temperature": pacing.gate_temperature,
            **update_metrics([stats for _, _, stats in ranks]),
            **memory_metrics(self.device),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    @property
    def evaluation_weights(self) -> Mapping[str, Tensor] | None:
        """The weights that evaluation, `sample` and the export at the end of a run use: the EMA if
        there is one, else None, which `using_weights` takes for the raw weights. Rollouts use the
        raw weights.
        """
        return self.ema

    def tensors(self) -> dict[str, Any]:
        """The tensors of a checkpoint, in the form that torch.distributed.checkpoint loads into.

        Only what is trained: with LoRA the adapters. Another number of ranks can load it.
        """
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.policy.transformer, self.optimizer, options=options)
        ema = {} if self.ema is None else {"ema": self.ema}
        return {"model": model, "optimizer": optimizer, **ema}

    def load_tensors(self, tensors: dict[str, Any]) -> None:
        """Take over what was loaded into `tensors()`."""
        # These settings come from the configuration, which a resume may change.
        groups = tensors["optimizer"]["param_groups"]
        for loaded, own in zip(groups, self.optimizer.param_groups, strict=True):
            loaded.update({key: own[key] for key in ("lr", "betas", "weight_decay")})
        set_state_dict(
            self.policy.transformer,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        if self.ema is not None:
            # An EMA that this resume switches on starts at the loaded weights.
            self.ema = tensors.get("ema") or copy_weights(self.trainable)

    def state_dict(self) -> dict[str, Any]:
        """The rest of the state, as JSON. Noise is counter-based, so there is no generator."""
        return {
            "prompts_drawn": self.prompts_drawn,
            "skipped_in_a_row": self.skipped_in_a_row,
            "pacer": self.pacer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            UserError: A counter is no count, or the pacer's state is not of this judge.
            KeyError, TypeError, AttributeError: It is no such state.
        """
        for key in ("prompts_drawn", "skipped_in_a_row"):
            is_count = isinstance(state[key], int) and state[key] >= 0
            require(is_count, f"state: {key}", "a count", state[key])
        self.prompts_drawn = state["prompts_drawn"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.pacer.load_state_dict(state["pacer"])
