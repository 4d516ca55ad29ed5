"""The ways of starting the trainer, and the run folder of an earlier version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODULES = Path(__file__).resolve().parent / "modules"
RECIPE = ["--config", "fastgrpo/recipes/shapes.yaml"]
MY_REWARD = """
from fastgrpo.shapes.judge import ShapesJudge


class MyReward(ShapesJudge):
    pass
"""


def run_python(argv: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Start a Python that finds the packages as installed ones, behind sys.path[0]."""
    paths = os.pathsep.join(map(str, (MODULES, ROOT, ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        text=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("place", "entry"),
    [
        ("repository", [str(ROOT / "fastgrpo" / "train.py")]),
        ("folder of a user", [str(ROOT / "fastgrpo" / "train.py")]),
        ("folder of a user", ["-m", "fastgrpo.train"]),
    ],
    ids=["repository, path", "user, path", "user, -m"],
)
def test_by_path_and_by_name(entry: list[str], place: str, tmp_path: Path) -> None:
    """Names in the working directory are found, and the package's folders shadow nothing: by path,
    Python would look for `training` and `evaluation` in fastgrpo/ first.
    """
    argv, cwd, words = RECIPE, ROOT, "fastgrpo.shapes.judge.ShapesJudge"
    if place != "repository":
        (tmp_path / "my_reward.py").write_text(MY_REWARD)
        (tmp_path / "training.py").write_text("")
        argv, cwd, words = [*RECIPE, "--reward", "my_reward.MyReward"], tmp_path, "my_reward"
    done = run_python([*entry, *argv, "--print_config"], cwd)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["reward"]["class_path"].startswith(words)


@pytest.mark.parametrize("module", ["fastgrpo.train", "fastgrpo.__main__"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "a"}, {"PYTORCH_ALLOC_CONF": "a"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "b"}, {"PYTORCH_CUDA_ALLOC_CONF": "b"}),
    ],
)
def test_the_allocator_is_told_before_torch_is_loaded(
    module: str, given: dict[str, str], expected: dict[str, str]
) -> None:
    """Unless the user has, by either name that torch reads."""
    script = f"""
import json, os, sys, types
sys.modules["fastgrpo.cli.train"] = types.SimpleNamespace(main=None)
import {module}
assert "torch" not in sys.modules
print(json.dumps({{k: v for k, v in os.environ.items() if "ALLOC_CONF" in k}}))
"""
    own = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    environment = own | given | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    command = [sys.executable, "-c", script]
    printed = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(printed) == expected


REFUSED = """
import json, os, sys
from fastgrpo.__main__ import main

found = []
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        found.append(stop.code)
print(json.dumps([found, sorted({"torch", "numpy", "diffusers"} & {*sys.modules})]))
"""


def test_what_can_be_refused_at_once_is_refused_without_torch(tmp_path: Path) -> None:
    """A name that is taken, a misspelt key, a wrong value, a file that is not there; and help."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    here = ["train", *RECIPE, "--output_dir", str(tmp_path)]
    refused = {
        "holds a run already": ["--name", "run", "--policy.fused", "true", "--reward.noise=0.1"],
        "--rollout.heigth": ["--rollout.heigth", "3"],
        "rollout.height: expected at least 1": ["--rollout.height", "0"],
        "prompts.train: expected a file": ["--prompts.train", "nowhere.txt"],
        "nowhere.yaml": ["--config", "nowhere.yaml"],
    }
    commands = ("train", "plan", "embed", "export", "ablate")
    calls = [[*here, *words] for words in refused.values()] + [[c, "--help"] for c in commands]
    done = run_python(["-c", REFUSED, json.dumps(calls)], ROOT)
    assert done.returncode == 0, done.stderr
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert codes == [2] * len(refused) + [0] * len(commands)
    assert imported == []
    for line, said in zip(done.stderr.splitlines(), refused, strict=True):
        assert said in line


def test_a_users_reward_trains(tmp_path: Path, tiny: Callable[..., list[str]]) -> None:
    (tmp_path / "my_reward.py").write_text(MY_REWARD)
    argv = tiny(tmp_path / "run", "--iterations 1 --reward.class_path my_reward.MyReward")
    done = run_python([str(ROOT / "fastgrpo" / "train.py"), *argv], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "iteration     1" in done.stdout
    assert (tmp_path / "run" / "report" / "report.html").is_file()


def test_a_run_folder_of_an_earlier_version(
    tmp_path: Path, train: Callable[..., Any], start: Callable[..., Any]
) -> None:
    """Its configuration is refused with one line that says what to change; with today's recipe the
    run goes on.
    """
    folder = train(tmp_path / "run", "--iterations 1").folder
    config = folder / "config.yaml"
    for now, then in (
        ("fastgrpo.shapes.policy", "fastgrpo.policies.shapes"),
        ("validation:", "heldout:"),
        ("optimizer_steps: 1", "gradient_accumulation: 4"),
    ):
        assert now in config.read_text()
        config.write_text(config.read_text().replace(now, then))
    refused = start(folder, ["--config", str(config), "--resume auto"])
    assert refused.code == 2
    (line,) = refused.err.splitlines()
    assert "earlier version" in line
    assert "replace fastgrpo.policies.shapes by fastgrpo.shapes.policy" in line
    assert "replace prompts.heldout by prompts.validation" in line
    assert "replace update.gradient_accumulation by update.optimizer_steps" in line
    on = train(folder, "--iterations 2 --resume auto")
    assert on.code == 0
    assert "resume: going on after iteration 1" in on.out
    assert [row["iteration"] for row in on.rows] == [0, 1, 2]
