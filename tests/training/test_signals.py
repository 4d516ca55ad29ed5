"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from fastgrpo.training import signals
from fastgrpo.training.signals import PATIENCE, StopRequest, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_a_request_and_a_second_one_changes_nothing(
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    # Tests that were started by nohup would ignore SIGHUP.
    request.addfinalizer(partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert stop.requested is False
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert stop.requested is True
        assert not stop.must_abort_rollout(), "the rollout is finished first"
        monkeypatch.setattr(signals, "PATIENCE", -1.0)
        assert stop.must_abort_rollout()
    assert signal.getsignal(number) is before
    assert capsys.readouterr().out.count(number.name) == 1
    with stop_on_signals() as again:
        assert again.requested is False
        assert not again.must_abort_rollout()


def test_signals_are_given_back_after_an_error() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), stop_on_signals():
        raise KeyError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    code = (
        "import os, signal\n"
        "from fastgrpo.training.signals import stop_on_signals\n"
        "with stop_on_signals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(stop.requested)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.requested)\n"
    )
    done = subprocess.run(
        ["nohup", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]


def test_the_first_signal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: a second signal does not restart the patience."""
    now = 1000.0
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now))
    stop = StopRequest()
    assert not stop.must_abort_rollout()
    stop.receive(signal.SIGTERM, None)
    now += PATIENCE
    assert stop.requested
    assert not stop.must_abort_rollout()
    stop.receive(signal.SIGINT, None)
    now += 0.01
    assert stop.must_abort_rollout()
