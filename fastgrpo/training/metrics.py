"""The metrics of a training step, over all ranks, and the clock behind the times among them."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from fastgrpo.algorithm.self_paced import hoyer
from fastgrpo.distributed.collectives import gather
from fastgrpo.training.trajectory import Group
from fastgrpo.training.update import UpdateStatistics


def mean(values: Sequence[float]) -> float:
    """The mean; NaN, which is logged as null, if there are no values."""
    return math.fsum(values) / len(values) if values else math.nan


def reward_metrics(groups: Sequence[Group], stages: Sequence[str]) -> dict[str, Any]:
    """Metrics of the rewards of all ranks' groups.

    Args:
        groups: Every group of the iteration.
        stages: The K names of the judge's stages.
    """
    # Scores of the valid videos of each group, and mixed rewards of those that were not skipped.
    scored = [[row for row, ok in zip(g.scores_GK, g.valid_G, strict=True) if ok] for g in groups]
    rewards = [
        [reward for reward, ok in zip(g.rewards_G, g.valid_G, strict=True) if ok]
        for g in groups
        if g.rewards_G
    ]
    metrics: dict[str, Any] = {
        "reward": mean([*chain.from_iterable(rewards)]),
        "reward_std": mean([statistics.stdev(group) for group in rewards]),
    }
    for k, stage in enumerate(stages):
        columns = [[row[k] for row in rows] for rows in scored]
        scores = [*chain.from_iterable(columns)]
        metrics[f"rewards/{stage}/mean"] = mean(scores)
        metrics[f"rewards/{stage}/std"] = statistics.stdev(scores) if len(scores) > 1 else math.nan
        metrics[f"weights/{stage}"] = mean([g.weights_K[k] for g in groups if g.weights_K])
        metrics[f"hoyer/{stage}"] = mean([hoyer(column) for column in columns if len(column) > 1])
    no_signal = [bool(g.rewards_G) and not g.advantages for g in groups]
    return metrics | {
        "frac_reward_zero_std": sum(no_signal) / len(groups),
        "num_skipped_groups": sum(not g.advantages for g in groups),
        "num_invalid_videos": sum(not ok for g in groups for ok in g.valid_G),
    }


def judge_metrics(ranks: Sequence[tuple[dict[str, int], float]]) -> dict[str, Any]:
    """Metrics of all ranks' judges.

    Args:
        ranks: Of each rank the judge's counters, which are summed, and the seconds that sampling
            waited for the judge, of which the longest counts: the ranks wait for each other.
    """
    counts: Counter[str] = Counter()
    for counters, _ in ranks:
        counts.update(counters)
    return {f"judge/{name}": count for name, count in counts.items()} | {
        "time/backpressure": max(seconds for _, seconds in ranks)
    }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """`memory/peak_gb`: the most that torch held on any rank's GPU since the last call.

    In 1e9 bytes, as `plan` counts them. Empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    peak = max(gather(torch.cuda.max_memory_allocated(device)))
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory/peak_gb": peak / 1e9}


def worst_ratio_drift(drifts: Sequence[float]) -> float:
    """The largest drift. NaN counts as larger than every number; without drifts it is NaN too."""
    return max(drifts, default=math.nan, key=lambda drift: (math.isnan(drift), drift))


def update_metrics(ranks: Sequence[UpdateStatistics]) -> dict[str, Any]:
    """Metrics of one iteration's optimizer steps over all ranks.

    `ratio_drift` is |ratio - 1| in the first optimizer step, before any weight has moved: it shows
    whether rollout and update compute the same bits.
    """
    drifts: dict[int, list[float]] = defaultdict(list)
    for stats in ranks:
        on_policy = zip(stats.steps[: stats.num_first], stats.ratios, strict=False)
        for step, ratio in on_policy:
            drifts[step].append(abs(ratio - 1.0))

    def over_ranks(name: str) -> list[Any]:
        return [*chain.from_iterable(getattr(stats, name) for stats in ranks)]

    return {
        "ratio_drift": worst_ratio_drift([*chain.from_iterable(drifts.values())]),
        **{f"ratio_drift/step_{i:02d}": worst_ratio_drift(drifts[i]) for i in sorted(drifts)},
        "clip_ratio": mean(over_ranks("clipped")),
        "approx_kl": mean([0.5 * x * x for x in over_ranks("log_ratios")]),
        "kl": mean(over_ranks("kl")),
        "loss": mean(over_ranks("losses")),
        # The same on every rank.
        "grad_norm": mean(ranks[0].grad_norms),
        "num_skipped_updates": sum(ranks[0].skipped),
    }


class Stopwatch:
    """Adds up the seconds spent in named phases.

    A phase waits for the GPU's queued work at its end, so that the work counts where it was asked
    for.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` of each phase, and `step_time` since the start, in seconds."""
        return {f"time/{name}": s for name, s in self.seconds.items()} | {
            "step_time": time.perf_counter() - self.started
        }
