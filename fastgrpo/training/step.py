"""One training step of Self-Paced GRPO, in the paper's terms.

Departures from textbook GRPO, all of them the method's (method.md, sections 2 and 3): the reward
is a mixture of stages whose weights move with competence (Eqs. 4-9); only the best and the worst
videos of a group are trained; advantages are normalised over the whole group before that choice;
the log-probability is a mean over elements, with a clip range to match (1e-4); no KL unless
`kl_coef` asks for it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from fastgrpo.algorithm.advantages import best_of_n, group_advantages
from fastgrpo.algorithm.self_paced import GroupStatistics, Pacer, group_statistics, hoyer, mix
from fastgrpo.config import TrainConfig
from fastgrpo.distributed.collectives import any_rank, gather, rank, world_size
from fastgrpo.distributed.sharding import gathered
from fastgrpo.interfaces import Policy
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training.decode import decode
from fastgrpo.training.prompts import draw_prompts
from fastgrpo.training.rollout import sample_groups, start_rollout
from fastgrpo.training.timing import Stopwatch
from fastgrpo.training.trajectory import WITHOUT_ADAPTERS, derive_seed, local_part
from fastgrpo.training.update import UpdateStatistics, make_optimizer, update

TRAINED = StateDictOptions(ignore_frozen_params=True)
"""What a checkpoint keeps of a network: with LoRA its adapters alone, since the rest is the model's
own.
"""


class Abandoned(Exception):
    """A step was left during its rollout, before it had changed anything."""


@dataclass
class Group:
    """One prompt's G videos as scored. Advantages and chosen stay empty where the group is skipped."""

    scores_GK: list[list[float]]
    valid_G: list[bool]
    statistics: GroupStatistics | None
    weights_K: tuple[float, ...] = ()
    rewards_G: list[float] = field(default_factory=list)
    advantages: dict[int, float] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)


class Trainer:
    """What lives through a run, and the step that uses it."""

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
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer([*self.trained.values()], cfg)
        scheduler = get_scheduler(
            cfg.lr_scheduler,
            self.optimizer,
            num_warmup_steps=cfg.warmup_iterations,
            num_training_steps=max(1, config.iterations),
        )
        self.learning_rate_factor = scheduler.lr_lambdas[
            0
        ]  # a function of the iteration: no state of a schedule has to be kept
        # Tensors, sharded like the parameters, for using_weights: a network under FSDP2 cannot be
        # copied.
        has_adapters = bool(getattr(network, "_hf_peft_config_loaded", False))
        self.reference = (
            None
            if not cfg.kl_coef
            else WITHOUT_ADAPTERS
            if has_adapters
            else self.copy_of_weights()
        )
        self.ema = self.copy_of_weights() if cfg.ema_decay else None
        self.prompts_drawn = 0
        self.skipped_in_a_row = 0
        self.invalid_share = 0.0
        self.make_optimizer_state()

    def step(self, iteration: int, leave: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Sample, score, mix, normalise, choose, update; `iteration` counts from 1. Returns the
        metrics over all ranks.

        leave: asked after every micro-batch of videos; where it is true on a rank, Abandoned is
        raised on all.
        """
        cfg, G, clock = self.config, self.config.rollout.num_generations, Stopwatch()
        self.set_learning_rate(iteration)
        slots, prompts = self.next_prompts()
        rollout = start_rollout(  # seeds, schedule, shared first noise
            self.policy,
            prompts,
            cfg.rollout,
            seed=cfg.seed,
            iteration=iteration,
            first_slot=slots[0],
            device=self.device,
            compute_dtype=self.compute_dtype,
        )
        with clock.phase("rollout"), gathered(self.policy.transformer, cfg.parallel.keep_gathered):
            # Eq. 2, one micro-batch after the other
            for sample in sample_groups(
                self.policy, rollout, share_first_step=cfg.rollout.share_first_step
            ):
                # scored while the next one is sampled
                self.judge.submit(
                    decode(self.policy, sample.latents), sample.prompts, self.policy.fps
                )
                if any_rank(leave()):
                    raise Abandoned
        with clock.phase("reward"):
            scores_PGK, valid_PG = self.judge.collect(G)
        groups = [
            Group(s, v, group_statistics(s, v, cfg.pacing.saturation))
            for s, v in zip(scores_PGK, valid_PG, strict=True)
        ]  # Eqs. 7-8
        self.pacer.observe(
            concatenate(gather([group.statistics for group in groups]))
        )  # competence, over all ranks
        for slot, group in zip(slots, groups, strict=True):
            if group.statistics is None:
                continue  # fewer than two videos with a score
            group.weights_K = self.pacer.weights(group.statistics)  # Eqs. 6, 9
            group.rewards_G = mix(group.scores_GK, group.weights_K)  # Eq. 5
            group.advantages = group_advantages(group.rewards_G, group.valid_G)  # Eq. 10
            order = derive_seed(cfg.seed, "order", iteration, slot)
            group.chosen = best_of_n(
                group.advantages, cfg.update.num_best, cfg.update.num_worst, order
            )
        chosen = [p * G + g for p, group in enumerate(groups) for g in group.chosen]
        advantages = {
            p * G + g: a for p, group in enumerate(groups) for g, a in group.advantages.items()
        }
        with clock.phase("update"):
            stats = update(  # Eq. 11
                self.policy,
                self.optimizer,
                rollout,
                chosen,
                advantages,
                cfg.update,
                reference=self.reference,
                after_step=self.average_weights,
            )
        return self.finish(iteration, groups, stats) | clock.metrics()

    def next_prompts(self) -> tuple[range, list[str]]:
        """This rank's slots among the iteration's prompts (they are dealt in blocks), and the
        captions there.
        """
        cfg, share = self.config, self.config.rollout.num_prompts // world_size()
        slots = range(rank() * share, (rank() + 1) * share)
        return slots, draw_prompts(
            self.prompts, self.prompts_drawn + slots[0], share, cfg.seed, cfg.prompts.shuffle
        )

    def make_optimizer_state(self) -> None:
        """Make the optimizer's state now, at step 0. Left to torch, the first checkpoint would make
        it, by a step that counts as one.
        """
        get_optimizer_state_dict(self.policy.transformer, self.optimizer)
        for counted in (
            *self.optimizer.state.values(),
            *self.optimizer.param_groups,
        ):  # AdamW counts for each weight, apex for each group
            if "step" in counted:
                counted["step"] *= 0

    def set_learning_rate(self, iteration: int) -> None:
        for group in self.optimizer.param_groups:
            # The schedules count from 0. During warm-up that would make the first iteration one
            # without any effect.
            done = iteration if iteration <= self.config.update.warmup_iterations else iteration - 1
            group["lr"] = self.config.update.learning_rate * self.learning_rate_factor(done)

    def copy_of_weights(self) -> dict[str, Tensor]:
        """The trained parameters as they are now, by name, sharded as they are."""
        return {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def average_weights(self) -> None:
        """Take one optimizer step's weights into the EMA, where there is one."""
        if self.ema is not None:
            own = [local_part(p.detach()) for p in self.trained.values()]
            torch._foreach_lerp_(
                [local_part(e) for e in self.ema.values()], own, 1 - self.config.update.ema_decay
            )

    def finish(
        self, iteration: int, groups: list[Group], stats: UpdateStatistics
    ) -> dict[str, Any]:
        """Move the counters on; the metrics of the iteration over all ranks."""
        self.prompts_drawn += self.config.rollout.num_prompts
        every_group, stages, pacing = (
            concatenate(gather(groups)),
            self.judge.reward.stages,
            self.config.pacing,
        )
        nothing_scored = all(
            group.statistics is None for group in every_group
        )  # counts as an update that could not be made
        for skipped in [True] if nothing_scored else stats.skipped:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        validity = concatenate(group.valid_G for group in every_group)
        self.invalid_share = validity.count(False) / len(validity)
        return {
            "iteration": iteration,
            **reward_metrics(every_group, stages),
            **judge_metrics(gather((self.judge.counters(), self.judge.blocked_seconds()))),
            **{
                f"competence/{s}": c
                for s, c in zip(stages, self.pacer.competence or (), strict=False)
            },
            **{
                f"saturation/{s}": c
                for s, c in zip(stages, self.pacer.saturations or (), strict=False)
            },
            **{
                f"pacing/{key}": getattr(pacing, key)
                for key in ("sharpness", "sparsity_weight", "gate_temperature")
            },
            **update_metrics(gather(stats)),
            **memory_metrics(self.device),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    @property
    def sampling_weights(self) -> Mapping[str, Tensor] | None:
        """What to sample with and to export, for `using_weights`: the EMA where there is one, else
        None, the weights themselves.
        """
        return self.ema

    def tensors(self) -> dict[str, Any]:
        """The state that torch.distributed.checkpoint keeps, which it also loads into; it can be
        loaded by another number of ranks.
        """
        model, optimizer = get_state_dict(self.policy.transformer, self.optimizer, options=TRAINED)
        return {"model": model, "optimizer": optimizer} | (
            {} if self.ema is None else {"ema": self.ema}
        )

    def load_tensors(self, tensors: dict[str, Any]) -> None:
        """Take over what was loaded into `tensors()`."""
        # These are the configuration's, which a resume may change, not the checkpoint's.
        for loaded, own in zip(
            tensors["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True
        ):
            loaded.update({key: own[key] for key in ("lr", "betas", "weight_decay")})
        model, optimizer = tensors["model"], tensors["optimizer"]
        set_state_dict(
            self.policy.transformer,
            self.optimizer,
            model_state_dict=model,
            optim_state_dict=optimizer,
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        if self.ema is not None:  # switched on by this resume, the average starts at these weights
            self.ema = tensors["ema"] if "ema" in tensors else self.copy_of_weights()

    def state_dict(self) -> dict[str, Any]:
        """The rest of the state, as JSON. Noise is counter-based: there is no generator to keep."""
        return {
            "prompts_drawn": self.prompts_drawn,
            "skipped_in_a_row": self.skipped_in_a_row,
            "pacer": self.pacer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts_drawn, self.skipped_in_a_row = (
            state["prompts_drawn"],
            state["skipped_in_a_row"],
        )
        self.pacer.load_state_dict(state["pacer"])


def concatenate(lists: Iterable[list[Any]]) -> list[Any]:
    """One list of all the lists' items, in order."""
    return list(itertools.chain.from_iterable(lists))


def mean(values: Sequence[float]) -> float:
    """NaN where there is nothing to average, which is written as null."""
    return math.fsum(values) / len(values) if values else math.nan


def reward_metrics(groups: Sequence[Group], stages: Sequence[str]) -> dict[str, Any]:
    """Metrics of all ranks' groups; the README's glossary says what each is."""
    scored = [[row for row, ok in zip(g.scores_GK, g.valid_G, strict=True) if ok] for g in groups]
    rewards = [
        [r for r, ok in zip(g.rewards_G, g.valid_G, strict=False) if ok]
        for g in groups
        if g.rewards_G
    ]
    metrics: dict[str, Any] = {
        "reward": mean(concatenate(rewards)),
        "reward_std": mean([statistics.stdev(r) for r in rewards]),
    }
    for k, stage in enumerate(stages):
        values = [row[k] for rows in scored for row in rows]
        metrics[f"rewards/{stage}/mean"] = mean(values)
        metrics[f"rewards/{stage}/std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        metrics[f"weights/{stage}"] = mean([g.weights_K[k] for g in groups if g.weights_K])
        metrics[f"hoyer/{stage}"] = mean(
            [hoyer([row[k] for row in rows]) for rows in scored if len(rows) > 1]
        )
    return metrics | {
        "frac_reward_zero_std": sum(bool(g.rewards_G) and not g.advantages for g in groups)
        / len(groups),
        "num_skipped_groups": sum(not g.advantages for g in groups),
        "num_invalid_videos": sum(not ok for g in groups for ok in g.valid_G),
    }


def judge_metrics(ranks: Sequence[tuple[dict[str, int], float]]) -> dict[str, Any]:
    """Metrics of all ranks' judges: what they count, and the longest time that a rank's sampling
    stood still for its judge.
    """
    counts: Counter[str] = Counter()
    for of_rank, _ in ranks:
        counts.update(of_rank)
    return {f"judge/{name}": count for name, count in counts.items()} | {
        "time/backpressure": max(s for _, s in ranks)
    }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """`memory/peak_gb`: the most that torch held on any rank's GPU since the last call, in 1e9
    bytes as in `plan`; none on a CPU.
    """
    if device.type != "cuda":
        return {}
    peak = max(gather(torch.cuda.max_memory_allocated(device)))
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory/peak_gb": peak / 1e9}


def worst(drift: float) -> tuple[bool, float]:
    """Sorting key that puts NaN above every number."""
    return math.isnan(drift), drift


def update_metrics(ranks: Sequence[UpdateStatistics]) -> dict[str, Any]:
    """Metrics of one iteration's optimizer steps over all ranks. The drift is that of the first
    step, before any weight has moved.
    """
    drift: dict[int, float] = {}
    for stats in ranks:
        for step, ratio in list(zip(stats.steps, stats.ratios, strict=True))[: stats.num_first]:
            drift[step] = max(drift.get(step, 0.0), abs(ratio - 1.0), key=worst)
    log_ratios = concatenate(s.log_ratios for s in ranks)
    return {
        "ratio_drift": max(drift.values(), default=math.nan, key=worst),
        **{f"ratio_drift/step_{step:02d}": drift[step] for step in sorted(drift)},
        "clip_ratio": mean(concatenate(s.clipped for s in ranks)),
        "approx_kl": mean([0.5 * x * x for x in log_ratios]),
        "kl": mean(concatenate(s.kl for s in ranks)),
        "loss": mean(concatenate(s.losses for s in ranks)),
        "grad_norm": mean(ranks[0].grad_norms),
        "num_skipped_updates": sum(ranks[0].skipped),
    }
