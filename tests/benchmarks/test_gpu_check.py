"""The plan for a GPU machine: its parts and their limits, what a second start does, what the exit
code tells, and every operation called once.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, iteration, judge, ops
from benchmarks.common import cases


def part(name: str, script: str, seconds: float = 20.0, **values: Any) -> gpu_check.Part:
    given = {"least": 0.0} | values
    return gpu_check.Part(name, (sys.executable, "-c", script), seconds, **given)


@pytest.mark.parametrize("tiny", [False, True])
def test_every_part_is_a_command_that_its_script_takes(tmp_path: Path, tiny: bool) -> None:
    """The generators check G0 of what they measure, and end before their limit."""
    parts = {p.name: p for p in gpu_check.plan(tmp_path, tiny)}
    scripts = {name: Path(p.command[1]).name for name, p in parts.items()}
    models = [name for name, script in scripts.items() if script == "iteration.py"]
    assert models == ["g0", "forward", "train", "decode", "iteration", "14b", "hunyuan"]
    for name in models:
        options, overrides = iteration._parse(parts[name].command[2:])
        assert (options.csv, options.recipe_size) == (tmp_path, not tiny)
        assert tiny or overrides == []  # a tiny video's size is among them
        assert options.budget < parts[name].seconds
        assert options.parts[0] == ("decode" if name == "decode" else "g0")
        assert options.device == ("cpu" if tiny else "cuda")
    for name in ("ops", "ops_others"):
        chosen = ops._parse(parts[name].command[2:])
        assert chosen.csv == tmp_path
        assert chosen.budget < parts[name].seconds
    chosen = judge._parse(parts["judge"].command[2:])
    assert chosen.model == ("tiny" if tiny else "qwen2.5-vl-7b")
    for p in parts.values():
        assert not p.command[1].startswith("/") or Path(p.command[1]).exists()
        assert p.least <= p.seconds


def test_the_plan_is_ordered_by_worth_and_fits_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G0 before all that is compared; two commands of ten minutes hold what is asked of 15."""
    monkeypatch.setattr(gpu_check, "_missing", lambda *packages: "")
    parts = gpu_check.plan(tmp_path)
    names = [p.name for p in parts]
    order = ["g0", "memcheck", "ops", "forward", "train", "decode", "judge", "iteration", "14b"]
    assert [name for name in names if name in order] == order
    assert names[0] == "build"
    assert [p.name for p in parts if not p.is_kept] == ["build"]
    assert sum(p.least for p in parts[: names.index("iteration") + 1]) <= 900 - 120


def test_parts_run_in_order_and_the_exit_code_tells(tmp_path: Path) -> None:
    good, bad = part("good", "print('said')"), part("bad", "print('why'); exit(4)")
    endless = part("endless", "import time; time.sleep(60)", seconds=1.5)
    absent = part("absent", "", missing="no tool")
    outcomes = gpu_check.run_plan([good, bad, endless, absent], tmp_path)
    assert [(o.state, o.note) for o in outcomes] == [
        ("right", ""),
        ("FAILED", "exit code 4, see gpu_check.log"),
        ("cut off", "not done after 2 s"),
        ("left out", "no tool"),
    ]
    codes = [gpu_check.exit_code(outcomes[i : i + 1]) for i in range(4)]
    assert codes == [0, 1, 3, 3]
    assert gpu_check.exit_code(outcomes) == 1
    log = (tmp_path / "gpu_check.log").read_text()
    assert log.index("said") < log.index("why")


def test_a_part_begins_only_with_the_seconds_that_it_needs(tmp_path: Path) -> None:
    """A later, shorter one may still fit."""
    long, short = part("long", "print(1)", least=50.0), part("short", "print(2)", least=1.0)
    outcomes = gpu_check.run_plan([long, short], tmp_path, budget=40.0)
    assert [o.state for o in outcomes] == ["left out", "right"]
    assert outcomes[0].note == "40 of 50 s are left"


def test_another_start_goes_on_with_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The build again, then what was not begun, last what failed; with all right, nothing."""
    folder, back = tmp_path / "gpu_check", tmp_path / "out"
    back.mkdir()
    ready = tmp_path / "ready"
    script = f"import pathlib, sys; sys.exit(not pathlib.Path({str(ready)!r}).exists())"
    parts = [
        part("build", "print('built')", is_kept=False),
        part("right", "print('a number')"),
        part("red", script),
        part("late", "print('another')", least=30.0),
    ]
    monkeypatch.setattr(gpu_check, "plan", lambda out, tiny: parts)
    monkeypatch.setattr(gpu_check, "FOLDER", folder)
    monkeypatch.setenv("OUT", str(back))
    monkeypatch.setenv("FASTGRPO_COMMIT", "abc1234")

    def start(*options: str) -> tuple[int, list[tuple[str, str]]]:
        code = gpu_check.main(["--tiny", *options])
        lines = capsys.readouterr().out.splitlines()
        begun = [line.split()[1].rstrip(":") for line in lines if line.startswith("===")]
        table = [line.split()[:2] for line in lines[-len(parts) :] if len(line.split()) > 1]
        return code, [*((name, "begun") for name in begun), *((a, b) for a, b in table)]

    code, seen = start("--budget", "25")
    assert code == 1
    assert [name for name, what in seen if what == "begun"] == ["build", "right", "red"]
    assert ("late", "left") in seen
    assert {p.name for p in back.iterdir()} == {"state.json", "gpu_check.log"}
    state = gpu_check.read_state(back)
    assert (state["right"].commit, state["red"].state) == ("abc1234", "FAILED")
    ready.touch()
    code, seen = start()
    assert code == 0
    assert [name for name, what in seen if what == "begun"] == ["build", "late", "red"]
    assert ("right", "right") in seen  # from the start before
    assert start() == (0, [(p.name, "right") for p in parts])
    assert start("--only", "red")[1][:2] == [("build", "begun"), ("red", "begun")]
    assert gpu_check.main(["--tiny", "--dry-run"]) == 0
    assert capsys.readouterr().out == "nothing is left\n"
    # On a GPU nothing of it is done yet.
    assert gpu_check.main(["--dry-run"]) == 0
    assert "right (at most 20 s" in capsys.readouterr().out
    assert gpu_check.main(["--tiny", "--dry-run", "--fresh"]) == 0
    assert "late (at most 20 s, from 30 s on)" in capsys.readouterr().out
    assert gpu_check.main(["--tiny", "--only", "blue"]) == 2
    assert "--only: expected names of build, right, red, late, got blue" in capsys.readouterr().err


def test_a_start_that_is_killed_leaves_what_it_had(tmp_path: Path) -> None:
    """The part that ran counts as cut off, and comes last at the next start."""
    script = (
        "import os, sys, pathlib; from benchmarks import gpu_check as g; out = pathlib.Path({!r})\n"
        "one = g.Part('one', (sys.executable, '-c', ''), 20, 0)\n"
        "kill = g.Part('kill', (sys.executable, '-c', 'import os; os.kill({}, 9)'), 20, 0)\n"
        "g.run_plan([one, kill], out)"
    ).format(str(tmp_path), "os.getppid()")
    done = subprocess.run([sys.executable, "-c", script], cwd=gpu_check.ROOT, check=False)
    assert done.returncode == -9
    state = gpu_check.read_state(tmp_path)
    assert {name: o.state for name, o in state.items()} == {"one": "right", "kill": "cut off"}
    todo = [part(name, "") for name in ("one", "kill", "new")]
    assert [p.name for p in gpu_check.in_order(todo, state)] == ["new", "kill"]
    (tmp_path / "state.json").write_text("[{")
    assert gpu_check.read_state(tmp_path) == {}


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
