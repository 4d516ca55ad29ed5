"""Group-relative advantages (Eq. 10) and best-of-n, for one prompt. Pure Python float64; the loss
does the clamping.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

STD_EPSILON = 1e-8
"""Added to the standard deviation in Eq. 10."""

MIN_REWARD_RANGE = 1e-6
"""A group whose rewards lie closer together than this has no signal: what fp32 scores differ by
there is rounding.
"""


def group_advantages(rewards_G: Sequence[float], valid_G: Sequence[bool]) -> dict[int, float]:
    """A_i = (r_i - mean) / (std + 1e-8) with the sample std (ddof = 1), over ALL valid videos of a
    group (Eq. 10).

    Args:
        rewards_G: mixed rewards, one a video; those of invalid videos are not read (NaN is fine
            there). valid_G: which videos could be scored.

    Returns:
        advantage by video index, in rising order of index. Empty for a group to skip: fewer than
        two valid videos, or max - min below 1e-6.

    Raises:
        ValueError: the lengths differ, or a valid video has a NaN or Inf reward.
    """
    if len(rewards_G) != len(valid_G):
        raise ValueError(
            f"expected one validity flag for each of {len(rewards_G)} rewards, got {len(valid_G)}"
        )
    rewards = {video: float(reward) for video, reward in enumerate(rewards_G) if valid_G[video]}
    for video, reward in rewards.items():
        if not math.isfinite(reward):
            raise ValueError(f"expected a finite reward for the valid video {video}, got {reward}")
    if len(rewards) < 2 or max(rewards.values()) - min(rewards.values()) < MIN_REWARD_RANGE:
        return {}
    mean = math.fsum(rewards.values()) / len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards.values()) / (len(rewards) - 1)
    scale = math.sqrt(variance) + STD_EPSILON
    return {video: (reward - mean) / scale for video, reward in rewards.items()}


def best_of_n(
    advantages: Mapping[int, float], num_best: int, num_worst: int, seed: int
) -> list[int]:
    """The videos to train on: the `num_best` highest and `num_worst` lowest advantages, in shuffled
    order, none twice.

    With no more videos than `num_best + num_worst`, all of them. Of equal advantages the lower
    index ranks higher. The same `seed` (a non-negative integer) gives the same order on every
    machine, whatever the order of the mapping. ValueError for negative counts, and for counts
    that would train nothing.
    """
    if num_best < 0 or num_worst < 0 or num_best + num_worst == 0:
        raise ValueError(
            f"expected num_best and num_worst of at least 0, not both 0, got {num_best} and {num_worst}"
        )
    ranked = sorted(advantages, key=lambda video: (-advantages[video], video))
    if len(ranked) > num_best + num_worst:
        ranked = ranked[:num_best] + ranked[len(ranked) - num_worst :]
    random.Random(seed).shuffle(ranked)
    return ranked
