"""Group-relative advantages (Eq. 10) and best-of-n, for one prompt.

Pure Python float64. The loss clamps the advantages.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

STD_EPSILON = 1e-8
"""Added to the standard deviation in Eq. 10."""

MIN_REWARD_RANGE = 1e-6
"""A group whose rewards lie closer together has no signal: such differences are fp32 rounding."""


def group_advantages(rewards_G: Sequence[float], valid_G: Sequence[bool]) -> dict[int, float]:
    """A_i = (r_i - mean) / (std + 1e-8) over ALL valid videos of a group (Eq. 10).

    The standard deviation is that of a sample (ddof = 1).

    Args:
        rewards_G: Mixed rewards, one per video; those of invalid videos are not read.
        valid_G: Which videos have a score.

    Returns:
        The advantages by index of the video, in rising order. Empty for a group to skip: fewer
        than two valid videos, or max - min below 1e-6.
    """
    pairs = zip(rewards_G, valid_G, strict=True)
    rewards = {index: float(reward) for index, (reward, ok) in enumerate(pairs) if ok}
    values = rewards.values()
    assert all(map(math.isfinite, values)), rewards
    if len(rewards) < 2 or max(values) - min(values) < MIN_REWARD_RANGE:
        return {}
    mean = math.fsum(values) / len(values)
    variance = math.fsum((reward - mean) ** 2 for reward in values) / (len(values) - 1)
    scale = math.sqrt(variance) + STD_EPSILON
    return {index: (reward - mean) / scale for index, reward in rewards.items()}


def choose_and_shuffle(
    advantages: Mapping[int, float], num_best: int, num_worst: int, seed: int
) -> list[int]:
    """The videos to train on: the highest and the lowest advantages, in shuffled order.

    With no more videos than `num_best + num_worst` these are all of them, none twice. Of equal
    advantages the lower index ranks higher. The order depends only on `seed`, so it is the same on
    every machine.

    Args:
        advantages: By index of the video.
        num_best, num_worst: How many of each; not both 0.
        seed: Non-negative.
    """
    ranked = sorted(advantages, key=lambda index: (-advantages[index], index))
    if len(ranked) > num_best + num_worst:
        ranked = ranked[:num_best] + ranked[len(ranked) - num_worst :]
    random.Random(seed).shuffle(ranked)
    return ranked
