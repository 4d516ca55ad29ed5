"""A process whose CUDA device is not there, and what its cases report."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

MODULES = Path(__file__).resolve().parent / "modules"


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guard.cpp, compiled against this torch."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the CUDA device that is not there needs a C++ compiler, and there is no g++")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    home = Path(torch.__file__).parent
    includes = [f"-I{home / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", str(MODULES / "guard.cpp"), *includes]
    command += ["-o", str(library), f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture(scope="session")
def fake_gpu(guard: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """fake_gpu(**case): what server.py answers to a case, {"report": ...} or {"error": ...}. A case
    runs once, however many tests ask for it.
    """
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)  # Triton's kernels are not run, only called
    server = subprocess.Popen(
        [sys.executable, str(MODULES / "server.py"), str(guard)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=MODULES.parents[2],
    )

    @functools.cache
    def ask(line: str) -> dict[str, Any]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(line + "\n")
        server.stdin.flush()
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    yield lambda **case: ask(json.dumps(case))
    server.kill()
    server.wait()
