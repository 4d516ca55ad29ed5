"""How many processes `make train` starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("cores", "has_gpu", "arguments", "expected"),
    [
        (2, False, [], 2),
        (64, False, [], 2),
        (1, False, [], 1),
        (2, True, [], 1),
        (2, False, ["NPROC=1"], 1),
        (1, False, ["NPROC=4"], 4),
        (2, False, ["RECIPE=fastgrpo/recipes/shapes_literal_gate.yaml"], 1),
    ],
)
def test_the_embedded_world_takes_two_cores_where_there_are_two(
    tmp_path: Path, cores: int, has_gpu: bool, arguments: list[str], expected: int
) -> None:
    """Whether coreutils' nproc counts the cores, or macOS' sysctl."""
    make, shell = shutil.which("make"), shutil.which("sh")
    assert make
    assert shell
    for name, answer in (("nproc", cores), ("sysctl", cores)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sh").symlink_to(shell)
        for tool in [name, *["nvidia-smi"] * has_gpu]:
            (folder / tool).write_text(f"#!{shell}\necho {answer}\n")
            (folder / tool).chmod(0o755)
        said = subprocess.run(
            [make, "--dry-run", "train", *arguments],
            cwd=ROOT,
            env=os.environ | {"PATH": str(folder), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert re.findall(r"--nproc-per-node (\d+)", said.stdout) == [str(expected)]
