"""A process whose CUDA device is not there: loads the guard before torch, then runs a case per line
of its input, each in a fork of its own.

    python server.py GUARD.so       {"name": ..., ...} -> {"report": ...} or {"error": ...}
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

PRELOADED = (
    "judge_call",
    "trainer_step",
    "diffusers.optimization",
    "fastgrpo.policies.hunyuan_video",
    "fastgrpo.policies.wan",
    "fastgrpo.shapes.judge",
    "peft",
)
"""Imported once, before the forks: the cases, and what the recipes name."""


def load_guard(guard: str) -> None:
    """Load torch's libraries and the guard before Python's side of torch asks for its devices."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    libraries = Path(spec.origin).parent / "lib"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(libraries / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(guard, ctypes.RTLD_GLOBAL)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """What the case's function reports, or the error that ended it."""
    import judge_call
    import trainer_step

    kinds = {"step": trainer_step.run, "judge": judge_call.run}
    try:
        return {"report": kinds[case.pop("kind", "step")](**case)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def main() -> None:
    load_guard(sys.argv[1])
    root = Path(__file__).resolve().parents[3]
    sys.path[:0] = [str(root), str(root / "kernels"), str(Path(__file__).parent)]
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer

    import torch

    torch.set_num_threads(1)
    import fake_cuda

    fake_cuda.install()
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answers.write(json.dumps(run(json.loads(line))) + "\n")
            answers.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            answers.write(json.dumps({"error": f"the case's process ended with {status}"}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
