"""The metrics of a step by hand, and the stopwatch against a clock that is moved by hand."""

from __future__ import annotations

import math
import statistics
import time

import pytest
import torch

from fastgrpo.algorithm.self_paced import GroupStatistics
from fastgrpo.training.metrics import (
    Stopwatch,
    judge_metrics,
    mean,
    memory_metrics,
    reward_metrics,
    update_metrics,
    worst_ratio_drift,
)
from fastgrpo.training.trajectory import Group
from fastgrpo.training.update import UpdateStatistics

NAN = math.nan


def test_reward_metrics_by_hand() -> None:
    seen = GroupStatistics((0.0, 0.0), (0.0, 0.0))
    usable = Group(
        [[0.2, 0.0], [0.6, 0.0], [9.0, 9.0]],
        [True, True, False],
        seen,
        (0.75, 0.25),
        [0.15, 0.45, NAN],
        {0: -0.7, 1: 0.7},
        [1, 0],
    )
    alike = Group([[0.5, 0.5]] * 3, [True] * 3, seen, (0.25, 0.75), [0.5, 0.5, 0.5])
    alone = Group([[9.0, 9.0], [0.7, 0.1], [9.0, 9.0]], [False, True, False], None)
    got = reward_metrics([usable, alike, alone], ("vq", "ta"))
    vq, ta = [0.2, 0.6, 0.5, 0.5, 0.5, 0.7], [0.0, 0.0, 0.5, 0.5, 0.5, 0.1]
    # Hoyer of (0.2, 0.6): (sqrt 2 - 0.8 / sqrt 0.4) / (sqrt 2 - 1); of equal scores 0, of zeros 0;
    # one score has none.
    hoyer = (math.sqrt(2) - 0.8 / math.sqrt(0.4)) / (math.sqrt(2) - 1)
    expected = {
        "reward": (0.15 + 0.45 + 1.5) / 5,
        "reward_std": (0.3 / math.sqrt(2) + 0.0) / 2,
        "rewards/vq/mean": sum(vq) / 6,
        "rewards/vq/std": statistics.stdev(vq),
        "rewards/ta/mean": sum(ta) / 6,
        "rewards/ta/std": statistics.stdev(ta),
        "weights/vq": 0.5,
        "weights/ta": 0.5,
        "hoyer/vq": hoyer / 2,
        "hoyer/ta": 0.0,
        "frac_reward_zero_std": 1 / 3,
        "num_skipped_groups": 2,
        "num_invalid_videos": 3,
    }
    assert got == pytest.approx(expected, abs=1e-12)


def test_reward_metrics_without_any_score_are_nan_and_not_zero() -> None:
    got = reward_metrics([Group([[1.0], [1.0]], [False, False], None)], ("vq",))
    counted = {"frac_reward_zero_std": 0.0, "num_skipped_groups": 1, "num_invalid_videos": 2}
    assert {k: got[k] for k in counted} == counted
    others = {"reward", "reward_std", "rewards/vq/mean", "rewards/vq/std", "weights/vq", "hoyer/vq"}
    assert got.keys() == counted.keys() | others
    assert all(math.isnan(got[k]) for k in others)
    one = reward_metrics([Group([[0.5]], [True], None)], ("vq",))
    assert (one["rewards/vq/mean"], math.isnan(one["rewards/vq/std"])) == (0.5, True)


def test_update_metrics_by_hand() -> None:
    """The drift is the first optimizer step's alone; everything else is of all steps and ranks."""
    first = UpdateStatistics(
        steps=[0, 3, 0, 3],
        ratios=[1.0, 0.75, 5.0, 7.0],
        log_ratios=[0.0, -0.3, 1.6, 1.9],
        clipped=[False, True, True, True],
        kl=[0.1, 0.2, 0.3, 0.4],
        num_first=2,
        losses=[1.0, 2.0],
        grad_norms=[3.0, 5.0],
        skipped=[False, True],
    )
    second = UpdateStatistics(
        steps=[0, 11],
        ratios=[1.125, 1.0],
        log_ratios=[0.1, 0.0],
        clipped=[False, False],
        kl=[0.0, 0.6],
        num_first=2,
        losses=[6.0, 0.0],
        grad_norms=[3.0, 5.0],
        skipped=[False, True],
    )
    expected = {
        "ratio_drift": 0.25,
        "ratio_drift/step_00": 0.125,
        "ratio_drift/step_03": 0.25,
        "ratio_drift/step_11": 0.0,
        "clip_ratio": 3 / 6,
        "approx_kl": 0.5 * (0.09 + 2.56 + 3.61 + 0.01) / 6,
        "kl": 1.6 / 6,
        "loss": 9.0 / 4,
        "grad_norm": 4.0,
        "num_skipped_updates": 1,
    }
    assert update_metrics([first, second]) == pytest.approx(expected)


@pytest.mark.parametrize("ratios", [[NAN, 1.5], [1.5, NAN]])
def test_a_drift_that_is_nan_is_not_hidden_by_another(ratios: list[float]) -> None:
    for steps in ([2, 2], [2, 3]):
        got = update_metrics([UpdateStatistics(steps=steps, ratios=ratios, num_first=2)])
        assert math.isnan(got["ratio_drift"])
        assert math.isnan(got[f"ratio_drift/step_{steps[ratios.index(NAN)]:02d}"])


def test_the_worst_drift() -> None:
    assert worst_ratio_drift([0.5, NAN, 2.0]) is NAN
    assert worst_ratio_drift([0.5, 2.0, 0.0]) == 2.0
    assert math.isnan(worst_ratio_drift([]))


def test_no_update_is_nan_and_none_skipped() -> None:
    got = update_metrics([UpdateStatistics(), UpdateStatistics()])
    assert got.pop("num_skipped_updates") == 0
    assert got.keys() == {"ratio_drift", "clip_ratio", "approx_kl", "kl", "loss", "grad_norm"}
    assert all(math.isnan(value) for value in got.values())


def test_mean() -> None:
    assert mean([0.1] * 10) == 0.1  # rounded once
    assert math.isnan(mean([]))


def test_what_the_judges_of_all_ranks_count() -> None:
    """Counts are summed, 0 among them; of the times that sampling stood still the longest, since
    the ranks wait for each other.
    """
    ranks = [
        ({"answers": 24, "no_number": 0}, 0.5),
        ({"answers": 21, "no_number": 0, "requests": 7}, 2.0),
    ]
    assert judge_metrics(ranks) == {
        "judge/answers": 45,
        "judge/no_number": 0,
        "judge/requests": 7,
        "time/backpressure": 2.0,
    }
    assert judge_metrics([({}, 0.0)]) == {"time/backpressure": 0.0}


def test_memory_is_of_the_rank_that_takes_most_and_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert memory_metrics(torch.device("cpu")) == {}
    reset = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr("fastgrpo.training.metrics.gather", lambda value: [value, 2 * value, 0])
    assert memory_metrics(torch.device("cuda", 1)) == {"memory/peak_gb": 6.0}
    assert reset == [torch.device("cuda", 1)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_phases_add_up_and_the_rest_is_only_in_the_step(clock: list[float]) -> None:
    watch = Stopwatch()
    clock[0] += 0.5
    for seconds in (1.0, 0.25):
        with watch.phase("rollout"):
            clock[0] += seconds
    with watch.phase("update"):
        clock[0] += 2.0
        with watch.phase("reward"):
            clock[0] += 4.0
    clock[0] += 8.0
    expected = {"time/rollout": 1.25, "time/reward": 4.0, "time/update": 6.0, "step_time": 15.75}
    assert watch.metrics() == expected
    assert watch.seconds["update"] == 6.0
    assert Stopwatch().metrics() == {"step_time": 0.0}


def test_real_time_passes_and_an_error_goes_through() -> None:
    watch = Stopwatch()
    with watch.phase("sleep"):
        time.sleep(0.02)
    assert 0.02 <= watch.metrics()["time/sleep"] <= watch.metrics()["step_time"] < 10
    with pytest.raises(KeyError, match="inside"), watch.phase("update"):
        raise KeyError("inside")
