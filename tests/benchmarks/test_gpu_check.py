"""The plan for a GPU machine: its parts and their limits, what the exit code tells, and every
operation called once.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, iteration, judge
from benchmarks.common import cases


def part(name: str, script: str, seconds: float = 20.0, missing: str = "") -> gpu_check.Part:
    return gpu_check.Part(name, (sys.executable, "-c", script), seconds, missing)


def test_every_part_is_a_command_that_its_script_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generators check G0 of what they measure, and end before their limit."""
    for p in gpu_check.plan(tmp_path, "iteration")[1:]:
        options, overrides = iteration._parse(p.command[2:])
        assert (options.csv, overrides, options.recipe_size) == (tmp_path, [], True)
        assert options.budget < p.seconds
        assert options.parts[0] == "g0"
    _, judging = gpu_check.plan(tmp_path, "judge")
    assert judge._parse(judging.command[2:]).model == "qwen2.5-vl-7b"
    every = gpu_check.plan(tmp_path)
    assert all(Path(p.command[1]).exists() for p in every if p.command[1].startswith("/"))
    assert gpu_check.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(p.name in out for p in every)
    assert "setup.py build_ext --inplace" in out


def test_parts_run_in_order_and_the_exit_code_tells(tmp_path: Path) -> None:
    good, bad = part("good", "print('said')"), part("bad", "print('why'); exit(4)")
    endless = part("endless", "import time; time.sleep(60)", seconds=1.5)
    absent = part("absent", "", missing="no tool")
    outcomes = gpu_check.run_plan([good, bad, endless, absent], tmp_path)
    assert [(o.state, o.note) for o in outcomes] == [
        ("right", ""),
        ("FAILED", "exit code 4, see gpu_check.log"),
        ("FAILED", "not done after 2 s"),
        ("left out", "no tool"),
    ]
    codes = [gpu_check.exit_code(outcomes[i:]) for i in (0, 3)]
    assert (codes, gpu_check.exit_code(outcomes[:1])) == ([1, 3], 0)
    log = (tmp_path / "gpu_check.log").read_text()
    assert log.index("said") < log.index("why")
    (late,) = gpu_check.run_plan([good], tmp_path, budget=4.0)
    assert late.note == "the budget of 4 s is spent"


def test_every_operation_can_be_called_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the backends of this machine. A result that is not finite is a failure."""
    assert gpu_check.touch("cpu") == 0
    assert " calls forward and backward, 0 failed" in capsys.readouterr().out
    nan = (torch.tensor([float("nan")]),)
    broken = dataclasses.replace(cases.cases("tiny")[0], fused=lambda inputs, backend: nan)
    monkeypatch.setattr(cases, "cases", lambda name: [broken])
    assert gpu_check.touch("cpu") == 1
