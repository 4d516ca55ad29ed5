"""The stopwatch, against a clock that is moved by hand."""

from __future__ import annotations

import time

import pytest

from fastgrpo.training.timing import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_phases_add_up_and_the_rest_is_in_the_step_alone(clock: list[float]) -> None:
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
    assert watch.metrics() == {
        "time/rollout": 1.25,
        "time/reward": 4.0,
        "time/update": 6.0,
        "step_time": 15.75,
    }
    assert watch.seconds["update"] == 6.0


def test_a_new_stopwatch_starts_at_zero(clock: list[float]) -> None:
    first = Stopwatch()
    with first.phase("rollout"):
        clock[0] += 3.0
    assert Stopwatch().metrics() == {"step_time": 0.0}


def test_real_time_passes() -> None:
    watch = Stopwatch()
    with watch.phase("sleep"):
        time.sleep(0.02)
    assert 0.02 <= watch.metrics()["time/sleep"] <= watch.metrics()["step_time"] < 10


def test_an_error_goes_through() -> None:
    with pytest.raises(KeyError, match="inside"), Stopwatch().phase("update"):
        raise KeyError("inside")
