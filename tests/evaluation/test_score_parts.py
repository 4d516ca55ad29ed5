"""The parts of `score`: the file of rows, reading ahead, the device. The command itself is tested
in tests/rewards/test_score.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastgrpo.evaluation.score import plain_row, read_ahead, select_device
from fastgrpo.evaluation.score_file import identify, judge_hash, open_scores
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.vlm.engine import Clip


def test_a_served_judge_is_the_same_wherever_it_is_and_with_a_server_down() -> None:
    def served(*hosts: str, version: str = "1") -> str:
        engine = {
            "engine": "server",
            "endpoints": ["http://a", "http://b"],
            "servers": {host: {"version": version} for host in hosts},
        }
        return judge_hash({"seed": 0, "engine": {**engine, "endpoints": list(hosts)}})

    assert served("http://a", "http://b") == served("http://b") == served("http://elsewhere:9")
    assert served("http://a") != served("http://a", version="2")


def test_a_name_that_is_not_utf_8_has_its_row_and_is_resumed(tmp_path: Path) -> None:
    name, out = os.fsdecode(b"caf\xe9.mp4"), tmp_path / "s.jsonl"
    with open_scores(out, {"class": "x"}) as (_, add):
        add({"video": name, "prompt": "\u00fc", "error": f"{name}: empty"})
    with open_scores(out, {"class": "x"}) as (rows, _):
        assert rows[name, "\u00fc"]["error"] == f"{name}: empty"
    assert "\u00fc" in out.read_text(encoding="utf-8")


def test_what_cannot_be_identified_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"four")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert identify(str(tmp_path / "a.mp4"), max_bytes=4)["bytes"] == 4
    for name, most in (("a.mp4", 3), ("none.mp4", 9), (".", 9), ("pipe.mp4", 9), ("a\0.mp4", 9)):
        assert identify(str(tmp_path / name), most) == {"bytes": None, "sha256": None}


def test_a_row_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with open_scores(path, {"a": 1}) as (rows, add):
        assert rows == {}
        add({"video": "v", "prompt": "p"})
        add({"video": "v", "prompt": "another"})
        add({"video": "v", "prompt": "p"})
    with (
        pytest.raises(ValueError, match="line 3: expected one row per video and prompt"),
        open_scores(path, {"a": 1}),
    ):
        pass


@pytest.mark.parametrize(
    ("code", "goes_on"), [(errno.ENOLCK, True), (errno.ENOTSUP, True), (errno.EACCES, False)]
)
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, goes_on: bool
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if goes_on:
        with open_scores(tmp_path / "s.jsonl", {}) as (_, add):
            add({"video": "v", "prompt": "p"})
        assert (tmp_path / "s.jsonl").read_text()
        return
    with (
        pytest.raises(ValueError, match="another process is writing"),
        open_scores(tmp_path / "s.jsonl", {}),
    ):
        pass


def test_a_file_that_was_replaced_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.jsonl"
    monkeypatch.setattr(
        fcntl, "flock", lambda *_: (path.unlink(), path.write_text('{"video": "other'))
    )
    with pytest.raises(ValueError, match="one process to write it"), open_scores(path, {}):
        pass
    assert path.read_text() == '{"video": "other'


def test_a_score_that_is_not_a_number_is_none() -> None:
    class Nan(RewardModel):
        stages = ("one",)

        def load(self, device: torch.device) -> None:
            pass

        def score(
            self, frames: torch.Tensor, prompts: Sequence[str], fps: float
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full((1, 1), float("nan"), dtype=torch.float64), torch.ones(
                1, dtype=torch.bool
            )

    row = plain_row(Nan(), Clip(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), 2.0), "a cat")
    assert row == {"error": "the judge gave no score"}


def test_reading_ahead_keeps_the_order_and_its_bound() -> None:
    started, lock = [], threading.Lock()

    def read(item: int) -> int:
        with lock:
            started.append(item)
        time.sleep(0.001 * (item % 3))
        return item * item

    for taken, (item, square) in enumerate(
        read_ahead(range(40), read, threads=3, ahead=4), start=1
    ):
        assert square == item * item == (taken - 1) ** 2
        assert len(started) <= taken + 4
    assert sorted(started) == list(range(40))


def test_a_reader_that_is_left_starts_nothing_more() -> None:
    started: list[int] = []
    ahead = read_ahead(
        range(100), lambda item: (time.sleep(0.01), started.append(item)), threads=1, ahead=8
    )
    next(ahead)
    ahead.close()
    assert len(started) < 10


@pytest.mark.parametrize(
    ("device", "has_gpu", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, has_gpu: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert select_device(device) == torch.device(expected)  # type: ignore[arg-type]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected cuda to be available"):
        select_device("cuda")
