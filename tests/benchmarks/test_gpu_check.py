"""The plan for a GPU machine: its parts, their limits, what the exit code tells, and every
operation called once.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check, judge, registry, throughput  # noqa: E402


def part(name: str, script: str, seconds: float = 20.0, missing: str = "") -> gpu_check.Part:
    return gpu_check.Part(name, (sys.executable, "-c", script), seconds, missing)


def test_the_plan_builds_tests_watches_and_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = gpu_check.plan(tmp_path, "kernels")
    order = [p.name for p in parts]
    assert order == [
        "build",
        "what serves",
        "every op once",
        "tests",
        "memcheck",
        "racecheck",
        "figures",
        "figures, others",
    ]
    memcheck = parts[order.index("memcheck")]
    assert memcheck.command[-2:] == ("--touch", "cuda")
    assert dict(memcheck.variables) == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert all(str(tmp_path) in p.command for p in parts if p.name.startswith("figures"))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(
        gpu_check.importlib.util,
        "find_spec",
        lambda name: None if name in ("hypothesis", "av") else object(),
    )
    missing = {p.name: p.missing for p in gpu_check.plan(tmp_path)}
    assert missing["memcheck"] == missing["racecheck"] == "compute-sanitizer is not on this machine"
    assert (
        missing["tests"]
        == missing["figures"]
        == "hypothesis missing: carry the wheels (see the top of gpu_check.py)"
    )
    assert missing["14B"] == "av missing: carry the wheels (see the top of gpu_check.py)"
    assert not missing["build"]
    assert gpu_check.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "setup.py build_ext --inplace" in out
    assert "racecheck (at most 90 s): left out" in out


def test_the_generators_are_a_command_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part is a command line that throughput.py takes, which checks G0 of what it measures and
    ends before its limit.
    """
    build, *parts = gpu_check.plan(tmp_path, "throughput")
    assert build.name == "build"
    order = ["1.3B, forward", "1.3B, units", "1.3B, iteration", "14B", "HunyuanVideo"]
    assert [p.name for p in parts] == order
    (_, judging), every = gpu_check.plan(tmp_path, "judge"), gpu_check.plan(tmp_path)
    assert [p.name for p in every] == [
        p.name for p in [*gpu_check.plan(tmp_path, "kernels"), *parts, judging]
    ]
    assert (judge._parse(judging.command[2:]).model, judge._parse(judging.command[2:]).csv) == (
        "qwen2.5-vl-7b",
        tmp_path,
    )
    measured = []
    for p in parts:
        options, overrides = throughput._parse(p.command[2:])
        assert (options.csv, overrides, options.recipe_size) == (tmp_path, [], True)
        assert options.budget < p.seconds
        assert options.parts[0] == "g0"
        measured += [f"{options.model} {name}" for name in options.parts]
    assert {f"wan2.1_t2v_1.3b {name}" for name in throughput.PARTS} < set(measured)
    assert {"wan2.1_t2v_14b train", "hunyuanvideo forward"} < set(measured)
    assert gpu_check.main(["--dry-run", "--only", "throughput"]) == 0
    out = capsys.readouterr().out
    assert "racecheck" not in out
    assert "1.3B, iteration (at most 220 s)" in out


def test_parts_run_in_order_and_the_exit_code_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        part("good", "print('said')"),
        part("bad", "import sys; print('why'); sys.exit(4)"),
        part("after", "pass"),
    ]
    outcomes = gpu_check.run_plan(parts, tmp_path / "out")
    assert [(o.name, o.state) for o in outcomes] == [
        ("good", "right"),
        ("bad", "FAILED"),
        ("after", "right"),
    ]
    assert outcomes[1].words == "exit code 4, see gpu_check.log"
    assert gpu_check.exit_code(outcomes) == 1
    assert gpu_check.exit_code(outcomes[:1]) == 0
    log = (tmp_path / "out" / "gpu_check.log").read_text()
    assert log.index("said") < log.index("why")
    assert "said" in capsys.readouterr().out


def test_a_part_that_cannot_run_or_has_no_time_is_named(tmp_path: Path) -> None:
    outcomes = gpu_check.run_plan(
        [part("absent", "", missing="no tool"), part("here", "pass")], tmp_path
    )
    assert [(o.state, o.words) for o in outcomes] == [("left out", "no tool"), ("right", "")]
    assert gpu_check.exit_code(outcomes) == 3
    assert [o.words for o in gpu_check.run_plan([part("late", "pass")], tmp_path, budget=4.0)] == [
        "the budget of 4 s is spent"
    ]
    unknown = gpu_check.Part("unknown", (str(tmp_path / "nothing"),), 5.0)
    assert gpu_check.run_plan([unknown], tmp_path)[0].state == "FAILED"


def test_a_part_has_its_own_limit_and_what_is_left_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(
        gpu_check,
        "_run",
        lambda part, out, seconds: (
            limits.append(seconds) or gpu_check.Outcome(part.name, "right", 0.0, "")
        ),
    )
    gpu_check.run_plan(
        [part("short", "", seconds=20.0), part("long", "", seconds=100.0)], tmp_path, budget=50.0
    )
    assert limits[0] == 20.0
    assert 40.0 < limits[1] <= 50.0


def test_a_part_beyond_its_limit_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    grandchild = f"import time, pathlib; time.sleep(4); pathlib.Path({str(child)!r}).touch()"
    begin = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}])"
    )
    script = f"{begin}; print('begun', flush=True); time.sleep(60)"
    (outcome,) = gpu_check.run_plan([part("endless", script, seconds=1.5)], tmp_path)
    assert (outcome.state, outcome.words) == ("FAILED", "not done after 2 s")
    assert "begun" in (tmp_path / "gpu_check.log").read_text()
    time.sleep(4)
    assert not child.exists()


def test_every_operation_can_be_called_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the backends of this machine: the C++ path and, interpreted, Triton. A result that is not
    finite is a failure; so is no call.
    """
    assert gpu_check.touch("cpu") == 0
    assert " calls forward and backward, 0 failed" in capsys.readouterr().out
    broken = [
        dataclasses.replace(case, fused=lambda inputs, backend: (torch.tensor([float("nan")]),))
        for case in registry.cases("tiny")[:1]
    ]
    monkeypatch.setattr(registry, "cases", lambda name: broken)
    assert gpu_check.touch("cpu") == 1
    assert "sde_step tiny" in capsys.readouterr().out
    monkeypatch.setattr(registry, "cases", lambda name: [])
    assert gpu_check.touch("cpu") == 1


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 1
    assert "expected a GPU" in capsys.readouterr().out
