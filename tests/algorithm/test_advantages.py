"""fastgrpo.algorithm.advantages: by hand, against numpy float64, and by properties."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.algorithm.advantages import MIN_REWARD_RANGE, choose_and_shuffle, group_advantages
from fastgrpo.algorithm.self_paced import mix, stage_weights

unit = st.floats(0.0, 1.0)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    """Rewards and validity with 2 to 16 valid videos of a range above 1e-3; invalid ones hold NaN
    or Inf.
    """
    rewards = draw(
        st.lists(unit, min_size=2, max_size=16).filter(
            lambda values: max(values) - min(values) > 1e-3
        )
    )
    num_invalid = draw(st.integers(0, 4))
    valid = draw(st.permutations([True] * len(rewards) + [False] * num_invalid))
    source = iter(rewards)
    return [
        next(source) if ok else draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        for ok in valid
    ], valid


def test_group_advantages_by_hand() -> None:
    # mean 0.5; deviations -0.1, 0, 0.1; sample variance 0.02 / 2 = 0.01, std 0.1 (the population
    # std would be 0.0816)
    assert group_advantages([0.4, 0.5, 0.6], [True] * 3) == pytest.approx(
        {0: -1.0, 1: 0.0, 2: 1.0}, abs=1e-6
    )
    # 1e-8 is added to the std: two videos 2e-6 apart have std sqrt(2)e-6, so 1e-6 / (1.41421e-6 +
    # 1e-8) = 0.702142
    small = group_advantages([0.0, 2e-6], [True, True])
    assert small == pytest.approx({0: -0.702142, 1: 0.702142}, abs=1e-6)


@given(groups())
def test_group_advantages_are_equation_10_over_valid_videos_only(
    case: tuple[list[float], list[bool]],
) -> None:
    rewards, valid = case
    advantages = group_advantages(rewards, valid)
    assert list(advantages) == [video for video, ok in enumerate(valid) if ok]
    kept = np.array([rewards[video] for video in advantages], dtype=np.float64)
    expected = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(list(advantages.values()), expected, rtol=1e-9, atol=1e-9)
    assert math.fsum(advantages.values()) == pytest.approx(0.0, abs=1e-9)
    squares = math.fsum(value**2 for value in advantages.values())
    assert squares == pytest.approx(len(kept) - 1, rel=1e-4)  # unit sample variance


@given(groups(), st.randoms(use_true_random=False))
def test_group_advantages_do_not_depend_on_the_order_of_videos(
    case: tuple[list[float], list[bool]], rng: random.Random
) -> None:
    rewards, valid = case
    order = rng.sample(range(len(rewards)), len(rewards))
    shuffled = group_advantages(
        [rewards[video] for video in order], [valid[video] for video in order]
    )
    assert {order[place]: value for place, value in shuffled.items()} == group_advantages(
        rewards, valid
    )


@given(st.integers(2, 7))
def test_a_few_valid_videos_are_enough(num_valid: int) -> None:
    rewards = [0.1 * video if video < num_valid else math.nan for video in range(16)]
    advantages = group_advantages(rewards, [video < num_valid for video in range(16)])
    assert sorted(choose_and_shuffle(advantages, 4, 4, seed=3)) == list(range(num_valid))


def test_fifteen_equal_scores_in_fp32_are_no_signal() -> None:
    score = np.float32(0.7)
    in_fp32 = np.full(15, score)
    mean = np.float32(0.0)
    for value in in_fp32:
        mean += value / np.float32(15)
    std = np.sqrt(np.sum((in_fp32 - mean) ** 2) / np.float32(14))
    assert (
        abs((score - mean) / (std + np.float32(1e-8))) > 0.5
    )  # what fp32 makes of them: an advantage for every video
    scores = [[float(score)] * 3 for _ in range(15)]
    mixed = mix(scores, stage_weights((0.25, 0.5625, 0.1875), 5.0))
    assert group_advantages(mixed, [True] * 15) == {}
    one_ulp_off = [*in_fp32[:14].tolist(), float(np.nextafter(score, np.float32(1.0)))]
    assert group_advantages(one_ulp_off, [True] * 15) == {}


@pytest.mark.parametrize(
    ("rewards", "valid"),
    [
        ([], []),
        ([0.5], [True]),
        ([0.5, math.nan, math.nan], [True, False, False]),
        ([math.nan, math.nan], [False, False]),
        ([0.0, 0.0, 0.0], [True] * 3),
        ([0.5, 0.9, 0.5], [True, False, True]),
        ([0.0, 0.99 * MIN_REWARD_RANGE], [True, True]),
    ],
)
def test_groups_without_a_signal_are_skipped(rewards: list[float], valid: list[bool]) -> None:
    assert group_advantages(rewards, valid) == {}


def test_the_limit_of_the_signal_is_a_range_of_one_millionth() -> None:
    assert MIN_REWARD_RANGE == 1e-6
    assert set(group_advantages([0.0, 1e-6], [True, True])) == {0, 1}


def test_choose_and_shuffle_by_hand() -> None:
    advantages = {0: 0.3, 1: -1.2, 3: 2.0, 4: 0.1, 5: -0.4, 7: 1.1}  # videos 2 and 6 were not valid
    assert sorted(choose_and_shuffle(advantages, 2, 1, seed=0)) == [1, 3, 7]
    assert sorted(choose_and_shuffle(advantages, 1, 2, seed=0)) == [1, 3, 5]
    assert sorted(choose_and_shuffle(advantages, 2, 0, seed=0)) == [3, 7]
    assert sorted(choose_and_shuffle(advantages, 0, 2, seed=0)) == [1, 5]
    assert sorted(choose_and_shuffle(advantages, 4, 4, seed=0)) == [0, 1, 3, 4, 5, 7]
    assert choose_and_shuffle({}, 4, 4, seed=0) == []
    # Equal advantages: the lower index ranks higher, so of the equal 0, 1, 2, 3 the best is 0 and
    # the worst is 3.
    assert sorted(choose_and_shuffle({3: 0.0, 1: 0.0, 2: 0.0, 0: 0.0}, 1, 1, seed=0)) == [0, 3]
    assert sorted(choose_and_shuffle({0: 1.0, 1: 1.0, 2: -1.0, 3: -1.0}, 1, 1, seed=0)) == [0, 3]


@given(
    st.dictionaries(st.integers(0, 40), st.integers(-3, 3).map(float), max_size=20),
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(0, 2**63),
)
def test_choose_and_shuffle_keeps_both_ends(
    advantages: dict[int, float], num_best: int, num_worst: int, seed: int
) -> None:
    chosen = choose_and_shuffle(advantages, num_best, num_worst, seed)
    assert len(set(chosen)) == len(chosen) == min(len(advantages), num_best + num_worst)
    values = np.sort(list(advantages.values()))
    if len(values) > num_best + num_worst:
        values = np.concatenate([values[:num_worst], values[len(values) - num_best :]])
    assert sorted(advantages[video] for video in chosen) == values.tolist()
    assert (
        choose_and_shuffle(dict(reversed(advantages.items())), num_best, num_worst, seed) == chosen
    )


def test_choose_and_shuffle_order_follows_the_seed() -> None:
    advantages = {video: float(video) for video in range(16)}
    orders = [tuple(choose_and_shuffle(advantages, 4, 4, seed)) for seed in range(800)]
    assert {frozenset(order) for order in orders} == {frozenset([0, 1, 2, 3, 12, 13, 14, 15])}
    assert len(set(orders)) > 700  # of 40,320
    # The best video comes at every place alike: 100 times of 800 expected, standard deviation 9.4.
    places = np.bincount([order.index(15) for order in orders], minlength=8)
    assert places.min() > 55
    assert places.max() < 145
    # Resumed runs and other Pythons must draw the same order: that of seed=0 on CPython 3.11.
    assert orders[0] == (3, 14, 2, 13, 15, 12, 0, 1)
