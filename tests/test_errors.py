"""The one wording of an error, and the one way to end a command."""

from __future__ import annotations

import time

import pytest

from fastgrpo.errors import UserError, fail, one_line, require


def test_fail_speaks_once_a_node_and_ends_with_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent rank ends later: torchrun would end the one that speaks with it."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for rank, local, expected in (
        ("0", "0", "error: what is wrong\n"),
        ("1", "1", ""),
        ("8", "0", "error on rank 8: what is wrong\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit) as stop:
            fail("what is wrong")
        assert stop.value.code == 2
        assert capsys.readouterr().err == expected
        assert bool(waits) == (not expected)
        waits.clear()


def test_require_names_key_expectation_and_value() -> None:
    require(True, "a.b", "at least 1", 0)
    with pytest.raises(UserError, match=r"^a\.b: expected at least 1, got '0'$"):
        require(False, "a.b", "at least 1", "0")


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (OSError(28, "No space left on device", "x"), "no space left on device: x"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("x" * 10**6), "x" * 4000 + "…"),
        (Mute(), "(its message cannot be shown: RuntimeError)"),
    ],
)
def test_any_error_is_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
